"""Loading of published SAEs: their files, their checks against the activations, and the artefact."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import saeens_models as sm
from saeens_models import SAE
from saeens_models.interop import InputScaleMissingError, load
from saeens_pipeline.assets.declarations import RunContext, Task
from saeens_pipeline.assets.sources import activations_of, sae_metadata
from saeens_pipeline.storage.activations import ActivationStatistics
from saeens_pipeline.storage.disk import require_free_disk

_LAYER = re.compile(r"\b(?:layers?|blocks|h)[._](\d+)")  # in names of modules, such as layers.3.mlp


def load_published(place: str, input_scale: float | None = None) -> SAE:
    """Load the SAE at a place; `input_scale` is for weights that take scaled activations.

    Raises as `saeens_models.interop.load`, and ValueError for an ensemble.
    """
    try:
        found = load(place)
    except InputScaleMissingError:
        found = load(place, input_scale=input_scale or 1.0)
    if not isinstance(found, SAE):
        raise ValueError(f"{place} is an ensemble of {len(found)} SAEs, and a member is one: name the folder of one of them")
    return found


def require_width(sae: SAE, d_in: int | None, place: str) -> None:
    """Raise ValueError for an SAE of another width than the activations, if that is known."""
    if d_in is not None and sae.config.d_in != d_in:
        raise ValueError(f"{place} takes activations of width {sae.config.d_in}, and those of the source have {d_in}")


def write_published(context: RunContext, task: Task, place: str) -> None:
    """Load the SAE at a place and write it as an artefact, with the metadata of its files before those of the source."""
    store, source = context.store, task.declaration.source
    activations = activations_of(source).require(store, task.partition)
    statistics = ActivationStatistics.from_json(activations.provenance["statistics"]["train"])
    d_in = len(statistics.mean)
    input_scale = d_in**0.5 / statistics.mean_norm
    sae = load_published(place, input_scale)
    require_width(sae, d_in, place)
    own = sae_metadata(store, source, task.partition)
    provenance = context.provenance(task.declaration) | {
        "published": place,
        "differences": list(_differences(sae.metadata, own)),
        "l0_target": sae.config.l0_field and getattr(sae.config, sae.config.l0_field),
        "inference_flops_per_token": sae.config.inference_flops_per_token,
        "dtype": "float32",
        **dict.fromkeys(("train_tokens", "train_flops", "train_seconds", "peak_memory_bytes")),
    }
    require_free_disk(store.root, sum(weight.nbytes for weight in sae.state_dict().values()), f"writing {task.declaration.address}")
    with store.write_folder(*task.where, task.recipe, provenance) as folder:
        sm.save_sae(sae, folder, {**own, **sae.metadata, "published": place})


def _differences(published: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each fact about its activations in which a published SAE differs from the source."""
    named, ours = (str(each.get("model_name") or "") for each in (published, source))
    if named and _short(named) != _short(ours):
        yield f"it was trained on {named}, and the source has {ours}"
    hook, layer = str(published.get("hook_name") or published.get("hookpoint") or ""), published.get("hook_layer")
    if hook.startswith("blocks.") and hook != source["hook_name"]:  # other tools have other names of modules
        yield f"it was trained at the hook {hook}, and the source has {source['hook_name']}"
        return
    if layer is None and (found := _LAYER.search(hook)):
        layer = int(found[1])
    if layer is not None and layer != source["hook_layer"]:
        yield f"it was trained at layer {layer}, and the source has layer {source['hook_layer']}"


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
