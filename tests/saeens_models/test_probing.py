"""Concept detection and spurious correlation removal against dense computations, scikit-learn and a plain training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import saeens_models as sm
from saeens_models.ensembles import Ensemble
from saeens_models.probing import (
    N_ABLATED,
    RAW,
    ConceptProbe,
    ConceptScore,
    CorrelationTask,
    Dictionary,
    LabelledTexts,
    PooledTexts,
    Quadrants,
    TextBatch,
    detect_concepts,
    one_against_the_others,
    remove_correlations,
    scr,
    train_probes,
)

D_IN = 6
N_TEXTS = 96
PAIRS = [(True, True), (True, False), (False, True), (False, False)]


def _sae(seed: int, d_sae: int = 20, architecture: str = "topk", **own: Any) -> sm.SAE:
    own = own or ({"k": 3} if architecture == "topk" else {"l1_coefficient": 0.1})
    sae = sm.build_sae(sm.SAEConfig(architecture=architecture, d_in=D_IN, d_sae=d_sae, init_seed=seed, **own))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(d_sae, generator=generator) * 0.3)
        sae.b_dec.copy_(torch.randn(D_IN, generator=generator) * 0.3)
    return sae


@pytest.fixture(scope="module")
def ensembles() -> dict[str, Ensemble]:
    return {
        "bag": sm.Bagging([_sae(seed) for seed in (1, 2, 3)]),
        "boost": sm.Boosting([_sae(seed) for seed in (4, 5)]),
        "wide": sm.Bagging([_sae(6, d_sae=50, architecture="standard")]),
    }


def _texts() -> list[Tensor]:
    """Texts of 1 to 9 tokens; the first two bits of a text's number move its activations, one more than the other."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for number in range(N_TEXTS):
        x = torch.randn(1 + number % 9, D_IN, generator=generator)
        x[:, 0] += 1.0 * (number & 1)
        x[:, 1] += 0.7 * (number >> 1 & 1)
        texts.append(x)
    return texts


