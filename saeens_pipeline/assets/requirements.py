"""What the tables of an experiment need, looked at before an SAE of it is trained: what fails after hours could be known before."""

from __future__ import annotations

from saeens_pipeline.assets.sources import activations_of, language_model_of, tokens_of
from saeens_pipeline.assets.specialised import require_labels
from saeens_pipeline.assets.tables.evaluation import validate_ce_loss
from saeens_pipeline.assets.tables.probing import PROBED, validate_labelled_texts
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import has_table


def require_what_tables_need(store: Store, experiment: ExperimentSettings, partition: Partition, *, texts: bool) -> None:
    """Raise ConfigurationError or SaeensError, with what is there and what is needed, where a table that is not there yet would fail.

    `saeens run` has looked at all of this before its first stage; a run that the UI or a schedule started has not. `texts`: also at
    labelled texts. To read them takes seconds, in every process anew.
    """
    require_labels(store, experiment)
    to_come = {table for table in experiment.evaluations if not has_table(store.root, experiment.name, table, partition.layer)}
    loss_is_asked_for = experiment.ce_loss_tokens and "ce_loss_tokens" in experiment.model_fields_set and "reconstruction" in to_come
    probed = [table for table in PROBED if texts and table in to_come]
    activations = store.find(activations_of(experiment.source).address, Partition(partition.layer))
    if activations is None or not (loss_is_asked_for or probed):
        return
    model = language_model_of(activations)
    validate_ce_loss(experiment, model, activations.recipe["settings"]["hook"])
    tokens = store.require(tokens_of(experiment.source).address, Partition())
    validate_labelled_texts(experiment, probed, model, tokens.recipe["settings"]["drop"])
