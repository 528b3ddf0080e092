"""The peers' own trainers, stepped as each one's own training loop steps them. None of them has to be installed."""

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
    """What is trained."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    batch_tokens: int = 4096
    learning_rate: float = 3e-4
    dead_after_steps: int | None = None
    """Steps without firing after which a feature is dead; None is each side's default, which no benchmark runs long enough to reach."""
    trained_steps: int = 0
    """Steps that our own training takes before, whose weights both sides start from: 0 is initial weights."""

    def __str__(self) -> str:
        k = f", k {self.k}" if self.architecture == "topk" else ""
        trained = f" after {self.trained_steps} steps" if self.trained_steps else ""
        dead = f", auxiliary loss active (dead after {self.dead_after_steps} steps)" if self.dead_after_steps else ""
        return f"{self.architecture}{trained}, d_in {self.d_in}, d_sae {self.d_sae}{k}{dead}"


class PeerTrainer(Protocol):
    """One SAE of a peer in training."""

    def step(self, x: Tensor) -> None:
        """One step of the peer's own training loop on a batch `[n, d_in]`."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """The SAE's reconstruction, both `[n, d_in]`."""
        ...


@dataclass(frozen=True)
class PeerSetting:
    """One way of running a peer, and the settings of this project that compute the same."""

    peer: str
    name: str
    settings: str
    """In full, for the tables."""
    build: Callable[[sm.SAE, Workload], PeerTrainer]
    """A trainer that starts from the weights of the given SAE of this project."""
    sae: Mapping[str, Any] = field(default_factory=dict)
    """Fields of our SAEConfig beside architecture, sizes and seed."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of our TrainingConfig beside the learning rate."""
    bfloat16: bool = False
    """Whether we multiply in bfloat16, too, where we would in float32: weights and sums stay in float32."""
    difference: str | None = None
    """What the peer computes otherwise than this project does with these fields; None if nothing."""

    @property
    def label(self) -> str:
        return f"{self.peer}, {self.name}"


class Peers(NamedTuple):
    """The settings that can be run here, and which peers cannot, and why."""

    settings: list[PeerSetting]
    left_out: list[str]


def training_peers(workload: Workload) -> Peers:
    """Every setting of every installed peer that has the workload's architecture."""
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
    """Torch's precision of float32 products, within."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
