"""Checkpoints: an interrupted training resumes and ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import saeens_models as sm
from saeens_models.training import CheckpointError, CurvePoint, NonFiniteLossError, checkpoints

D_IN, N_BATCHES, BATCH_TOKENS = 12, 24, 48
CONFIGS = [
    sm.SAEConfig(architecture="topk", d_in=D_IN, d_sae=40, k=3, init_seed=1),
    sm.SAEConfig(architecture="jumprelu", d_in=D_IN, d_sae=32, init_seed=2),
    sm.SAEConfig(architecture="standard", d_in=D_IN, d_sae=32, init_seed=3),
]
TRAINING = sm.TrainingConfig(
    learning_rate=0.01,
    total_tokens=N_BATCHES * BATCH_TOKENS,
    learning_rate_warmup_fraction=0.2,
    learning_rate_decay_fraction=0.4,
    sparsity_warmup_fraction=0.5,
    dead_after_tokens=3 * BATCH_TOKENS,
    normalize_activations="expected_average_only_in",
    input_scale=0.5,
    input_mean=(0.1,) * D_IN,
)
TRAIN = {"side by side": sm.train, "concurrent rounds": sm.train_boosting_concurrently}
either = pytest.mark.parametrize("train", TRAIN.values(), ids=TRAIN)


class PowerCutError(Exception):
    """Stands for the end of a process in tests that continue after it."""


def _batches(n_batches: int = N_BATCHES) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(30, D_IN, generator=generator)
    for number in range(n_batches):
        codes = torch.rand(BATCH_TOKENS, 30, generator=generator) * (torch.rand(BATCH_TOKENS, 30, generator=generator) < 0.1)
        yield codes @ basis * (1 + number % 3)


def _cut_after(n_batches: int) -> Iterator[Tensor]:
    yield from _batches(n_batches)
    raise PowerCutError


def _weights(saes: list[sm.SAE]) -> list[dict[str, Tensor]]:
    return [{name: weight.clone() for name, weight in sae.state_dict().items()} for sae in saes]


@cache
def _undisturbed(train: Callable) -> list[dict[str, Tensor]]:
    return _weights(train(CONFIGS, _batches(), TRAINING))


def _same_bits(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    bits = [[{name: weight.contiguous().numpy().tobytes() for name, weight in each.items()} for each in side] for side in (one, other)]
    return bits[0] == bits[1]


def _interrupted(file: Path, train: Callable = sm.train, configs: list = CONFIGS, after: int = 10, **options) -> None:
    with pytest.raises(PowerCutError):
        train(configs, _cut_after(after), TRAINING, checkpoints=sm.Checkpoints(file, interval_seconds=0, **options))


@either
def test_architectures_with_other_weights_or_external_state_resume_with_the_same_bits(train: Callable, tmp_path: Path):
    configs = [
        sm.SAEConfig(architecture="batch_topk", d_in=D_IN, d_sae=32, k=2.5, init_seed=4),
        sm.SAEConfig(architecture="gated", d_in=D_IN, d_sae=32, init_seed=5),
        sm.SAEConfig(architecture="matching_pursuit", d_in=D_IN, d_sae=32, max_iterations=4, init_seed=6),
    ]
    _interrupted(tmp_path / "state", train, configs)
    saes = train(configs, _batches(), TRAINING, checkpoints=sm.Checkpoints(tmp_path / "state"))
    assert saes[0].get_buffer("threshold") > 0
    assert _same_bits(_weights(saes), _weights(train(configs, _batches(), TRAINING)))


@either
@pytest.mark.parametrize("after", [1, 10, N_BATCHES - 1])
def test_an_interrupted_training_ends_with_the_bits_of_an_uninterrupted_one(train: Callable, after: int, tmp_path: Path):
    curve: list[Sequence[CurvePoint]] = []
    before: list[Sequence[CurvePoint]] = []
    resumed: list[Sequence[CurvePoint]] = []
    train(CONFIGS, _batches(), TRAINING, curve.append)
    file = tmp_path / "folder" / "state.safetensors"
    with pytest.raises(PowerCutError):
        train(CONFIGS, _cut_after(after), TRAINING, before.append, checkpoints=sm.Checkpoints(file, interval_seconds=0))
    going_on = sm.Checkpoints(file, interval_seconds=0)
    saes = train(CONFIGS, _batches(), TRAINING, resumed.append, checkpoints=going_on)
    assert going_on.resumed_at_tokens == [after * BATCH_TOKENS]
    assert going_on.seconds_before > 0
    assert _same_bits(_weights(saes), _undisturbed(train))
    assert resumed == curve
    assert resumed[: len(before)] == before


@either
def test_checkpoints_change_no_bit_of_an_uninterrupted_training(train: Callable, tmp_path: Path):
    with_checkpoints = train(CONFIGS, _batches(), TRAINING, checkpoints=sm.Checkpoints(tmp_path / "s", interval_seconds=0))
    assert _same_bits(_weights(with_checkpoints), _undisturbed(train))


def test_consumed_batches_of_a_seekable_stream_are_not_recomputed(tmp_path: Path):
    class Seekable:
        def __iter__(self) -> Iterator[Tensor]:
            raise AssertionError("the stream is read from its beginning")

        def starting_at(self, step: int) -> Iterator[Tensor]:
            started.append(step)
            return iter([*_batches()][step:])

    started: list[int] = []
    _interrupted(tmp_path / "state")
    saes = sm.train(CONFIGS, Seekable(), TRAINING, checkpoints=sm.Checkpoints(tmp_path / "state"))
    assert started == [10]
    assert _same_bits(_weights(saes), _undisturbed(sm.train))


def test_resuming_after_the_last_batch_of_a_stream_of_unknown_length_finishes_the_training(tmp_path: Path):
    training = sm.TrainingConfig(learning_rate=0.01)
    with pytest.raises(PowerCutError):
        sm.train(CONFIGS, _cut_after(5), training, checkpoints=sm.Checkpoints(tmp_path / "state", interval_seconds=0))
    curve: list[Sequence[CurvePoint]] = []
    saes = sm.train(CONFIGS, _batches(5), training, curve.append, checkpoints=sm.Checkpoints(tmp_path / "state"))
    assert _same_bits(_weights(saes), _weights(sm.train(CONFIGS, _batches(5), training)))
    assert [point.step for point in curve[-1]] == [5, 5, 5]


def test_some_saes_of_a_checkpoint_resume_without_the_others(tmp_path: Path):
    _interrupted(tmp_path / "state")
    going_on = sm.Checkpoints(tmp_path / "state")
    saes = sm.train([CONFIGS[2], CONFIGS[0]], _batches(), TRAINING, checkpoints=going_on)
    undisturbed = _undisturbed(sm.train)
    assert going_on.resumed_at_tokens == [10 * BATCH_TOKENS]
    assert _same_bits(_weights(saes), [undisturbed[2], undisturbed[0]])


OTHERS = {
    "another configuration": ([*CONFIGS[:2], CONFIGS[2].model_copy(update={"init_seed": 9})], TRAINING, ["a", "b", "c"]),
    "another training": (CONFIGS, TRAINING.model_copy(update={"learning_rate": 0.02}), ["a", "b", "c"]),
    "another recipe": (CONFIGS, TRAINING, ["a", "b", "d"]),
    "one more SAE": ([*CONFIGS, CONFIGS[0].model_copy(update={"init_seed": 9})], TRAINING, ["a", "b", "c", "d"]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_training_is_reported_and_removed(other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    configs, training, recipes = OTHERS[other]
    file = tmp_path / "state"
    _interrupted(file, recipes=["a", "b", "c"])
    fresh = sm.Checkpoints(file, recipes=recipes)
    saes = sm.train(configs, _batches(), training, checkpoints=fresh)
    assert "is a checkpoint of other SAEs" in caplog.text
    assert not file.exists()
    assert fresh.resumed_at_tokens == []
    assert _same_bits(_weights(saes), _weights(sm.train(configs, _batches(), training)))


def test_checkpoints_of_independent_saes_are_not_used_for_concurrent_rounds(tmp_path: Path):
    _interrupted(tmp_path / "state")
    fresh = sm.Checkpoints(tmp_path / "state")
    saes = sm.train_boosting_concurrently(CONFIGS, _batches(), TRAINING, checkpoints=fresh)
    assert fresh.resumed_at_tokens == []
    assert _same_bits(_weights(saes), _undisturbed(sm.train_boosting_concurrently))


def _cut_short(contents: bytes) -> bytes:
    return contents[: len(contents) * 2 // 3]


def _flip_a_weight(contents: bytes) -> bytes:
    return contents[:-5] + bytes([contents[-5] ^ 1]) + contents[-4:]


def _move_the_position(contents: bytes) -> bytes:
    return contents.replace(b'\\"steps\\": 10', b'\\"steps\\": 11')


@pytest.mark.parametrize("damage", [_cut_short, _flip_a_weight, _move_the_position, lambda _: b"", lambda _: b"{}" * 500])
def test_a_damaged_checkpoint_is_reported_and_removed(damage: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "state"
    _interrupted(file)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    saes = sm.train(CONFIGS, _batches(), TRAINING, checkpoints=sm.Checkpoints(file))
    assert f"{file} is damaged" in caplog.text
    assert not file.exists()
    assert _same_bits(_weights(saes), _undisturbed(sm.train))


def test_a_checkpoint_is_plain_safetensors_and_json(tmp_path: Path):
    _interrupted(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as opened:
        record = json.loads(opened.metadata()["training"])
        weights = {name for name in opened.keys() if name.startswith("1.weight.")}  # noqa: SIM118 (not a mapping)
    assert (record["steps"], record["tokens"]) == (10, 10 * BATCH_TOKENS)
    assert weights == {f"1.weight.{name}" for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}


def test_a_full_disk_names_the_required_bytes_and_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "state"
    _interrupted(file)
    before = file.read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_safetensors", half)
        with pytest.raises(
            CheckpointError, match=r"a checkpoint of [\d,]+ bytes cannot be written.*No space left.*the one before, is kept"
        ):
            sm.train(CONFIGS, _batches(), TRAINING, checkpoints=sm.Checkpoints(file, interval_seconds=0))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert file.read_bytes() == before
    saes = sm.train(CONFIGS, _batches(), TRAINING, checkpoints=sm.Checkpoints(file))
    assert _same_bits(_weights(saes), _undisturbed(sm.train))


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path: Path):
    batches = [*_batches()]
    batches[7] = batches[7] * float("nan")
    with pytest.raises(NonFiniteLossError, match=rf"at step 8.*last good checkpoint is .*state, after {7 * BATCH_TOKENS} tokens"):
        sm.train(CONFIGS, batches, TRAINING, checkpoints=sm.Checkpoints(tmp_path / "state", interval_seconds=0))


def test_non_finite_weights_are_not_written_to_a_checkpoint(tmp_path: Path):
    """A gradient may overflow in a step whose loss is finite: the next loss shows it."""
    batches = [*_batches()]
    batches[7] = batches[7] * 1e18
    with pytest.raises(NonFiniteLossError, match=rf"at step [89].*last good checkpoint is .*state, after {7 * BATCH_TOKENS} tokens"):
        sm.train(CONFIGS[2:], batches, TRAINING, checkpoints=sm.Checkpoints(tmp_path / "state", interval_seconds=0))


def test_checkpoints_are_rarer_on_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    kept = sm.Checkpoints(tmp_path / "state", interval_seconds=60)
    written: list[float] = []

    def slow(*_: object) -> None:
        nonlocal now
        written.append(now)
        now += 10

    monkeypatch.setattr(checkpoints, "_write", slow)

    def batches() -> Iterator[Tensor]:
        nonlocal now
        for batch in _batches():
            now += 50
            yield batch

    sm.train(CONFIGS[:1], batches(), TRAINING, checkpoints=kept)
    assert written == [100, 610, 1120]  # 60 seconds after the beginning, then 50 times the 10 that writing takes


# A signal reaches a child process, never the process of the tests: Python swallows what comes while a callback of the garbage
# collector runs, and hypothesis has one.
SIGNALLED = """
import signal, sys
sys.path.insert(0, sys.argv[1])
import saeens_models as sm
import test_checkpoints as t

