"""Functional stability: correlation of the activations of matched features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from saeens_models.metrics.matching import Matching
from saeens_models.metrics.sparsity import check_code
from saeens_models.sparse_code import SparseCode

_ELEMENTS_PER_STEP = 2**22


class MatchedCorrelationMetric:
    """Streaming metric: the mean Pearson correlation, over tokens, of the activations of matched features of two dictionaries.

    ``update(z_a, z_b)`` for the codes of each batch of tokens by both, then ``compute()``. Several matchings share the pass, such as those
    of ensembles of the first n members: features that a matching does not have are ignored. Keeps two float64 numbers per feature, and
    two numbers per feature and matching.
    """

    def __init__(self, matchings: Sequence[Matching], n_features_a: int, n_features_b: int) -> None:
        self._sizes = n_features_a, n_features_b
        self._matchings = matchings
        device = matchings[0].row_a.device if matchings else None
        self._partners = [torch.full((n_features_a,), -1, device=device).index_put_((each.row_a,), each.row_b) for each in matchings]
        self._products = [torch.zeros(n_features_a, dtype=torch.float64, device=device) for _ in matchings]
        self._sums = [torch.zeros(2, n, dtype=torch.float64, device=device) for n in self._sizes]  # of values and of their squares
        self._tokens = 0

    @torch.no_grad()
    def update(self, z_a: SparseCode, z_b: SparseCode) -> None:
        """Add the codes of the same tokens by both dictionaries, `[n, n_features]` each."""
        if z_a.n_tokens != z_b.n_tokens:
            raise ValueError(f"both codes are of the same tokens; got {z_a.n_tokens} and {z_b.n_tokens}")
        for code, n_features, sums in zip((z_a, z_b), self._sizes, self._sums, strict=True):
            check_code(code, n_features)
            values = code.value.double()
            sums.index_add_(1, code.feature, torch.stack([values, values.square()]))
        self._tokens += z_a.n_tokens
        step = max(1, _ELEMENTS_PER_STEP // z_b.n_features)
        for a, b in zip(z_a.split(step), z_b.split(step), strict=True):
            dense = b.value.new_zeros(b.shape).index_put_((_tokens_of(b), b.feature), b.value)
            token = _tokens_of(a)
            for partner, products in zip(self._partners, self._products, strict=True):
                others = partner[a.feature]
                matched = others >= 0
                product = a.value[matched].double() * dense[token[matched], others[matched]].double()
                products.index_add_(0, a.feature[matched], product)

    def compute(self) -> list[float | None]:
        """Return the mean correlation of each matching, over the pairs in which both features vary; None without such a pair."""
        return [self._mean(matching, products) for matching, products in zip(self._matchings, self._products, strict=True)]

    def _mean(self, matching: Matching, products: Tensor) -> float | None:
        n = self._tokens
        (sum_a, squares_a), (sum_b, squares_b) = self._sums[0][:, matching.row_a], self._sums[1][:, matching.row_b]
        covariance = products[matching.row_a] * n - sum_a * sum_b
        variances = (squares_a * n - sum_a.square(), squares_b * n - sum_b.square())
        vary = (variances[0] > 0) & (variances[1] > 0)
        if not vary.any():
            return None
        return (covariance[vary] / (variances[0][vary] * variances[1][vary]).sqrt()).mean().item()


def _tokens_of(code: SparseCode) -> Tensor:
    """Return the token of each entry."""
    return torch.arange(code.n_tokens, device=code.start.device).repeat_interleave(code.start.diff())
