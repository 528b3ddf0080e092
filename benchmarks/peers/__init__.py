"""The trainers of the peers, stepped as in their own training loops. No peer has to be installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import saeens_models as sm

_MODULES = {"SAELens": "saelens", "dictionary_learning": "dictionarylearning", "sparsify": "eleuther_sparsify"}


class Workload(NamedTuple):
    """An SAE to train, and its training settings."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    batch_tokens: int = 4096
    learning_rate: float = 3e-4
    dead_after_steps: int | None = None
    """Steps without firing after which a feature is dead; None is each side's default, which is longer than any benchmark."""
    trained_steps: int = 0
    """Steps of our training whose weights both sides start from; 0: initial weights."""

    def __str__(self) -> str:
        k = f", k {self.k}" if self.architecture == "topk" else ""
        trained = f" after {self.trained_steps} steps" if self.trained_steps else ""
        dead = f", auxiliary loss active (dead after {self.dead_after_steps} steps)" if self.dead_after_steps else ""
        return f"{self.architecture}{trained}, d_in {self.d_in}, d_sae {self.d_sae}{k}{dead}"


class PeerTrainer(Protocol):
    """One SAE of a peer in training."""

    def step(self, x: Tensor) -> None:
        """Do one step of the peer's training loop on a batch `[n, d_in]`."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the SAE's reconstruction, both `[n, d_in]`."""
        ...


@dataclass(frozen=True)
class PeerSetting:
    """Settings of a peer, and the settings of this project that compute the same."""

    peer: str
    name: str
    settings: str
    """All settings as text, for the tables."""
    build: Callable[[sm.SAE, Workload], PeerTrainer]
    """Return a trainer that starts from the weights of the given SAE of this project."""
    sae: Mapping[str, Any] = field(default_factory=dict)
    """Fields of our SAEConfig, without architecture, sizes and seed."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of our TrainingConfig, without the learning rate."""
    bfloat16: bool = False
    """True: our float32 products are computed in bfloat16, like the peer's; weights and sums stay in float32."""
    difference: str | None = None
    """Difference between the peer's computation and ours with these fields; None if there is none."""

    @property
    def label(self) -> str:
        return f"{self.peer}, {self.name}"


class Peers(NamedTuple):
    """The settings that can run here, and the peers that cannot, with the reason."""

    settings: list[PeerSetting]
    left_out: list[str]


def training_peers(workload: Workload) -> Peers:
    """Return every setting of every installed peer that has the workload's architecture."""
    settings: list[PeerSetting] = []
    left_out: list[str] = []
    for peer, module in _MODULES.items():
        try:
            settings += import_module(f"{__name__}.{module}").settings(workload)
        except ImportError as error:
            left_out.append(f"{peer}, which cannot be imported: {error}")
    return Peers(settings, left_out)


@contextmanager
def products_at(precision: str) -> Iterator[None]:
    """Set torch's precision of float32 products inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