name, file, n_signals = sys.argv[2], sys.argv[3], int(sys.argv[4])
signum = getattr(signal, name)

class EndedError(BaseException):
    pass

def end(*_):
    raise EndedError

def batches():
    for number, batch in enumerate(t._batches()):
        if number == 6:
            for _ in range(n_signals):
                signal.raise_signal(signum)
                print("still here after a signal in batch", number)
        yield batch

signal.signal(signum, end)
try:
    sm.train(t.CONFIGS, batches(), t.TRAINING, checkpoints=sm.Checkpoints(file))
except EndedError:
    print("ended by the handler of before")
print(signal.getsignal(signum) is end)
"""


def _signalled(signum: signal.Signals, file: Path, n_signals: int) -> list[str]:
    """Return the output of a training that receives signals in its seventh batch."""
    command = [sys.executable, "-c", SIGNALLED, str(Path(__file__).parent), signum.name, str(file), str(n_signals)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_after_its_step_and_writes_a_checkpoint(signum: signal.Signals, tmp_path: Path):
    printed = _signalled(signum, tmp_path / "state", n_signals=1)
    assert printed == ["still here after a signal in batch 6", "ended by the handler of before", "True"]
    going_on = sm.Checkpoints(tmp_path / "state")
    saes = sm.train(CONFIGS, _batches(), TRAINING, checkpoints=going_on)
    assert going_on.resumed_at_tokens == [7 * BATCH_TOKENS]
    assert _same_bits(_weights(saes), _undisturbed(sm.train))


@pytest.mark.slow
def test_a_second_signal_ends_the_training_at_once(tmp_path: Path):
    printed = _signalled(signal.SIGINT, tmp_path / "state", n_signals=2)
    assert printed == ["still here after a signal in batch 6", "ended by the handler of before", "True"]
    assert not (tmp_path / "state").exists()


def test_a_different_number_of_recipes_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="2 recipes for 3 SAEs"):
        sm.train(CONFIGS, _batches(), TRAINING, checkpoints=sm.Checkpoints(tmp_path / "state", recipes=["a", "b"]))


KILLS = 12  # for each way to train
SERVER = """
import random, sys
from pathlib import Path
import torch
torch.set_num_threads(1)  # no thread is running when children are forked
sys.path.insert(0, sys.argv[1])
import saeens_models as sm
import test_checkpoints as t
from killed_process import count_calls, run_and_kill
from saeens_models.architectures import architectures
from saeens_models.training import load_kernels
for architecture in architectures():
    load_kernels(architecture)
