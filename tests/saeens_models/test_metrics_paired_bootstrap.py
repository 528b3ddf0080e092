"""The paired bootstrap over documents, against its definition written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import saeens_models as sm
from saeens_models.evaluation import evaluate_ensembles, evaluate_losses
from saeens_models.metrics import (
    LossBatch,
    NextTokenLoss,
    PairedBootstrap,
    Resampled,
    SumsByDocument,
    blocks_of,
    paired_bootstrap,
    paired_difference,
)

D_IN, DOCUMENTS, ROWS = 5, 12, 300


def _counts(n_documents: int) -> np.ndarray:
    """Count the documents of the seeded draws with numpy: `[n_draws, n_documents]`."""
    generator = torch.Generator().manual_seed(paired_bootstrap._SEED)
    drawn = torch.randint(n_documents, (paired_bootstrap.N_DRAWS, n_documents), generator=generator).numpy()
    return np.stack([np.bincount(row, minlength=n_documents) for row in drawn])


@pytest.fixture(scope="module")
def document() -> Tensor:
    """Documents of different lengths, in order; document 4 has no row."""
    of_rows = torch.arange(ROWS) ** 2 * DOCUMENTS // ROWS**2
    return torch.where(of_rows == 4, 5, of_rows).to(torch.int32)


@pytest.fixture(scope="module")
def x() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, D_IN, generator=generator) * torch.linspace(1, 3, ROWS)[:, None] + 50  # documents differ; mean beyond the spread
    x[:, 3] = 0.25  # without variance
    return x


@pytest.fixture(scope="module")
def ensembles() -> dict[str, sm.Ensemble]:
    saes = [sm.build_sae(sm.SAEConfig(architecture="jumprelu", d_in=D_IN, d_sae=8, init_seed=seed)) for seed in (1, 2, 3)]
    for sae in saes:
        sae.b_dec.data += 50
    return {"bagging": sm.Bagging(saes), "boosting": sm.Boosting(saes[:2])}


def test_ev_and_l0_on_draws_equal_those_of_the_drawn_documents_put_together(ensembles, x: Tensor, document: Tensor):
    evaluations = evaluate_ensembles(ensembles, x.split(70), document=document)
    counts, present = _counts(DOCUMENTS - 1), np.setdiff1d(np.arange(DOCUMENTS), [4])
    mean = x.double().mean(0)
    for name, ensemble in ensembles.items():
        for n, size in enumerate(evaluations[name].sizes, start=1):
            with torch.no_grad():
                z = ensemble[:n].encode(x)
                error = ((ensemble[:n].decode(z) - x).double() ** 2).numpy()
            deviation, active = ((x.double() - mean) ** 2).numpy(), (z != 0).sum(1).numpy()
            explained, l0 = size.resampled["explained_variance"], size.resampled["l0"]
            assert (explained.tokens, explained.documents) == (ROWS, DOCUMENTS - 1)
            assert explained.value == pytest.approx(size.reconstruction.explained_variance, abs=1e-9)
            assert l0.value == pytest.approx(size.sparsity.l0, rel=1e-12)
            for draw in (0, 1, 999):
                rows = np.concatenate(
                    [np.flatnonzero(document.numpy() == present[g]) for g in np.repeat(np.arange(DOCUMENTS - 1), counts[draw])]
                )
                varies = [0, 1, 2, 4]
                ratio = error[rows].sum(0)[varies] / deviation[rows].sum(0)[varies]
                assert explained.draws[draw].item() == pytest.approx(1 - ratio.mean(), abs=1e-5)
                assert l0.draws[draw].item() == pytest.approx(active[rows].mean(), rel=1e-12)


def test_results_do_not_depend_on_batches_nor_on_the_documents(ensembles, x: Tensor, document: Tensor):
    plain, whole = evaluate_ensembles(ensembles, [x]), evaluate_ensembles(ensembles, [x], document=document)
    for name in ensembles:
        for one, other in zip(plain[name].sizes, whole[name].sizes, strict=True):
            assert dict(one.reconstruction) == dict(other.reconstruction)
            assert one.resampled == {}


def test_the_interval_is_the_percentiles_of_paired_differences():
    rng = np.random.default_rng(1)
    errors, others, total = rng.gamma(2, 1, (9, 3)), rng.gamma(2, 1, (9, 3)), rng.gamma(9, 1, (9, 3))
    bootstrap = PairedBootstrap(torch.full((9,), 7))
    one, other = (bootstrap.mean_ratio(torch.from_numpy(each), torch.from_numpy(total)) for each in (errors, others))
    found, counts = paired_difference(one, other), _counts(9)
    draws = ((counts @ errors - counts @ others) / (counts @ total)).mean(1)
    assert found.difference == pytest.approx(((errors - others).sum(0) / total.sum(0)).mean(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), rel=1e-9)
    reverse = paired_difference(other, one)
    assert (reverse.low, reverse.high) == pytest.approx((-found.high, -found.low))  # pyright: ignore[reportOptionalOperand]


def test_the_interval_covers_the_true_difference():
    """Of 200 data sets of 60 documents, about 95 % of the intervals hold the true difference."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(200):
        of_document = rng.normal(0, 2, 60)  # shared by both: the difference is far less noisy than either
        one, other = (torch.from_numpy(np.stack([of_document + rng.normal(mean, 0.3, 60)], 1)) for mean in (5.1, 5.0))
        bootstrap = PairedBootstrap(torch.ones(60), n_draws=400)
        resampled = [bootstrap.mean_ratio(each, torch.ones(60, 1)) for each in (one, other)]
        _, low, high = paired_difference(resampled[0], resampled[1])
        assert low is not None and high is not None
        assert high - low < 0.4
        covered += low <= 0.1 <= high
    assert 180 <= covered <= 198


