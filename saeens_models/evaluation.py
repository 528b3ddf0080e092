"""Evaluation of ensembles of every size in one pass over held-out activations."""

from collections.abc import Collection, Iterable, Mapping, Sequence
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
from saeens_models.metrics.paired_bootstrap import PairedBootstrap, Resampled, SumsByDocument
from saeens_models.metrics.reconstruction import Moments, Reconstruction, ReconstructionMetric
from saeens_models.metrics.sparsity import Sparsity, SparsityMetric
from saeens_models.sparse_code import SparseCode

_ENCODER_BYTES = {"cpu": 2**24}
"""Bytes of pre-activations at a time, by device type: on a CPU they stay in the cache."""
_ENCODER_BYTES_ELSEWHERE = 2**28


class TokenPoint(NamedTuple):
    """Metrics that depend on the number of tokens, on the first tokens."""

    tokens: int
    """Number of tokens, from the first one on."""
    connectivity: float
    dead_features: float


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
    token_curve: Sequence[TokenPoint] = ()
    """One point for each number in ``evaluate_ensembles(..., curve_at)``."""
    ce_loss_recovered: float | None = None
    """Set by ``LossEvaluation.fill_into``, as the next two; None if it is not defined."""
    ce_loss_recovered_from_mean: float | None = None
    """The same with the mean activation as the floor instead of zeros."""
    ce_loss_added_nats: float | None = None
    """Next-token loss with the reconstruction minus that with the activations."""
    resampled: Mapping[str, Resampled] = {}
    """explained_variance and l0, and after ``fill_into`` ce_loss_added_nats, on draws of documents; empty without documents."""


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
    replaced_by_mean: float | None
    """Loss with the mean activation instead; None if it was not given."""
    recovered_from_mean: dict[str, list[float | None]]
    """As ``recovered``, with ``replaced_by_mean`` as the floor."""
    added: dict[str, list[float]]
    """Loss with the reconstruction minus ``clean``."""
    resampled: dict[str, list[Resampled]]
    """``added`` on draws of documents; empty if the batches have no sums by document."""

    def fill_into(self, evaluations: Mapping[str, EnsembleEvaluation]) -> dict[str, EnsembleEvaluation]:
        """Return the evaluations of the same ensembles with the fields of the next-token loss set."""
        filled = {}
        for name, evaluation in evaluations.items():
            sizes = [
                size._replace(ce_loss_recovered=recovered, ce_loss_recovered_from_mean=from_mean, ce_loss_added_nats=added)
                for size, recovered, from_mean, added in zip(
                    evaluation.sizes, self.recovered[name], self.recovered_from_mean[name], self.added[name], strict=True
                )
            ]
            if name in self.resampled:
                pairs = zip(sizes, self.resampled[name], strict=True)
                sizes = [size._replace(resampled={**size.resampled, "ce_loss_added_nats": added}) for size, added in pairs]
            filled[name] = evaluation._replace(sizes=sizes)
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
    *,
    document: Tensor | None = None,
    curve_at: Collection[int] = (),
) -> dict[str, EnsembleEvaluation]:
    """Evaluate every size 1 .. J of each ensemble in one pass over ``chunks``, an iterable of activations `[n, d_in]`.

    ``magnitude_step``, in the activations' unit, is the precision of description lengths; None leaves them out. ``document``, integers
    `[n_tokens]`: document of each token, or the block that it was joined into (``blocks_of``), for ``SizeEvaluation.resampled``: it takes
    8 bytes for each document, dimension and ensemble size. ``curve_at``: numbers of tokens for ``SizeEvaluation.token_curve``.

    Memory: up to ``memory_budget`` bytes for connectivity, by far the largest part, shared among the ensembles in proportion to their
    needs (see ``ConnectivityMetric`` for budgets below ``streaming_memory``); 16 MiB of pre-activations on a CPU, 256 MiB on a GPU, or
    those of 64 tokens if they take more; and a chunk with its reconstructions. Codes of TopK SAEs are never dense. The budget does not
    change the results.

    Raises ValueError without tokens and for values that are not finite, MemoryBudgetError for a budget that is too small.
    """
    moments = Moments()
    needed = streaming_memory(ensembles.values())
    documents = None if document is None else _Documents(document)
    evaluators = {
        name: _Evaluator(ensemble, moments, documents, memory_budget * streaming_memory([ensemble]) // needed, magnitude_step)
        for name, ensemble in ensembles.items()
    }
    for chunk in chunks:
        ends = sorted(n - moments.tokens for n in curve_at if 0 < n - moments.tokens < len(chunk))
        for x in chunk.tensor_split(ends):
            moments.update(x)
            of_rows = documents.update(x) if documents else None
            for evaluator in evaluators.values():
                evaluator.update(x, of_rows)
                if moments.tokens in curve_at:
                    evaluator.add_to_curve(moments.tokens)
    return {name: evaluator.compute() for name, evaluator in evaluators.items()}


@torch.no_grad()
def evaluate_losses(ensembles: Mapping[str, Ensemble], batches: Iterable[LossBatch], mean: Tensor | None = None) -> LossEvaluation:
    """Measure how much of the language model's loss every size 1 .. J of each ensemble recovers, in one pass over windows of text.

    ``mean`` `[d_in]`: mean of the training activations, the second floor. A batch's activations are encoded once for all sizes. Memory:
    that of ``evaluate_ensembles`` without connectivity, the J reconstructions of a batch, and 16 bytes for each document and ensemble size
    if the losses have sums by document. Raises ValueError if no token was predicted.
    """
    nothing, tokens = NextTokenLoss(0.0, 0), 0
    clean = ablated = replaced_by_mean = nothing
    of_sizes = {name: [nothing] * len(ensemble) for name, ensemble in ensembles.items()}
    for x, loss in batches:
        clean, ablated, tokens = clean.plus(loss(x)), ablated.plus(loss(torch.zeros_like(x))), tokens + len(x)
        if mean is not None:
            replaced_by_mean = replaced_by_mean.plus(loss(mean.to(x).expand_as(x)))
        for name, ensemble in ensembles.items():
            parts = [[each.x_hat for each in ensemble.prefix_reconstructions(rows)] for rows in _split_to_encode(ensemble, x)]
            x_hats = [torch.cat(of_size) for of_size in zip(*parts, strict=True)]
            of_sizes[name] = [before.plus(loss(x_hat)) for before, x_hat in zip(of_sizes[name], x_hats, strict=True)]
    from_mean = None if mean is None else replaced_by_mean.mean

    def recovered(floor: float | None) -> dict[str, list[float | None]]:
        return {
            name: [None if floor is None else ce_loss_recovered(clean.mean, floor, reconstructed.mean) for reconstructed in losses]
            for name, losses in of_sizes.items()
        }

    added = {name: [each.mean - clean.mean for each in losses] for name, losses in of_sizes.items()}
    resampled = (
        {name: _resampled_losses(clean.by_document, losses) for name, losses in of_sizes.items()} if clean.by_document is not None else {}
    )
    return LossEvaluation(clean.mean, ablated.mean, recovered(ablated.mean), tokens, from_mean, recovered(from_mean), added, resampled)


def _resampled_losses(clean: Tensor, losses: Sequence[NextTokenLoss]) -> list[Resampled]:
    """Return the loss in addition to ``clean``, sums and numbers of predictions by document `[n_documents, 2]`, on draws of documents."""
    bootstrap = PairedBootstrap(clean[:, 1])
    of_clean = bootstrap.mean_ratio(clean[:, :1], clean[:, 1:])
    measured = [bootstrap.mean_ratio(sums[:, :1], sums[:, 1:]) for each in losses if (sums := each.by_document) is not None]
    return [each._replace(value=each.value - of_clean.value, draws=each.draws - of_clean.draws) for each in measured]


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


class _Documents:
    """Tokens and squared deviations of x by document, and the draws of documents."""

    def __init__(self, document: Tensor) -> None:
        self._document, self._seen = document, 0
        self.n_documents = int(document.max()) + 1
        self._shift = torch.empty(0)
        self._sums, self._squares = SumsByDocument(self.n_documents), SumsByDocument(self.n_documents)

    def update(self, x: Tensor) -> Tensor:
        """Add the next rows x `[n, d_in]`; return their documents, int64 `[n]`. Raises ValueError for rows without a document."""
        rows = self._document[self._seen : self._seen + len(x)].to(x.device, torch.int64)
        if len(rows) < len(x):
            raise ValueError(f"there are documents of {len(self._document)} tokens, and more tokens")
        if not self._seen and len(x):
            self._shift = x[0].double()
        self._seen += len(x)
        shifted = x.double() - self._shift
        self._sums.update(shifted, rows)
        self._squares.update(shifted.square_(), rows)
        return rows

    def compute(self) -> tuple[PairedBootstrap, Tensor]:
        """Return draws, and the squares around the mean over all rows, float64 `[n_documents, d_in]`."""
        if not self._seen:
            raise ValueError("no tokens were seen")
        sums, squares = self._sums.compute(), self._squares.compute()
        tokens = torch.bincount(self._document[: self._seen].long(), minlength=self.n_documents).to(sums)
        mean = sums.sum(0) / self._seen
        return PairedBootstrap(tokens), squares - 2 * mean * sums + tokens[:, None] * mean.square()


class _Evaluator:
    def __init__(
        self, ensemble: Ensemble, moments: Moments, documents: _Documents | None, memory_budget: int, magnitude_step: float | None
    ) -> None:
        self.ensemble, self.documents = ensemble, documents
        n_documents = documents.n_documents if documents else 0
        self.errors = [SumsByDocument(n_documents) for _ in ensemble if documents]  # of the first n members
        self.active = [SumsByDocument(n_documents) for _ in ensemble if documents]  # of each member
        self.of_sizes = [ReconstructionMetric(moments, errors) for errors in self.errors or [None] * len(ensemble)]
        # the input of bagging members and of the first boosting round is x; the input of later rounds is a residual
        self.of_members = [ReconstructionMetric(None if ensemble.sequential and j else moments) for j in range(len(ensemble))]
        self.sparsity = SparsityMetric(ensemble.n_features)
        self.connectivity = ConnectivityMetric(ensemble.n_features, memory_budget)
        norms = [torch.linalg.vector_norm(sae.W_dec, dim=1) for sae in ensemble]
        self.description_length = None if magnitude_step is None else DescriptionLengthMetric(norms, magnitude_step)

        self.curves: list[list[TokenPoint]] = [[] for _ in ensemble]

    def update(self, x: Tensor, document: Tensor | None) -> None:
        parts = _split_to_encode(self.ensemble, x)
        documents = [None] * len(parts) if document is None else document.split([len(part) for part in parts])
        for rows, of_rows in zip(parts, documents, strict=True):
            codes: list[SparseCode] = []
            prefixes = self.ensemble.prefix_reconstructions(rows)
            for prefix, of_size, of_member in zip(prefixes, self.of_sizes, self.of_members, strict=True):
                of_size.update(rows, prefix.x_hat, of_rows)
                of_member.update(prefix.given, prefix.given_hat)
                codes.append(prefix.code)
                if of_rows is not None:
                    self.active[prefix.n_members - 1].update(prefix.code.start.diff()[:, None], of_rows)
            code = SparseCode.concatenate(codes)
            self.sparsity.update(code)
            self.connectivity.update(code)
            if self.description_length:
                self.description_length.update(code)

    def add_to_curve(self, tokens: int) -> None:
        widths = self.ensemble.offsets[1:]
        for curve, width, connectivity in zip(self.curves, widths, self.connectivity.compute_prefixes(widths), strict=True):
            curve.append(TokenPoint(tokens, connectivity, self.sparsity.compute(range(width)).dead_features))

    def resampled(self) -> list[dict[str, Resampled]]:
        """Return explained variance and L0 of each size on draws of documents; empty mappings without documents."""
        if self.documents is None:
            return [{} for _ in self.ensemble]
        bootstrap, squares = self.documents.compute()
        found, active = [], torch.zeros(1)
        for errors, of_member in zip(self.errors, self.active, strict=True):
            active = active.to(squares.device) + of_member.compute()
            unexplained = bootstrap.mean_ratio(errors.compute(), squares)
            explained = unexplained._replace(value=1 - unexplained.value, draws=1 - unexplained.draws)
            found.append({"explained_variance": explained, "l0": bootstrap.mean_ratio(active, bootstrap.tokens_of_documents[:, None])})
        return found

    def compute(self) -> EnsembleEvaluation:
        offsets = self.ensemble.offsets
        compared = compare_members([sae.W_dec for sae in self.ensemble])
        bits = self.description_length.compute_prefixes() if self.description_length else [None] * len(self.ensemble)
        sizes = [
            SizeEvaluation(n, width, reconstruction.compute(), self.sparsity.compute(range(width)), *others)
            for n, (width, reconstruction, *others) in enumerate(
                zip(
                    offsets[1:],
                    self.of_sizes,
                    self.connectivity.compute_prefixes(offsets[1:]),
                    compared.diversity,
                    bits,
                    self.curves,
                    strict=True,
                ),
                start=1,
            )
        ]
        sizes = [size._replace(resampled=resampled) for size, resampled in zip(sizes, self.resampled(), strict=True)]
        cosines = compared.mean_max_cosine or [None]
        members = [
            MemberEvaluation(reconstruction.compute(), self.sparsity.compute(range(*features)), cosine)
            for reconstruction, features, cosine in zip(self.of_members, pairwise(offsets), cosines, strict=True)
        ]
        return EnsembleEvaluation(sizes, members)
