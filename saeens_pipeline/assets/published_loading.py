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

_LAYER = re.compile(r"(?:\b|_)(?:layers?|blocks|h)[._](\d+)")  # in names of modules: layers.3.mlp, resid_post_layer_3
_SITES = {
    "resid_pre": "resid_pre", "resid_mid": "resid_mid", "resid_post": r"resid_post|(?:^|\.)(?:layers?|blocks|h)\.\d+$",
    "mlp": "mlp", "attn": "att(?:n|ention)",
}  # fmt: skip


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
        "differences": list(differences(sae.metadata, own)),
        "l0_target": sae.config.l0_field and getattr(sae.config, sae.config.l0_field),
        "inference_flops_per_token": sae.config.inference_flops_per_token,
        "dtype": "float32",
        **dict.fromkeys(("train_tokens", "train_flops", "train_seconds", "peak_memory_bytes")),
    }
    require_free_disk(store.root, sum(weight.nbytes for weight in sae.state_dict().values()), f"writing {task.declaration.address}")
    with store.write_folder(*task.where, task.recipe, provenance) as folder:
        sm.save_sae(sae, folder, {**own, **sae.metadata, "published": place})


def differences(published: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each fact about its activations in which a published SAE differs from the source."""
    named, ours = (str(each.get("model_name") or "") for each in (published, source))
    if named and not _is_same_model(named, ours):
        yield f"it was trained on {named}, and the source has {ours}"
    hook, own = str(published.get("hook_name") or published.get("hookpoint") or ""), source["hook_name"]
    if hook == own:
        return
    site, own_site = _site(hook), _site(own)
    if site and own_site and site != own_site:
        yield f"it was trained at the hook {hook}, and the source has {own}"
    stated, found = str(published.get("hook_layer") or ""), _LAYER.search(hook)
    layer = int(stated) if stated.isdecimal() else int(found[1]) if found else published.get("hook_layer")
    if layer is not None and layer != source["hook_layer"]:
        yield f"it was trained at layer {layer}, and the source has layer {source['hook_layer']}"


def _is_same_model(one: str, other: str) -> bool:
    """Return whether two names may be of one model. Owners are compared where both names have one: `gpt2` may be any owner's."""
    (owner, _, name), (other_owner, _, other_name) = (each.rstrip("/").lower().rpartition("/") for each in (one, other))
    are_owners = all(each and "/" not in each for each in (owner, other_owner))  # no folders
    return name == other_name and (owner == other_owner or not are_owners)


def _site(hook: str) -> str:
    """Return the place in a block that the name of a hook means, in the words of several tools; empty for other names."""
    return next((site for site, words in _SITES.items() if re.search(words, hook)), "")
