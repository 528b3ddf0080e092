"""The settings of a training: optimiser, schedules, constraints, and statistics of the input."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

MOST_TOKENS_UNTIL_DEAD = 10_000_000
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
    """Tokens per step. The producer of the batches reads this; training takes each tensor of the stream as one step."""
    total_tokens: PositiveInt | None = None
    """Tokens to train on; None trains on the whole stream. Required by all settings that are a fraction of the training."""
    learning_rate_warmup_fraction: Fraction = 0.0
    """Fraction of the training at its start over which the learning rate rises linearly from 0."""
    learning_rate_decay_fraction: Fraction = 0.0
    """Fraction of the training at its end over which the learning rate falls linearly."""
    learning_rate_floor: Fraction = 0.0
    """Learning rate at the end of the decay, as a fraction of ``learning_rate``."""
    sparsity_warmup_fraction: Fraction = 0.0
    """Fraction of the training at its start over which the sparsity coefficient rises linearly from 0."""
    gradient_clip_norm: PositiveFloat | None = 1.0
    """Largest norm of all gradients of an SAE together; None does not clip."""
    unit_norm_decoder: bool = True
    """Keep decoder rows at norm 1: rows are normalised after each step, and the gradient's part along a row is removed before it."""
    frozen: Literal["none", "decoder", "decoder_soft", "encoder"] = "none"
    """Weights that keep their initial values: W_dec, or W_enc. ``decoder_soft`` keeps each row of W_dec at a cosine of at least 0.8 to its
    initial value. Controls of Korznikov et al. (arXiv 2602.14111): what they reach is not due to learned directions."""
    dead_after_tokens: PositiveInt | None = None
    """A feature that has not fired for more tokens than this is dead. None: a tenth of ``total_tokens``, at most 10 million (Gao et al.
    2024), and 10 million without ``total_tokens``."""
    normalize_activations: Literal["none", "expected_average_only_in"] = "none"
    """``expected_average_only_in``: train on ``input_scale * x``, whose mean norm is sqrt(d_in). Trained SAEs take ``x`` in both cases."""
    input_scale: PositiveFloat | None = None
    """``sqrt(d_in) / mean norm`` of the input; required by ``expected_average_only_in``."""
    input_mean: Annotated[tuple[float, ...], BeforeValidator(_tensor_to_list)] | None = None
    """Mean of the unscaled input `[d_in]`: the initial b_dec. None: zeros."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.learning_rate_warmup_fraction + self.learning_rate_decay_fraction > 1:
            raise ValueError("learning_rate_warmup_fraction and learning_rate_decay_fraction overlap: their sum may be at most 1")
        if self.normalize_activations == "none" and self.input_scale not in (None, 1.0):
            raise ValueError(f"input_scale = {self.input_scale} is not used with normalize_activations = none")
        return self

    @property
    def dead_after(self) -> int:
        """Value of ``dead_after_tokens``, or its default for this length of training."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return MOST_TOKENS_UNTIL_DEAD if self.total_tokens is None else min(max(self.total_tokens // 10, 1), MOST_TOKENS_UNTIL_DEAD)

    def check_input_is_known(self, d_in: int) -> None:
        """Raise ``ValueError`` if a required ``total_tokens`` or ``input_scale`` is missing, or if ``input_mean`` is not `[d_in]`."""
        fractions = ("learning_rate_warmup_fraction", "learning_rate_decay_fraction", "sparsity_warmup_fraction")
        used = [name for name in fractions if getattr(self, name) > 0]
        if used and self.total_tokens is None:
            raise ValueError(f"{' and '.join(used)} need total_tokens, of which they are a fraction")
        if self.normalize_activations != "none" and self.input_scale is None:
            raise ValueError(
                f"normalize_activations = {self.normalize_activations} needs input_scale = sqrt(d_in) / mean norm of the input"
            )
        if self.input_mean is not None and len(self.input_mean) != d_in:
            raise ValueError(f"input_mean has {len(self.input_mean)} entries, the SAEs have d_in = {d_in}")

    def learning_rate_at(self, start: int, end: int) -> float:
        """Return the learning rate of the step on the tokens from ``start`` to ``end``."""
        scale = _ramp(end, self.learning_rate_warmup_fraction, self.total_tokens)
        if self.total_tokens is not None and self.learning_rate_decay_fraction > 0:
            left = max(1 - start / self.total_tokens, 0.0)
            scale = min(scale, max(left / self.learning_rate_decay_fraction, self.learning_rate_floor))
        return self.learning_rate * scale

    def sparsity_scale_at(self, end: int) -> float:
        """Return the factor of the sparsity coefficient in the step that ends at token ``end``."""
        return _ramp(end, self.sparsity_warmup_fraction, self.total_tokens)


def _ramp(tokens: int, fraction: float, total_tokens: int | None) -> float:
    if total_tokens is None or fraction == 0:
        return 1.0
    return min(tokens / (fraction * total_tokens), 1.0)
