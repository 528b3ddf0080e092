"""Opening of the corpus in the settings of a source."""

from __future__ import annotations

from saeens_pipeline.language_models.documents import Corpus
from saeens_pipeline.language_models.hub_datasets import HubCorpus
from saeens_pipeline.language_models.pinned_packages import PinnedPackages
from saeens_pipeline.language_models.text_files import TextFileCorpus
from saeens_pipeline.settings.corpora import BUILTIN_CORPUS, HubDataset, TextFiles
from saeens_pipeline.storage.root import data_root


def open_corpus(settings: str | TextFiles | HubDataset) -> Corpus:
    """Return the corpus of `settings`, without reading it."""
    match settings:
        case TextFiles():
            return TextFileCorpus(settings)
        case HubDataset():
            return HubCorpus(settings)
        case _:
            assert settings == BUILTIN_CORPUS, "the settings of the source allow no other name"
            return PinnedPackages(data_root())