folder, chosen = Path(sys.argv[2]), random.Random(7)

for name, train in t.TRAIN.items():
    file, result = folder / "state", folder / "result.pt"
    def work():
        kept = sm.Checkpoints(file, interval_seconds=0)
        saes = train(t.CONFIGS, t._batches(), t.TRAINING, checkpoints=kept)
        torch.save([t._weights(saes), kept.resumed_at_tokens], result)
        kept.remove()
    n_calls = count_calls(work)
    expected, _ = torch.load(result)
    kills, finished, resumed, died = 0, 0, 0, None
    while kills < t.KILLS or died != 0:
        died = run_and_kill(work, chosen.randrange(n_calls * 2 // 3))
        assert died in (0, -9), died
        kills += died == -9
        if died == 0:
            weights, resumptions = torch.load(result)
            assert t._same_bits(weights, expected), (name, resumptions)
            finished, resumed = finished + 1, max(resumed, len(resumptions))
            assert [path.name for path in folder.iterdir()] == ["result.pt"]
    print(name, kills, finished, resumed)
"""


@pytest.mark.slow
def test_a_training_killed_at_random_points_ends_with_the_same_bits(tmp_path: Path):
    """SIGKILL at 24 seeded points: inside steps, while a checkpoint is written, before and after its rename."""
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = [list(map(int, line.split()[-3:])) for line in done.stdout.splitlines()]
    assert sum(kills for kills, _, _ in counts) >= 20
    assert all(finished >= 1 and resumed >= 1 for _, finished, resumed in counts), done.stdout


def test_a_resumed_training_is_logged_by_the_package(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "saeens_models")
    _interrupted(tmp_path / "state")
    sm.train(CONFIGS, _batches(), TRAINING, checkpoints=sm.Checkpoints(tmp_path / "state"))
    assert f"training resumes from {tmp_path / 'state'}, after step 10 and {10 * BATCH_TOKENS} tokens" in caplog.text
