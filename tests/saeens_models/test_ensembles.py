"""Bagging and boosting against golden values and the paper's formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saeens_models.architectures import SAE, SAEConfig, SAESettings, architectures, build_sae, load_sae, save_sae
from saeens_models.ensembles import Bagging, Boosting, Ensemble, load_ensemble, save_ensemble
from saeens_models.metrics import connectivity, reconstruction, sparsity
from saeens_models.sparse_code import SparseCode

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["metrics"]
TENSORS = load_file(GOLDEN / "tensors.safetensors")
X = TENSORS["activations"]
ARCHITECTURES = ["standard", "topk", "jumprelu"]
KINDS = [Bagging, Boosting]
REQUIRED = {name: {"k": 4} for name in ("topk", "batch_topk")} | {"matching_pursuit": {"max_iterations": 4}}


def golden_members(architecture: str) -> list[SAE]:
    return [load_sae(GOLDEN / "sae_lens" / architecture / f"member_{j}") for j in range(4)]


def heterogeneous_members() -> list[SAE]:
    """Members of different architectures and sizes, none with a zero bias."""
    saes = [
        build_sae(SAEConfig(architecture="topk", d_in=16, d_sae=24, k=4, init_seed=0)),
        build_sae(SAEConfig(architecture="standard", d_in=16, d_sae=7, init_seed=1)),
        build_sae(SAEConfig(architecture="topk", d_in=16, d_sae=1, k=1, init_seed=2)),
    ]
    generator = torch.Generator().manual_seed(3)
    for sae in saes:
        sae.b_dec.data.normal_(generator=generator)
        sae.b_enc.data.normal_(generator=generator)
    return saes


def dense(code: SparseCode) -> torch.Tensor:
    z = torch.zeros(code.n_tokens, code.n_features)
    z[torch.arange(code.n_tokens).repeat_interleave(code.start.diff()), code.feature] = code.value
    return z


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_reconstructions_meet_the_golden_values(kind: type[Ensemble], architecture: str) -> None:
    ensemble = kind(golden_members(architecture))
    codes, x_hat = (TENSORS[f"{architecture}.{kind.kind}.{name}"] for name in ("codes", "reconstruction"))
    torch.testing.assert_close(ensemble.encode(X), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ensemble.decode(codes), x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ensemble(X), x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_members_meet_the_golden_values(architecture: str) -> None:
    for j, sae in enumerate(Bagging(golden_members(architecture))):
        torch.testing.assert_close(sae.encode(X), TENSORS[f"{architecture}.member.{j}.codes"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(X), TENSORS[f"{architecture}.member.{j}.reconstruction"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_residuals_meet_the_golden_values(architecture: str) -> None:
    boost = Boosting(golden_members(architecture))
    for j in range(4):
        expected = TENSORS[f"{architecture}.boosting.residual_after.{j}"]
        torch.testing.assert_close(boost[: j + 1].residual(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_the_ensemble_meet_the_golden_values(kind: type[Ensemble], architecture: str) -> None:
    ensemble = kind(golden_members(architecture))
    expected = EXPECTED[f"{architecture}.{kind.kind}"]
    z = ensemble.encode(X)
    quality = reconstruction(X, ensemble.decode(z))
    found = {
        "mse": quality.mse,
        "explained_variance": quality.explained_variance,
        "l0": sparsity(z).l0,
        "connectivity": connectivity(z),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_bagging_is_the_mean_of_its_members() -> None:
    saes = heterogeneous_members()
    bag = Bagging(saes)
    mean = torch.stack([sae(X) for sae in saes]).mean(0)
    torch.testing.assert_close(bag(X), mean)
    torch.testing.assert_close(bag.decode(bag.encode(X)), mean)
    torch.testing.assert_close(bag.b_dec, torch.stack([sae.b_dec for sae in saes]).mean(0))


def test_boosting_applies_each_member_to_the_residual_of_the_earlier_ones() -> None:
    first, second, third = saes = heterogeneous_members()
    boost = Boosting(saes)
    after_first = X - first(X)
    after_second = after_first - second(after_first)
    x_hat = first(X) + second(after_first) + third(after_second)
    torch.testing.assert_close(boost(X), x_hat)
    torch.testing.assert_close(boost.decode(boost.encode(X)), x_hat)
    torch.testing.assert_close(boost.residual(X), X - x_hat)
    assert torch.equal(boost.residual(X), after_second - third(after_second))
    torch.testing.assert_close(boost.b_dec, first.b_dec + second.b_dec + third.b_dec)
    torch.testing.assert_close(boost.encode(X)[:, 24:31], second.encode(after_first))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ensemble_is_one_sae_with_stacked_dictionaries(kind: type[Ensemble]) -> None:
    ensemble = kind(heterogeneous_members())
    z = ensemble.encode(X)
    assert z.shape == (600, 32)
    assert ensemble.W_dec.shape == (32, 16)
    torch.testing.assert_close(ensemble(X), z @ ensemble.W_dec + ensemble.b_dec)


def test_unscaled_codes_equal_the_members_codes() -> None:
    saes = heterogeneous_members()
    own = torch.cat([sae.encode(X) for sae in saes], dim=1)
    bag = Bagging(saes)
    assert torch.equal(bag.encode(X, scaled=False), own)
    torch.testing.assert_close(bag.encode(X), own / 3)
    boost = Boosting(saes)
    assert torch.equal(boost.encode(X, scaled=False), boost.encode(X))


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_gives_the_reconstructions_of_all_prefixes(kind: type[Ensemble]) -> None:
    ensemble = kind(heterogeneous_members())
    prefixes = list(ensemble.prefix_reconstructions(X))
    assert [prefix.n_members for prefix in prefixes] == [1, 2, 3]
    for n_members, x_hat, code, given, given_hat in prefixes:
        of_slice = ensemble[:n_members]
        torch.testing.assert_close(x_hat, of_slice.decode(of_slice.encode(X)))
        first, last = ensemble.offsets[n_members - 1 : n_members + 1]
        torch.testing.assert_close(dense(code), ensemble.encode(X, scaled=False)[:, first:last])
        torch.testing.assert_close(dense(code), ensemble[n_members - 1].encode(given))
        torch.testing.assert_close(given_hat, ensemble[n_members - 1](given))


def test_prefixes_hold_the_input_of_each_member() -> None:
    saes = heterogeneous_members()
    assert all(torch.equal(prefix.given, X) for prefix in Bagging(saes).prefix_reconstructions(X))
    boost = Boosting(saes)
    first, second, third = (prefix.given for prefix in boost.prefix_reconstructions(X))
    assert torch.equal(first, X)
    torch.testing.assert_close(second, boost[:1].residual(X))
    torch.testing.assert_close(third, boost[:2].residual(X))


@pytest.mark.parametrize("kind", KINDS)
def test_ensemble_outputs_keep_leading_dimensions(kind: type[Ensemble]) -> None:
    ensemble = kind(heterogeneous_members())
    x = X.reshape(6, 100, 16)
    torch.testing.assert_close(ensemble.encode(x).reshape(600, 32), ensemble.encode(X))
    torch.testing.assert_close(ensemble(x).reshape(600, 16), ensemble(X))


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_of_one_member_computes_the_same_as_that_sae(kind: type[Ensemble]) -> None:
    (sae, *_) = heterogeneous_members()
    ensemble = kind([sae])
    torch.testing.assert_close(ensemble(X), sae(X))
    assert torch.equal(ensemble.encode(X), sae.encode(X))


def test_feature_indices_map_to_their_member() -> None:
    bag = Bagging(heterogeneous_members())
    assert bag.offsets == [0, 24, 31, 32]
    assert [bag.feature(i) for i in (0, 23, 24, 30, 31)] == [(0, 0), (0, 23), (1, 0), (1, 6), (2, 0)]
    for i in range(bag.n_features):
        origin = bag.feature(i)
        assert torch.equal(bag[origin.member].W_dec[origin.index], bag.W_dec[i])
    for i in (-1, 32):
        with pytest.raises(IndexError, match="features 0 to 31"):
            bag.feature(i)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_is_a_sequence_of_its_members(kind: type[Ensemble]) -> None:
    saes = heterogeneous_members()
    ensemble = kind(saes)
    assert len(ensemble) == 3
    assert list(ensemble) == saes
    assert ensemble[-1] is saes[2]
    assert type(ensemble[:2]) is kind
    assert list(ensemble[:2]) == saes[:2]
    for index in (3, -4):
        with pytest.raises(IndexError, match="members 0 to 2"):
            ensemble[index]
    with pytest.raises(ValueError, match="at least one member"):
        ensemble[:0]


def test_bagging_allows_any_slice_and_boosting_only_the_first_rounds() -> None:
    saes = heterogeneous_members()
    assert list(Bagging(saes)[1:]) == saes[1:]
    assert list(Boosting(saes)[0:2]) == saes[:2]
    for leaving_out in (slice(1, None), slice(None, None, 2), slice(None, None, -1)):
        with pytest.raises(ValueError, match="only the first n rounds"):
            Boosting(saes)[leaving_out]


def test_moving_the_ensemble_moves_its_members() -> None:
    bag = Bagging(heterogeneous_members()).to(torch.device("meta"))
    assert {sae.W_dec.device.type for sae in bag} == {"meta"}
    assert bag.W_dec.device.type == "meta"
    assert Bagging(heterogeneous_members()).to(torch.float64)(X.double()).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_bad_members_and_codes_are_refused(kind: type[Ensemble]) -> None:
    saes = heterogeneous_members()
    other = build_sae(SAEConfig(architecture="standard", d_in=8, d_sae=4))
    with pytest.raises(ValueError, match="at least one member"):
        kind([])
    with pytest.raises(ValueError, match=r"one d_in; got \[16, 8\]"):
        kind([saes[0], other])
    with pytest.raises(TypeError, match="member 1 is Linear"):
        kind([saes[0], torch.nn.Linear(16, 16)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\[2, 31\].* the 32 features of the 3 members"):
        kind(saes).decode(torch.zeros(2, 31))


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_gives_the_same_ensemble(kind: type[Ensemble], tmp_path: Path) -> None:
    ensemble = kind(heterogeneous_members())
    save_ensemble(ensemble, tmp_path / "new" / "ensemble")
    loaded = load_ensemble(tmp_path / "new" / "ensemble")
    assert type(loaded) is kind
    assert [sae.config for sae in loaded] == [sae.config for sae in ensemble]
    assert torch.equal(loaded.encode(X), ensemble.encode(X))
    assert torch.equal(loaded(X), ensemble(X))


def test_a_saved_ensemble_consists_of_sae_folders(tmp_path: Path) -> None:
    save_ensemble(Bagging(heterogeneous_members()), tmp_path)
    assert torch.equal(load_sae(tmp_path / "member_2").W_dec, heterogeneous_members()[1].W_dec)
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".json", ".safetensors"}


def test_a_saved_ensemble_can_refer_to_sae_folders_outside_it(tmp_path: Path) -> None:
    boost = Boosting(heterogeneous_members())
    save_ensemble(boost, tmp_path)
    (tmp_path / "references").mkdir()
    manifest = {"format_version": 1, "kind": "boosting", "members": ["../member_1", "../member_2"]}
    (tmp_path / "references" / "ensemble.json").write_text(json.dumps(manifest))
    assert torch.equal(load_ensemble(tmp_path / "references")(X), boost[:2](X))


def test_saving_a_smaller_ensemble_over_a_larger_one_loads_the_smaller(tmp_path: Path) -> None:
    bag = Bagging(heterogeneous_members())
    save_ensemble(bag, tmp_path)
    save_ensemble(bag[:2], tmp_path)
    assert len(load_ensemble(tmp_path)) == 2


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"format_version": 2, "kind": "bagging", "members": ["member_1"]}', "format_version: Input should be 1"),
        ('{"format_version": 1, "kind": "stacking", "members": ["member_1"]}', "kind: Input should be 'bagging' or 'boosting'"),
        ('{"format_version": 1, "kind": "bagging", "members": []}', "members: List should have at least 1 item"),
        ('{"format_version": 1, "kind": "bagging", "members": ["../../member_1"]}', "members.0: String should match pattern"),
        ('{"format_version": 1, "kind": "bagging", "members": ["/member_1"]}', "members.0: String should match pattern"),
        ('{"format_version": 1, "kind": "bagging"}', "members: Field required"),
        (
            json.dumps({"format_version": 1, "kind": "bagging", "members": ["member_1"] * 1001}),
            "members: List should have at most 1000 items",
        ),
        (json.dumps({"format_version": 1, "kind": "bagging", "members": ["m" * 300]}), "members.0: String should match pattern"),
        ("[" * 100_000, "Invalid JSON"),
        ("\udcff", "Invalid JSON"),
    ],
)
def test_an_invalid_manifest_is_refused(manifest: str, message: str, tmp_path: Path) -> None:
    save_ensemble(Bagging(heterogeneous_members()), tmp_path)
    (tmp_path / "ensemble.json").write_text(manifest, errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as error:
        load_ensemble(tmp_path)
    assert str(tmp_path / "ensemble.json") in str(error.value)


def test_missing_or_inconsistent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ensemble\.json is missing"):
        load_ensemble(tmp_path)
    save_ensemble(Bagging(heterogeneous_members()), tmp_path)
    save_ensemble(Bagging([build_sae(SAEConfig(architecture="standard", d_in=8, d_sae=4))]), tmp_path / "narrow")
    (tmp_path / "member_3").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="member_3"):
        load_ensemble(tmp_path)
    (tmp_path / "narrow" / "member_1").rename(tmp_path / "member_3")
    with pytest.raises(ValueError, match=r"one d_in; got \[16, 16, 8\]"):
        load_ensemble(tmp_path)


def test_metadata_survive_saving_and_loading_an_ensemble(tmp_path: Path) -> None:
    members = heterogeneous_members()
    save_sae(members[0], tmp_path / "one", metadata={"model_name": "m", "hook_name": "blocks.3.hook_resid_post", "own": {"a": [1]}})
    members[0] = load_sae(tmp_path / "one")
    save_ensemble(Bagging(members), tmp_path / "bag")
    loaded = load_ensemble(tmp_path / "bag")
    expected = {"model_name": "m", "hook_name": "blocks.3.hook_resid_post", "own": {"a": [1]}, "sae_lens_training_version": None}
    assert loaded[0].metadata == expected
    assert "model_name" not in loaded[1].metadata
    ours, before = (json.loads((tmp_path / name / "cfg.json").read_text()) for name in ("bag/member_1", "one"))
    assert ours == before


def test_a_member_that_is_named_twice_is_loaded_once(tmp_path: Path) -> None:
    bag = Bagging(heterogeneous_members())
    save_ensemble(bag, tmp_path)
    manifest = {"format_version": 1, "kind": "bagging", "members": ["member_1", "member_2", "member_1"]}
    (tmp_path / "ensemble.json").write_text(json.dumps(manifest))
    loaded = load_ensemble(tmp_path)
    assert loaded[0] is loaded[2]
    torch.testing.assert_close(loaded(X), (2 * bag[0](X) + bag[1](X)) / 3)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", architectures())
@pytest.mark.parametrize("kind", KINDS)
def test_decode_of_encode_is_the_mean_or_the_sum_for_every_architecture(kind: type[Ensemble], architecture: str, subtracts: bool) -> None:
    settings = SAESettings.model_validate(
        {"architecture": architecture, "d_sae": 24, "apply_b_dec_to_input": subtracts, **REQUIRED.get(architecture, {})}
    )
    saes = [build_sae(settings.config(16, seed)).inference_form() for seed in range(3)]
    generator = torch.Generator().manual_seed(3)
    for sae in saes:
        sae.b_dec.data.normal_(generator=generator)
    x = torch.randn(50, 16, generator=generator)
    parts, residual = [], x
    for sae in saes:
        parts.append(sae(residual))
        residual = residual - parts[-1] if kind is Boosting else x
    expected = sum(parts) / (1 if kind is Boosting else 3)
    ensemble = kind(saes)
    z = ensemble.encode(x)
    torch.testing.assert_close(ensemble.decode(z), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z @ ensemble.W_dec + ensemble.b_dec, expected, rtol=1e-5, atol=1e-5)
