"""Experiments whose members are published SAEs: bags of them, boosting on one, and training that starts from one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file
from tiny_experiment import EXPERIMENT, LAYER, NAME, Laboratory, status_of
from tiny_models import D_MODEL

import saeens_models as sm
from saeens_models import interop
from saeens_pipeline.assets.lineage import lineage
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.storage.activations import ActivationStore
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.tables import read_table

D_SAE, K = 24, 4
FORMATS = ("sae_lens", "sparsify", "dictionary_learning")


def published(folder: Path, format: str, seed: int = 0, d_in: int = D_MODEL, **metadata: Any) -> Path:
    """Write an SAE of random weights in the format of another tool, as somebody else might have published it."""
    generator = torch.Generator().manual_seed(seed)
    sae = sm.build_sae(sm.SAESettings.model_validate({"architecture": "topk", "d_sae": D_SAE, "k": K}).config(d_in, seed))
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 3)
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    interop.export(
        sae, format, folder, {"model_name": "tiny", "hook_name": f"blocks.{LAYER}.hook_resid_post", "hook_layer": LAYER} | metadata
    )
    return folder


def _ensemble(*entries: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return EXPERIMENT["ensemble"] | {"published": [dict(each) for each in entries]} | changes


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One SAE in each format, all of the same width."""
    folder = tmp_path_factory.mktemp("published")
    return {name: published(folder / name, name, seed) for seed, name in enumerate(FORMATS, start=1)}


def _bag_of(saes: Mapping[str, Path]) -> dict[str, Any]:
    """Settings that train nothing."""
    entries = [{"member": j, "sae": str(path)} for j, path in enumerate(saes.values(), start=1)]
    return dict.fromkeys(("sae", "training", "baselines", "keep_residuals")) | {"ensemble": _ensemble(*entries, seeds=[1])}


