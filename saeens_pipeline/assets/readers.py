"""Readers of activations and of residuals, whose bytes may be dropped."""

from __future__ import annotations

import saeens_models as sm
from saeens_pipeline.assets.declarations import Declaration, Reference
from saeens_pipeline.assets.sources import language_model_of, tokens_of
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.tokens import open_tokens
from saeens_pipeline.storage.activations import ActivationReader, ActivationStore
from saeens_pipeline.storage.names import Partition, place
from saeens_pipeline.storage.recipes import Artefact, Store
from saeens_pipeline.storage.residuals import ResidualView
from saeens_pipeline.storage.rolling_cache import activation_cache


def open_reader(store: Store, given: Reference, partition: Partition, device: str = "cpu") -> ActivationReader:
    """Open activations or a residual. A residual without bytes is computed from its nearest stored ancestor.

    Raises SaeensError if such a residual was computed from other activations, or by another round, than the present ones.
    """
    if given.address.kind == "source":
        return open_activations(store, given, partition, device)
    artefact = given.require(store, partition)
    if artefact.files or not isinstance(given, Declaration):
        return ActivationStore(artefact.path)
    inputs = {each.name: each.artefact for each in given.inputs}
    view = residual_view(store, inputs["activations"], inputs["round"], partition, device)
    for name, each in inputs.items():  # now that they are open
        if each.require(store, partition).data_version != artefact.recipe["inputs"][name]:
            raise SaeensError(f"{each.address} has changed since {place(given.address, partition)} was computed: compute that again first")
    return view


def open_activations(store: Store, activations: Reference, partition: Partition, device: str = "cpu") -> ActivationStore:
    """Open the activations of a source in the layer of `partition`.

    Training rows without bytes are computed from tokens, by the language model, when they are read.

    Raises SaeensError for activations of other tokens, and if the files of the language model have changed.
    """
    artefact = activations.require(store, partition)
    opened = ActivationStore(artefact.path)
    if opened.has_bytes("train"):
        return opened
    from saeens_pipeline.language_models.loading import load_language_model
    from saeens_pipeline.language_models.on_demand import ActivationsOnDemand

    assert partition.layer is not None, "activations are partitioned by layer"
    source = activations.address.owner
    settings, tokens = artefact.recipe["settings"], tokens_of_activations(store, source, artefact)
    dtype = settings.get("language_model_dtype", "float32")
    model = load_language_model(language_model_of(artefact), settings["weights"], device, dtype)
    cache = activation_cache(store.root, f"{source}_{partition.layer}_{artefact.data_version}")
    return ActivationsOnDemand(artefact.path, open_tokens(tokens.path), model, (settings["hook"], partition.layer), cache)


def tokens_of_activations(store: Store, source: str, activations: Artefact) -> Artefact:
    """Return the tokens of activations. Raises SaeensError if they have changed since."""
    tokens = tokens_of(source).require(store, Partition())
    if activations.recipe["inputs"]["tokens"] != tokens.data_version:  # the numbers of documents differ
        raise SaeensError(f"{activations.path} was computed from tokens of {source} that have changed since: compute the activations again")
    return tokens


def residual_view(store: Store, activations: Reference, boosting_round: Reference, partition: Partition, device: str) -> ResidualView:
    """Open a residual that is computed while it is read: `activations`, or an earlier residual, minus its reconstruction by a round."""
    sae = sm.load_sae(boosting_round.require(store, partition).path).to(device)
    origin = open_reader(store, activations, partition, device)
    return ResidualView(origin, [lambda r: (r.to(device) - sae(r.to(device))).cpu()], name=str(boosting_round.address))