class Batches:
    """The texts in batches of seven; counts the reads of each batch."""

    def __init__(self, texts: Sequence[Tensor]) -> None:
        self.batches = [texts[first : first + 7] for first in range(0, len(texts), 7)]
        self.asked = [0] * len(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> TextBatch:
        self.asked[index] += 1
        batch = self.batches[index]
        return TextBatch(torch.cat(list(batch)), torch.tensor([len(text) for text in batch]))


def _dense(ensembles: dict[str, Ensemble], texts: Sequence[Tensor]) -> np.ndarray:
    """Pooled codes and activations `[n_texts, n_columns]`, text by text, in float64 from codes that are never sparse."""
    rows = []
    with torch.no_grad():
        for x in texts:
            codes = [ensemble.encode(x, scaled=False).double().mean(0) for ensemble in ensembles.values()]
            rows.append(torch.cat([*codes, x.double().mean(0)]))
    return torch.stack(rows).numpy()


def _of(pooled: PooledTexts, name: str, n_members: int) -> Dictionary:
    (found,) = [each for each in pooled.dictionaries if (each.name, each.n_members) == (name, n_members)]
    return found


# pooling


@pytest.mark.parametrize("memory_budget", [0, 5000, 2**30])
def test_pooled_texts_equal_means_of_dense_codes_and_of_activations(ensembles: dict[str, Ensemble], memory_budget: int):
    texts, expected = _texts(), _dense(ensembles, _texts())
    pooled = PooledTexts(ensembles, Batches(texts), memory_budget)
    for _ in range(2):
        firsts, values = zip(*pooled, strict=True)
        assert list(firsts) == list(range(0, N_TEXTS, 7))
        np.testing.assert_allclose(torch.cat(values).numpy(), expected, atol=1e-5)
    groups = [torch.tensor([3, 95, 8]), torch.arange(40)]
    np.testing.assert_allclose(pooled.means(groups).numpy(), [expected[group.numpy()].mean(0) for group in groups], atol=1e-5)
    columns = torch.tensor([119, 0, 64])
    (selected,) = pooled.select([(torch.tensor([90, 2, 50]), columns)])
    np.testing.assert_allclose(selected.numpy(), expected[[90, 2, 50]][:, columns.numpy()], atol=1e-5)


def test_members_of_several_architectures_are_pooled_by_their_own_encoders():
    own = {"topk": {"k": 3}, "jumprelu": {"l0_coefficient": 0.1}, "standard": {"l1_coefficient": 0.1}}
    saes = [_sae(seed, 10 + seed, architecture, **fields) for seed, (architecture, fields) in enumerate(own.items())]
    mixed = {"bag": sm.Bagging(saes), "boost": sm.Boosting(saes)}
    values = torch.cat([values for _, values in PooledTexts(mixed, Batches(_texts()))])
    np.testing.assert_allclose(values.numpy(), _dense(mixed, _texts()), atol=1e-5)


def test_probed_dictionaries_are_all_sizes_of_all_ensembles_and_the_activations(ensembles: dict[str, Ensemble]):
    pooled = PooledTexts(ensembles, Batches(_texts()))
    sizes = [(each.name, each.n_members, each.columns, each.scale) for each in pooled.dictionaries]
    assert sizes == [
        ("bag", 1, range(20), 1.0),
        ("bag", 2, range(40), 1 / 2),
        ("bag", 3, range(60), 1 / 3),
        ("boost", 1, range(60, 80), 1.0),
        ("boost", 2, range(60, 100), 1.0),
        ("wide", 1, range(100, 150), 1.0),
        (RAW, 1, range(150, 156), 1.0),
    ]
    w = torch.randn(D_IN, 2)
    torch.testing.assert_close(_of(pooled, "bag", 2).decoded(w), ensembles["bag"][:2].W_dec.detach() @ w)
    features = torch.tensor([25, 3, 39, 0])
    torch.testing.assert_close(_of(pooled, "boost", 2).directions(features), ensembles["boost"].W_dec.detach()[features])


def test_codes_within_the_memory_budget_are_computed_once(ensembles: dict[str, Ensemble]):
    for memory_budget, expected in ((2**30, {1}), (0, {3}), (10_000, {1, 3})):
        batches = Batches(_texts())
        pooled = PooledTexts(ensembles, batches, memory_budget)
        for _ in range(3):
            list(pooled)
        assert set(batches.asked) == expected


# concept detection


def _probe(bit: int, start: int = 0) -> ConceptProbe:
    """Texts whose number has a bit set, against the others; every third is a test text."""
    numbers = torch.arange(start, N_TEXTS)
    positive = (numbers >> bit & 1).bool()
    is_test = numbers // 4 % 3 == 0
    return ConceptProbe(LabelledTexts(numbers[~is_test], positive[~is_test]), LabelledTexts(numbers[is_test], positive[is_test]))


def _reference_accuracy(dense: np.ndarray, probe: ConceptProbe, columns: range, n: int, scale: float) -> float:
    """Compute k-sparse probing directly: all features, numpy's sort, scikit-learn's logistic regression."""
    train, test = (dense[split.texts.numpy()][:, columns.start : columns.stop] * scale for split in probe)
    y_train, y_test = (split.positive.numpy() for split in probe)
    difference = np.abs(train[y_train].mean(0) - train[~y_train].mean(0))
    best = np.argsort(-difference, kind="stable")[:n]
    return LogisticRegression(penalty="l2", C=1.0, max_iter=1000).fit(train[:, best], y_train).score(test[:, best], y_test)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_concept_scores_equal_those_of_scikit_learn_on_dense_codes(ensembles: dict[str, Ensemble]):
    pooled, dense = PooledTexts(ensembles, Batches(_texts()), memory_budget=3000), _dense(ensembles, _texts())
    probes = [_probe(0), _probe(1, start=16)]
    for probe, scores in zip(probes, detect_concepts(pooled, probes), strict=True):
        for score in scores:
            scale = score.dictionary.scale if score.scaled else 1.0
            expected = _reference_accuracy(dense, probe, score.dictionary.columns, score.n_features, scale)
            assert score.accuracy == pytest.approx(expected, abs=1e-9), score
        measured = {(score.dictionary.name, score.dictionary.n_members, score.n_features, score.scaled) for score in scores}
        assert measured == {
            *(("bag", 1, n, False) for n in (1, 2, 5)),
            *(("bag", 2, n, scaled) for n in (1, 2, 4, 5, 10) for scaled in (False, True)),
            *(("bag", 3, n, scaled) for n in (1, 2, 3, 5, 6, 15) for scaled in (False, True)),
            *(("boost", 1, n, False) for n in (1, 2, 5)),
            *(("boost", 2, n, False) for n in (1, 2, 4, 5, 10)),
            *(("wide", 1, n, False) for n in (1, 2, 5)),
            *((RAW, 1, n, False) for n in (1, 2, 5, 6)),
        }


def test_near_duplicates_are_counted_once():
    sae, other = _sae(1), _sae(2)
    twins, alone = sm.Bagging([sae, sae]), sm.Bagging([sae, other])
    pooled = PooledTexts({"twins": twins, "alone": alone}, Batches(_texts()))
    (scores,) = detect_concepts(pooled, [_probe(0)])

    def score(name: str, n_members: int, n: int) -> ConceptScore:
        dictionary = _of(pooled, name, n_members)
        return next(s for s in scores if s.dictionary == dictionary and s.n_features == n and not s.scaled)

    for n in (2, 10):
        assert score("twins", 2, n).n_distinct <= n / 2  # every feature comes twice, and some features of an SAE may be alike
    for n in (1, 2, 5):
        assert score("twins", 2, n).accuracy_distinct == score("alone", 1, n).accuracy_distinct
        directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1).numpy()
        assert score("alone", 1, n).n_distinct == n - _n_near_an_earlier_one(directions, pooled, n)


