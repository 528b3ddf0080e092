"""Training: the steps against plain autograd and Adam, schedules, constraints, and independence of SAEs that share a stream."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

import saeens_models as sm
from saeens_models.training import CurvePoint, NonFiniteLossError, SAETrainer

D_IN, D_SAE = 12, 40
CONFIGS = {
    "batch_topk": {"k": 3, "threshold_rate": 0.1},
    "gated": {"l1_coefficient": 0.05},
    "matching_pursuit": {"max_iterations": 3, "decoder_init_norm": 0.5},
    "standard": {"l1_coefficient": 0.05},
    "topk": {"k": 3, "decoder_init_norm": 0.5},
    "jumprelu": {"l0_coefficient": 0.01, "init_threshold": 0.05, "bandwidth": 0.2},
}
ARCHITECTURES = sorted(CONFIGS)


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: in steps this small threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(architecture: str, init_seed: int = 0, **fields) -> sm.SAEConfig:
    fields = {"d_in": D_IN, "d_sae": D_SAE, **CONFIGS[architecture], **fields}
    return sm.SAEConfig(architecture=architecture, init_seed=init_seed, **fields)


def stream(n: int = 1024, seed: int = 0) -> Tensor:
    """Sparse sums of twice as many directions as dimensions, off-centre."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(2 * D_IN, D_IN, generator=generator), dim=1)
    strengths = torch.rand(n, 2 * D_IN, generator=generator) * (torch.rand(n, 2 * D_IN, generator=generator) < 0.1)
    return 3 * strengths @ directions + 0.5


def quick(**fields) -> sm.TrainingConfig:
    return sm.TrainingConfig(**{"learning_rate": 1e-2, "dead_after_tokens": 300, **fields})


def same_bits(a: sm.SAE, b: sm.SAE) -> bool:
    return all(torch.equal(weight, b.state_dict()[name]) for name, weight in a.state_dict().items())


