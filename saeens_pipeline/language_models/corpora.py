"""Opening of the corpus in the settings of a source."""

from __future__ import annotations

from saeens_pipeline.language_models.documents import Corpus
from saeens_pipeline.language_models.hub_datasets import HubCorpus
from saeens_pipeline.language_models.installed_packages import InstalledPackages
from saeens_pipeline.language_models.installed_prose import InstalledProse
from saeens_pipeline.language_models.pinned_packages import PinnedPackages
from saeens_pipeline.language_models.text_files import TextFileCorpus
from saeens_pipeline.settings.corpora import HubDataset, TextFiles
from saeens_pipeline.storage.root import data_root


def open_corpus(settings: str | TextFiles | HubDataset) -> Corpus:
    """Return the corpus of `settings`, without reading it."""
    match settings:
        case TextFiles():
            return TextFileCorpus(settings)
        case HubDataset():
            return HubCorpus(settings)
        case _:
            packages = {each.name: each for each in (InstalledPackages, InstalledProse)}
            return PinnedPackages(data_root(), packages[settings])
