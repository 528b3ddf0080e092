"""One SAE in training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeens_models.architectures import SAE, Objective, SAEConfig, build_sae
from saeens_models.training.config import TrainingConfig

_LOSSES_PER_CHECK = {"cpu": 1}  # elsewhere each look at a loss would wait for the device
_LOSSES_PER_CHECK_ELSEWHERE = 64


class CurvePoint(NamedTuple):
    """Where the training of one SAE stands; losses and codes are those of the last batch, in the scale of the training."""

    step: int
    """Steps taken."""
    tokens: int
    """Tokens seen."""
    loss: float
    """The training objective."""
    explained_variance: float
    """Mean over dimensions of 1 - squared error / variance, over dimensions that vary."""
    l0: float
    """Mean number of active features per token."""
    dead_features: float
    """Share of features that have not fired for ``dead_after_tokens`` tokens."""
    learning_rate: float
    """Learning rate of the last step."""


class NonFiniteLossError(FloatingPointError):
    """A loss became infinite or not a number. The message says which SAE, at which step and after how many tokens."""


class SAETrainer:
    """The state of one SAE in training: weights, optimiser, position in the stream, and when each feature last fired.

    ``index`` names the SAE in errors. It sees the scaled input, and nothing else of the stream.
    """

    def __init__(self, config: SAEConfig, training: TrainingConfig, device: torch.device | str = "cpu", index: int = 0) -> None:
        self.training = training
        self.index = index
        self.input_scale = training.input_scale or 1.0
        b_dec = None if training.input_mean is None else torch.tensor(training.input_mean) * self.input_scale
        self.sae = build_sae(config, b_dec).to(device)
        if training.unit_norm_decoder:
            _normalise_rows(self.sae.W_dec)
        self._weights = [_as_in_memory(parameter.detach()) for parameter in self.sae.parameters()]
        self.optimiser = torch.optim.Adam(self._weights, lr=training.learning_rate, betas=training.adam_betas, fused=True)
        self.last_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.steps = 0
        self.tokens = 0
        self._last: tuple[Tensor, Objective] | None = None
        self._unchecked_losses: list[tuple[int, int, Tensor]] = []

    @property
    def dead_mask(self) -> Tensor:
        """Which features have not fired for more than ``dead_after_tokens`` tokens, `[d_sae]`."""
        return self.tokens - self.last_fired > self.training.dead_after_tokens

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimiser.param_groups[0]["lr"]

    def step(self, x: Tensor) -> None:
        """Train on one batch of scaled activations `[n, d_in]`.

        Raises :class:`NonFiniteLossError`; on an accelerator some steps later, so that no step waits for the loss of the one before.
        """
        end = self.tokens + len(x)
        objective = self.sae.objective(x, self.dead_mask, self.training.sparsity_scale_at(end))
        self.sae.zero_grad()
        objective.loss.backward()
        if self.training.unit_norm_decoder:
            _remove_parallel_gradient(self.sae.W_dec)
        if self.training.gradient_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.training.gradient_clip_norm)
        self.optimiser.param_groups[0]["lr"] = self.training.learning_rate_at(self.tokens, end)
        for weight, parameter in zip(self._weights, self.sae.parameters(), strict=True):
            weight.grad = None if parameter.grad is None else _as_in_memory(parameter.grad)
        self.optimiser.step()
        if self.training.unit_norm_decoder:
            _normalise_rows(self.sae.W_dec)
        self.sae.apply_constraints()
        self.steps += 1
        self.tokens = end
        self.last_fired.masked_fill_(objective.fire_counts > 0, end)
        loss = objective.loss.detach()
        self._last = (x, objective._replace(loss=loss))  # detached, so that the step's graph is freed
        self._unchecked_losses.append((self.steps, end, loss))
        if len(self._unchecked_losses) >= _LOSSES_PER_CHECK.get(x.device.type, _LOSSES_PER_CHECK_ELSEWHERE):
            self.check_losses()

    def check_losses(self) -> None:
        """Raise :class:`NonFiniteLossError` if a loss since the last check is not finite."""
        unchecked, self._unchecked_losses = self._unchecked_losses, []
        if not unchecked or bool(torch.stack([loss for _, _, loss in unchecked]).isfinite().all()):
            return
        step, tokens, loss = next(entry for entry in unchecked if not entry[2].isfinite())
        config = self.sae.config
        raise NonFiniteLossError(
            f"SAE {self.index} ({config.architecture}, init_seed {config.init_seed}): loss {float(loss)} at step {step}, after {tokens} "
            f"tokens. Check the activations for values that are not finite, or lower learning_rate = {self.training.learning_rate}"
        )

    def curve_point(self) -> CurvePoint:
        """Where the training stands after at least one step."""
        if self._last is None:
            raise ValueError("no step has been taken")
        self.check_losses()
        x, objective = self._last
        return CurvePoint(
            step=self.steps,
            tokens=self.tokens,
            loss=float(objective.loss),
            explained_variance=_explained_variance(x, objective.x_hat),
            l0=float(objective.l0),
            dead_features=float(self.dead_mask.float().mean()),
            learning_rate=self.learning_rate,
        )

    def finish(self) -> SAE:
        """The trained SAE, which takes activations as they are: the input scale is folded into its weights. Ends the training."""
        self.check_losses()
        self.sae.zero_grad()
        self.sae.fold_input_scale(self.input_scale)
        return self.sae.eval()


def _as_in_memory(weight: Tensor) -> Tensor:
    """A view of a weight in the order of its memory: fused Adam copies what is transposed, as W_enc is."""
    return weight.t() if weight.ndim == 2 and weight.t().is_contiguous() else weight


@torch.no_grad()
def _normalise_rows(W_dec: Tensor) -> None:
    W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(W_dec.dtype).tiny))


@torch.no_grad()
def _remove_parallel_gradient(W_dec: Tensor) -> None:
    """Remove the part of the gradient along each row, whose norm is 1: renormalising would undo its step, and Adam would remember it."""
    assert W_dec.grad is not None
    along = torch.linalg.vecdot(W_dec.grad, W_dec, dim=1)
    W_dec.grad.addcmul_(W_dec, along[:, None], value=-1)


def _explained_variance(x: Tensor, x_hat: Tensor) -> float:
    variance = x.var(dim=0, correction=0)
    unexplained = (x - x_hat).square().mean(dim=0) / variance
    return float(1 - unexplained[variance > 0].mean())
