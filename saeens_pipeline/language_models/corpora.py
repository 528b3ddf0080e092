"""Opening of the corpus in the settings of a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, overload

from saeens_pipeline.language_models.chat_templates import ChatTemplate
from saeens_pipeline.language_models.documents import Corpus
from saeens_pipeline.language_models.hub_datasets import HubCorpus
from saeens_pipeline.language_models.installed_packages import InstalledPackages
from saeens_pipeline.language_models.installed_prose import InstalledProse
from saeens_pipeline.language_models.mixtures import MixedCorpus, Part
from saeens_pipeline.language_models.pinned_packages import PinnedPackages
from saeens_pipeline.language_models.text_files import TextFileCorpus
from saeens_pipeline.settings.corpora import HubDataset, SingleCorpus, TextFiles, corpus_name, shares_of
from saeens_pipeline.storage.root import data_root


@overload
def open_corpus(settings: SingleCorpus, template: ChatTemplate | None = None) -> Corpus: ...
@overload
def open_corpus(settings: SingleCorpus | Sequence[SingleCorpus], template: ChatTemplate | None = None) -> Corpus | MixedCorpus: ...
def open_corpus(settings: SingleCorpus | Sequence[SingleCorpus], template: ChatTemplate | None = None) -> Corpus | MixedCorpus:
    """Return the corpus of `settings`, without reading it.

    template: for reading documents of corpora with `messages_field`.
    """
    if not isinstance(settings, list):
        return _open_one(cast("SingleCorpus", settings), template)
    entries = cast("list[SingleCorpus]", settings)
    shares = shares_of(entries).items()
    parts = [Part(name, share, _open_one(entry, template)) for entry, (name, share) in zip(entries, shares, strict=True)]
    return MixedCorpus(corpus_name(entries), parts)


def _open_one(settings: SingleCorpus, template: ChatTemplate | None) -> Corpus:
    match settings:
        case TextFiles():
            return TextFileCorpus(settings, template=template)
        case HubDataset():
            return HubCorpus(settings, template=template)
        case _:
            packages = {each.name: each for each in (InstalledPackages, InstalledProse)}
            return PinnedPackages(data_root(), packages[str(settings)])
