"""Steering: a language model whose activations are moved along features, or lose features, while it computes."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from saeens_models.architectures import SAE
from saeens_models.ensembles import Ensemble


@contextmanager
def steer(model: nn.Module, sae: SAE | Ensemble, strengths: Mapping[int, float], hook: str | nn.Module) -> Iterator[None]:
    """Within this context the output x `[..., d_in]` of a module becomes ``x + sum_i strengths[i] * W_dec[i]``, at every position.

    hook: the module, or its path in ``model`` or in ``model.base_model``, such as ``layers.12``: in models of transformers the output of
    a block is the residual stream after it. A strength is in the unit of the activations where decoder rows have norm 1: a value that the
    feature takes on tokens where it fires is a natural start. Features of an ensemble are counted through its members.

    Raises ``ValueError`` for features and modules that do not exist, and for an output of another width.
    """
    vector = steering_vector(sae, strengths)
    with _edited(model, hook, len(vector), lambda x: x + vector.to(x)):
        yield


@contextmanager
def ablate(model: nn.Module, sae: SAE | Ensemble, features: Iterable[SupportsIndex], hook: str | nn.Module) -> Iterator[None]:
    """Within this context the output x of a module loses what the features contribute to its reconstruction: ``x - sum_i z_i * W_dec[i]``.

    z is the (scaled) code of x. What the SAE does not reconstruct stays as it is. ``hook`` and errors: as for :func:`steer`.
    """
    chosen = torch.tensor(_checked(sae, features), device=sae.W_dec.device)
    rows = sae.W_dec.detach()[chosen]

    def without(x: Tensor) -> Tensor:
        with torch.no_grad():
            z = sae.encode(x.to(rows))[..., chosen]
        return x - (z @ rows).to(x)

    with _edited(model, hook, rows.shape[1], without):
        yield


def steering_vector(sae: SAE | Ensemble, strengths: Mapping[int, float]) -> Tensor:
    """Return ``sum_i strengths[i] * W_dec[i]`` `[d_in]`.

    Raises ``ValueError`` for features that do not exist, and for strengths that are not finite numbers by feature.
    """
    if not isinstance(strengths, Mapping):
        raise ValueError(f"strengths are a mapping such as {{17: 4.0}}; got {type(strengths).__name__}")
    chosen, W_dec = _checked(sae, strengths), sae.W_dec.detach()
    for feature, strength in strengths.items():
        if isinstance(strength, str) or not math.isfinite(strength):
            raise ValueError(f"the strength of feature {feature} is {strength!r}, expected a finite number")
    return torch.tensor([float(each) for each in strengths.values()], dtype=W_dec.dtype, device=W_dec.device) @ W_dec[chosen]


def save_lm_eval_steering(sae: SAE | Ensemble, strengths: Mapping[int, float], hook: str, file: str | Path) -> None:
    """Write a file for the lm-evaluation-harness: ``lm_eval --model steered --model_args pretrained=...,steer_path=FILE.pt``.

    hook: path of the module in the model's ``base_model``, such as ``layers.12``. Raises ``ValueError`` unless the name ends with
    ``.pt``, and for features that do not exist.
    """
    if Path(file).suffix != ".pt":
        raise ValueError(f"{file}: the harness reads steering vectors from files that end with .pt")
    if not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{Path(file).absolute().parent} is no folder")
    vector = steering_vector(sae, strengths).cpu()
    torch.save({hook: {"steering_vector": vector, "steering_coefficient": 1.0, "action": "add", "bias": None}}, file)


def _checked(sae: SAE | Ensemble, features: Iterable[SupportsIndex]) -> list[int]:
    """Return the features, each once."""
    n_features = sae.n_features if isinstance(sae, Ensemble) else sae.config.d_sae
    chosen: list[int] = []
    for each in features:
        try:
            i = -1 if isinstance(each, bool) else index(each)
        except TypeError:
            i = -1
        if not 0 <= i < n_features:
            raise ValueError(f"feature {each!r} does not exist: there are features 0 to {n_features - 1}")
        chosen.append(i)
    if not chosen:
        raise ValueError("no feature is given")
    return list(dict.fromkeys(chosen))


def _module(model: nn.Module, hook: str | nn.Module) -> nn.Module:
    if isinstance(hook, nn.Module):
        return hook
    named = dict(model.named_modules())
    base = getattr(model, "base_model", None)
    named = {**(dict(base.named_modules()) if isinstance(base, nn.Module) else {}), **named}
    if not hook or hook not in named:
        close = " or ".join(get_close_matches(hook, named, n=3))
        raise ValueError(f"the model has no module {hook!r}{f'; did you mean {close}?' if close else ''}")
    return named[hook]


@contextmanager
def _edited(model: nn.Module, hook: str | nn.Module, d_in: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's output, or the first of a tuple, by what ``edit`` returns."""

    def after(module: nn.Module, given: Any, output: Any) -> Any:
        first, *others = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, Tensor) or first.shape[-1] != d_in:
            found = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(f"the output at {hook if isinstance(hook, str) else type(hook).__name__} is {found}, expected [..., {d_in}]")
        return (edit(first), *others) if isinstance(output, tuple) else edit(first)

    handle = _module(model, hook).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
