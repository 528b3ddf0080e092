"""Specialised bagging members: the activations of documents with some labels."""

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
    """Raise ConfigurationError, with the known labels, if a member is to be trained on a label that no document has."""
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
    """Open the training rows of the documents with these labels. Raises SaeensError for activations made from other tokens."""
    from saeens_pipeline.language_models.tokens import open_tokens
    from saeens_pipeline.storage.selection import SelectedDocuments

    tokens = store.require(tokens_of(source).address, Partition())
    if activations.recipe["inputs"]["tokens"] != tokens.data_version:  # the numbers of documents differ
        raise SaeensError(f"{activations.path} was made from tokens of {source} that have changed since: make the activations again")
    return SelectedDocuments(ActivationStore(activations.path), "train", open_tokens(tokens.path).documents_with("train", labels))
