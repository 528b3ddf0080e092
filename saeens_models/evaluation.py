"""Evaluate ensembles of every size in one pass over held-out activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from saeens_models.ensembles import Ensemble
from saeens_models.metrics.coactivation import ConnectivityMetric
from saeens_models.metrics.dictionaries import diversity, mean_max_cosine
from saeens_models.metrics.reconstruction import Reconstruction, ReconstructionMetric
from saeens_models.metrics.sparsity import Sparsity, SparsityMetric


class SizeEvaluation(NamedTuple):
    """What the ensemble of the first ``n_members`` members does."""

    n_members: int
    n_features: int
    reconstruction: Reconstruction
    sparsity: Sparsity
    connectivity: float
    diversity: int


class MemberEvaluation(NamedTuple):
    """What one member does with what it is given: the activations, or for a boosting round the residual."""

    reconstruction: Reconstruction
    sparsity: Sparsity
    mean_max_cosine_to_other_members: float | None
    """None for an ensemble of one."""


class EnsembleEvaluation(NamedTuple):
    sizes: list[SizeEvaluation]
    """For n = 1 .. J."""
    members: list[MemberEvaluation]


@torch.no_grad()
def evaluate_ensembles(ensembles: Mapping[str, Ensemble], chunks: Iterable[Tensor]) -> dict[str, EnsembleEvaluation]:
    """Evaluate every size 1 .. J of each ensemble in one pass over ``chunks``, an iterable of activations `[n, d_in]`.

    Memory: the codes of one chunk, `[n, n_features]`, and what the metrics keep (see ``ConnectivityMetric``).
    """
    evaluators = {name: _Evaluator(ensemble) for name, ensemble in ensembles.items()}
    for x in chunks:
        for evaluator in evaluators.values():
            evaluator.update(x)
    return {name: evaluator.compute() for name, evaluator in evaluators.items()}


class _Evaluator:
    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble
        self.of_sizes = [ReconstructionMetric() for _ in ensemble]
        self.of_members = [ReconstructionMetric() for _ in ensemble]
        self.sparsity = SparsityMetric(ensemble.n_features)
        self.connectivity = ConnectivityMetric(ensemble.n_features)
        self.member_sparsity = [SparsityMetric(sae.config.d_sae) for sae in ensemble]

    def update(self, x: Tensor) -> None:
        codes: list[Tensor] = []
        for prefix, of_size, of_member, sparsity in zip(
            self.ensemble.prefix_reconstructions(x), self.of_sizes, self.of_members, self.member_sparsity, strict=True
        ):
            of_size.update(x, prefix.x_hat)
            of_member.update(prefix.given, prefix.given_hat)
            sparsity.update(prefix.z)
            codes.append(prefix.z)
        z = torch.cat(codes, dim=-1)
        self.sparsity.update(z)
        self.connectivity.update(z)

    def compute(self) -> EnsembleEvaluation:
        n_features = self.ensemble.offsets[1:]
        dictionary = self.ensemble.W_dec
        measured = zip(
            n_features,
            self.of_sizes,
            self.sparsity.compute_prefixes(n_features),
            self.connectivity.compute_prefixes(n_features),
            strict=True,
        )
        sizes = [
            SizeEvaluation(n, width, reconstruction.compute(), sparsity, connectivity, diversity(dictionary[:width]))
            for n, (width, reconstruction, sparsity, connectivity) in enumerate(measured, start=1)
        ]
        dictionaries = [sae.W_dec for sae in self.ensemble]
        members = [
            MemberEvaluation(
                self.of_members[j].compute(),
                self.member_sparsity[j].compute(),
                mean_max_cosine(dictionaries[j], dictionaries[:j] + dictionaries[j + 1 :]) if len(dictionaries) > 1 else None,
            )
            for j in range(len(dictionaries))
        ]
        return EnsembleEvaluation(sizes, members)