@pytest.fixture(scope="module")
def bag(tiny_model: Path, saes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Laboratory, str]]:
    """Three published SAEs, and nothing that is trained; with what the run printed. For reading only."""
    home = tmp_path_factory.mktemp("bag")
    laboratory = Laboratory(tiny_model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(**_bag_of(saes))
        yield laboratory, laboratory.run()


@pytest.fixture(scope="module")
def boosted(tiny_model: Path, saes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """Member 1 published by sparsify, member 2 by dictionary_learning, member 3 and rounds 2 and 3 trained. For reading only."""
    home = tmp_path_factory.mktemp("boosted")
    laboratory = Laboratory(tiny_model, home / "defs", home / "data")
    entries = [{"member": 1, "sae": str(saes["sparsify"])}, {"member": 2, "sae": str(saes["dictionary_learning"])}]
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(baselines=None, ensemble=_ensemble(*entries))
        laboratory.run()
        yield laboratory


def _rows(laboratory: Laboratory) -> torch.Tensor:
    store = ActivationStore(laboratory.artefact("activations").path)
    return torch.cat([store.read_chunk("test", i) for i in range(store.n_chunks("test"))]).float()


def _explained(rows: torch.Tensor, reconstruction: torch.Tensor) -> float:
    """Explained variance: the mean over dimensions of 1 - squared error / variance."""
    error, variance = ((rows - other).double().square().sum(0) for other in (reconstruction, rows.mean(0)))
    return (1 - error / variance).mean().item()


def test_a_bag_of_published_saes_is_their_mean(bag: tuple[Laboratory, str], saes: dict[str, Path]):
    laboratory, _ = bag
    rows = _rows(laboratory)
    mean = torch.stack([interop.load(path)(rows) for path in saes.values()]).mean(0)
    assert torch.allclose(sm.load_ensemble(laboratory.artefact("bagging/bagging_ensemble", 1).path)(rows), mean, atol=1e-5)
    table = read_table(laboratory.root, NAME, "reconstruction")
    assert set(table["method"]) == {"single", "bagging"}
    of_three = table.filter(method="bagging", n_members=3)["explained_variance"].item()
    assert of_three == pytest.approx(_explained(rows, mean), abs=1e-5)


def test_nothing_is_trained_without_sae(bag: tuple[Laboratory, str]):
    laboratory, printed = bag
    builders = {name: each.builder for name, each in laboratory.declarations().items() if not each.address.is_table}
    assert "sae" not in builders.values()
    assert not any("boosting" in name or "residual" in name for name in builders)
    assert f"{NAME}/eval/training_curves" not in laboratory.declarations()
    assert "bagging" in printed
    assert "boosting" not in printed
    cost = read_table(laboratory.root, NAME, "cost")
    assert cost["train_flops"].to_list() == [None] * len(cost)
    assert (
        cost.filter(n_members=3)["inference_flops_per_token"].item() == 3 * cost.filter(method="single")["inference_flops_per_token"].item()
    )
    assert (laboratory.root / "reports" / NAME / f"layer={LAYER}" / "index.html").exists()


def test_a_second_run_computes_nothing(bag: tuple[Laboratory, str]):
    assert {each.state for each in status_of()} == {"fresh"}


def test_lineage_reaches_the_hashes_of_the_files(bag: tuple[Laboratory, str], saes: dict[str, Path]):
    laboratory, _ = bag
    traced = lineage(
        laboratory.store,
        laboratory.declarations().values(),
        f"{NAME}/bagging:layer={LAYER},seed=1".replace("bagging:", "bagging/bagging_ensemble:"),
    )
    origins = {each.title: each for member in traced.parents for each in member.parents if each.role == "published SAE"}
    for path in saes.values():
        hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
        (facts,) = origins[str(path)].facts
        assert all(f"{name} {value[:16]}" in facts for name, value in hashes.items()), facts


def test_boosting_fits_what_a_published_sae_leaves(boosted: Laboratory, saes: dict[str, Path]):
    rows, first = _rows(boosted), interop.load(saes["sparsify"])
    assert isinstance(first, sm.SAE)
    for seed in (1, 2):
        rounds = [sm.load_sae(boosted.artefact(f"boosting/round_{j}", seed).path) for j in (1, 2, 3)]
        assert torch.equal(rounds[0].W_dec, first.W_dec)
        residual = rows - first(rows)
        of_two = first(rows) + rounds[1](residual)
        table = read_table(boosted.root, NAME, "reconstruction").filter(method="boosting", seed=seed)
        assert table.filter(n_members=1)["explained_variance"].item() == pytest.approx(_explained(rows, first(rows)), abs=1e-5)
        assert table.filter(n_members=2)["explained_variance"].item() == pytest.approx(_explained(rows, of_two), abs=1e-5)
        assert _explained(rows, of_two) > _explained(rows, first(rows)) + 0.2
    made = boosted.artefact("boosting/round_1", 1).provenance
    assert made["same_as"]
    assert made["published"] == str(saes["sparsify"])


def test_a_bag_mixes_published_and_trained_members(boosted: Laboratory, saes: dict[str, Path]):
    rows = _rows(boosted)
    trained = sm.load_sae(boosted.artefact("bagging/member_3", 2).path)
    members = [interop.load(saes["sparsify"]), interop.load(saes["dictionary_learning"]), trained]
    mean = torch.stack([member(rows) for member in members]).mean(0)
    table = read_table(boosted.root, NAME, "reconstruction").filter(method="bagging", seed=2, n_members=3)
    assert table["explained_variance"].item() == pytest.approx(_explained(rows, mean), abs=1e-5)
    cost = read_table(boosted.root, NAME, "cost").filter(method="bagging", seed=2)
    assert cost["train_seconds"].to_list() == [None] * 3


def test_the_ui_shows_what_is_known_of_a_published_sae(boosted: Laboratory, saes: dict[str, Path]):
    made = boosted.materialise(["tiny/bagging/member_1"], Partition(LAYER, 1))["tiny/bagging/member_1"].metadata
    shown = {name: made[name].value for name in ("published", "architecture", "features", "target L0 [features per token]")}
    assert shown == {
        "published": str(saes["sparsify"]), "architecture": "topk", "features": D_SAE, "target L0 [features per token]": K,
    }  # fmt: skip
    assert "differs from the source" not in made


def test_changed_files_are_loaded_again(empty: Laboratory, tmp_path: Path):
    folder = published(tmp_path / "a", "sae_lens")
    empty.declare(**_bag_of({"a": folder, "b": published(tmp_path / "b", "sparsify", 1), "c": published(tmp_path / "c", "sparsify", 2)}))
    empty.run()
    weights = load_file(folder / "sae_weights.safetensors")
    save_file({name: weight * 2 if name == "b_dec" else weight for name, weight in weights.items()}, folder / "sae_weights.safetensors")
    stale = {str(each.declaration.address): each.reason for each in status_of() if each.state == "stale"}
    assert "sae_weights.safetensors" in stale[f"{NAME}/bagging/member_1"]
    assert f"{NAME}/bagging/member_2" not in stale
    empty.run()
    assert torch.equal(sm.load_sae(empty.artefact("bagging/member_1", 1).path).b_dec, weights["b_dec"] * 2)


def _gemma_scope(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Write an SAE as Gemma Scope publishes them, and return its arrays."""
    random = np.random.default_rng(seed)
    arrays = {
        "W_enc": random.normal(size=(D_MODEL, D_SAE)) / 4, "W_dec": random.normal(size=(D_SAE, D_MODEL)) / 4,
        "b_enc": random.normal(size=D_SAE) / 4, "b_dec": random.normal(size=D_MODEL) / 4, "threshold": random.uniform(0.1, 0.5, D_SAE),
    }  # fmt: skip
    folder.mkdir(parents=True)
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    np.savez(folder / "params.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return arrays


def test_a_gemma_scope_pair_forms_a_bag_and_the_first_is_boosted(empty: Laboratory, tmp_path: Path):
    """The flow of the page on published SAEs."""
    folders = [tmp_path / "gemma-scope" / f"layer_{LAYER}" / "width_24" / f"average_l0_{l0}" for l0 in (8, 4)]
    pair = [_gemma_scope(folder, seed) for seed, folder in enumerate(folders)]
    places = [str(folder).replace(f"layer_{LAYER}", "layer_{layer}") for folder in folders]
    entries = [{"member": j, "sae": place} for j, place in enumerate(places, start=1)]
    empty.declare(baselines=None, ensemble={"members": 2, "seeds": [1], "published": entries})
    empty.run()
    rows = _rows(empty).numpy()
    parts = []
    for arrays in pair:
        pre = rows @ arrays["W_enc"] + arrays["b_enc"]
        parts.append((pre * (pre > arrays["threshold"])) @ arrays["W_dec"] + arrays["b_dec"])
    table = read_table(empty.root, NAME, "reconstruction")
    of_bag, of_boosting = (table.filter(method=method, n_members=2)["explained_variance"].item() for method in ("bagging", "boosting"))
    assert of_bag == pytest.approx(_explained(torch.from_numpy(rows), torch.from_numpy(sum(parts) / 2)), abs=1e-4)
    second = sm.load_sae(empty.artefact("boosting/round_2", 1).path)
    boosted = torch.from_numpy(parts[0]) + second(torch.from_numpy(rows - parts[0]))
    assert of_boosting == pytest.approx(_explained(torch.from_numpy(rows), boosted), abs=1e-4)
    assert second.config.architecture == "topk"


def test_layer_and_seed_stand_for_the_partition(empty: Laboratory, tmp_path: Path):
    for seed in (1, 2):
        published(tmp_path / f"layer_{LAYER}" / f"seed_{seed}", "sparsify", seed)
    place = str(tmp_path / "layer_{layer}" / "seed_{seed}")
    empty.declare(**_bag_of({"a": Path(place)}) | {"ensemble": {"members": 1, "seeds": [1, 2], "published": [{"member": 1, "sae": place}]}})
    empty.run()
    for seed in (1, 2):
        expected = load_file(tmp_path / f"layer_{LAYER}" / f"seed_{seed}" / "sae.safetensors")["W_dec"]
        assert torch.equal(sm.load_sae(empty.artefact("bagging/member_1", seed).path).W_dec, expected)


def test_training_starts_from_a_published_sae(empty: Laboratory, tmp_path: Path):
    folder = published(tmp_path / "a", "sparsify")
    ensemble = {
        "members": 2,
        "seeds": [1],
        "published": [{"member": 1, "sae": str(folder)}],
        "specialised": [{"member": 2, "start_from": 1}],
    }
    few = {"learning_rate": 1e-9, "batch_tokens": 64}
    empty.declare(sae={"architecture": "topk", "d_sae": D_SAE, "k": K}, training=few, baselines=None, ensemble=ensemble)
    empty.run(select=["bagging/member_2"])
    tuned = sm.load_sae(empty.artefact("bagging/member_2", 1).path)
    assert torch.allclose(tuned.W_dec, load_file(folder / "sae.safetensors")["W_dec"], atol=1e-5)
    empty.declare(sae={"architecture": "topk", "d_sae": 2 * D_SAE, "k": K}, training=few, baselines=None, ensemble=ensemble)
    with pytest.raises(ConfigurationError, match=rf"topk with {2 * D_SAE} features, and cannot start from topk with {D_SAE} features"):
        empty.run(select=["bagging/member_2"])


def test_a_scale_that_the_files_lack_is_that_of_the_source(empty: Laboratory, tmp_path: Path):
    folder = published(tmp_path / "a", "sae_lens")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": "expected_average_only_in"}))
    empty.declare(**_bag_of({"a": folder}) | {"ensemble": {"members": 1, "seeds": [1], "published": [{"member": 1, "sae": str(folder)}]}})
    empty.run(select=["bagging/member_1"])
    store = ActivationStore(empty.artefact("activations").path)
    scale = D_MODEL**0.5 / store.statistics("train").mean_norm
    weights, rows = load_file(folder / "sae_weights.safetensors"), _rows(empty)
    centre = weights["b_dec"] if cfg["apply_b_dec_to_input"] else 0
    pre = (rows * scale - centre) @ weights["W_enc"] + weights["b_enc"]
    top = pre.topk(K, dim=1)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    expected = (codes @ weights["W_dec"] + weights["b_dec"]) / scale
    assert torch.allclose(sm.load_sae(empty.artefact("bagging/member_1", 1).path)(rows), expected, atol=1e-4)


def test_another_model_hook_or_layer_is_a_warning(empty: Laboratory, tmp_path: Path):
    elsewhere = {"model_name": "org/other", "hook_name": "blocks.0.hook_mlp_out", "hook_layer": 0}
    empty.declare(
        **_bag_of({"a": published(tmp_path / "a", "sae_lens", **elsewhere)})
        | {"ensemble": {"members": 1, "seeds": [1], "published": [{"member": 1, "sae": str(tmp_path / "a")}]}}
    )
    printed = " ".join(empty.run().split())
    assert "it was trained on org/other, and the source has" in printed
    assert f"it was trained at the hook blocks.0.hook_mlp_out, and the source has blocks.{LAYER}.hook_resid_post" in printed


def _refusal(laboratory: Laboratory) -> str:
    with pytest.raises((ConfigurationError, SaeensError)) as refused:
        laboratory.run()
    return str(refused.value)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("missing", "does not exist"),
        ("wide", f"takes activations of width {2 * D_MODEL}, and those of the source have {D_MODEL}"),
        ("ensemble", "is an ensemble of 2 SAEs, and a member is one"),
        ("truncated", "sae.safetensors"),
        ("hub:org/sae@main", "cannot be reached"),
        ("hub:org", "write hub:OWNER/REPO"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_before_anything_is_trained(empty: Laboratory, tmp_path: Path, place: str, expected: str):
    published(tmp_path / "wide", "sparsify", d_in=2 * D_MODEL)
    interop.export(
        sm.Bagging([sm.load_sae(published(tmp_path / f"m{j}", "sae_lens", j)) for j in (1, 2)]), "sae_lens", tmp_path / "ensemble"
    )
    file = published(tmp_path / "truncated", "sparsify") / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    where = place if place.startswith("hub:") else str(tmp_path / place)
    written = empty.declare(baselines=None, ensemble=_ensemble({"member": 2, "sae": where}))
    message = _refusal(empty)
    assert expected in message
    assert "cannot be reached" in message or f"{written}:" in message
    assert not list((empty.root / "experiments").rglob("*.safetensors")) if (empty.root / "experiments").exists() else True


_ONE = {"member": 1, "sae": "somewhere"}


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"ensemble": _ensemble({"member": 4, "sae": "x"})}, "ensemble.published.0.member", "there is no member 4"),
        ({"ensemble": _ensemble(_ONE, _ONE)}, "ensemble.published.1.member", "member 1 is named twice"),
        ({"ensemble": _ensemble(_ONE, boosting="concurrent"), "keep_residuals": None}, "ensemble.boosting", "round 1 is published"),
        ({"ensemble": _ensemble({"member": 1, "sae": "a/{step}"})}, "ensemble.published.0.sae", "{step} stands for nothing"),
        ({"ensemble": _ensemble(_ONE)}, "baselines.0", "expanded is not defined with published members"),
        ({"ensemble": _ensemble(_ONE), "sae": None, "baselines": None}, "sae", "required"),
        ({"ensemble": {"members": 1, "seeds": [1], "published": [_ONE]}, "sae": None}, "training", "nothing is trained"),
        (
            {**_bag_of({}), "ensemble": {"members": 1, "seeds": [1, 2], "published": [_ONE]}},
            "ensemble.seeds", "2 seeds of the same SAEs",
        ),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_with_their_field(empty: Laboratory, changes: dict[str, Any], field: str, expected: str):
    empty.declare(**changes)
    message = next(iter(empty.catalogue.broken.values()))
    assert f"{field}:" in message
    assert expected in message


def test_one_sae_is_not_used_at_several_layers(empty: Laboratory):
    empty.declare(source={"layers": [0, 1]}, baselines=None, ensemble=_ensemble(_ONE))
    assert "has the layers 0, 1: write {layer} where the paths differ" in next(iter(empty.catalogue.broken.values()))


def test_a_place_on_the_hub_is_pinned_to_its_commit(empty: Laboratory, fake_hub: FakeHub, tmp_path: Path):
    folder = published(tmp_path / "repository" / f"layers.{LAYER}", "sparsify")
    fake_hub.repositories["models/org/sae"] = folder.parent
    where = "hub:org/sae/layers.{layer}"
    empty.declare(**_bag_of({}) | {"ensemble": {"members": 1, "seeds": [1], "published": [{"member": 1, "sae": where}]}})
    empty.run(select=["bagging/member_1"])
    artefact = empty.artefact("bagging/member_1", 1)
    place = artefact.recipe["settings"]["published"]["sae"]
    assert re.fullmatch(rf"hub:org/sae/layers\.{LAYER}@[0-9a-f]{{40}}", place)
    assert torch.equal(sm.load_sae(artefact.path).W_dec, load_file(folder / "sae.safetensors")["W_dec"])
    fake_hub.requests.clear()
    assert {each.state for each in status_of() if each.declaration.address.name == "member_1"} == {"fresh"}
    assert not fake_hub.requests
