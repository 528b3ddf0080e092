"""Bagging members that see a part of the corpus: the rows of documents with some labels, out of the activations of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from saeens_pipeline.assets.sources import tokens_of
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.activations import ActivationStore
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Artefact, Store

if TYPE_CHECKING:
    from saeens_pipeline.storage.selection import SelectedDocuments


def require_labels(store: Store, experiment: ExperimentSettings) -> None:
    """Raise ConfigurationError, with the labels that there are, where a member of the experiment asks for one that no document has."""
    from saeens_pipeline.language_models.tokens import open_tokens

    asking = [each for each in experiment.ensemble.specialised if each.documents]
    if not asking:
        return
    tokens = open_tokens(store.require(tokens_of(experiment.source).address, Partition()).path)
    for each in asking:
        try:
            tokens.documents_with("train", each.documents)
        except ConfigurationError as error:
            raise ConfigurationError(f"{experiment.name}: ensemble.specialised, member {each.member}, documents: {error}") from None


def open_documents(store: Store, activations: Artefact, source: str, labels: Mapping[str, Sequence[str]]) -> SelectedDocuments:
    """The training rows of the documents with these labels, for reading."""
    from saeens_pipeline.language_models.tokens import open_tokens
    from saeens_pipeline.storage.selection import SelectedDocuments

    tokens = store.require(tokens_of(source).address, Partition())
    if activations.recipe["inputs"]["tokens"] != tokens.data_version:  # whose documents have other numbers
        raise SaeensError(f"{activations.path} was made from other tokens than those of {source} now: make the activations again")
    return SelectedDocuments(ActivationStore(activations.path), "train", open_tokens(tokens.path).documents_with("train", labels))
