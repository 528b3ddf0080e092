"""Steps launched as a graph: recording, checking and giving up a graph. A record of the work stands for the graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import saeens_models as sm
from saeens_models.training import loop
from saeens_models.training.step_graph import StepGraphs

D_IN = 12
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-2,
    "learning_rate_warmup_fraction": 0.3,
    "learning_rate_decay_fraction": 0.3,
    "gradient_clip_norm": 0.5,
    "unit_norm_decoder": True,
}


class RecordedWork:
    """Stands for a CUDA graph: recording does not run the work, and a replay repeats it on the same memory."""

    made: ClassVar[list[RecordedWork]]

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        assert device.type == "cpu"
        self.work, self.n_replays = work, 0
        self.made.append(self)

    def replay(self) -> None:
        self.n_replays += 1
        self.work()


@pytest.fixture
def graphs(monkeypatch) -> list[RecordedWork]:
    """Graphs recorded by trainings on this device, which is treated as a device with graphs."""

    class OfThisTest(RecordedWork):
        made: ClassVar[list[RecordedWork]] = []

    monkeypatch.setattr(loop, "cpu_team", lambda _: nullcontext())
    monkeypatch.setattr(loop, "_GRAPHS_ON", {"cpu"})
    monkeypatch.setattr(loop, "_ENTRIES_FOR_ONE_LAUNCH", {"cpu": 2**20})
    monkeypatch.setattr(loop, "StepGraphs", lambda: StepGraphs(OfThisTest))
    return OfThisTest.made


def configs(architecture: str = "topk") -> list[sm.SAEConfig]:
    own = {"k": 3} if architecture == "topk" else {}
    return [sm.SAEConfig(architecture=architecture, d_in=D_IN, d_sae=40, init_seed=seed, **own) for seed in range(2)]


def batches(*sizes: int) -> Sequence[Tensor]:
    return torch.randn(sum(sizes), D_IN, generator=torch.Generator().manual_seed(3)).split(list(sizes))


def train(on: Sequence[Tensor], saes: Sequence[sm.SAEConfig] | None = None, **settings: Any) -> tuple[list[sm.SAE], list[Any]]:
    points: list[Any] = []
    total_tokens = sum(map(len, on))  # no feature is dead before the last token
    of_training: dict[str, Any] = {**TRAINING, "dead_after_tokens": total_tokens - 1, **settings}
    training = sm.TrainingConfig(**of_training, total_tokens=total_tokens)
    return sm.train(saes or configs(), on, training, points.append), points


def without_graphs(monkeypatch, *arguments: Any, **settings: Any) -> tuple[list[sm.SAE], list[Any]]:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_GRAPHS_ON", set())
        return train(*arguments, **settings)


def assert_same(found: tuple[list[sm.SAE], list[Any]], expected: tuple[list[sm.SAE], list[Any]]) -> None:
    for sae, other in zip(found[0], expected[0], strict=True):
        for name, weight in other.state_dict().items():
            torch.testing.assert_close(sae.state_dict()[name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert len(found[1]) == len(expected[1])
    for point, other in zip(found[1], expected[1], strict=True):
        for of_sae, of_other in zip(point, other, strict=True):
            assert of_sae._asdict() == pytest.approx(of_other._asdict(), rel=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_steps_of_a_graph_equal_steps_without_one(graphs, monkeypatch, architecture):
    on = batches(*[32] * 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = train(on, configs(architecture))
    assert [graph.n_replays for graph in graphs] == [11]  # all but the first, and the second to compare
    assert_same(found, without_graphs(monkeypatch, on, configs(architecture)))


def test_a_graph_is_recorded_for_each_shape_seen_twice(graphs, monkeypatch):
    on = batches(32, 32, 32, 16, 32, 16, 16, 16, 7)
    found = train(on)
    assert [graph.n_replays for graph in graphs] == [3, 2]
    assert_same(found, without_graphs(monkeypatch, on))


def test_steps_with_dead_features_use_no_graph(graphs, monkeypatch):
    on = batches(*[16] * 10)
    found = train(on, dead_after_tokens=64)
    assert any(of_sae.dead_features > 0 for point in found[1] for of_sae in point)
    assert graphs[0].n_replays < 9
    assert_same(found, without_graphs(monkeypatch, on, dead_after_tokens=64))


def test_the_warm_up_of_the_sparsity_coefficient_uses_no_graph(graphs, monkeypatch):
    on = batches(*[16] * 10)
    found = train(on, configs("standard"), sparsity_warmup_fraction=0.5)
    assert [graph.n_replays for graph in graphs] == [6]  # steps 5 to 10 are at the full coefficient
    assert_same(found, without_graphs(monkeypatch, on, configs("standard"), sparsity_warmup_fraction=0.5))


def test_a_graph_with_another_result_is_not_used(graphs, monkeypatch):
    expected = without_graphs(monkeypatch, batches(*[32] * 5))
    monkeypatch.setattr(RecordedWork, "replay", lambda self: None)
    with pytest.warns(RuntimeWarning, match=r"as a CUDA graph on cpu.*it moves the mean of W_enc of SAE 1 differently") as caught:
        found = train(batches(*[32] * 5))
    assert len(caught) == len(graphs) == 1
    assert_same(found, expected)


def test_a_graph_of_another_learning_rate_is_not_used(graphs, monkeypatch):
    replay = RecordedWork.replay

    def replay_twice(self: RecordedWork) -> None:
        replay(self)
        replay(self)

    monkeypatch.setattr(RecordedWork, "replay", replay_twice)
    with pytest.warns(RuntimeWarning, match=r"it moves the .* of SAE \d differently"):
        found = train(batches(*[32] * 5))
    assert_same(found, without_graphs(monkeypatch, batches(*[32] * 5)))


def test_steps_use_no_graph_if_recording_fails(graphs, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(RecordedWork, "__init__", fail)
    with pytest.warns(RuntimeWarning, match="RuntimeError: operation not permitted when stream is capturing") as caught:
        found = train(batches(*[32] * 5))
    assert len(caught) == 1
    assert_same(found, without_graphs(monkeypatch, batches(*[32] * 5)))


def test_large_saes_and_micro_batches_use_no_graph(graphs, monkeypatch):
    sm.train(configs(), batches(*[32] * 4), sm.TrainingConfig(**TRAINING, total_tokens=128), micro_batch_tokens=8)
    monkeypatch.setattr(loop, "_ENTRIES_FOR_ONE_LAUNCH", {"cpu": 100})
    train(batches(*[32] * 4))
    assert graphs == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu_use_a_graph(monkeypatch):
    on = [batch.cuda() for batch in batches(*[512] * 12)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = train(on)
    assert_same(found, without_graphs(monkeypatch, on))
