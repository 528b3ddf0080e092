"""SAEs that do not fit into memory together are trained in smaller portions."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch

import saeens_models as sm
from saeens_pipeline.assets.memory import FEWEST_TOKENS, MemoryPlan, Portion, is_out_of_memory, portion_within, train_in_portions
from saeens_pipeline.errors import ConfigurationError

BATCH = 512


class Device:
    """Trains what fits: so many SAEs at once, each on so many tokens."""

    def __init__(self, n_saes: int, tokens: int, error: Exception | None = None) -> None:
        self.n_saes, self.tokens = n_saes, tokens
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.trained: list[tuple[tuple[str, ...], int | None, int]] = []

    def train(self, saes: Sequence[str], plan: MemoryPlan) -> None:
        if len(saes) > self.n_saes or (plan.portion.micro_batch_tokens or BATCH) > self.tokens:
            raise self.error
        self.trained.append((tuple(saes), plan.portion.micro_batch_tokens, len(plan.too_much)))


def test_saes_that_fit_are_trained_together():
    device = Device(n_saes=4, tokens=BATCH)
    train_in_portions("abcd", BATCH, Portion(4, None), device.train)
    assert device.trained == [(("a", "b", "c", "d"), None, 0)]


def test_out_of_memory_halves_the_group_and_each_sae_is_trained_once(caplog):
    device = Device(n_saes=2, tokens=BATCH)
    with caplog.at_level(logging.WARNING):
        train_in_portions("abcdefg", BATCH, Portion(7, None), device.train)
    assert [saes for saes, *_ in device.trained] == [("a", "b"), ("c", "d"), ("e", "f"), ("g",)]
    assert {tokens for _, tokens, _ in device.trained} == {None}
    assert {n_tried for *_, n_tried in device.trained} == {2}  # 7 and 4 together were too much
    assert "out of memory with 7 SAEs at once, whole batches: continuing with 4 SAEs at once" in caplog.text


def test_one_sae_that_does_not_fit_is_trained_in_micro_batches():
    device = Device(n_saes=1, tokens=200)
    train_in_portions("ab", BATCH, Portion(2, None), device.train)
    assert device.trained == [(("a",), 128, 3), (("b",), 128, 3)]


def test_an_sae_that_never_fits_fails_with_the_devices_error():
    device = Device(n_saes=1, tokens=FEWEST_TOKENS - 1)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        train_in_portions("ab", BATCH, Portion(2, None), device.train)
    assert device.trained == []


def test_errors_other_than_out_of_memory_are_not_retried():
    device = Device(n_saes=1, tokens=BATCH, error=RuntimeError("wrong shape"))
    with pytest.raises(RuntimeError, match="wrong shape"):
        train_in_portions("ab", BATCH, Portion(2, None), device.train)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_out_of_memory_is_distinguished_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


CONFIGS = [sm.SAEConfig(architecture="topk", k=4, d_in=100, d_sae=1000)] * 8
WEIGHTS = 16 * (2 * 100 * 1000 + 2 * 1000 + 100)
TOKEN = 4 * (1000 + 8 * 100)


def _portion(n_bytes: int) -> Portion:
    return portion_within(n_bytes / 1e9, CONFIGS, BATCH, "member_1")


def test_the_memory_budget_limits_the_first_group():
    one = WEIGHTS + BATCH * TOKEN
    assert portion_within(0, CONFIGS, BATCH, "member_1") == Portion(8, None)
    assert _portion(20 * one) == Portion(8, None)
    assert _portion(3 * one + one // 2) == Portion(3, None)
    assert _portion(WEIGHTS + 100 * TOKEN + TOKEN // 2) == Portion(1, 100)


def test_a_memory_budget_too_small_for_any_sae_is_refused_with_the_required_one():
    with pytest.raises(ConfigurationError, match=r"SAEENS_MEMORY_GB=.*one SAE of member_1 .*takes at least 0.0037 GB"):
        _portion(WEIGHTS + (FEWEST_TOKENS - 1) * TOKEN)