# Steps


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("unit_norm_decoder", [True, False])
def test_steps_equal_adam_on_the_objective(architecture, unit_norm_decoder):
    training = quick(
        unit_norm_decoder=unit_norm_decoder,
        adam_betas=(0.5, 0.99),
        gradient_clip_norm=0.7,
        total_tokens=320,
        learning_rate_warmup_fraction=0.5,
        sparsity_warmup_fraction=0.4,
    )
    batches = stream(320).split(32)
    (trained,) = sm.train([config(architecture)], batches, training)

    sae = sm.build_sae(config(architecture)).double()
    weights = list(sae.parameters())
    if unit_norm_decoder:
        sae.W_dec.data = F.normalize(sae.W_dec.data, dim=1)
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for t, x in enumerate(batches, start=1):
        loss = sae.objective(x.double(), None, min(t / 4, 1.0)).loss
        grads = list(torch.autograd.grad(loss, weights))
        if unit_norm_decoder:
            i = next(i for i, weight in enumerate(weights) if weight is sae.W_dec)
            grads[i] = grads[i] - (grads[i] * sae.W_dec.detach()).sum(1, keepdim=True) * sae.W_dec.detach()
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        for weight, grad, m, v in zip(weights, grads, first, second, strict=True):
            clipped = grad * min(1.0, 0.7 / (norm + 1e-6))
            m.mul_(0.5).add_(clipped, alpha=0.5)
            v.mul_(0.99).addcmul_(clipped, clipped, value=0.01)
            step_size = 1e-2 * min(t / 5, 1.0) / (1 - 0.5**t)
            weight.data -= step_size * m / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        if unit_norm_decoder:
            sae.W_dec.data = F.normalize(sae.W_dec.data, dim=1)
        if architecture == "jumprelu":
            sae.get_parameter("threshold").data.clamp_(min=0)
    for name, weight in sae.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name).double(), weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_explains_variance(architecture):
    x = stream(8192)
    (sae,) = sm.train([config(architecture)], x.split(128), quick(input_mean=x.mean(0)))
    held_out = stream(8192)[4096:]
    untrained = sm.build_sae(config(architecture), b_dec=x.mean(0))
    with torch.no_grad():
        unexplained = [
            float((m(held_out) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum()) for m in (sae, untrained)
        ]
    assert unexplained[0] < 0.4 < unexplained[1]


def test_unit_norm_decoder_keeps_rows_at_one():
    (sae,) = sm.train([config("topk")], stream().split(128), quick())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    (free,) = sm.train([config("topk")], stream().split(128), quick(unit_norm_decoder=False))
    assert (free.W_dec.norm(dim=1) - 1).abs().max() > 0.05


def test_jumprelu_thresholds_learn_and_stay_at_or_above_zero():
    (sae,) = sm.train([config("jumprelu", init_threshold=0.01)], stream().split(64), quick())
    threshold = sae.get_parameter("threshold")
    assert (threshold >= 0).all()
    assert (threshold - 0.01).abs().max() > 0.01


# Many SAEs on one stream


def test_an_sae_trained_alone_equals_the_same_sae_trained_with_others():
    configs = [config("topk", seed) for seed in range(3)] + [config("standard"), config("jumprelu", d_sae=24)]
    together = sm.train(configs, stream().split(64), quick())
    for own_config, sae in zip(configs, together, strict=True):
        (alone,) = sm.train([own_config], stream().split(64), quick())
        assert sae.config == own_config
        assert same_bits(alone, sae)
    assert not same_bits(together[0], together[1])


def test_training_twice_gives_the_same_bits():
    training = quick(normalize_activations="expected_average_only_in", input_scale=1.7)
    first, second = (sm.train([config(a) for a in ARCHITECTURES], stream().split(64), training) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_batches_are_read_once_and_never_modified():
    x = stream(512)
    kept = x.clone()
    sm.train(
        [config("topk"), config("topk", 1)], iter(x.split(64)), quick(normalize_activations="expected_average_only_in", input_scale=2.0)
    )
    assert torch.equal(x, kept)


def test_half_precision_batches_train_as_their_float32_values():
    x = stream(512).half()
    (from_half,) = sm.train([config("topk")], x.split(64), quick())
    (from_float,) = sm.train([config("topk")], x.float().split(64), quick())
    assert same_bits(from_half, from_float)


# Concurrent boosting


def test_concurrent_rounds_equal_adam_on_the_residuals():
    training = quick(unit_norm_decoder=False, gradient_clip_norm=None)
    batches = stream(320).split(32)
    configs = [config("topk"), config("standard"), config("topk", 1)]
    trained = sm.train_boosting_concurrently(configs, batches, training)

    saes = [sm.build_sae(each).double() for each in configs]
    optimisers = [torch.optim.Adam(sae.parameters(), lr=1e-2) for sae in saes]
    for x in batches:
        residual = x.double()
        for sae, optimiser in zip(saes, optimisers, strict=True):
            left = residual - sae(residual).detach()  # by the weights before the step
            optimiser.zero_grad()
            sae.objective(residual).loss.backward()
            optimiser.step()
            residual = left
    for sae, plain in zip(trained, saes, strict=True):
        for name, weight in plain.named_parameters():
            torch.testing.assert_close(sae.get_parameter(name).double(), weight, rtol=1e-3, atol=1e-4)


NORMALISED = {"normalize_activations": "expected_average_only_in", "input_scale": 0.7}


@pytest.mark.parametrize("fields", [{}, NORMALISED], ids=["not normalised", "normalised"])
def test_concurrent_rounds_do_not_depend_on_later_ones_and_the_first_equals_a_plain_sae(fields):
    x = stream()
    configs, training = [config("topk", seed) for seed in range(3)], quick(input_mean=x.mean(0), **fields)
    rounds = sm.train_boosting_concurrently(configs, x.split(64), training)
    first_two = sm.train_boosting_concurrently(configs[:2], x.split(64), training)
    (alone,) = sm.train(configs[:1], x.split(64), training)
    assert same_bits(rounds[0], alone)
    assert all(same_bits(a, b) for a, b in zip(rounds, first_two, strict=False))
    assert not same_bits(rounds[1], sm.train(configs, x.split(64), training)[1])


def test_concurrent_rounds_train_on_residuals_at_the_norm_of_the_input(monkeypatch):
    norms: dict[int, list[float]] = {0: [], 1: [], 2: []}
    step = SAETrainer.step

    def recorded(trainer: SAETrainer, x: Tensor):
        norms[trainer.index].append(float(x.norm(dim=1).mean()))
        return step(trainer, x)

    monkeypatch.setattr(SAETrainer, "step", recorded)
    x = stream(4096)
    scale = D_IN**0.5 / float(x.norm(dim=1).mean())
    training = quick(input_mean=x.mean(0), **NORMALISED | {"input_scale": scale})
    configs = [config("topk", seed) for seed in range(3)]
    rounds = sm.train_boosting_concurrently(configs, x.split(128), training, boosting_scale="per_round")
    for of_round in norms.values():
        assert sum(of_round[10:]) / 22 == pytest.approx(D_IN**0.5, rel=0.15)  # residuals still shrink
    with torch.no_grad():
        left = x - rounds[0](x)
    assert left.norm(dim=1).mean() < 0.7 * x.norm(dim=1).mean()  # which unscaled the second round would see

    for of_round in norms.values():
        of_round.clear()
    sm.train_boosting_concurrently(configs, x.split(128), training)
    assert sum(norms[1][10:]) / 22 < 0.7 * D_IN**0.5  # one scale for all rounds is the default


@pytest.mark.parametrize("boosting_scale", ["shared", "per_round"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_concurrent_rounds_are_the_same_in_any_unit_of_the_activations(architecture, boosting_scale):
    x = stream()
    configs = [config(architecture, seed) for seed in range(3)]
    in_units = [
        sm.train_boosting_concurrently(
            configs,
            (x * unit).split(64),
            quick(input_mean=x.mean(0) * unit, **NORMALISED | {"input_scale": 0.5 / unit}),
            boosting_scale=boosting_scale,
        )
        for unit in (1.0, 4.0)  # a power of two: every rounding is the same
    ]
    residual = x
    for sae, of_four in zip(*in_units, strict=True):
        assert torch.equal(sae.W_enc, of_four.W_enc) and torch.equal(sae.W_dec, of_four.W_dec)
        assert torch.equal(4 * sae(residual), of_four(4 * residual))
        residual = residual - sae(residual)


def test_concurrent_rounds_explain_nearly_as_much_as_sequential_rounds():
    x = stream(8192)
    configs = [config("topk", seed) for seed in range(3)]
    concurrent = sm.Boosting(sm.train_boosting_concurrently(configs, x.split(128), quick(input_mean=x.mean(0))))
    saes: list[sm.SAE] = []
    residual = x
    for each in configs:
        saes += sm.train([each], residual.split(128), quick(input_mean=residual.mean(0)))
        with torch.no_grad():
            residual = residual - saes[-1](residual)
    with torch.no_grad():
        first, sequential, together = (
            sm.metrics.reconstruction(x, x_hat).explained_variance for x_hat in (concurrent[:1](x), sm.Boosting(saes)(x), concurrent(x))
        )
    assert 1 - together < 0.2 * (1 - first)
    assert together == pytest.approx(sequential, abs=0.02)


def test_concurrent_rounds_have_one_training_curve_each():
    seen: list[list[CurvePoint]] = []
    x = stream(512)
    sm.train_boosting_concurrently(
        [config("topk"), config("topk", 1)], x.split(64), quick(total_tokens=512), lambda p: seen.append(list(p))
    )
    assert [len(points) for points in seen] == [2] * 2
    assert [points[1].tokens for points in seen] == [4 * 64, 8 * 64]


def test_concurrent_rounds_refuse_the_arguments_that_training_refuses():
    with pytest.raises(ValueError, match="configs is empty"):
        sm.train_boosting_concurrently([], [stream(64)], quick())
    x = stream(256)
    x[130, 3] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"SAE 1 \(topk, init_seed 7\): loss nan at step 3"):
        sm.train_boosting_concurrently([config("topk", 7), config("topk")], x.split(64), quick())


# The input's scale and mean


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_on_the_scaled_input_is_folded_back(architecture):
    x, scale = stream(), 4.0  # a power of two: every rounding is the same
    normalised = quick(normalize_activations="expected_average_only_in", input_scale=scale, input_mean=x.mean(0))
    (folded,) = sm.train([config(architecture)], x.split(64), normalised)
    (of_scaled,) = sm.train([config(architecture)], (x * scale).split(64), quick(input_mean=x.mean(0) * scale))
    assert torch.equal(folded.W_dec, of_scaled.W_dec) and torch.equal(folded.W_enc, of_scaled.W_enc)
    assert torch.equal(folded(x) * scale, of_scaled(x * scale))


def test_b_dec_starts_at_the_mean_of_the_input():
    x = stream()
    trainer = SAETrainer(config("topk"), quick(normalize_activations="expected_average_only_in", input_scale=0.3, input_mean=x.mean(0)))
    torch.testing.assert_close(trainer.sae.b_dec.detach(), x.mean(0) * 0.3)
    torch.testing.assert_close(trainer.finish().b_dec.detach(), x.mean(0))


# Dead features


def test_dead_features_are_counted_in_tokens():
    trainer = SAETrainer(config("topk", k=1, aux_loss_coefficient=0.0), quick(dead_after_tokens=100, learning_rate=1e-9))
    x = stream(1)  # one row: the same feature fires every time
    (fires,) = trainer.sae.encode(x)[0].nonzero().flatten().tolist()
    for n in (60, 40):
        trainer.step(x.expand(n, -1))
    assert not trainer.dead_mask.any()  # exactly dead_after_tokens is not more
    trainer.step(x)
    dead = trainer.dead_mask
    assert not dead[fires] and dead.sum() == D_SAE - 1
    assert trainer.curve_point().dead_features == pytest.approx((D_SAE - 1) / D_SAE)


@pytest.mark.parametrize("aux_loss_coefficient", [0.0, 1.0])
def test_only_the_auxiliary_loss_moves_dead_features(aux_loss_coefficient):
    trainer = SAETrainer(config("topk", aux_loss_coefficient=aux_loss_coefficient), quick(dead_after_tokens=100, unit_norm_decoder=False))
    with torch.no_grad():
        trainer.sae.b_enc[:5] = -20.0
    before = trainer.sae.W_dec[:5].clone()
    batches = stream(400).split(50)
    for x in batches[:3]:
        trainer.step(x)
    assert torch.equal(trainer.sae.W_dec[:5], before)  # silent for 100 tokens is not yet dead
    for x in batches[3:]:
        trainer.step(x)
    assert trainer.dead_mask[:5].all()
    moved = (trainer.sae.W_dec[:5] != before).any(dim=1)
    assert moved.all() if aux_loss_coefficient > 0 else not moved.any()


# Schedules


def test_learning_rate_warms_up_and_decays_to_its_floor():
    training = sm.TrainingConfig(
        learning_rate=2.0,
        total_tokens=1000,
        learning_rate_warmup_fraction=0.1,
        learning_rate_decay_fraction=0.2,
        learning_rate_floor=0.25,
    )
    rates = [training.learning_rate_at(start, start + 10) for start in range(0, 1000, 10)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert rates[9:81] == [pytest.approx(2.0)] * 72
    assert rates[90] == pytest.approx(1.0)
    assert rates[-1] == rates[-3] == 0.5
    assert rates[:10] == sorted(rates[:10]) and rates[80:] == sorted(rates[80:], reverse=True)


def test_without_schedules_the_rates_are_constant():
    assert sm.TrainingConfig(learning_rate=0.5).learning_rate_at(10**9, 10**9 + 1) == 0.5
    assert sm.TrainingConfig().sparsity_scale_at(1) == 1.0


# What is observed


def test_curves_have_about_two_hundred_points_and_one_after_the_last_step():
    seen: list[list[CurvePoint]] = []
    x = stream(1640)
    sm.train([config("topk"), config("standard")], x.split(2), quick(total_tokens=1640), lambda points: seen.append(list(points)))
    assert len(seen) == 200
    assert {len(points) for points in seen} == {2}
    assert seen[-1][0].tokens == 1640 and seen[-1][0].step == 820
    assert [points[0].tokens for points in seen] == sorted({points[0].tokens for points in seen})


def test_curves_of_short_trainings_have_a_point_every_four_steps():
    steps: list[int] = []
    sm.train([config("topk")], stream(100).split(10), quick(total_tokens=100), lambda points: steps.append(points[0].step))
    assert steps == [4, 8, 10]


def test_constant_dimensions_are_left_out_of_the_explained_variance_of_a_curve():
    trainer, x = SAETrainer(config("topk"), quick()), stream(100)
    x[:, 3] = 0.1  # no binary fraction: its mean is rounded
    trainer.step(x)
    unexplained = (x - trainer.last_objective.x_hat).square().mean(0) / x.double().var(dim=0, correction=0)
    varying = [dimension for dimension in range(x.shape[1]) if dimension != 3]
    assert trainer.curve_point().explained_variance == pytest.approx(1 - float(unexplained[varying].mean()), rel=1e-5)


def test_curve_points_describe_the_last_batch():
    trainer = SAETrainer(config("topk"), quick())
    x = stream(256)
    z, x_hat = trainer.sae.encode(x).detach(), trainer.sae(x).detach()  # the objective is that of the weights before the step
    trainer.step(x)
    point = trainer.curve_point()
    variance = (x - x.mean(0)).square().sum(0)
    assert point.step == 1 and point.tokens == 256 and point.learning_rate == 1e-2 and point.dead_features == 0
    assert point.loss == pytest.approx(float((x - x_hat).square().sum(1).mean()), rel=1e-5)
    assert point.explained_variance == pytest.approx(float((1 - (x - x_hat).square().sum(0) / variance).mean()), abs=1e-5)
    assert point.l0 == pytest.approx(float((z > 0).sum(1).float().mean()))


# Ends, good and bad


def test_training_stops_at_total_tokens():
    def endless():
        while True:
            yield stream(64)

    points: list[CurvePoint] = []
    sm.train([config("topk")], endless(), quick(total_tokens=200), points.extend)
    assert points[-1].tokens == 256


def test_a_stream_shorter_than_total_tokens_is_warned_about():
    with pytest.warns(UserWarning, match="after 128 of total_tokens = 512"):
        sm.train([config("topk")], stream(128).split(64), quick(total_tokens=512))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_non_finite_loss_stops_training_and_names_its_step(architecture):
    x = stream(256)
    x[130, 3] = torch.nan
    with pytest.raises(NonFiniteLossError, match=rf"SAE 1 \({architecture}, init_seed 7\): loss nan at step 3, after 192 tokens"):
        sm.train([config(architecture, init_seed=7), config("topk")], x.split(64), quick())


def test_losses_checked_late_name_their_step(monkeypatch):
    monkeypatch.setattr("saeens_models.training.trainer._LOSSES_PER_CHECK", {"cpu": 100})
    x = stream(256)
    x[70] = torch.inf
    with pytest.raises(FloatingPointError, match="at step 2, after 128 tokens"):
        sm.train([config("standard")], x.split(64), quick())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.zeros(4, D_IN + 1)], r"batch 1 has shape \[4, 13\], expected \[n, 12\]"),
        ([torch.zeros(2, 4, D_IN)], r"batch 1 has shape \[2, 4, 12\]"),
        ([torch.ones(4, D_IN), torch.zeros(0, D_IN)], r"batch 2 has shape \[0, 12\]"),
        ([torch.zeros(4, D_IN, dtype=torch.int32)], "int32"),
        ([], "batches is empty"),
    ],
)
def test_unusable_training_batches_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        sm.train([config("topk")], batches, quick())


