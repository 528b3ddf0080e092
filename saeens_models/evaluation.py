"""Evaluation of ensembles of every size in one pass over held-out activations."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saeens_models.ensembles import Ensemble
from saeens_models.metrics import coactivation
from saeens_models.metrics.coactivation import ConnectivityMetric
from saeens_models.metrics.contexts import FeatureContexts, FeatureContextsMetric
from saeens_models.metrics.description_length import DescriptionLengthMetric
from saeens_models.metrics.dictionaries import compare_members
from saeens_models.metrics.features import FeatureActivity, FeatureActivityMetric
from saeens_models.metrics.language_model_loss import LossBatch, NextTokenLoss, ce_loss_recovered
from saeens_models.metrics.matched_correlation import MatchedCorrelationMetric
from saeens_models.metrics.matching import Matching
from saeens_models.metrics.reconstruction import Moments, Reconstruction, ReconstructionMetric
from saeens_models.metrics.sparsity import Sparsity, SparsityMetric
from saeens_models.sparse_code import SparseCode

_ENCODER_BYTES = {"cpu": 2**24}
"""Bytes of pre-activations at a time, by device type: on a CPU they stay in the cache."""
_ENCODER_BYTES_ELSEWHERE = 2**28


class SizeEvaluation(NamedTuple):
    """Metrics of the ensemble of the first ``n_members`` members."""

    n_members: int
    n_features: int
    reconstruction: Reconstruction
    sparsity: Sparsity
    connectivity: float
    diversity: int
    description_length: float | None = None
    """Bits per token; None without a step."""
    ce_loss_recovered: float | None = None
    """Set by ``LossEvaluation.fill_into``; None if it is not defined."""


class MemberEvaluation(NamedTuple):
    """Metrics of one member on its own input: the activations, or the residual for a boosting round."""

    reconstruction: Reconstruction
    sparsity: Sparsity
    mean_max_cosine_to_other_members: float | None
    """None for an ensemble of one."""


class EnsembleEvaluation(NamedTuple):
    """Metrics of every size and of every member of an ensemble."""

    sizes: list[SizeEvaluation]
    """Ensembles of the first n members, for n = 1 .. J."""
    members: list[MemberEvaluation]
    """Members in order."""


class LossEvaluation(NamedTuple):
    """Next-token loss of a language model with reconstructed activations, in nats per predicted token."""

    clean: float
    """Loss with the original activations."""
    ablated: float
    """Loss with zeros instead."""
    recovered: dict[str, list[float | None]]
    """``ce_loss_recovered`` of each ensemble's first n members, for n = 1 .. J."""
    tokens: int
    """Number of replaced activations."""

    def fill_into(self, evaluations: Mapping[str, EnsembleEvaluation]) -> dict[str, EnsembleEvaluation]:
        """Return the evaluations of the same ensembles with ``ce_loss_recovered`` set."""
        filled = {}
        for name, evaluation in evaluations.items():
            sizes = zip(evaluation.sizes, self.recovered[name], strict=True)
            filled[name] = evaluation._replace(sizes=[size._replace(ce_loss_recovered=value) for size, value in sizes])
        return filled


def streaming_memory(ensembles: Iterable[Ensemble]) -> int:
    """Return the smallest ``memory_budget``, in bytes, for ``evaluate_ensembles`` on any number of tokens."""
    return sum(coactivation.streaming_memory(ensemble.n_features) for ensemble in ensembles)


