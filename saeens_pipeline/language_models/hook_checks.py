"""Checks of a hook on a few random tokens: later tokens and padding change nothing, and terms of the residual stream add up.

A model of lower precision is checked in float32, where rounding hides no error. Patching is checked in `patching`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Protocol, TypeVar

import torch

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.descriptions import HOOKS, LanguageModelDescription

TOLERANCE = 1e-3
"""Largest relative error of float32; other dtypes may differ by 16 roundings."""
_MAX_SHORTER = 0.25  # of a shorter text at low precision, where a median of the errors is compared
_WINDOW = 12  # tokens
_Result = TypeVar("_Result")
_TERMS = ("attn_out", "mlp_out", "resid_mid")


class Reader(Protocol):
    """Returns activations by hook and layer, from one forward pass of all blocks on tokens `[b, L]`."""

    def __call__(
        self, tokens: torch.Tensor, wanted: Collection[tuple[str, int]], *, strict: bool = True
    ) -> Mapping[tuple[str, int], torch.Tensor]:
        """Raise SaeensError for what cannot be read or, unless `strict`, leave it out."""
        ...


def check_hook(description: LanguageModelDescription, hook: str, layers: Collection[int], read: Reader) -> None:
    """Raise ConfigurationError if activations depend on later tokens, or if a hook inside the block is not a part of its sum.

    All layers are read in one pass, on text and on text with padding. Raises as the reader.
    """
    check_causal(description, hook, layers, read)
    if hook in _TERMS:
        found = read(random_windows(description), [(each, layer) for each in HOOKS for layer in layers], strict=False)
        _check_terms(description, hook, layers, found)


def check_causal(
    description: LanguageModelDescription, hook: str, layers: Collection[int], read: Reader, *, strict: bool = True
) -> list[int]:
    """Raise ConfigurationError if later tokens or padding change activations. `strict`: also as the reader, else these are left out.

    Returns the layers that were checked.
    """
    tokens, prefix = random_windows(description), _prefix(description)
    wanted = [(hook, layer) for layer in layers]
    whole, alone = read(tokens, wanted, strict=strict), read(tokens[:1, :prefix], wanted, strict=strict)
    checked = sorted(layer for place, layer in wanted if (place, layer) in whole and (place, layer) in alone)
    for layer in checked:
        text, *others = whole[hook, layer][:, :prefix]
        error = max(relative_error(other, text) for other in others)
        shorter = relative_error(alone[hook, layer][0], text)  # rounds otherwise, which deep networks amplify
        if error > tolerance(text) or shorter > min(10 * tolerance(text), _MAX_SHORTER):
            raise ConfigurationError(
                f"{description.name} ({description.model_type}) is not causal: later tokens or padding change {hook!r} of layer {layer} "
                f"(relative error {max(error, shorter):.2g}). Choose a language model that attends to earlier tokens only"
            )
    return checked


def checked_in_float32(model: torch.nn.Module, check: Callable[[], _Result]) -> _Result:
    """Return the result of a check, with the model in float32. If its code cannot compute in float32, the check is made as it is.

    Raises as the check.
    """
    if not any(_is_low(weights) for weights in chain(model.parameters(), model.buffers())):
        return check()
    try:
        with _in_float32(model):
            return check()
    except (SaeensError, torch.OutOfMemoryError):
        raise
    except Exception:  # code of the model, which may mix its weights' dtype with others
        return check()


@contextmanager
def _in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Give each module float32 weights while it runs, so that only one module at a time takes more memory."""
    narrow: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # weights and their data, by id

    def own(module: torch.nn.Module) -> Iterator[torch.Tensor]:
        return chain(module.parameters(recurse=False), module.buffers(recurse=False))

    def widen(module: torch.nn.Module, _: object) -> None:
        for weights in filter(_is_low, own(module)):
            narrow[id(weights)] = weights, weights.data
            weights.data = weights.data.float()

    def restore(module: torch.nn.Module, *_: object) -> None:
        for weights in own(module):
            if id(weights) in narrow:
                weights.data = narrow.pop(id(weights))[1]

    hooks = [hook for each in model.modules() for hook in (each.register_forward_pre_hook(widen), each.register_forward_hook(restore))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weights, data in narrow.values():  # of modules that an error or the end of a pass stopped
            weights.data = data


def _is_low(weights: torch.Tensor) -> bool:
    return weights.is_floating_point() and weights.itemsize == 2


def random_windows(description: LanguageModelDescription) -> torch.Tensor:
    """Return tokens `[4, L]`: random text, and its beginning with another end, with token 0 and with the end-of-text token after it."""
    length = min(_WINDOW, description.context_length or _WINDOW)
    tokens = torch.randint(description.vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    prefix = _prefix(description)
    tokens[1:, :prefix] = tokens[0, :prefix]
    tokens[2, prefix:] = 0
    tokens[3, prefix:] = description.end_of_text or 0
    return tokens


def _prefix(description: LanguageModelDescription) -> int:
    return max(1, min(_WINDOW, description.context_length or _WINDOW) * 2 // 3)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the error relative to the norm of `expected` `[..., d]`: the largest over tokens or, below float32, the median.

    At low precision the router of a mixture of experts may decide otherwise for single tokens.
    """
    of_token = (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1).clamp(min=1e-30)
    return (of_token.max() if torch.finfo(expected.dtype).eps < TOLERANCE / 16 else of_token.median()).item()


def tolerance(activations: torch.Tensor) -> float:
    """Return the largest relative error of activations that is explained by rounding."""
    return max(TOLERANCE, 16 * torch.finfo(activations.dtype).eps)


def _check_terms(
    description: LanguageModelDescription, hook: str, layers: Collection[int], found: Mapping[tuple[str, int], torch.Tensor]
) -> None:
    """Raise ConfigurationError, with the largest error, if the stream is not the sum of its terms at this hook."""
    errors = {layer: term_errors({each: found[each, layer] for each in HOOKS if (each, layer) in found}) for layer in layers}
    worst = max(layers, key=lambda layer: errors[layer].get(hook, float("inf")))
    error = errors[worst].get(hook)
    if error is not None and error <= TOLERANCE:
        return
    others = [each for each in HOOKS if each not in _TERMS or all(of.get(each, 1.0) <= TOLERANCE for of in errors.values())]
    what = "its module does not read the stream" if hook == "resid_mid" else "the output of its module is not what is added to the stream"
    size = "cannot be tested, since other parts of the block cannot be read" if error is None else f"relative error {error:.2g}"
    raise ConfigurationError(
        f"hook {hook!r} is not available in {description.name} ({description.model_type}): {what} (layer {worst}: {size}); "
        f"available: {', '.join(others)}, or a module path with {{layer}}"
    )


def term_errors(block: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the error of each hook inside a block, given the activations `[b, L, d]` at the hooks that can be read.

    `resid_pre + attn_out + mlp_out = resid_post`, and `resid_mid` lies between: the smallest error of the sums that test a hook,
    relative to the size of the term, at the worst token. For `resid_mid` the terms may be scaled, or the module may return the sum.
    A hook that no sum tests is left out.
    """
    pre, post = (block.get(hook) for hook in ("resid_pre", "resid_post"))
    attention, middle, mlp = (block.get(hook) for hook in ("attn_out", "resid_mid", "mlp_out"))
    errors: dict[str, list[float]] = {hook: [] for hook in _TERMS}
    if pre is not None and attention is not None and mlp is not None and post is not None:
        missing = post.double() - pre.double() - attention.double() - mlp.double()
        around = (pre, attention, mlp, post)
        errors["attn_out"].append(_excess(missing, attention, around))
        errors["mlp_out"].append(_excess(missing, mlp, around))
    for term, name, before, after in ((attention, "attn_out", pre, middle), (mlp, "mlp_out", middle, post)):
        if term is None or before is None or after is None:
            continue
        added = after.double() - before.double()
        errors[name].append(_excess(added - term.double(), term, (before, term, after)))
        if added.any():
            scale = (added * term.double()).sum() / term.double().square().sum().clamp(min=1e-30)
            errors["resid_mid"].append(_excess(added - scale * term.double(), added, (before, term, after)))
    if attention is not None and middle is not None:
        errors["resid_mid"].append(_excess(middle.double() - attention.double(), middle, (middle,)))
    return {hook: min(of) for hook, of in errors.items() if of}


def _excess(difference: torch.Tensor, term: torch.Tensor, around: Collection[torch.Tensor]) -> float:
    """Return the norm of a difference `[b, L, d]` beyond rounding of the tensors in the sum, relative to a term, at the worst token."""
    eps = max(torch.finfo(each.dtype).eps for each in around)
    rounding = eps * sum(each.double().norm(dim=-1) for each in around)
    return ((difference.norm(dim=-1) - rounding).clamp(min=0) / term.double().norm(dim=-1).clamp(min=1e-30)).max().item()
