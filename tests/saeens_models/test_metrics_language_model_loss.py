"""Next-token loss, and the share of it that reconstructions recover, through a language model of one matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import saeens_models as sm
from saeens_models import evaluation
from saeens_models.evaluation import evaluate_ensembles, evaluate_losses
from saeens_models.metrics import LossBatch, NextTokenLoss, ce_loss_recovered, language_model_loss, next_token_loss

D_IN, VOCABULARY = 6, 11
UNEMBEDDING = torch.randn(D_IN, VOCABULARY, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("elements", [1, 3 * VOCABULARY, 2**24])
def test_the_loss_is_the_cross_entropy_of_next_tokens_without_padding(monkeypatch, elements: int) -> None:
    monkeypatch.setattr(language_model_loss, "_ELEMENTS_PER_STEP", elements)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, VOCABULARY, generator=generator)
    tokens = torch.randint(VOCABULARY, (2, 5), generator=generator)
    is_text = torch.tensor([[True] * 5, [True, True, True, False, False]])
    log_p = logits.double().log_softmax(-1)
    expected = -sum(log_p[b, i, tokens[b, i + 1]] for b, i in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)])
    found = next_token_loss(logits, tokens, is_text)
    assert found.predictions == 6
    assert found.total == pytest.approx(float(expected), rel=1e-5)
    assert found.plus(NextTokenLoss(1.0, 2)) == (found.total + 1.0, 8, None)
    document = torch.tensor([[0, 0, 0, 2, 2], [2, 2, 2, 0, 0]])  # of the predicted token
    found = next_token_loss(logits, tokens, is_text, document, 3)
    of_documents = [
        -sum(log_p[b, i, tokens[b, i + 1]] for b, i in places) for places in ([(0, 0), (0, 1)], [(0, 2), (0, 3), (1, 0), (1, 1)])
    ]
    assert found.by_document is not None
    torch.testing.assert_close(
        found.by_document, torch.tensor([[of_documents[0], 2], [0, 0], [of_documents[1], 4]]).double(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(found.plus(found).by_document, 2 * found.by_document)


def test_ce_loss_recovered_is_one_for_activations_zero_for_zeros_and_nan_if_ablation_does_little() -> None:
    assert ce_loss_recovered(clean=2.0, ablated=6.0, reconstructed=2.0) == 1
    assert ce_loss_recovered(clean=2.0, ablated=6.0, reconstructed=6.0) == 0
    assert ce_loss_recovered(clean=2.0, ablated=6.0, reconstructed=3.0) == 0.75
    assert ce_loss_recovered(clean=2.0, ablated=2.049, reconstructed=2.01) is None
    assert ce_loss_recovered(clean=2.0, ablated=1.951, reconstructed=2.01) is None
    assert ce_loss_recovered(clean=2.0, ablated=2.1, reconstructed=2.2) == pytest.approx(-1)


def test_a_loss_without_predicted_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no token was predicted"):
        evaluate_losses({}, [])


def _batch(seed: int, n: int = 40) -> LossBatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D_IN, generator=generator) * 2
    tokens = (x @ UNEMBEDDING).argmax(1)  # the most likely next token

    def loss(rows: Tensor) -> NextTokenLoss:
        return NextTokenLoss(F.cross_entropy(rows @ UNEMBEDDING, tokens, reduction="sum").item(), n)

    return LossBatch(x, loss)


def _saes() -> list[sm.SAE]:
    return [sm.build_sae(sm.SAEConfig(architecture="topk", d_in=D_IN, d_sae=16, k=3, init_seed=seed)) for seed in (1, 2, 3)]


@pytest.mark.parametrize("encoder_bytes", [1, 2**24])
def test_ce_loss_recovered_of_every_size_equals_that_of_the_ensemble_alone(monkeypatch, encoder_bytes: int) -> None:
    monkeypatch.setattr(evaluation, "_ENCODER_BYTES", {"cpu": encoder_bytes})
    batches = [_batch(1, n=100), _batch(2, n=25)]
    ensembles = {"bagging": sm.Bagging(_saes()), "boosting": sm.Boosting(_saes())}
    mean = torch.arange(D_IN) / 2
    found = evaluate_losses(ensembles, iter(batches), mean)

    def mean_loss(replace) -> float:
        with torch.no_grad():
            return sum(loss(replace(x)).total for x, loss in batches) / 125

    clean, ablated = mean_loss(lambda x: x), mean_loss(torch.zeros_like)
    assert (found.clean, found.ablated, found.tokens) == pytest.approx((clean, ablated, 125))
    assert ablated == pytest.approx(torch.log(torch.tensor(VOCABULARY)).item(), rel=1e-6)  # zeros predict all tokens alike
    for name, ensemble in ensembles.items():
        expected = [(ablated - mean_loss(ensemble[:n])) / (ablated - clean) for n in (1, 2, 3)]
        assert found.recovered[name] == pytest.approx(expected, rel=1e-5)
        losses = [mean_loss(ensemble[:n]) for n in (1, 2, 3)]
        assert found.added[name] == pytest.approx([loss - clean for loss in losses], rel=1e-5)
        floor = mean_loss(mean.expand_as)
        assert found.recovered_from_mean[name] == pytest.approx([(floor - loss) / (floor - clean) for loss in losses], rel=1e-5)
        assert found.resampled == {}
    evaluations = found.fill_into(evaluate_ensembles(ensembles, [x for x, _ in batches]))
    sizes = evaluations["boosting"].sizes
    assert [size.ce_loss_recovered for size in sizes] == found.recovered["boosting"]
    assert [size.ce_loss_recovered_from_mean for size in sizes] == found.recovered_from_mean["boosting"]
    assert [size.ce_loss_added_nats for size in sizes] == found.added["boosting"]


def test_without_a_mean_there_is_one_floor() -> None:
    found = evaluate_losses({"one": sm.Bagging(_saes()[:1])}, [_batch(1)])
    assert (found.replaced_by_mean, found.recovered_from_mean) == (None, {"one": [None]})


def test_a_batch_is_encoded_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    saes, given = _saes(), []
    for sae in saes:
        reconstruct = sae.reconstruct
        monkeypatch.setattr(sae, "reconstruct", lambda rows, reconstruct=reconstruct: given.append(len(rows)) or reconstruct(rows))
    evaluate_losses({"boosting": sm.Boosting(saes)}, [_batch(1)])
    assert given == [40, 40, 40]
