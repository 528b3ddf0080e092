"""Random weights for SAEs of any package."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def with_random_weights(sae: Any, d_in: int, seed: int = 3) -> Any:
    """Draw every parameter, thresholds above 0, and return the SAE."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sae.named_parameters():
        drawn = torch.rand if name == "threshold" else torch.randn
        weight.copy_(drawn(weight.shape, generator=generator) / d_in**0.5)
    return sae
