"""Ensembles in SAELens: ``import saeens_models.interop.sae_lens``, then ``sae_lens.SAE.load_from_disk`` loads them.

SAELens is no dependency: this module alone imports it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import SAE, SAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from torch import Tensor, nn

from saeens_models.architectures import SAEConfig as MemberConfig
from saeens_models.architectures import sae_class
from saeens_models.ensembles import Bagging, Boosting
from saeens_models.interop.saelens_folder import ENSEMBLE_ARCHITECTURE

_FOLDED = {"standard": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag")}
"""Weights in the unit of the pre-activations, by architecture, of members whose codes follow the decoder's norm."""


@dataclass
class EnsembleSAEConfig(SAEConfig):
    """Configuration of an ensemble as one SAE of SAELens; ``d_sae`` counts the features of all members."""

    kind: str = "bagging"
    """bagging or boosting."""
    members: list[dict[str, Any]] = field(default_factory=list)
    """Configurations of the members, in order."""

    @classmethod
    def architecture(cls) -> str:
        return ENSEMBLE_ARCHITECTURE


class EnsembleSAE(SAE[EnsembleSAEConfig]):
    """An ensemble as one SAE of SAELens: codes are concatenated and scaled, and boosting encodes round by round.

    ``W_dec``, ``W_enc`` and ``b_dec`` are copies, put together from those of the members in ``ensemble``.
    """

    ensemble: Bagging | Boosting

    def initialize_weights(self) -> None:
        configs = [MemberConfig(**config) for config in self.cfg.members]
        with torch.device(self.device):
            saes = [sae_class(config.architecture)(config) for config in configs]
        self.ensemble = (Boosting(saes) if self.cfg.kind == "boosting" else Bagging(saes)).to(self.dtype)

    @property
    def W_dec(self) -> Tensor:
        return self.ensemble.W_dec

    @property
    def W_enc(self) -> Tensor:
        return self.ensemble.W_enc

    @property
    def b_dec(self) -> Tensor:
        return self.ensemble.b_dec

    def encode(self, x: Tensor) -> Tensor:
        return self.hook_sae_acts_post(self.ensemble.encode(self.process_sae_in(x)))

    def decode(self, feature_acts: Tensor) -> Tensor:
        decoded = self.hook_sae_recons(self.ensemble.decode(feature_acts))
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(decoded), self.d_head)

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Give decoder rows norm 1 and codes the norms, in place; return the norms `[d_sae]`.

        Raises NotImplementedError for members that select features, whose selection would change, unless all rows have norm 1.
        """
        norms = self.get_W_dec_norm()
        of_members = norms.split([sae.config.d_sae for sae in self.ensemble])
        for sae, of_member in zip(self.ensemble, of_members, strict=True):
            if torch.allclose(of_member, torch.ones_like(of_member), atol=1e-5):
                continue
            folded = _FOLDED.get(sae.config.architecture)
            if folded is None:
                raise NotImplementedError(
                    f"the norms of a {sae.config.architecture} member cannot be folded: it selects features by its codes"
                )
            sae.W_dec.div_(of_member[:, None])
            sae.W_enc.mul_(of_member)
            for name in folded:
                nn.Module.get_parameter(sae, name).mul_(of_member)
        return norms


if ENSEMBLE_ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ENSEMBLE_ARCHITECTURE, EnsembleSAE, EnsembleSAEConfig)
