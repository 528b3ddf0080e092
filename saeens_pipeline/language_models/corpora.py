"""Opens the corpus that a source's settings describe."""

from __future__ import annotations

from saeens_pipeline.language_models.documents import Corpus
from saeens_pipeline.language_models.hub_datasets import HubCorpus
from saeens_pipeline.language_models.installed_packages import InstalledPackages
from saeens_pipeline.language_models.text_files import TextFileCorpus
from saeens_pipeline.settings.corpora import BUILTIN_CORPUS, HubDataset, TextFiles


def open_corpus(settings: str | TextFiles | HubDataset) -> Corpus:
    """Return the corpus of `settings`. Reads nothing yet."""
    match settings:
        case TextFiles():
            return TextFileCorpus(settings)
        case HubDataset():
            return HubCorpus(settings)
        case _:
            assert settings == BUILTIN_CORPUS, "checked where the source is read"
            return InstalledPackages()