@pytest.mark.parametrize(
    ("configs", "training", "message"),
    [
        ([], {}, "configs is empty"),
        ([config("topk"), config("topk", d_in=13)], {}, r"one d_in; found \[12, 13\]"),
        ([config("topk")], {"learning_rate_decay_fraction": 0.2}, "learning_rate_decay_fraction need total_tokens"),
        ([config("topk")], {"normalize_activations": "expected_average_only_in"}, "needs input_scale"),
        ([config("topk")], {"input_mean": [0.0] * 3}, "input_mean has 3 entries, the SAEs have d_in = 12"),
    ],
)
def test_missing_inputs_of_training_are_named(configs, training, message):
    with pytest.raises(ValueError, match=message):
        sm.train(configs, [stream(64)], quick(**training))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"learning_rate": 0}, "learning_rate"),
        ({"adam_betas": [0.9, 1.0]}, "adam_betas"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"l1": 3}, "l1"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
    ],
)
def test_wrong_training_settings_name_the_field(fields, field):
    with pytest.raises(ValidationError) as caught:
        sm.TrainingConfig(**fields)
    assert caught.value.errors()[0]["loc"][0] == field


def test_contradictory_training_settings_are_refused():
    with pytest.raises(ValidationError, match="overlap"):
        sm.TrainingConfig(learning_rate_warmup_fraction=0.6, learning_rate_decay_fraction=0.6)
    with pytest.raises(ValidationError, match="not used with normalize_activations = none"):
        sm.TrainingConfig(input_scale=2.0)


