"""Reconstruction metrics against golden values, closed forms and their own definition on the whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from saeens_models.metrics import Moments, Reconstruction, ReconstructionMetric, reconstruction

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["metrics"]
TENSORS = load_file(GOLDEN / "tensors.safetensors")


def streamed(x: torch.Tensor, x_hat: torch.Tensor, cuts: list[int]) -> Reconstruction:
    metric = ReconstructionMetric()
    for x_batch, x_hat_batch in zip(x.tensor_split(sorted(cuts)), x_hat.tensor_split(sorted(cuts)), strict=True):
        metric.update(x_batch, x_hat_batch)
    return metric.compute()


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("method", ["member.0", "bagging", "boosting"])
def test_mse_and_explained_variance_meet_the_golden_values(architecture: str, method: str) -> None:
    expected = EXPECTED[f"{architecture}.{method}"]
    result = reconstruction(TENSORS["activations"], TENSORS[f"{architecture}.{method}.reconstruction"])
    assert result.mse == pytest.approx(expected["mse"], rel=1e-5)
    assert result.explained_variance == pytest.approx(expected["explained_variance"], rel=1e-5)
    assert result.tokens == 600


@given(cuts=st.lists(st.integers(0, 600), max_size=12), mean=st.sampled_from([0.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_reconstruction_does_not_depend_on_batching(cuts: list[int], mean: float) -> None:
    x = TENSORS["activations"].double() + mean
    x_hat = TENSORS["topk.bagging.reconstruction"].double() + mean
    whole = reconstruction(x, x_hat)
    assert dict(streamed(x, x_hat, cuts)) == pytest.approx(dict(whole), rel=1e-10)


def test_fvu_pools_the_dimensions_that_explained_variance_averages() -> None:
    x, x_hat = TENSORS["activations"].double(), TENSORS["topk.bagging.reconstruction"].double()
    error, deviation = (x_hat - x).square().sum(0), (x - x.mean(0)).square().sum(0)
    result = reconstruction(x, x_hat)
    assert result.fvu == pytest.approx((error.sum() / deviation.sum()).item(), rel=1e-12)
    assert result.explained_variance == pytest.approx((1 - error / deviation).mean().item(), rel=1e-12)
    assert result.explained_variance != pytest.approx(1 - result.fvu, rel=1e-4)


@pytest.mark.parametrize("batch", [1, 64, 100_000])
def test_a_mean_far_above_the_deviation_costs_no_precision(batch: int) -> None:
    n = 20_000
    # 0, 1, 2, 3, 0, ... has variance 5/4; every value is exact in float64, and 1e12 squared would leave no digit for the variance.
    x = 1e12 + (torch.arange(n, dtype=torch.float64) % 4).unsqueeze(1)
    metric = ReconstructionMetric()
    for part in x.split(batch):
        metric.update(part, part + 0.5)
    result = metric.compute()
    assert result.mse == pytest.approx(0.25, rel=1e-12)
    assert result.explained_variance == pytest.approx(1 - 0.25 / 1.25, rel=1e-12)


def test_an_outlying_first_token_costs_no_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    x[0] = 1e4
    x_hat = 0.9 * x
    expected = 1 - ((x_hat - x).square().sum(0) / (x - x.mean(0)).square().sum(0)).mean()
    assert streamed(x, x_hat, [1, 500]).explained_variance == pytest.approx(expected.item(), rel=1e-12)


def test_constant_dimensions_are_left_out_of_explained_variance_and_counted() -> None:
    x = TENSORS["activations"].clone()
    x_hat = TENSORS["topk.bagging.reconstruction"].clone()
    varying = reconstruction(x[:, 2:], x_hat[:, 2:])
    x[:, 0], x[:, 1] = 0.1, 1e6 / 3  # neither is a sum of few powers of two: means of them are rounded
    for result in (reconstruction(x, x_hat), streamed(x, x_hat, [7, 411])):
        assert result.constant_dimensions == 2
        assert result.explained_variance == pytest.approx(varying.explained_variance, rel=1e-12)
        assert result.mse > 1e10


def test_constant_activations_have_nan_explained_variance_and_an_mse() -> None:
    x = torch.full((5, 3), 2.0)
    result = reconstruction(x, x + 1)
    assert math.isnan(result.explained_variance)
    assert math.isnan(result.fvu)
    assert result.mse == 3.0
    assert result.constant_dimensions == 3


def test_half_precision_input_is_accumulated_in_double() -> None:
    x = torch.full((70_000, 1), 2.0, dtype=torch.float16)
    x[::2] = 4.0
    assert reconstruction(x, torch.full_like(x, 3.0)).mse == 1.0  # 70 000 is beyond float16
    assert reconstruction(x, torch.full_like(x, 3.0)).explained_variance == pytest.approx(0.0, abs=1e-12)


def test_the_reconstruction_result_is_a_mapping() -> None:
    result = reconstruction(torch.eye(3), torch.zeros(3, 3))
    assert list(result) == ["mse", "explained_variance", "fvu", "constant_dimensions", "tokens"]
    assert result["mse"] == result.mse == 1.0
    with pytest.raises(KeyError):
        result["keys"]


def test_reconstructions_of_the_same_activations_share_their_moments() -> None:
    x = torch.randn(90, 5, generator=torch.Generator().manual_seed(0)) + 3
    moments = Moments()
    metrics = [ReconstructionMetric(moments), ReconstructionMetric(moments)]
    for part in x.split(40):
        moments.update(part)
        metrics[0].update(part, part * 0.9)
        metrics[1].update(part, part + 0.5)
    for metric, x_hat in zip(metrics, (x * 0.9, x + 0.5), strict=True):
        assert dict(metric.compute()) == pytest.approx(dict(reconstruction(x, x_hat)), rel=1e-6)
    metrics[0].update(x, x)
    with pytest.raises(ValueError, match="180 tokens were reconstructed, but the shared moments have seen 90"):
        metrics[0].compute()


def test_a_refused_batch_does_not_change_the_metric() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    metric = ReconstructionMetric()
    metric.update(x, x + 1)
    before = metric.compute()
    with pytest.raises(ValueError, match="not finite among tokens 20 to 39"):
        metric.update(x, x / 0)
    assert metric.compute() == before


def test_reconstruction_refuses_wrong_shapes_and_non_finite_values() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[4, 2\]"):
        reconstruction(x, x[:, :2])
    with pytest.raises(ValueError, match="no tokens"):
        reconstruction(x[:0], x[:0])
    metric = ReconstructionMetric()
    metric.update(x, x)
    with pytest.raises(ValueError, match="d_in = 2, earlier batches had 3"):
        metric.update(x[:, :2], x[:, :2])
    with pytest.raises(ValueError, match="not finite among tokens 4 to 7"):
        metric.update(x, x / 0)