def _n_near_an_earlier_one(directions: np.ndarray, pooled: PooledTexts, n: int) -> int:
    train = _probe(0).train
    means = pooled.means([train.texts[train.positive], train.texts[~train.positive]]).numpy()
    kept: list[int] = []
    for feature in np.argsort(-np.abs(means[0] - means[1])[:20], kind="stable")[:n]:
        if all(directions[feature] @ directions[earlier] < 0.7 for earlier in kept):
            kept.append(feature)
    return n - len(kept)


@given(sizes=st.lists(st.integers(4, 12), min_size=2, max_size=5), seed=st.integers(0, 5))
def test_a_label_is_probed_against_as_many_texts_spread_evenly_over_the_other_labels(sizes: list[int], seed: int):
    sizes[0] = 4 * (len(sizes) - 1)  # so that each of the others has its share
    bounds = np.cumsum([0, *sizes])
    texts = {str(i): torch.arange(bounds[i], bounds[i + 1]) for i in range(len(sizes))}
    drawn = one_against_the_others(texts, "0", torch.Generator().manual_seed(seed))
    assert drawn.texts[drawn.positive].tolist() == list(range(sizes[0]))
    negative = drawn.texts[~drawn.positive]
    assert len(negative.unique()) == len(negative) == sizes[0]
    assert [int(((negative >= bounds[i]) & (negative < bounds[i + 1])).sum()) for i in range(1, len(sizes))] == [4] * (len(sizes) - 1)
    again = one_against_the_others(texts, "0", torch.Generator().manual_seed(seed))
    assert torch.equal(again.texts, drawn.texts)


def test_a_probe_needs_enough_texts_of_other_labels():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="texts of another label"):
        one_against_the_others({"a": torch.arange(4)}, "a", generator)
    with pytest.raises(ValueError, match=r"'a' has 6 texts, so each of the other labels needs 3"):
        one_against_the_others({"a": torch.arange(6), "b": torch.arange(6, 9), "c": torch.arange(9, 11)}, "a", generator)


# spurious correlation removal


def test_scr_is_the_share_of_the_accuracy_gap_and_zero_for_small_gaps():
    assert scr(0.8, biased := 0.6, 0.9) == pytest.approx(2 / 3)
    assert scr(0.5, biased, 0.9) == pytest.approx(-1 / 3)
    assert scr(0.8, 0.8999, 0.9) == 0  # the clean probe is better by less than 0.001
    assert scr(0.8, 0.95, 0.9) == 0


