"""Detection scores against scikit-learn's balanced accuracy, and silent windows against dense codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

import saeens_models as sm
from saeens_models.evaluation import silent_windows

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2).filter(lambda pairs: len({fires for _, fires in pairs}) == 2)


@given(PAIRS)
def test_detection_score_is_balanced_accuracy(pairs: list[tuple[bool, bool]]):
    said, fires = zip(*pairs, strict=True)
    score = sm.metrics.detection_score(said, fires)
    assert score.balanced_accuracy == pytest.approx(balanced_accuracy_score(fires, said))
    assert score.true_positive_rate == sum(a for a, b in pairs if b) / sum(fires)
    assert score.false_positive_rate == sum(a for a, b in pairs if not b) / (len(fires) - sum(fires))


@pytest.mark.parametrize("answer", [True, False])
def test_a_constant_answer_scores_chance(answer: bool):
    assert sm.metrics.detection_score([answer] * 7, [True] * 2 + [False] * 5).balanced_accuracy == 0.5


@pytest.mark.parametrize("fires", [[True, True], [False, False], [True]])
def test_texts_of_a_single_class_have_no_detection_score(fires: list[bool]):
    with pytest.raises(ValueError):
        sm.metrics.detection_score([True, False], fires)


@pytest.mark.parametrize("kind", [sm.Bagging, sm.Boosting])
def test_windows_are_silent_where_no_row_of_the_dense_code_is_active(kind: type[sm.Ensemble]):
    torch.manual_seed(0)
    configs = [sm.SAEConfig(architecture="topk", d_in=8, d_sae=width, k=2, init_seed=width) for width in (16, 24)]
    ensemble = kind(sm.train(configs, [torch.randn(32, 8) for _ in range(3)], sm.TrainingConfig(learning_rate=1e-2)))
    windows = [torch.randn(n_rows, 8) for n_rows in (1, 5, 3, 7)]
    features = [torch.tensor([3, 0, 15]), torch.tensor([], dtype=torch.int64)]
    first, none = silent_windows(ensemble, windows, features)
    codes = [ensemble.encode(window)[:, [3, 0, 15]] for window in windows]
    assert first.tolist() == [(code == 0).all(0).tolist() for code in codes]
    assert first.any() and not first.all()
    assert none.shape == (4, 0)
