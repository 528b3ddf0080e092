"""Evaluation of every ensemble size in one pass, against each size computed alone on all rows at once."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

import saeens_models as sm
from saeens_models import evaluation
from saeens_models.ensembles import Ensemble
from saeens_models.evaluation import EnsembleEvaluation, evaluate_ensembles, streaming_memory
from saeens_models.metrics import MemoryBudgetError

D_IN, ROWS = 6, 150


def _sae(seed: int, d_sae: int, **settings) -> sm.SAE:
    sae = sm.build_sae(sm.SAEConfig(d_in=D_IN, d_sae=d_sae, init_seed=seed, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(D_IN, generator=generator) / 4)
        sae.W_dec.mul_(torch.rand(d_sae, 1, generator=generator) + 0.5)
    return sae


@pytest.fixture(scope="module")
def x() -> Tensor:
    x = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(5))
    x[:, 2] = 0.25  # a dimension without variance
    return x


def _saes() -> list[sm.SAE]:
    """Ensembles with members of different widths and architectures."""
    return [_sae(1, 8, architecture="topk", k=2), _sae(2, 12, architecture="topk", k=3), _sae(3, 5, architecture="standard")]


@pytest.fixture(scope="module")
def ensembles() -> dict[str, Ensemble]:
    return {"bagging": sm.Bagging(_saes()), "boosting": sm.Boosting(_saes()), "one": sm.Bagging(_saes()[1:2])}


@pytest.fixture(scope="module")
def evaluations(ensembles: dict[str, Ensemble], x: Tensor) -> dict[str, EnsembleEvaluation]:
    return evaluate_ensembles(ensembles, [x])


@pytest.mark.parametrize(
    ("name", "n"), [("bagging", 1), ("bagging", 2), ("bagging", 3), ("boosting", 1), ("boosting", 2), ("boosting", 3), ("one", 1)]
)
def test_metrics_of_every_size_equal_those_of_that_ensemble_alone(ensembles, evaluations, x: Tensor, name: str, n: int):
    ensemble, size = ensembles[name][:n], evaluations[name].sizes[n - 1]
    with torch.no_grad():
        z = ensemble.encode(x)
        x_hat = ensemble.decode(z)
        W_dec = ensemble.W_dec
    assert (size.n_members, size.n_features) == (n, z.shape[1])
    errors, deviations = ((x - x_hat) ** 2).double(), ((x - x.mean(0)) ** 2).double()
    varies = torch.arange(D_IN) != 2
    assert size.reconstruction.mse == pytest.approx(errors.sum(1).mean().item(), rel=1e-5)
    assert size.reconstruction.explained_variance == pytest.approx((1 - errors.sum(0) / deviations.sum(0))[varies].mean().item(), abs=1e-5)
    assert size.reconstruction.constant_dimensions == 1
    assert size.reconstruction.tokens == ROWS
    fires = (z != 0).double()
    assert size.sparsity.l0 == pytest.approx(fires.sum(1).mean().item())
    assert size.sparsity.relative_sparsity == pytest.approx(fires.mean().item())
    assert size.sparsity.dead_features == pytest.approx((fires.sum(0) == 0).double().mean().item())
    torch.testing.assert_close(size.sparsity.density, fires.mean(0))
    assert size.connectivity == pytest.approx(1 - ((fires.T @ fires) > 0).double().mean().item())
    cosines = cosine_similarity(W_dec) - 2 * torch.eye(len(W_dec)).numpy()
    assert size.diversity == (cosines.max(axis=1) < 0.7).sum()


@pytest.mark.parametrize("name", ["bagging", "boosting"])
def test_members_are_measured_on_their_own_input(ensembles, evaluations, x: Tensor, name: str):
    saes, given = list(ensembles[name]), x
    for j, member in enumerate(evaluations[name].members):
        with torch.no_grad():
            z = saes[j].encode(given)
            given_hat = saes[j].decode(z)
        assert member.reconstruction.mse == pytest.approx(((given - given_hat) ** 2).sum(1).mean().item(), rel=1e-5)
        torch.testing.assert_close(member.sparsity.density, (z != 0).double().mean(0))
        others = torch.cat([sae.W_dec for k, sae in enumerate(saes) if k != j]).detach()
        expected = cosine_similarity(saes[j].W_dec.detach(), others).max(axis=1).mean()
        assert member.mean_max_cosine_to_other_members == pytest.approx(expected, abs=1e-6)
        given = given - given_hat if name == "boosting" else x


def test_an_ensemble_of_one_has_no_other_members(evaluations):
    assert [member.mean_max_cosine_to_other_members for member in evaluations["one"].members] == [None]


@pytest.mark.parametrize("rows", [1, 7, 64, ROWS])
def test_evaluation_does_not_depend_on_how_rows_are_batched(ensembles, evaluations, x: Tensor, rows: int):
    found = evaluate_ensembles(ensembles, iter(x.split(rows)))
    for name, expected in evaluations.items():
        for size, whole in zip(found[name].sizes, expected.sizes, strict=True):
            assert dict(size.reconstruction) == pytest.approx(dict(whole.reconstruction), rel=1e-5)
            assert size.sparsity[:3] == pytest.approx(whole.sparsity[:3])
            assert (size.connectivity, size.diversity) == (whole.connectivity, whole.diversity)
        for member, whole in zip(found[name].members, expected.members, strict=True):
            assert dict(member.reconstruction) == pytest.approx(dict(whole.reconstruction), rel=1e-5)


def test_evaluation_does_not_depend_on_the_ensembles_evaluated_together(ensembles, evaluations, x: Tensor):
    (alone,) = evaluate_ensembles({"boosting": ensembles["boosting"]}, [x]).values()
    assert [size.reconstruction for size in alone.sizes] == [size.reconstruction for size in evaluations["boosting"].sizes]


def test_metrics_carry_no_gradients(evaluations):
    assert not evaluations["bagging"].sizes[0].sparsity.density.requires_grad


def test_evaluation_without_rows_is_refused(ensembles):
    with pytest.raises(ValueError, match="no tokens"):
        evaluate_ensembles(ensembles, [])


def test_chunks_are_read_once(ensembles, x: Tensor):
    chunks = iter(x.split(50))
    evaluate_ensembles(ensembles, chunks)
    assert next(chunks, None) is None


def test_results_do_not_depend_on_the_memory_budget(ensembles, evaluations, x: Tensor):
    found = evaluate_ensembles(ensembles, [x], memory_budget=streaming_memory(ensembles.values()))
    for name, expected in evaluations.items():
        assert [size[:3] for size in found[name].sizes] == [size[:3] for size in expected.sizes]
        assert [size.connectivity for size in found[name].sizes] == [size.connectivity for size in expected.sizes]


def test_a_memory_budget_that_is_too_small_is_refused_at_once(ensembles):
    with pytest.raises(MemoryBudgetError, match="memory_budget must be at least"):
        evaluate_ensembles(ensembles, [], memory_budget=100)


def test_a_topk_sae_is_evaluated_without_a_dense_code(x: Tensor, monkeypatch: pytest.MonkeyPatch):
    saes = _saes()[:2]
    for sae in saes:
        monkeypatch.setattr(sae, "encode", None)
        monkeypatch.setattr(sae, "decode", None)
    assert len(evaluate_ensembles({"boosting": sm.Boosting(saes)}, [x])["boosting"].sizes) == 2


def test_rows_are_encoded_in_blocks(ensembles, evaluations, x: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluation, "_ENCODER_BYTES", {"cpu": 1})
    given: list[int] = []
    for sae in ensembles["bagging"]:
        reconstruct = sae.reconstruct
        monkeypatch.setattr(sae, "reconstruct", lambda rows, reconstruct=reconstruct: given.append(len(rows)) or reconstruct(rows))
    found = evaluate_ensembles(ensembles, [x])
    assert given == [64] * 6 + [ROWS - 128] * 3
    for name, expected in evaluations.items():
        for size, whole in zip(found[name].sizes, expected.sizes, strict=True):
            assert dict(size.reconstruction) == pytest.approx(dict(whole.reconstruction), rel=1e-5)
