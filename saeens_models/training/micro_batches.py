"""Gradient accumulation over parts of a batch, for batches that do not fit into the device's memory."""

import torch
from torch import Tensor

from saeens_models.architectures import SAE, Objective
from saeens_models.kernels import Team


def backpropagate(
    sae: SAE, x: Tensor, dead_mask: Tensor, sparsity_scale: float, team: Team | None, *, micro_batch_tokens: int | None
) -> Objective:
    """Compute ``sae.backpropagate`` on a batch `[n, d_in]`, at most ``micro_batch_tokens`` at a time; None: the batch at once.

    The objective is the same up to rounding. Losses are means over tokens, so losses and gradients of the parts are weighted by their
    tokens. If a token's loss depends on the rest of the batch, as BatchTopK's does, the architecture sees all parts first
    (``batch_in_parts``). Memory in addition to that of a part: one tensor of the size of each weight.
    """
    if micro_batch_tokens is None or len(x) <= micro_batch_tokens:
        return sae.backpropagate(x, dead_mask, sparsity_scale, team)
    gradients = {name: torch.zeros_like(parameter) for name, parameter in sae.named_parameters()}
    parts = x.split(micro_batch_tokens)
    objectives: list[Objective] = []
    with sae.batch_in_parts(parts):
        for part in parts:
            objectives.append(sae.backpropagate(part, dead_mask, sparsity_scale, team))
            for name, parameter in sae.named_parameters():
                if parameter.grad is not None:
                    gradients[name].add_(parameter.grad, alpha=len(part) / len(x))
    for name, parameter in sae.named_parameters():
        parameter.grad = gradients[name]
    shares = torch.tensor([len(part) / len(x) for part in parts], device=x.device)
    return Objective(
        loss=torch.stack([each.loss for each in objectives]) @ shares,
        terms={name: torch.stack([each.terms[name] for each in objectives]) @ shares for name in objectives[0].terms},
        x_hat=torch.cat([each.x_hat for each in objectives]),
        fire_counts=torch.stack([each.fire_counts for each in objectives]).sum(dim=0),
    )
