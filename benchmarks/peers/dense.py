"""A TopK SAE in plain dense PyTorch, without kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saeens_models as sm
from benchmarks.peers import Workload

_CLIP_NORM = 1.0


class DenseTopK(nn.Module):
    """A dense encoder, ``torch.topk`` and a dense decoder, with the mathematics and initial weights of the given SAE of this project."""

    def __init__(self, initial: sm.SAE, k: int) -> None:
        super().__init__()
        self.k = k
        self.W_enc = nn.Parameter(initial.W_enc.detach().t().clone(memory_format=torch.contiguous_format))  # [d_sae, d_in]
        self.b_enc = nn.Parameter(initial.b_enc.detach().clone())
        self.W_dec = nn.Parameter(initial.W_dec.detach().clone())
        self.b_dec = nn.Parameter(initial.b_dec.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        pre = F.linear(x - self.b_dec, self.W_enc, self.b_enc)
        top = pre.topk(self.k, dim=-1, sorted=False)
        z = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        return z @ self.W_dec + self.b_dec


class DenseTrainer:
    """Adam (fused), gradients clipped, decoder rows kept at norm 1: as ``saeens_models`` trains by default."""

    def __init__(self, initial: sm.SAE, workload: Workload) -> None:
        self.sae = DenseTopK(initial, workload.k)
        self._optimiser = torch.optim.Adam(self.sae.parameters(), lr=workload.learning_rate, fused=True)
        self._normalise_decoder()

    def step(self, x: Tensor) -> None:
        loss = (self.sae(x) - x).square().sum(dim=-1).mean()
        loss.backward()
        W_dec = self.sae.W_dec
        assert W_dec.grad is not None
        W_dec.grad -= (W_dec.grad * W_dec.detach()).sum(dim=1, keepdim=True) * W_dec.detach()
        nn.utils.clip_grad_norm_(self.sae.parameters(), _CLIP_NORM)
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._normalise_decoder()

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x)

    @torch.no_grad()
    def _normalise_decoder(self) -> None:
        self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))
