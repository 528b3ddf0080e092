"""SAEs and ensembles as SAEBench evaluates them: ``run_eval(..., [("my_ensemble", for_saebench(ensemble))], ...)``.

The protocol is that of SAEBench 0.6 (arXiv 2503.09532). Neither SAEBench nor SAELens is imported.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from saeens_models.architectures import SAE
from saeens_models.ensembles import Ensemble

_HOOK = re.compile(r"blocks\.(\d+)\.(?!.*hook_[qkvz]$).+")
"""Hooks of TransformerLens' models that give `[batch, position, d]`."""


@dataclass
class SAEBenchConfig:
    """Fields that SAEBench reads from the configuration of an SAE, and a description of the SAE for its results file.

    SAEBench adds fields of its own.
    """

    model_name: str
    """Name of the language model in TransformerLens."""
    hook_name: str
    """Hook of TransformerLens, such as ``blocks.8.hook_resid_post``."""
    hook_layer: int
    d_in: int
    d_sae: int
    """Number of features; of an ensemble, those of all members."""
    dtype: str
    """Number type of the weights, such as ``float32``."""
    architecture: str
    """Architecture of a single SAE; ``bagging`` or ``boosting``."""
    scaled: bool
    """False: a bag's codes are the members' own, not divided by their number."""
    members: list[dict[str, Any]]
    """Configurations of the members, in order; one of a single SAE."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Metadata of the SAE, or those that all members have alike."""
    context_size: int | None = None
    prepend_bos: bool = True
    normalize_activations: str = "none"
    hook_head_index: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class SAEBenchSAE(nn.Module):
    """An SAE or ensemble with the attributes that SAEBench asks for, and decoder rows of norm 1; see :func:`for_saebench`.

    | attribute | shape | |
    |---|---|---|
    | W_enc | `[d_in, d_sae]` | of matching pursuit the transposed W_dec; later rounds of boosting encode residuals |
    | b_enc | `[d_sae]` | of gated SAEs b_mag, of matching pursuit 0 |
    | W_dec | `[d_sae, d_in]` | |
    | b_dec | `[d_in]` | |

    All four are copies. ``z @ W_dec + b_dec`` is ``decode(z)``.
    """

    per_row: Tensor
    """Factors of the codes, `[d_sae]`."""

    def __init__(self, sae: SAE | Ensemble, cfg: SAEBenchConfig) -> None:
        super().__init__()
        self.sae = sae
        self.cfg = cfg
        self._member_weight = sae.member_weight if isinstance(sae, Ensemble) else 1.0
        norms = sae.W_dec.detach().norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)
        self.register_buffer("per_row", norms if cfg.scaled else norms / self._member_weight, persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.per_row.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the weights."""
        return self.per_row.dtype

    @property
    def W_dec(self) -> Tensor:
        return self.sae.W_dec.detach() / self.per_row[:, None]

    @property
    def W_enc(self) -> Tensor:
        return self.sae.W_enc.detach() * (self._member_weight * self.per_row)

    @property
    def b_enc(self) -> Tensor:
        biases = [getattr(each, "b_enc", getattr(each, "b_mag", each.W_dec.new_zeros(each.config.d_sae))) for each in _members(self.sae)]
        return torch.cat(biases).detach() * (self._member_weight * self.per_row)

    b_mag = b_enc  # SAEBench's name of it for the architecture "gated"

    @property
    def b_dec(self) -> Tensor:
        bias = self.sae.b_dec if isinstance(self.sae, Ensemble) else self.sae.decoder_bias
        return bias.detach().clone()

    def encode(self, x: Tensor) -> Tensor:
        """Return the code `[..., d_sae]` of ``x`` `[..., d_in]`, in the unit of ``x``: a code of 1 adds a vector of norm 1."""
        return self.sae.encode(x) * self.per_row

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return the reconstruction `[..., d_in]` of a code `[..., d_sae]`."""
        return self.sae.decode(feature_acts / self.per_row)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of ``x``, both `[..., d_in]`."""
        return self.sae(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.cfg.dtype = _dtype_name(self.per_row)
        return self


def for_saebench(sae: SAE | Ensemble, *, model_name: str | None = None, hook_name: str | None = None, scaled: bool = True) -> SAEBenchSAE:
    """Return an SAE or ensemble as an object that SAEBench's evaluations take.

    Codes are multiplied by the norms of the decoder rows, and the rows divided by them: SAEBench compares SAEs with rows of norm 1. This
    comes after any selection of features and is exact for every architecture.

    ``model_name``, ``hook_name``: language model and hook by their names in TransformerLens; None: those of the metadata.
    ``scaled``: False multiplies a bag's codes by the number of its members and divides its decoder rows by it, so that codes are the
    members' own. Probes with a penalty on their weights depend on the unit of the codes; sparse probing is such an evaluation.

    The weights are shared with ``sae``. SAEBench moves them to its device and number type in place.

    Raises ``TypeError`` for anything else, and ``ValueError`` if the name of model or hook is missing or the hook has no layer.
    """
    if not isinstance(sae, SAE | Ensemble):
        raise TypeError(f"an SAE or an ensemble is needed, such as saeens_models.interop.load returns; got {type(sae).__name__}")
    hook_name = _named(sae, "hook_name", hook_name)
    layer = _HOOK.fullmatch(hook_name)
    if layer is None:
        raise ValueError(
            f"hook_name is {hook_name!r}; SAEBench evaluates hooks of TransformerLens with one vector per token, such as "
            "blocks.8.hook_resid_post: for_saebench(sae, hook_name=...)"
        )
    members = _members(sae)
    cfg = SAEBenchConfig(
        model_name=_named(sae, "model_name", model_name),
        hook_name=hook_name,
        hook_layer=int(layer[1]),
        d_in=members[0].config.d_in,
        d_sae=sum(each.config.d_sae for each in members),
        dtype=_dtype_name(sae.b_dec),
        architecture=sae.kind if isinstance(sae, Ensemble) else sae.config.architecture,
        scaled=scaled,
        members=[each.config.model_dump(mode="json") for each in members],
        origin=dict(sae.metadata),
        context_size=sae.metadata.get("context_size"),
    )
    return SAEBenchSAE(sae, cfg)


def _named(sae: SAE | Ensemble, name: str, given: str | None) -> str:
    """Return ``given``, otherwise what the metadata have under ``name``. Raises ``ValueError`` without either."""
    value = sae.metadata.get(name) if given is None else given
    if not isinstance(value, str) or not value:
        raise ValueError(f"the metadata of the SAE have no {name}: for_saebench(sae, {name}=...), by its name in TransformerLens")
    return value


def _members(sae: SAE | Ensemble) -> list[SAE]:
    return list(sae) if isinstance(sae, Ensemble) else [sae]


def _dtype_name(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
