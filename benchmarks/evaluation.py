"""Stability and connectivity of wide dictionaries, against blocked scipy and dense products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

import saeens_models as sm
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.runner import Contender, Effort, Row, Stopwatch, compare
from saeens_models.sparse_code import SparseCode

TITLE = "Evaluation"
_D_IN = 512
_TOKENS_PER_BATCH = 4096
_FEATURES_PER_BLOCK = 1024


class _Codes(NamedTuple):
    n_features: int
    n_tokens: int
    l0: int


class _Size(NamedTuple):
    n_features: int
    codes: tuple[_Codes, ...]
    """Codes for the comparison with scipy."""
    dense_codes: _Codes
    """Codes for the comparison with the dense product: fewer tokens, because its cost grows with ``n_tokens * n_features^2``."""


class _Work(NamedTuple):
    """The computation of one side."""

    name: str
    settings: str
    result: Callable[[], float]


_FULL = _Size(32768, (_Codes(32768, 100_000, 64), _Codes(32768, 100_000, 512)), _Codes(32768, 2048, 64))
_QUICK = _Size(4096, (_Codes(4096, 8192, 32),), _Codes(4096, 2048, 32))
_ONCE = Effort(rounds=1, budget_seconds=0)
_SCIPY_MINUTES = 10**9
"""Entry products (tokens * l0^2) above which scipy takes minutes and is measured once."""


def run(options: Options) -> Section:
    """Measure connectivity at two densities, and stability of two runs."""
    size = _QUICK if options.quick else _FULL
    rows: list[Row] = []
    for codes in size.codes:
        effort = _ONCE if codes.n_tokens * codes.l0**2 > _SCIPY_MINUTES else options.effort
        rows.append(_compare_connectivity(codes, "blocked scipy", _SCIPY_SETTINGS, _scipy_connectivity, effort))
    rows.append(_compare_connectivity(size.dense_codes, "dense product", _DENSE_SETTINGS, _dense_connectivity, options.effort))
    rows.append(_compare_stability(size.n_features, options.effort))
    about = (
        "Codes whose features are drawn by frequencies that fall as 1/sqrt(rank); dictionaries of random directions. "
        "Both sides are checked to give the same."
    )
    notes = [
        "Connectivity: both sides are given the non-zero entries; blocked scipy and the dense product need all codes at once, ours takes "
        "them in batches."
    ]
    return Section(TITLE, about, rows, notes=notes)


_SCIPY_SETTINGS = f"scipy.sparse: C^T C, {_FEATURES_PER_BLOCK} rows at a time, counting non-zeros"
_DENSE_SETTINGS = f"torch: dense float32 C^T C, {_FEATURES_PER_BLOCK} rows at a time, counting non-zeros"


def _compare_connectivity(
    codes: _Codes, name: str, settings: str, connectivity: Callable[[list[SparseCode]], float], effort: Effort
) -> Row:
    batches = _draw(codes)

    def ours() -> float:
        metric = sm.metrics.ConnectivityMetric(codes.n_features)
        for batch in batches:
            metric.update(batch)
        return metric.compute()

    case = f"connectivity, {codes.n_features} features, {codes.n_tokens} tokens, L0 {codes.l0}"
    return _compare(case, _Work("saeens", "ConnectivityMetric", ours), _Work(name, settings, lambda: connectivity(batches)), effort)


def _compare_stability(n_features: int, effort: Effort) -> Row:
    generator = torch.Generator().manual_seed(0)
    W_decs = [torch.randn(n_features, _D_IN, generator=generator) for _ in range(2)]

    def dense() -> float:
        cosines = F.normalize(W_decs[0], dim=1) @ F.normalize(W_decs[1], dim=1).T
        return float(cosines.amax(1).clamp(min=0).double().mean() + cosines.amax(0).clamp(min=0).double().mean()) / 2

    def ours() -> float:
        return sum(sm.metrics.stability(W_decs)) / 2

    case = f"stability, two runs of {n_features} features, d_in {_D_IN}"
    theirs = _Work("dense product, whole", "torch: the whole matrix of cosines, its maxima over rows and columns", dense)
    return _compare(case, _Work("saeens", "metrics.stability", ours), theirs, effort)


def _draw(codes: _Codes) -> list[SparseCode]:
    """Return codes with l0 different features per token; the feature of rank i has weight 1 / sqrt(i)."""
    generator = torch.Generator().manual_seed(0)
    log_weights = -0.5 * torch.arange(1, codes.n_features + 1).log()
    batches = []
    for start in range(0, codes.n_tokens, _TOKENS_PER_BATCH):
        n_tokens = min(_TOKENS_PER_BATCH, codes.n_tokens - start)
        gumbel = -torch.empty(n_tokens, codes.n_features).exponential_(generator=generator).log_()
        top = gumbel.add_(log_weights).topk(codes.l0, sorted=False)
        batches.append(SparseCode.from_topk(torch.ones_like(top.values), top.indices, codes.n_features))
    return batches


def _scipy_connectivity(batches: list[SparseCode]) -> float:
    code = sparse.vstack([_as_csr(batch) for batch in batches], format="csc")
    transposed = code.T.tocsr()
    n_features = batches[0].n_features
    n_pairs = sum((transposed[first : first + _FEATURES_PER_BLOCK] @ code).nnz for first in range(0, n_features, _FEATURES_PER_BLOCK))
    return 1 - n_pairs / n_features**2


def _as_csr(batch: SparseCode) -> sparse.csr_array:
    ones = np.ones(len(batch.feature), dtype=np.float32)
    return sparse.csr_array((ones, batch.feature.numpy().astype(np.int32), batch.start.numpy()), shape=(batch.n_tokens, batch.n_features))


def _dense_connectivity(batches: list[SparseCode]) -> float:
    code = torch.cat([_as_dense(batch) for batch in batches])
    n_pairs = sum(
        int((code[:, first : first + _FEATURES_PER_BLOCK].T @ code).count_nonzero())
        for first in range(0, code.shape[1], _FEATURES_PER_BLOCK)
    )
    return 1 - n_pairs / code.shape[1] ** 2


def _as_dense(batch: SparseCode) -> Tensor:
    tokens = torch.arange(batch.n_tokens).repeat_interleave(batch.start.diff())
    dense = torch.zeros(batch.n_tokens, batch.n_features)
    dense[tokens, batch.feature] = 1
    return dense


def _compare(case: str, ours: _Work, theirs: _Work, effort: Effort) -> Row:
    """Time both sides. Raises ``ArithmeticError`` if their results differ."""
    results: dict[_Work, float] = {}

    def contender(work: _Work) -> Contender:
        def run() -> float:
            stopwatch = Stopwatch()
            with stopwatch:
                results[work] = work.result()
            return stopwatch.seconds

        return Contender(work.name, work.settings, run)

    ours.result()  # compiles kernels
    row = compare(case, contender(ours), contender(theirs), effort)
    if abs(results[ours] - results[theirs]) > 1e-5:
        raise ArithmeticError(f"{theirs.name} gives {results[theirs]}, this project {results[ours]}: not the same work")
    return row