def test_the_loss_is_resampled_by_the_predictions_of_documents(ensembles, x: Tensor, document: Tensor):
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)).double()

    def batch(start: int) -> LossBatch:
        rows = slice(start, start + 100)

        def loss(x_hat: Tensor) -> NextTokenLoss:
            losses, sums = (x_hat.double() - 48).square().mean(1) * weights[rows], SumsByDocument(DOCUMENTS)
            sums.update(torch.stack([losses, torch.ones(100)], 1), document[rows].long())
            return NextTokenLoss(losses.sum().item(), 100, sums.compute())

        return LossBatch(x[rows], loss)

    found = evaluate_losses(ensembles, [batch(start) for start in (0, 100, 200)])
    counts, present = _counts(DOCUMENTS - 1), np.setdiff1d(np.arange(DOCUMENTS), [4])
    for n, measured in enumerate(found.resampled["bagging"], start=1):
        with torch.no_grad():
            x_hat = ensembles["bagging"][:n](x).double()
        added = (((x_hat - 48).square() - (x.double() - 48).square()).mean(1) * weights).numpy()
        assert measured.value == pytest.approx(added.mean(), abs=1e-4)
        assert measured.value == pytest.approx(found.added["bagging"][n - 1], rel=1e-12)
        sums = np.array([[added[document.numpy() == g].sum(), (document.numpy() == g).sum()] for g in present])
        above, below = (counts @ sums).T
        assert measured.draws.numpy() == pytest.approx(above / below, abs=1e-4)


def test_one_document_has_a_difference_and_no_interval():
    bootstrap = PairedBootstrap(torch.tensor([0, 5]))
    one, other = (bootstrap.mean_ratio(torch.tensor([[0.0], [value]]), torch.tensor([[0.0], [10.0]])) for value in (4.0, 1.0))
    assert paired_difference(one, other) == (pytest.approx(0.3), None, None)


def test_metrics_of_other_documents_are_not_compared():
    one, other = (Resampled(0.0, torch.zeros(10), 5, n) for n in (3, 4))
    with pytest.raises(ValueError, match="of 3 and of 4 documents"):
        paired_difference(one, other)


def test_documents_without_tokens_are_refused():
    with pytest.raises(ValueError, match="at least one document"):
        PairedBootstrap(torch.zeros(3))


def test_many_documents_are_joined_with_their_neighbours():
    few, many = blocks_of(torch.arange(700), 700), blocks_of(torch.arange(2500), 2500)
    assert few.tolist() == list(range(700))
    assert (many.diff() >= 0).all()
    assert set(many.bincount().tolist()) == {2, 3}
    assert len(many.bincount()) == 1000


def test_documents_of_fewer_tokens_than_there_are_are_refused(ensembles, x: Tensor, document: Tensor):
    with pytest.raises(ValueError, match="documents of 200 tokens"):
        evaluate_ensembles(ensembles, [x], document=document[:200])


def test_the_curve_over_tokens_has_the_metrics_of_the_first_tokens(ensembles, x: Tensor):
    evaluations = evaluate_ensembles(ensembles, x.split(70), curve_at=[18, 70, 150, ROWS])
    for name, ensemble in ensembles.items():
        for n, size in enumerate(evaluations[name].sizes, start=1):
            assert [point.tokens for point in size.token_curve] == [18, 70, 150, ROWS]
            for tokens, connectivity, dead in size.token_curve:
                fires = (ensemble[:n].encode(x[:tokens]) != 0).double()
                assert connectivity == pytest.approx(1 - ((fires.T @ fires) > 0).double().mean().item())
                assert dead == pytest.approx((fires.sum(0) == 0).double().mean().item())
            assert size.token_curve[-1].connectivity == size.connectivity
