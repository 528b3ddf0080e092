"""The state and the steps of one SAE in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeens_models.architectures import SAE, Objective, SAEConfig, build_sae, sae_class
from saeens_models.kernels import Team, cpu_team
from saeens_models.kernels.cpu_topk_encoder import Encoder
from saeens_models.kernels.products import multiplies_bfloat16
from saeens_models.training.adam import Adam
from saeens_models.training.config import TrainingConfig
from saeens_models.training.l0_control import L0Control
from saeens_models.training.micro_batches import backpropagate

_LOSSES_PER_CHECK = {"cpu": 1}  # on other devices each check waits for the device
_LOSSES_PER_CHECK_ELSEWHERE = 64


class CurvePoint(NamedTuple):
    """A point of the training curve of one SAE. Losses and codes are those of the last batch, in the scale of the training."""

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
    """A loss became infinite or NaN. The message names the SAE, the step and the number of tokens."""


@cache
def load_kernels(architecture: str) -> None:
    """Compile the CPU kernels of an architecture, or load them from disk, before training: takes seconds.

    Runs on a separate thread: an interrupt during compilation would leave the compiler locked.
    """
    with cpu_team("cpu") as team:
        if team is not None:
            team.apart(partial(_call_kernels, team, architecture))


def _call_kernels(team: Team, architecture: str) -> None:
    x = torch.linspace(-1, 1, 64 * 8).view(64, 8).sin()
    training = TrainingConfig(learning_rate=1e-3, dead_after_tokens=1, unit_norm_decoder=True)
    own = sae_class(architecture).config_class
    fields = {} if own.l0_field is None or own.adjusts_coefficient else {own.l0_field: 2}
    trainer = SAETrainer(SAEConfig(architecture=architecture, d_in=8, d_sae=64, **fields), training, team=team)
    for _ in range(2):  # in the second step there are dead features
        trainer.step(x)
    if not own.requires_l0() and "b_enc" in trainer.sae.state_dict():
        with torch.no_grad():
            trainer.sae.b_enc.fill_(-100.0)
        trainer.step(x)  # with few active features, whose entries are processed one by one
    trainer.sae.reconstruct(x)
    if architecture == "topk" and multiplies_bfloat16():
        rough = Encoder(team, trainer.sae.stored_weights, rough=True)
        rough.encode(x, np.empty((len(x), 2), np.int32), np.empty((len(x), 2), np.float32))


class SAETrainer:
    """The state of one SAE in training: weights, optimiser, position in the stream, and the last firing of each feature.

    ``index`` names the SAE in errors, where it counts from 1. Steps take scaled input. With a ``team`` of CPU threads they are compiled,
    otherwise they use torch.
    A batch is processed ``micro_batch_tokens`` at a time; None: at once. ``initial``: an SAE of unscaled activations whose weights are
    the initial weights.
    """

    def __init__(
        self,
        config: SAEConfig,
        training: TrainingConfig,
        device: torch.device | str = "cpu",
        index: int = 0,
        team: Team | None = None,
        *,
        initial: SAE | None = None,
        micro_batch_tokens: int | None = None,
    ) -> None:
        self.training = training
        self.index = index
        self._micro_batch_tokens = micro_batch_tokens
        self.input_scale: float | Tensor = training.input_scale or 1.0
        """Factor of the last step's input; a scalar tensor if it follows the stream."""
        self.mean_norm: Tensor | None = None
        """Running mean of the unscaled input's norm, a scalar, if the scale follows the stream; the scale brings it to sqrt(d_in)."""
        b_dec = None if training.input_mean is None else torch.tensor(training.input_mean) * self.input_scale
        self.sae = build_sae(config, b_dec).to(device)
        if initial is not None:
            self.sae.load_state_dict(initial.state_dict())
            self.sae.fold_input_scale(1 / float(self.input_scale))  # `finish` undoes this
        self.optimiser = Adam(self.sae, training)
        self._control = _l0_control(config, training)
        self.learning_rate = training.learning_rate
        """Learning rate of the last step."""
        self.team = team
        self.last_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.steps = 0
        self.tokens = 0
        self._last: tuple[Tensor, Objective] | None = None
        self._restored: CurvePoint | None = None
        self._unchecked_losses: list[tuple[int, int, Tensor]] = []

    @property
    def dead_mask(self) -> Tensor:
        """Mask of the features that have not fired for more than ``training.dead_after`` tokens, `[d_sae]`."""
        return self.tokens - self.last_fired > self.training.dead_after

    def step(self, x: Tensor) -> Objective:
        """Train on one batch of scaled activations `[n, d_in]`, and return the objective of the weights before the step.

        Raises :class:`NonFiniteLossError`; on an accelerator some steps later, so that no step waits for the device.
        """
        scale, tokens = self.training.sparsity_scale_at(self.tokens + len(x)), self._micro_batch_tokens
        scale *= 1.0 if self._control is None else self._control.factor
        self._move(x, backpropagate(self.sae, x, self.dead_mask, scale, self.team, micro_batch_tokens=tokens))
        return self.last_objective

    @staticmethod
    def step_together(trainers: Sequence[SAETrainer], x: Tensor) -> bool:
        """Take :meth:`step` of all trainers, with their objectives computed in shared kernel launches; they share a training.

        Returns False, and changes nothing, if the SAEs cannot share launches. Up to rounding, each SAE takes the step it takes alone.
        """
        first = trainers[0]
        if first._micro_batch_tokens is not None and first._micro_batch_tokens < len(x):
            return False
        saes, dead_masks = [trainer.sae for trainer in trainers], [trainer.dead_mask for trainer in trainers]
        objectives = first.sae.backpropagate_together(saes, x, dead_masks, first.training.sparsity_scale_at(first.tokens + len(x)))
        if objectives is None:
            return False
        for trainer, objective in zip(trainers, objectives, strict=True):
            trainer._move(x, objective)
        return True

    @staticmethod
    def backpropagate_without_dead(trainers: Sequence[SAETrainer], x: Tensor) -> list[Objective]:
        """Compute objectives and gradients of steps for which :meth:`takes_fixed_launches` is True, if no feature is dead.

        Changes no weights and no counters.
        """
        saes = [trainer.sae for trainer in trainers]
        together = saes[0].backpropagate_together(saes, x, [None] * len(saes)) if len(saes) > 1 else None
        return together or [sae.backpropagate(x) for sae in saes]

    def takes_fixed_launches(self, x: Tensor) -> bool:
        """Return True if the next step, on ``x``, launches the kernels of any other step on so many tokens without dead features."""
        in_parts = self._micro_batch_tokens is not None and self._micro_batch_tokens < len(x)
        is_fixed = self._control is None and self.training.sparsity_scale_at(self.tokens + len(x)) == 1
        return self.team is None and not in_parts and is_fixed

    @property
    def last_objective(self) -> Objective:
        """Objective of the last step. Raises ``ValueError`` before the first step."""
        if self._last is None:
            raise ValueError("no step has been taken")
        return self._last[1]

    def _move(self, x: Tensor, objective: Objective) -> None:
        """Move the weights along the gradients of ``objective`` on ``x``, and :meth:`note` both."""
        self.learning_rate = self.training.learning_rate_at(self.tokens, self.tokens + len(x))
        self.optimiser.step(self.learning_rate, self.team)
        self.sae.apply_constraints()
        self.note(x, objective)

    def count_step(self, x: Tensor) -> None:
        """Count a step on ``x`` that is computed elsewhere and reported with :meth:`note` afterwards."""
        self.learning_rate = self.training.learning_rate_at(self.tokens, self.tokens + len(x))
        self.optimiser.steps += 1

    def note(self, x: Tensor, objective: Objective) -> None:
        """Record a step on ``x`` in the counters, and check its loss."""
        end = self.tokens + len(x)
        self.steps += 1
        self.tokens = end
        self.last_fired.masked_fill_(objective.fire_counts > 0, end)
        self._last = (x, objective)
        if self._control is not None:
            self._control.update(float(objective.l0), len(x), end)
        self._unchecked_losses.append((self.steps, end, objective.loss))
        if len(self._unchecked_losses) >= _LOSSES_PER_CHECK.get(x.device.type, _LOSSES_PER_CHECK_ELSEWHERE):
            self.check_losses()

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the training state by name, without copies: weights, moments, last firing. Numbers: :meth:`curve_point`."""
        adam = self.optimiser
        groups = {"weight": self.sae.state_dict(), "mean": adam.means, "square": adam.squares}
        state = {f"{group}.{name}": tensor.detach() for group, tensors in groups.items() for name, tensor in tensors.items()}
        state["last_fired"] = self.last_fired
        if self.mean_norm is not None:
            state |= {"mean_norm": self.mean_norm, "input_scale": torch.as_tensor(self.input_scale)}
        if self._control is not None:
            state["l0_control"] = self._control.state
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], last: CurvePoint) -> None:
        """Resume from ``state`` and the ``curve_point`` of the same step. Raises ``ValueError`` if the state does not fit this SAE."""
        own = self.state()
        if self.mean_norm is None and "mean_norm" in state:
            self.mean_norm, self.input_scale = (state[name].to(self.last_fired.device) for name in ("mean_norm", "input_scale"))
            own |= {"mean_norm": self.mean_norm, "input_scale": self.input_scale}
        shapes, expected = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (state, own))
        if shapes != expected:
            raise ValueError(f"the state does not fit SAE {self.index}: it has {shapes}, expected {expected}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.steps = self.optimiser.steps = last.step
        self.tokens, self.learning_rate, self._restored = last.tokens, last.learning_rate, last

    def check_losses(self) -> None:
        """Raise :class:`NonFiniteLossError` if a loss since the last check is not finite."""
        unchecked, self._unchecked_losses = self._unchecked_losses, []
        if not unchecked or bool(torch.stack([loss for _, _, loss in unchecked]).isfinite().all()):
            return
        step, tokens, loss = next(entry for entry in unchecked if not entry[2].isfinite())
        config = self.sae.config
        raise NonFiniteLossError(
            f"SAE {self.index + 1} ({config.architecture}, init_seed {config.init_seed}): loss {float(loss)} at step {step}, after "
            f"{tokens} tokens. Check the activations for values that are not finite, or lower learning_rate = {self.training.learning_rate}"
        )

    def curve_point(self) -> CurvePoint:
        """Return the point of the training curve after the last step. Raises ``ValueError`` before the first step."""
        if self._last is None:
            if self._restored is None:
                raise ValueError("no step has been taken")
            return self._restored
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
        """End the training, and return the trained SAE for unscaled activations: the input scale is folded into its weights."""
        self.check_losses()
        self.sae.zero_grad()
        self.sae.fold_input_scale(float(self.input_scale))
        return self.sae.eval()


def _l0_control(config: SAEConfig, training: TrainingConfig) -> L0Control | None:
    """Return the control of the sparsity coefficient, if the configuration needs one. Raises ``ValueError`` without ``total_tokens``."""
    target = getattr(config, config.l0_field) if config.adjusts_coefficient and config.l0_field else None
    if target is None:
        return None
    if training.total_tokens is None:
        raise ValueError(f"{config.l0_field} needs total_tokens: the sparsity coefficient is adjusted over a fraction of the training")
    return L0Control(target, training.total_tokens)


def _explained_variance(x: Tensor, x_hat: Tensor) -> float:
    """Return the explained variance. Several times faster than ``x.var``; constant dimensions have a variance of exactly 0."""
    centred = x - x[0]
    variance = centred.sub_(centred.mean(dim=0)).square_().mean(dim=0)
    unexplained = (x - x_hat).square().mean(dim=0) / variance
    return float(1 - unexplained[variance > 0].mean())
