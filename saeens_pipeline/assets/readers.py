"""Readers of activations and of residuals, whose bytes may be dropped."""

from __future__ import annotations

import saeens_models as sm
from saeens_pipeline.assets.declarations import Declaration, Reference
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.activations import ActivationReader, ActivationStore
from saeens_pipeline.storage.names import Partition, place
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.residuals import ResidualView


def open_reader(store: Store, given: Reference, partition: Partition, device: str = "cpu") -> ActivationReader:
    """Open activations or a residual. A residual without bytes is computed from its nearest stored ancestor.

    Raises SaeensError if such a residual was computed from other activations, or by another round, than the present ones.
    """
    artefact = given.require(store, partition)
    if artefact.files or not isinstance(given, Declaration):
        return ActivationStore(artefact.path)
    inputs = {each.name: each.artefact for each in given.inputs}
    view = residual_view(store, inputs["activations"], inputs["round"], partition, device)
    for name, each in inputs.items():  # now that they are open
        if each.require(store, partition).data_version != artefact.recipe["inputs"][name]:
            raise SaeensError(f"{each.address} has changed since {place(given.address, partition)} was computed: compute that again first")
    return view


def residual_view(store: Store, activations: Reference, boosting_round: Reference, partition: Partition, device: str) -> ResidualView:
    """Open a residual that is computed while it is read: `activations`, or an earlier residual, minus its reconstruction by a round."""
    sae = sm.load_sae(boosting_round.require(store, partition).path).to(device)
    origin = open_reader(store, activations, partition, device)
    return ResidualView(origin, [lambda r: (r.to(device) - sae(r.to(device))).cpu()], name=str(boosting_round.address))
