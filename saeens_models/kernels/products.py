"""Products of float32 matrices on the CPU, by the faster of the two libraries that torch has for them.

``torch.mm`` asks MKL, which leaves the wider half of the registers unused on processors that are not Intel's; oneDNN uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def linear(x: Tensor, W: Tensor, *, in_bfloat16: bool = False) -> Tensor:
    """``x @ W.t()`` of ``x`` `[n, d]` and ``W`` `[m, d]`, without gradients, in float32. Fast where ``x`` is contiguous; ``W`` may be any.

    ``in_bfloat16``: both are rounded to it before, where they are not in it yet, and so is the product: torch has none that is in float32.
    """
    if in_bfloat16:
        return torch.mm(x.bfloat16(), W.bfloat16().t()).float()
    return _linear()(x, W)


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32. Looked up, not timed: a result must not depend on its load.

    Measured on one core of a Zen 5, conversions included: 1.7 times as fast.
    """
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


@cache
def _linear() -> Callable[[Tensor, Tensor], Tensor]:
    """Looked up, not timed: which of them it is decides the last bits.

    Measured on one core of a Zen 5: 250 GFLOPS with oneDNN, 110 with MKL. What torch calls it by is not part of its public interface,
    so that it may be gone in another version.
    """
    processor = torch.cpu.get_capabilities()
    if not (processor.get("avx512_f") and str(processor.get("cpu_name")).startswith("AMD") and torch.backends.mkldnn.is_available()):
        return _by_mm
    x = torch.arange(6.0).view(2, 3)
    try:
        return _by_onednn if torch.equal(_by_onednn(x, x), _by_mm(x, x)) else _by_mm
    except (AttributeError, RuntimeError):
        return _by_mm


def _by_onednn(x: Tensor, W: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, W, None, "none", [], "")


def _by_mm(x: Tensor, W: Tensor) -> Tensor:
    return torch.mm(x, W.t())