def _reference_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor], orders: list[Tensor]
) -> torch.nn.Linear:
    """SAEBench's loop for one probe, with autograd."""
    (x, y), (x_test, y_test) = train, test
    probe = torch.nn.Linear(x.shape[1], 1)
    with torch.no_grad():
        probe.weight.copy_(start[0][None])
        probe.bias.copy_(start[1][None])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3)
    best, best_accuracy = torch.nn.Linear(x.shape[1], 1), 0.0
    for order in orders:
        for first in range(0, len(x), 16):
            chosen = order[first : first + 16]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(probe(x[chosen]).squeeze(-1), y[chosen].float())
            loss = loss + 1e-3 * probe.weight.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = ((probe(x_test).squeeze(-1) > 0) == y_test).float().mean().item()
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            best.load_state_dict(probe.state_dict())
    return best


def test_probes_equal_those_of_a_plain_training_loop():
    generator = torch.Generator().manual_seed(3)
    n, p = 100, 3
    x, x_test = torch.randn(n, p, D_IN, generator=generator), torch.randn(40, p, D_IN, generator=generator)
    y, y_test = ((each[:, :, 0] + 0.5 * each[:, :, 1]) > 0.1 for each in (x, x_test))
    probes = train_probes(x, y, x_test, y_test, seed=7)
    draws = torch.Generator().manual_seed(7)
    bound = D_IN**-0.5
    weight = torch.empty(p, D_IN).uniform_(-bound, bound, generator=draws)
    bias = torch.empty(p).uniform_(-bound, bound, generator=draws)
    orders = [torch.randperm(n, generator=draws) for _ in range(20)]
    for i in range(p):
        expected = _reference_probe((x[:, i], y[:, i]), (x_test[:, i], y_test[:, i]), (weight[i], bias[i]), orders)
        torch.testing.assert_close(probes.weight[:, i], expected.weight.detach()[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(probes.bias[i], expected.bias.detach()[0], atol=1e-5, rtol=1e-4)


def _quadrants(numbers: range) -> Quadrants:
    """Return quadrants by the first two bits of a text's number: the target and the spurious attribute."""
    q = len(numbers) // 4
    of_pair = [[n for n in numbers if (bool(n & 1), bool(n >> 1 & 1)) == pair] for pair in PAIRS]
    both, only_target, only_spurious, neither = of_pair
    return Quadrants(*(torch.tensor(each) for each in (both[:q], only_target[: q // 2], only_spurious[: q // 2], neither[:q])))


TASK = CorrelationTask(_quadrants(range(64)), _quadrants(range(64, 96)))


def _ablated_text(dictionary: Dictionary, x: Tensor, zeroed: list[int]) -> Tensor:
    """Return the mean over tokens of the reconstruction without some features, plus the error of the full one."""
    if dictionary.ensemble is None:
        x = x.clone()
        x[:, zeroed] = 0
        return x.mean(0)
    with torch.no_grad():
        z = dictionary.ensemble.encode(x)
        error = x - dictionary.ensemble.decode(z)
        z[:, zeroed] = 0
        return (dictionary.ensemble.decode(z) + error).mean(0)


def test_scr_scores_equal_those_of_reconstructions_without_the_features(ensembles: dict[str, Ensemble]):
    texts, dense = _texts(), _dense(ensembles, _texts())
    pooled = PooledTexts(ensembles, Batches(texts), memory_budget=3000)
    (scores,) = remove_correlations(pooled, [TASK], seed=1)
    x = torch.stack([text.mean(0) for text in texts])

    def examples(quadrants: Quadrants) -> tuple[Tensor, Tensor]:
        q = len(quadrants.only_target)
        balanced = torch.cat([each[:q] for each in quadrants])
        agree = torch.cat([quadrants.both, quadrants.neither])
        labels = torch.tensor(PAIRS).repeat_interleave(q, 0)
        return torch.stack([x[balanced], x[balanced], x[agree]], 1), torch.cat([labels, (torch.arange(4 * q) < 2 * q)[:, None]], 1)

    probes = train_probes(*examples(TASK.train), *examples(TASK.test), seed=1)
    q = len(TASK.test.only_target)
    test = torch.cat([each[:q] for each in TASK.test]).tolist()
    labels = torch.tensor(PAIRS).repeat_interleave(q, 0)
    train = [dense[each[: len(TASK.train.only_target)].numpy()].mean(0) for each in TASK.train]
    biased = [_accuracy(x[test], probes.weight[:, 2], probes.bias[2], labels[:, attribute]) for attribute in (0, 1)]
    clean = [_accuracy(x[test], probes.weight[:, a], probes.bias[a], labels[:, a]) for a in (0, 1)]
    for score in scores:
        dictionary, attribute = score.dictionary, int(score.reversed)
        W_dec = (torch.eye(D_IN) if dictionary.ensemble is None else dictionary.ensemble.W_dec.detach()).double().numpy()
        both, only_target, only_spurious, neither = (each[dictionary.columns.start : dictionary.columns.stop] for each in train)
        removed = (both + only_target - only_spurious - neither) if score.reversed else (both + only_spurious - only_target - neither)
        effects = np.abs(removed / 2 * (W_dec @ probes.weight[:, 1 - attribute].double().numpy()))
        zeroed = [int(f) for f in np.argsort(-effects, kind="stable")[: score.n_ablated] if effects[f] > 0]
        ablated = torch.stack([_ablated_text(dictionary, texts[number], zeroed) for number in test])
        accuracies = [
            _accuracy(part, probes.weight[:, 2], probes.bias[2], of_part)
            for part, of_part in zip(ablated.chunk(4), labels[:, attribute].chunk(4), strict=True)
        ]
        assert score.accuracy_ablated == pytest.approx(np.mean(accuracies)), score
        assert score.worst_group_accuracy == pytest.approx(min(accuracies))
        assert (score.accuracy_biased, score.accuracy_clean) == pytest.approx((biased[attribute], clean[attribute]))
        assert score.scr == pytest.approx(scr(float(np.mean(accuracies)), biased[attribute], clean[attribute]))
        assert score.is_scr_metric == (biased[attribute] < biased[1 - attribute])
    numbers = {(s.dictionary.name, s.dictionary.n_members): [] for s in scores}
    for s in scores:
        numbers[s.dictionary.name, s.dictionary.n_members].append(s.n_ablated)
    assert numbers["bag", 3] == 2 * [0, 2, 5, 6, 10, 15, 20, 30, 50, 60]
    assert numbers[RAW, 1] == 2 * [0, 2, 5]
    assert numbers["wide", 1] == 2 * [0, *N_ABLATED[:5]]


def _accuracy(x: Tensor, weight: Tensor, bias: Tensor, positive: Tensor) -> float:
    return ((x @ weight + bias > 0) == positive).double().mean().item()


def test_no_scr_direction_counts_if_the_biased_probe_is_equally_good_in_both(ensembles: dict[str, Ensemble]):
    x = torch.zeros(N_TEXTS, D_IN)
    numbers = torch.arange(N_TEXTS)
    x[:, 0], x[:, 1] = 2.0 * (numbers & 1) - 1, 2.0 * (numbers >> 1 & 1) - 1  # the attributes are alike in every way
    x[:, 2] = x[:, 0] + x[:, 1]
    (scores,) = remove_correlations(PooledTexts(ensembles, Batches(list(x[:, None]))), [TASK], seed=0)
    biased = {score.reversed: score.accuracy_biased for score in scores}
    tied = biased[False] == biased[True]
    assert any(score.is_scr_metric for score in scores) != tied


def test_quadrants_of_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"2 q, q, q and 2 q texts, q at least 1; got \[3, 2, 2, 4\]"):
        Quadrants(*(torch.arange(n) for n in (3, 2, 2, 4))).check()
    with pytest.raises(ValueError, match="q at least 1"):
        Quadrants(*(torch.arange(0) for _ in range(4))).check()


def test_without_probes_and_tasks_no_text_is_encoded(ensembles: dict[str, Ensemble]):
    batches = Batches(_texts())
    pooled = PooledTexts(ensembles, batches)
    assert detect_concepts(pooled, []) == remove_correlations(pooled, [], seed=0) == []
    assert set(batches.asked) == {0}
