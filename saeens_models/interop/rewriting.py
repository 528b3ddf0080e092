"""The same SAE with other weights: exact changes of form, for formats that have only one of them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saeens_models.architectures import SAE, SAEConfig, sae_class
from saeens_models.ensembles import Boosting, Ensemble

_BIASES = {"standard": ("b_enc",), "jumprelu": ("b_enc",), "topk": ("b_enc",), "gated": ("b_gate", "b_mag")}
"""Biases of the encoder, by architecture; those without are not rewritten."""


@torch.no_grad()
def with_input_bias(sae: SAE, subtracted: bool) -> SAE:
    """Return an SAE with the codes and reconstructions of ``sae`` that subtracts ``b_dec`` from its input, or does not.

    The encoder's biases take up the difference, ``b_dec @ W_enc`` `[d_sae]`. Raises ``ValueError`` for an architecture without them.
    """
    if sae.config.apply_b_dec_to_input == subtracted:
        return sae
    if sae.config.architecture not in _BIASES:
        raise ValueError(f"a {sae.config.architecture} SAE has no bias in the encoder that could take up b_dec")
    weights = {name: weight.detach() for name, weight in sae.state_dict().items()}
    shift = (sae.b_dec @ sae.W_enc) * (1 if subtracted else -1)
    for name in _BIASES[sae.config.architecture]:
        weights[name] = weights[name] + (shift * weights["r_mag"].exp() if name == "b_mag" else shift)
    return _like(sae, sae.config.model_copy(update={"apply_b_dec_to_input": subtracted}), weights)


def as_one_sae(ensemble: Ensemble) -> SAE:
    """Return the plain SAE that has the scaled code and the reconstruction of a bag of standard, JumpReLU or gated SAEs.

    Its features are those of the members in order. Every other ensemble is more than one SAE: members of TopK SAEs select their features
    one by one, and rounds of boosting encode what the earlier ones leave. Its metadata are those that the members have alike.

    Raises ``ValueError`` for such ensembles, and for a bag of gated and other SAEs.
    """
    if len(ensemble) == 1:
        return ensemble[0]
    members = [sae.inference_form() for sae in ensemble]
    if isinstance(ensemble, Boosting):
        raise ValueError("boosting is no single SAE: a round encodes what the earlier rounds leave")
    kinds = {sae.config.architecture for sae in members}
    if kinds == {"standard", "jumprelu"}:
        members, kinds = [_as_jumprelu(sae) for sae in members], {"jumprelu"}
    if kinds not in ({"standard"}, {"jumprelu"}, {"gated"}):
        raise ValueError(f"a bag of {' and '.join(sorted(kinds))} SAEs is no single SAE: possible for standard, jumprelu or gated members")
    one = _merged([with_input_bias(sae, False) for sae in members])
    one.metadata = ensemble.metadata
    return one


@torch.no_grad()
def _merged(members: Sequence[SAE]) -> SAE:
    """Return the mean of members that do not subtract ``b_dec``: their codes side by side, divided by their number."""
    share = 1 / len(members)
    dimension = {"W_enc": 1}  # others are stacked along their first
    weights = {
        name: torch.cat([sae.get_parameter(name).detach() for sae in members], dim=dimension.get(name, 0))
        for name in members[0].state_dict()
        if name != "b_dec"
    }
    weights["b_dec"] = torch.stack([sae.b_dec.detach() for sae in members]).mean(0)
    if "r_mag" in weights:  # the gate decides as before; the magnitude is divided
        weights["r_mag"], weights["b_mag"] = weights["r_mag"] + math.log(share), weights["b_mag"] * share
    else:
        weights |= {name: weights[name] * share for name in ("W_enc", "b_enc", "threshold") if name in weights}
    config = members[0].config.model_copy(update={"d_sae": len(weights["W_dec"]), "l0_target": None})
    return _like(members[0], config, weights)


@torch.no_grad()
def _as_jumprelu(sae: SAE) -> SAE:
    """Return a standard SAE as a JumpReLU SAE with thresholds of 0."""
    if sae.config.architecture == "jumprelu":
        return sae
    shared = sae.config.model_dump(include={"d_in", "d_sae", "init_seed", "apply_b_dec_to_input", "decoder_init_norm"})
    config = SAEConfig(architecture="jumprelu", **shared)
    return _like(sae, config, {**sae.state_dict(), "threshold": torch.zeros_like(sae.state_dict()["b_enc"])})


def _like(sae: SAE, config: SAEConfig, weights: dict[str, Tensor]) -> SAE:
    """Return an SAE on the device of ``sae``, with its metadata."""
    made = sae_class(config.architecture)(config).to(sae.b_dec.device, sae.b_dec.dtype)
    made.load_state_dict(weights)
    made.metadata = dict(sae.metadata)
    return made