@pytest.mark.parametrize("rounds", [1, 2])
def test_at_inference_as_many_features_of_batch_topk_fire_as_asked_for(rounds, tmp_path):
    """The threshold's average lags while weights still move: without a calibration 3.2 fire."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 16, generator=generator)

    def rows(n: int) -> Tensor:
        active = torch.rand(n, 40, generator=generator) * (torch.rand(n, 40, generator=generator) < 0.1)
        return 3 * active @ directions

    configs = [sm.SAEConfig(architecture="batch_topk", d_in=16, d_sae=48, k=4, init_seed=j) for j in range(rounds)]
    batches = [rows(256) for _ in range(60)]
    training = sm.TrainingConfig(learning_rate=1e-2)
    saes = sm.train_boosting_concurrently(configs, batches, training) if rounds > 1 else sm.train(configs, batches, training)
    residual = rows(20_000)
    for sae in saes:
        sm.save_sae(sae, tmp_path)
        z = sm.load_sae(tmp_path).encode(residual).detach()
        assert float((z > 0).sum(1).float().mean()) == pytest.approx(4, rel=0.05)
        residual = residual - sae(residual).detach()


def test_rounds_of_a_shared_scale_are_steps_on_the_scaled_input_all_along():
    """Scaling all activations by hand, without normalisation, is the same training: a coefficient keeps its meaning in every round."""
    x = stream(1024)
    configs = [config("jumprelu", seed) for seed in range(3)]
    shared = sm.train_boosting_concurrently(configs, x.split(64), quick(**NORMALISED | {"input_scale": 0.5}))
    by_hand = sm.train_boosting_concurrently(configs, (0.5 * x).split(64), quick())
    for ours, theirs in zip(shared, by_hand, strict=True):
        assert torch.equal(ours.W_dec, theirs.W_dec)
        assert torch.equal(ours(x), 2 * theirs(0.5 * x))
        x = x - ours(x)


def test_a_checkpoint_of_rounds_of_another_scale_is_not_used(tmp_path):
    x, configs, training = stream(512), [config("topk", seed) for seed in range(2)], quick(**NORMALISED)

    def batches():
        yield from x.split(64)[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints = sm.Checkpoints(tmp_path / "state", interval_seconds=0)
        sm.train_boosting_concurrently(configs, batches(), training, boosting_scale="per_round", checkpoints=checkpoints)
    resumed = sm.train_boosting_concurrently(configs, x.split(64), training, checkpoints=sm.Checkpoints(tmp_path / "state"))
    assert all(same_bits(a, b) for a, b in zip(resumed, sm.train_boosting_concurrently(configs, x.split(64), training), strict=True))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 10_000_000),
        ({"total_tokens": 120_000}, 12_000),
        ({"total_tokens": 5}, 1),
        ({"total_tokens": 800_000_000}, 10_000_000),
        ({"total_tokens": 120_000, "dead_after_tokens": 7}, 7),
    ],
)
def test_a_feature_is_dead_after_a_tenth_of_the_tokens_and_at_most_ten_million(fields, expected):
    assert sm.TrainingConfig(**fields).dead_after == expected


N_DEAD = 10


def test_dead_features_are_revived_in_short_trainings_by_default():
    """Features that start without any activation stay dead where no feature is ever called dead."""
    x = stream(6400)
    start = sm.build_sae(config("topk"))
    with torch.no_grad():
        start.b_enc[:N_DEAD] = -100.0
    shares = []
    for fields in ({}, {"dead_after_tokens": 6399}):
        training = quick(**{"dead_after_tokens": None, "total_tokens": len(x), "unit_norm_decoder": False} | fields)
        (sae,) = sm.train([config("topk")], x.split(64), training, initial=[start])
        shares.append(float((sae.b_enc[:N_DEAD] != -100).float().mean()))
    assert shares == [1.0, 0.0]


def test_a_training_too_short_for_dead_features_says_so():
    x, too_short = stream(256), "no feature (can be|was) called dead"
    with pytest.warns(UserWarning, match=f"{too_short} .*silent for 256 tokens, and training takes 256"):
        sm.train([config("topk")], x.split(64), quick(dead_after_tokens=256, total_tokens=256))
    with pytest.warns(UserWarning, match=f"{too_short} .*silent for 10,000,000 tokens, and training takes 256"):
        sm.train([config("topk")], x.split(64), quick(dead_after_tokens=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sm.train([config("topk")], x.split(64), quick(dead_after_tokens=None, total_tokens=256))
        sm.train([config("standard")], x.split(64), quick(dead_after_tokens=None))