@torch.no_grad()
def evaluate_ensembles(
    ensembles: Mapping[str, Ensemble],
    chunks: Iterable[Tensor],
    memory_budget: int = coactivation.DEFAULT_MEMORY_BUDGET,
    magnitude_step: float | None = None,
) -> dict[str, EnsembleEvaluation]:
    """Evaluate every size 1 .. J of each ensemble in one pass over ``chunks``, an iterable of activations `[n, d_in]`.

    ``magnitude_step``, in the activations' unit, is the precision of description lengths; None leaves them out.

    Memory: up to ``memory_budget`` bytes for connectivity, by far the largest part, shared among the ensembles in proportion to their
    needs (see ``ConnectivityMetric`` for budgets below ``streaming_memory``); 16 MiB of pre-activations on a CPU, 256 MiB on a GPU, or
    those of 64 tokens if they take more; and a chunk with its reconstructions. Codes of TopK SAEs are never dense. The budget does not
    change the results.

    Raises ValueError without tokens and for values that are not finite, MemoryBudgetError for a budget that is too small.
    """
    moments = Moments()
    needed = streaming_memory(ensembles.values())
    evaluators = {
        name: _Evaluator(ensemble, moments, memory_budget * streaming_memory([ensemble]) // needed, magnitude_step)
        for name, ensemble in ensembles.items()
    }
    for x in chunks:
        moments.update(x)
        for evaluator in evaluators.values():
            evaluator.update(x)
    return {name: evaluator.compute() for name, evaluator in evaluators.items()}


@torch.no_grad()
def evaluate_losses(ensembles: Mapping[str, Ensemble], batches: Iterable[LossBatch]) -> LossEvaluation:
    """Measure how much of the language model's loss every size 1 .. J of each ensemble recovers, in one pass over windows of text.

    A batch's activations are encoded once for all sizes. Memory: that of ``evaluate_ensembles`` without connectivity, and the J
    reconstructions of a batch. Raises ValueError if no token was predicted.
    """
    nothing, tokens = NextTokenLoss(0.0, 0), 0
    clean = ablated = nothing
    of_sizes = {name: [nothing] * len(ensemble) for name, ensemble in ensembles.items()}
    for x, loss in batches:
        clean, ablated, tokens = clean.plus(loss(x)), ablated.plus(loss(torch.zeros_like(x))), tokens + len(x)
        for name, ensemble in ensembles.items():
            parts = [[each.x_hat for each in ensemble.prefix_reconstructions(rows)] for rows in _split_to_encode(ensemble, x)]
            x_hats = [torch.cat(of_size) for of_size in zip(*parts, strict=True)]
            of_sizes[name] = [before.plus(loss(x_hat)) for before, x_hat in zip(of_sizes[name], x_hats, strict=True)]
    recovered = {
        name: [ce_loss_recovered(clean.mean, ablated.mean, reconstructed.mean) for reconstructed in losses]
        for name, losses in of_sizes.items()
    }
    return LossEvaluation(clean.mean, ablated.mean, recovered, tokens)


@torch.no_grad()
def feature_activity(ensemble: Ensemble, chunks: Iterable[Tensor], n_top: int) -> list[FeatureActivity]:
    """Return the activity of each member's features with their ``n_top`` most active tokens, in one pass over ``chunks`` `[n, d_in]`.

    Memory: that of ``FeatureActivityMetric``, and that of ``evaluate_ensembles`` without connectivity.
    """
    metrics = [FeatureActivityMetric(sae.config.d_sae, n_top, sae.W_dec.device) for sae in ensemble]
    for x in chunks:
        for rows in _split_to_encode(ensemble, x):
            for metric, prefix in zip(metrics, ensemble.prefix_reconstructions(rows), strict=True):
                metric.update(prefix.code)
    return [metric.compute() for metric in metrics]


@torch.no_grad()
def feature_contexts(
    ensemble: Ensemble, chunks: Iterable[tuple[Tensor, Tensor]], window: int, n_contexts: int, radius: int
) -> list[FeatureContexts]:
    """Return the most active contexts of each member's features, in one pass over ``chunks``: activations `[n, d_in]`, places `[n]`.

    See ``FeatureContextsMetric`` for places, windows and contexts. Memory: that of ``FeatureContextsMetric``, and that of
    ``evaluate_ensembles`` without connectivity.
    """
    metrics = [FeatureContextsMetric(sae.config.d_sae, window, n_contexts, radius, sae.W_dec.device) for sae in ensemble]
    for x, place in chunks:
        parts = _split_to_encode(ensemble, x)
        for rows, places in zip(parts, place.split([len(part) for part in parts]), strict=True):
            for metric, prefix in zip(metrics, ensemble.prefix_reconstructions(rows), strict=True):
                metric.update(prefix.code, places)
    return [metric.compute() for metric in metrics]


@torch.no_grad()
def functional_stability(
    runs: Sequence[Ensemble], chunks: Iterable[Tensor], matchings: Mapping[tuple[int, int], Sequence[Matching]]
) -> dict[tuple[int, int], list[float | None]]:
    """Return the mean correlation of the activations of matched features of two runs, in one pass over ``chunks`` `[n, d_in]`.

    ``matchings``: for positions (a, b) of two runs, matchings of features of their dictionaries, such as one for the first n members of
    both, for each n. See ``MatchedCorrelationMetric``.
    """
    metrics = {(a, b): MatchedCorrelationMetric(of_pair, runs[a].n_features, runs[b].n_features) for (a, b), of_pair in matchings.items()}
    for x in chunks:
        for rows in min((_split_to_encode(run, x) for run in runs), key=lambda parts: len(parts[0])):
            codes = [SparseCode.concatenate([each.code for each in run.prefix_reconstructions(rows)]) for run in runs]
            for (a, b), metric in metrics.items():
                metric.update(codes[a], codes[b])
    return {pair: metric.compute() for pair, metric in metrics.items()}


def silent_windows(ensemble: Ensemble, windows: Iterable[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
    """Return for each member the windows on which each of the given features never fires: bool `[n_windows, n]`.

    ``windows``: activations `[n_rows, d_in]` each, encoded one at a time. ``features``: for each member int64 `[n]`, its own indices.
    """
    silent: list[list[Tensor]] = [[] for _ in ensemble]
    with torch.no_grad():
        for rows in windows:
            for of_member, prefix, chosen in zip(silent, ensemble.prefix_reconstructions(rows), features, strict=True):
                of_member.append(~torch.isin(chosen, prefix.code.feature))
    return [torch.stack(of_member) for of_member in silent]


def _split_to_encode(ensemble: Ensemble, x: Tensor) -> tuple[Tensor, ...]:
    """Return rows x `[n, d_in]` in parts whose pre-activations take bounded memory."""
    encoder_bytes = _ENCODER_BYTES.get(x.device.type, _ENCODER_BYTES_ELSEWHERE)
    widest = max(sae.config.d_sae for sae in ensemble)
    return x.split(max(64, encoder_bytes // (widest * x.element_size())))


class _Evaluator:
    def __init__(self, ensemble: Ensemble, moments: Moments, memory_budget: int, magnitude_step: float | None) -> None:
        self.ensemble = ensemble
        self.of_sizes = [ReconstructionMetric(moments) for _ in ensemble]
        # the input of bagging members and of the first boosting round is x; the input of later rounds is a residual
        self.of_members = [ReconstructionMetric(None if ensemble.sequential and j else moments) for j in range(len(ensemble))]
        self.sparsity = SparsityMetric(ensemble.n_features)
        self.connectivity = ConnectivityMetric(ensemble.n_features, memory_budget)
        norms = [torch.linalg.vector_norm(sae.W_dec, dim=1) for sae in ensemble]
        self.description_length = None if magnitude_step is None else DescriptionLengthMetric(norms, magnitude_step)

    def update(self, x: Tensor) -> None:
        for rows in _split_to_encode(self.ensemble, x):
            codes: list[SparseCode] = []
            prefixes = self.ensemble.prefix_reconstructions(rows)
            for prefix, of_size, of_member in zip(prefixes, self.of_sizes, self.of_members, strict=True):
                of_size.update(rows, prefix.x_hat)
                of_member.update(prefix.given, prefix.given_hat)
                codes.append(prefix.code)
            code = SparseCode.concatenate(codes)
            self.sparsity.update(code)
            self.connectivity.update(code)
            if self.description_length:
                self.description_length.update(code)

    def compute(self) -> EnsembleEvaluation:
        offsets = self.ensemble.offsets
        compared = compare_members([sae.W_dec for sae in self.ensemble])
        bits = self.description_length.compute_prefixes() if self.description_length else [None] * len(self.ensemble)
        measured = zip(offsets[1:], self.of_sizes, self.connectivity.compute_prefixes(offsets[1:]), compared.diversity, bits, strict=True)
        sizes = [
            SizeEvaluation(n, width, reconstruction.compute(), self.sparsity.compute(range(width)), connectivity, diversity, length)
            for n, (width, reconstruction, connectivity, diversity, length) in enumerate(measured, start=1)
        ]
        cosines = compared.mean_max_cosine or [None]
        members = [
            MemberEvaluation(reconstruction.compute(), self.sparsity.compute(range(*features)), cosine)
            for reconstruction, features, cosine in zip(self.of_members, pairwise(offsets), cosines, strict=True)
        ]
        return EnsembleEvaluation(sizes, members)
