"""How SAEs are trained: optimiser, schedules, constraints, and what the input is like."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _tensor_to_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


class TrainingConfig(BaseModel):
    """Settings of :func:`train`, shared by the SAEs that are trained together. Wrong values raise pydantic's ``ValidationError``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    learning_rate: PositiveFloat = 3e-4
    """Adam's step size between warm-up and decay."""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates."""
    batch_tokens: PositiveInt = 4096
    """Tokens per step, for whoever makes the batches: every tensor of the stream is one step, whatever its size."""
    total_tokens: PositiveInt | None = None
    """Tokens to train on; training stops there. Needed by everything that is a fraction of the training; None takes the whole stream."""
    learning_rate_warmup_fraction: Fraction = 0.0
    """The first part of the training, over which the learning rate rises linearly from 0."""
    learning_rate_decay_fraction: Fraction = 0.0
    """The last part of the training, over which the learning rate falls linearly."""
    learning_rate_floor: Fraction = 0.0
    """Where the decay ends, as a fraction of ``learning_rate``."""
    sparsity_warmup_fraction: Fraction = 0.0
    """The first part of the training, over which the sparsity coefficient rises linearly from 0."""
    gradient_clip_norm: PositiveFloat | None = 1.0
    """Largest norm of all gradients of an SAE together; None does not clip."""
    unit_norm_decoder: bool = True
    """Keep decoder rows at norm 1: renormalised after each step, the gradient's part along the row removed before it."""
    dead_after_tokens: PositiveInt = 10_000_000
    """A feature that has not fired for more tokens than this is dead (Gao et al. 2024)."""
    normalize_activations: Literal["none", "expected_average_only_in"] = "none"
    """``expected_average_only_in``: train on ``input_scale * x``, whose mean norm is sqrt(d_in). Trained SAEs take ``x`` either way."""
    input_scale: PositiveFloat | None = None
    """``sqrt(d_in) / mean norm`` of the input; needed by ``expected_average_only_in``."""
    input_mean: Annotated[tuple[float, ...], BeforeValidator(_tensor_to_list)] | None = None
    """Mean of the input, unscaled, `[d_in]`: what b_dec starts from. None starts from 0."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.learning_rate_warmup_fraction + self.learning_rate_decay_fraction > 1:
            raise ValueError("learning_rate_warmup_fraction and learning_rate_decay_fraction overlap: together they may be at most 1")
        if self.normalize_activations == "none" and self.input_scale not in (None, 1.0):
            raise ValueError(f"input_scale = {self.input_scale} is not used with normalize_activations = none")
        return self

    def check_input_is_known(self, d_in: int) -> None:
        """Raise ``ValueError`` if something is missing that depends on the stream: its length, its scale, or the right size of its mean."""
        fractions = ("learning_rate_warmup_fraction", "learning_rate_decay_fraction", "sparsity_warmup_fraction")
        used = [name for name in fractions if getattr(self, name) > 0]
        if used and self.total_tokens is None:
            raise ValueError(f"{' and '.join(used)} need total_tokens: a fraction of what?")
        if self.normalize_activations != "none" and self.input_scale is None:
            raise ValueError(
                f"normalize_activations = {self.normalize_activations} needs input_scale = sqrt(d_in) / mean norm of the input"
            )
        if self.input_mean is not None and len(self.input_mean) != d_in:
            raise ValueError(f"input_mean has {len(self.input_mean)} entries, the SAEs have d_in = {d_in}")

    def learning_rate_at(self, start: int, end: int) -> float:
        """Learning rate of the step that takes the tokens from ``start`` to ``end``."""
        scale = _ramp(end, self.learning_rate_warmup_fraction, self.total_tokens)
        if self.total_tokens is not None and self.learning_rate_decay_fraction > 0:
            left = max(1 - start / self.total_tokens, 0.0)
            scale = min(scale, max(left / self.learning_rate_decay_fraction, self.learning_rate_floor))
        return self.learning_rate * scale

    def sparsity_scale_at(self, end: int) -> float:
        """Factor of the sparsity coefficient in the step that ends at token ``end``."""
        return _ramp(end, self.sparsity_warmup_fraction, self.total_tokens)


def _ramp(tokens: int, fraction: float, total_tokens: int | None) -> float:
    if total_tokens is None or fraction == 0:
        return 1.0
    return min(tokens / (fraction * total_tokens), 1.0)
