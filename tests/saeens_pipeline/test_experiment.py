"""A whole experiment on a tiny language model, through Dagster: its artefacts, its numbers, and its cache hits."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from safetensors.numpy import load_file
from scipy.stats import entropy
from sklearn.metrics.pairwise import cosine_similarity
from test_tables import CONTRACT, SUBJECT
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, SEEDS, Laboratory, status_of
from tiny_models import D_MODEL, write_tiny_model
from transformers import PreTrainedModel

import saeens_models as sm
from saeens_pipeline.assets import sources, training
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import caching
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import open_tokens
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import MissingInputError
from saeens_pipeline.storage.tables import read_table

K, D_SAE, TRAIN, TEST = 4, 2 * D_MODEL, 600, 200
HERE = Partition(LAYER, SEEDS[0])
METHODS = {
    ("single", 1),
    *((method, n) for method in ("bagging", "boosting") for n in (1, 2, 3)),
    ("expanded", 3),
    ("expanded_l0_matched", 3),
}
SAE_KEYS = [f"{kind}_{j}" for kind in ("bagging/member", "boosting/round") for j in range(1, MEMBERS + 1)]
SAE_KEYS += ["baseline/expanded", "baseline/expanded_l0_matched"]


# independent of the package: SAEs and activations as they lie on disk, in float64


class PlainTopK:
    """A TopK SAE from its SAELens files, written out."""

    def __init__(self, folder: Path, k: int = K) -> None:
        weights = {name: values.astype(np.float64) for name, values in load_file(folder / "sae_weights.safetensors").items()}
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        self.k = k

    def encode(self, x: np.ndarray) -> np.ndarray:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        smallest = np.sort(pre, axis=1)[:, -self.k][:, None]
        return np.where(pre >= smallest, np.maximum(pre, 0), 0)

    def decode(self, z: np.ndarray) -> np.ndarray:
        return z @ self.W_dec + self.b_dec


def stored_activations(laboratory: Laboratory, split: str) -> np.ndarray:
    return np.asarray(zarr.open_group(laboratory.artefact("activations").path, mode="r")[f"{split}/activations"][:], dtype=np.float64)  # pyright: ignore


def plain_saes(laboratory: Laboratory, prefix: str, seed: int, n: int) -> list[PlainTopK]:
    return [PlainTopK(laboratory.artefact(f"{prefix}_{j}", seed).path) for j in range(1, n + 1)]


def _bagging(saes: list[PlainTopK], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reconstruction and concatenated code."""
    codes = [sae.encode(x) for sae in saes]
    return np.mean([sae.decode(z) for sae, z in zip(saes, codes, strict=True)], axis=0), np.concatenate(codes, axis=1)


def plain_boosting(saes: list[PlainTopK], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    residual, codes = x, []
    for sae in saes:
        codes.append(sae.encode(residual))
        residual = residual - sae.decode(codes[-1])
    return x - residual, np.concatenate(codes, axis=1)


def _mse(x: np.ndarray, x_hat: np.ndarray) -> float:
    return float(((x - x_hat) ** 2).sum(axis=1).mean())


def plain_explained_variance(x: np.ndarray, x_hat: np.ndarray) -> float:
    return float((1 - ((x - x_hat) ** 2).sum(axis=0) / ((x - x.mean(axis=0)) ** 2).sum(axis=0)).mean())


def _connectivity(z: np.ndarray) -> float:
    fires = (z != 0).astype(float)
    return 1 - np.count_nonzero(fires.T @ fires) / z.shape[1] ** 2


def _diversity(W_dec: np.ndarray) -> int:
    cosines = cosine_similarity(W_dec)
    np.fill_diagonal(cosines, -1)
    return int((cosines.max(axis=1) < 0.7).sum())


def _description_length(z: np.ndarray, saes: list[PlainTopK], step: float) -> float:
    fires = z != 0
    magnitudes = (z * np.linalg.norm(np.concatenate([sae.W_dec for sae in saes]), axis=1))[fires]
    _, counts = np.unique(np.round(magnitudes / step), return_counts=True)
    p = fires.mean(axis=0)
    return float(entropy(np.stack([p, 1 - p]), base=2).sum() + fires.sum() / len(z) * entropy(counts, base=2))


def _table(laboratory: Laboratory, table: str) -> pl.DataFrame:
    return read_table(laboratory.root, NAME, table)


def _row(laboratory: Laboratory, table: str, **wanted: Any) -> dict[str, Any]:
    (row,) = _table(laboratory, table).filter(**wanted).iter_rows(named=True)
    return row


# the tables


TABLES = CONTRACT.keys() - {
    "features",
    "contexts",
    "autointerp",
    "concept_detection",
    "spurious_correlation",
    "feature_stability",
    "recovery",
}  # which have tests of their own


@pytest.mark.parametrize("table", sorted(TABLES))
def test_every_table_has_the_columns_of_the_contract(finished_laboratory: Laboratory, table: str):
    files = sorted((finished_laboratory.root / "tables" / NAME / table).rglob("*.parquet"))
    assert len(files) == (1 if table in ("stability", "marginal_gain") else len(SEEDS))
    for file in files:
        assert pl.read_parquet(file, hive_partitioning=False).columns == SUBJECT + CONTRACT[table].split()


@pytest.mark.parametrize("table", ["reconstruction", "coactivation", "stability", "cost"])
def test_every_method_and_size_of_every_seed_has_a_row(finished_laboratory: Laboratory, table: str):
    frame = _table(finished_laboratory, table)
    assert sorted(frame.select("seed", "method", "n_members").iter_rows()) == sorted(
        (seed, *method) for seed in SEEDS for method in METHODS
    )
    assert set(frame.select("experiment", "layer", "language_model").iter_rows()) == {(NAME, LAYER, "trained")}


def test_rows_reference_the_saes_that_they_measure(finished_laboratory: Laboratory):
    for table in TABLES:
        for row in _table(finished_laboratory, table).iter_rows(named=True):
            prefix = {"single": "bagging/member", "bagging": "bagging/member", "boosting": "boosting/round"}.get(row["method"])
            keys = [f"{prefix}_{j}" for j in range(1, row["n_members"] + 1)] if prefix else [f"baseline/{row['method']}"]
            keys = [keys[row["member"] - 1]] if "member" in row else keys
            recipes = [finished_laboratory.artefact(key, row["seed"]).path / "recipe.json" for key in keys]
            assert row["sae_data_versions"] == ",".join(json.loads(recipe.read_text())["data_version"] for recipe in recipes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("method", "n"), sorted(METHODS))
def test_reconstruction_and_coactivation_agree_with_a_dense_computation(finished_laboratory: Laboratory, seed: int, method: str, n: int):
    x = stored_activations(finished_laboratory, "test")
    assert x.shape == (TEST, D_MODEL)
    if method.startswith("expanded"):
        saes = [PlainTopK(finished_laboratory.artefact(f"baseline/{method}", seed).path, k=K * MEMBERS if "l0" in method else K)]
    else:
        saes = plain_saes(finished_laboratory, "boosting/round" if method == "boosting" else "bagging/member", seed, n)
    x_hat, z = plain_boosting(saes, x) if method == "boosting" else _bagging(saes, x)
    row = _row(finished_laboratory, "reconstruction", method=method, n_members=n, seed=seed)
    assert row["n_features"] == z.shape[1] == n * D_SAE
    assert row["tokens"] == TEST
    assert row["mse"] == pytest.approx(_mse(x, x_hat), rel=1e-5)
    assert row["explained_variance"] == pytest.approx(plain_explained_variance(x, x_hat), abs=1e-5)
    assert row["fvu"] == pytest.approx(((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum(), rel=1e-5)
    assert row["l0"] == pytest.approx(np.count_nonzero(z) / TEST)
    assert row["relative_sparsity"] == pytest.approx(np.count_nonzero(z) / TEST / z.shape[1])
    assert row["dead_features"] == pytest.approx((np.count_nonzero(z, axis=0) == 0).mean())
    assert row["constant_dimensions"] == 0
    assert row["description_length_bits"] == pytest.approx(_description_length(z, saes, np.linalg.norm(x, axis=1).mean() / 256), rel=1e-3)
    row = _row(finished_laboratory, "coactivation", method=method, n_members=n, seed=seed)
    assert row["connectivity"] == pytest.approx(_connectivity(z))
    assert row["diversity"] == _diversity(np.concatenate([sae.W_dec for sae in saes]))
    assert row["tokens"] == TEST


@pytest.mark.parametrize(("method", "n"), sorted(METHODS))
def test_ce_loss_recovered_equals_that_of_the_models_own_loss(finished_laboratory: Laboratory, method: str, n: int):
    model = load_language_model(describe_language_model(str(finished_laboratory.model)))
    tokens = open_tokens(finished_laboratory.artefact("tokens", layer=None).path)
    windows = next(tokens.batches("test", 1000))
    x = model.activations(windows.tokens, "resid_post", [LAYER])[LAYER][windows.kept].double().numpy()
    if method.startswith("expanded"):
        saes = [PlainTopK(finished_laboratory.artefact(f"baseline/{method}", 1).path, k=K * MEMBERS if "l0" in method else K)]
    else:
        saes = plain_saes(finished_laboratory, "boosting/round" if method == "boosting" else "bagging/member", 1, n)
    x_hat, _ = plain_boosting(saes, x) if method == "boosting" else _bagging(saes, x)

    def loss(rows: np.ndarray) -> float:
        """The model's own, with rows in the place of the activations of kept positions."""

        def replace(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            return output.masked_scatter(windows.kept[..., None], torch.from_numpy(rows).float())

        handle = model.module("resid_post", LAYER).register_forward_hook(replace)
        with torch.no_grad():
            found = model.model(input_ids=windows.tokens, labels=windows.tokens.masked_fill(windows.document < 0, -100)).loss.item()
        handle.remove()
        return found

    mean = stored_activations(finished_laboratory, "train").mean(0)
    clean, ablated, replaced_by_mean = loss(x), loss(np.zeros_like(x)), loss(np.broadcast_to(mean, x.shape).copy())
    row = _row(finished_laboratory, "reconstruction", method=method, n_members=n, seed=1)
    assert row["ce_loss_recovered"] == pytest.approx((ablated - loss(x_hat)) / (ablated - clean), abs=1e-4)
    assert row["ce_loss_added_nats"] == pytest.approx(loss(x_hat) - clean, abs=1e-4)
    assert row["ce_loss_recovered_from_mean"] is None, "the mean changes the loss of this untrained model by less than 0.05 nats"
    recorded = finished_laboratory.artefact("eval/reconstruction", 1).provenance["next_token_loss"]
    floors = {"ablated": ablated, "replaced_by_mean": replaced_by_mean}
    assert recorded == pytest.approx({"clean": clean, **floors, "tokens": TEST}, rel=1e-5)
    assert abs(replaced_by_mean - clean) < 0.05


@pytest.mark.parametrize(("method", "n"), sorted(METHODS))
def test_stability_of_all_methods_equals_scikit_learn(finished_laboratory: Laboratory, method: str, n: int):
    def dictionary(seed: int) -> np.ndarray:
        if method.startswith("expanded"):
            return PlainTopK(finished_laboratory.artefact(f"baseline/{method}", seed).path).W_dec
        prefix = "boosting/round" if method == "boosting" else "bagging/member"
        return np.concatenate([sae.W_dec for sae in plain_saes(finished_laboratory, prefix, seed, n)])

    cosines = cosine_similarity(dictionary(SEEDS[0]), dictionary(SEEDS[1]))
    for seed, axis in ((SEEDS[0], 1), (SEEDS[1], 0)):
        row = _row(finished_laboratory, "stability", method=method, n_members=n, seed=seed)
        assert row["n_runs"] == 2
        assert row["stability"] == pytest.approx(np.maximum(cosines.max(axis=axis), 0).mean(), abs=1e-5)
        assert row["stability_pairwise"] == pytest.approx(row["stability"])
        assert -1 <= row["stability_matched"] <= row["stability"] + 1e-6


def test_the_table_of_members_measures_them_on_their_own_input(finished_laboratory: Laboratory):
    x = stored_activations(finished_laboratory, "test")
    members, rounds = (plain_saes(finished_laboratory, prefix, 1, MEMBERS) for prefix in ("bagging/member", "boosting/round"))
    for method, of_method in (("bagging", members), ("boosting", rounds)):
        given = x
        for number, sae in enumerate(of_method, start=1):
            row = _row(finished_laboratory, "members", method=method, member=number, seed=1)
            z = sae.encode(given)
            assert row["n_members"] == MEMBERS
            assert row["mse"] == pytest.approx(_mse(given, sae.decode(z)), rel=1e-4)
            assert row["explained_variance"] == pytest.approx(plain_explained_variance(given, sae.decode(z)), abs=1e-4)
            assert row["l0"] == pytest.approx(np.count_nonzero(z) / TEST)
            assert row["median_density"] == pytest.approx(_lower_median((z != 0).mean(axis=0)))
            others = np.concatenate([other.W_dec for other in of_method if other is not sae])
            assert row["mean_max_cosine_to_other_members"] == pytest.approx(
                cosine_similarity(sae.W_dec, others).max(axis=1).mean(), abs=1e-5
            )
            given = given - sae.decode(z) if method == "boosting" else given


def _lower_median(values: np.ndarray) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def test_cost_adds_up_over_members_and_lists_passes_over_residuals_separately(finished_laboratory: Laboratory):
    for method, n in METHODS:
        row = _row(finished_laboratory, "cost", method=method, n_members=n, seed=1)
        config = sm.SAEConfig(architecture="topk", d_in=D_MODEL, d_sae=D_SAE, k=K)
        wide = sm.SAEConfig(architecture="topk", d_in=D_MODEL, d_sae=n * D_SAE, k=K)
        one_sae = method.startswith("expanded")
        assert row["train_tokens"] == (TRAIN if one_sae else n * TRAIN)
        assert row["train_flops"] == TRAIN * (wide.train_flops_per_token if one_sae else n * config.train_flops_per_token)
        assert row["inference_flops_per_token"] == (wide if one_sae else config).inference_flops_per_token * (1 if one_sae else n)
        passes = n - 1 if method == "boosting" else 0
        assert row["residual_flops"] == passes * TRAIN * config.inference_flops_per_token
        assert (row["residual_seconds"] > 0) == (passes > 0)
        assert row["train_seconds"] > 0
        assert row["dtype"] == "float32"
        assert row["device"].startswith("cpu")
        assert row["boosting_mode"] == ("sequential" if method == "boosting" else None)


def test_members_share_the_seconds_of_the_op_that_trained_them(finished_laboratory: Laboratory):
    seconds = [finished_laboratory.artefact(f"bagging/member_{j}", 1).provenance["train_seconds"] for j in range(1, MEMBERS + 1)]
    assert seconds == [seconds[0]] * MEMBERS
    assert finished_laboratory.artefact("bagging/member_1", 1).provenance["trained_together"] == MEMBERS


def test_training_curves_end_with_all_tokens(finished_laboratory: Laboratory):
    curves = _table(finished_laboratory, "training_curves")
    last = curves.group_by("seed", "method", "member").agg(pl.col("step", "tokens", "learning_rate").last())
    assert len(last) == len(SEEDS) * (2 * MEMBERS + 2)
    steps = -(-TRAIN // EXPERIMENT["training"]["batch_tokens"])
    assert set(last.select("step", "tokens", "learning_rate").iter_rows()) == {(steps, TRAIN, 0.01)}
    assert curves["loss"].is_finite().all()


def test_the_control_is_measured_through_the_untrained_model(empty: Laboratory):
    empty.declare({"weights": "random"})
    empty.run(seeds=[1], select=["eval/reconstruction"])
    model = load_language_model(describe_language_model(str(empty.model)), "random").model
    windows = next(open_tokens(empty.artefact("tokens", layer=None).path).batches("test", 1000))
    with torch.no_grad():
        expected = model(input_ids=windows.tokens, labels=windows.tokens.masked_fill(windows.document < 0, -100)).loss.item()
    recorded = empty.artefact("eval/reconstruction", 1).provenance["next_token_loss"]
    assert recorded["clean"] == pytest.approx(expected, rel=1e-5)


def test_without_ce_loss_tokens_there_is_no_ce_loss_and_no_text_is_read(finished: Laboratory):
    finished.declare(ce_loss_tokens=0)
    before = {seed: finished.artefact("eval/members", seed).data_version for seed in SEEDS}
    finished.run()
    assert _table(finished, "reconstruction")["ce_loss_recovered"].null_count() == len(SEEDS) * len(METHODS)
    assert "tokens" not in finished.artefact("eval/reconstruction", 1).recipe["inputs"]
    assert before == {seed: finished.artefact("eval/members", seed).data_version for seed in SEEDS}


def _take_the_head_away(model: Path, folder: Path) -> Path:
    loaded = load_language_model(describe_language_model(str(model))).model
    cast("PreTrainedModel", loaded.base_model).save_pretrained(folder)
    shutil.copy(model / "tokenizer.json", folder)
    return folder


def test_without_a_language_modelling_head_ce_loss_is_null_and_requesting_it_is_refused(empty: Laboratory, tmp_path: Path):
    headless = {"language_model": str(_take_the_head_away(empty.model, tmp_path / "headless"))}
    empty.declare(headless, ce_loss_tokens=100)
    with pytest.raises(ConfigurationError, match=r"ce_loss_tokens: 100, but .*headless has no language-modelling head.*set it to 0"):
        empty.run()
    assert not (empty.root / "sources").exists()
    empty.materialise([f"{NAME}/tokens"], Partition())
    empty.materialise([f"{NAME}/activations"], Partition(LAYER))
    with pytest.raises(ConfigurationError, match=r"ce_loss_tokens: 100, but"):  # also of the UI, before it trains anything
        empty.materialise([f"{NAME}/boosting/round_1"], Partition(LAYER, SEEDS[0]))
    empty.declare(headless)
    empty.run(seeds=[1], select=["eval/reconstruction"])
    table = pl.read_parquet(empty.artefact("eval/reconstruction", 1).path, hive_partitioning=False)
    assert table["ce_loss_recovered"].null_count() == len(table) == len(METHODS)
    assert table["description_length_bits"].min() > 0  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]


def test_a_changed_language_model_is_refused_for_measuring_ce_loss(finished: Laboratory, tmp_path: Path):
    model = Path(shutil.copytree(finished.model, tmp_path / "model"))
    finished.declare({"language_model": str(model)})
    finished.run()
    write_tiny_model(model, seed=1)
    finished.artefact("eval/reconstruction", 1).path.unlink()
    with pytest.raises(SaeensError, match=r"have changed since .*activations\.zarr was computed from them"):
        finished.materialise([f"{NAME}/eval/reconstruction"], HERE)
    finished.run()
    assert {status.state for status in status_of(NAME)} == {"fresh"}


# SAEs and ensembles


def test_init_seeds_are_all_different_and_data_seeds_shared(finished_laboratory: Laboratory):
    settings = {(key, seed): finished_laboratory.artefact(key, seed).recipe["settings"] for key in SAE_KEYS for seed in SEEDS}
    assert {values["data_seed"] for (_, seed), values in settings.items() if seed == 1} == {1}
    assert {values["data_seed"] for (_, seed), values in settings.items() if seed == 2} == {2}
    members = [values["init_seed"] for (key, _), values in settings.items() if key.startswith("bagging")]
    assert len(set(members)) == len(SEEDS) * MEMBERS


def test_ensembles_open_from_their_folder(finished_laboratory: Laboratory):
    x = stored_activations(finished_laboratory, "test")
    for kind, prefix, reconstruct in (("bagging", "bagging/member", _bagging), ("boosting", "boosting/round", plain_boosting)):
        ensemble = sm.load_ensemble(finished_laboratory.artefact(f"{kind}/{kind}_ensemble", 1).path)
        assert (ensemble.kind, len(ensemble)) == (kind, MEMBERS)
        with torch.no_grad():
            x_hat = ensemble(torch.from_numpy(x).float()).numpy()
        np.testing.assert_allclose(x_hat, reconstruct(plain_saes(finished_laboratory, prefix, 1, MEMBERS), x)[0], atol=1e-4)


def test_round_1_links_to_member_1(finished_laboratory: Laboratory):
    for seed in SEEDS:
        member, first_round = (finished_laboratory.artefact(key, seed) for key in ("bagging/member_1", "boosting/round_1"))
        assert first_round.data_version == member.data_version
        assert first_round.provenance["same_as"] == f"{NAME}/bagging/member_1"
        assert (first_round.path / "sae_weights.safetensors").samefile(member.path / "sae_weights.safetensors")
        assert (member.path / "sae_weights.safetensors").read_bytes() == (first_round.path / "sae_weights.safetensors").read_bytes()


def test_residuals_equal_activations_minus_reconstructions_in_the_stored_dtype(finished_laboratory: Laboratory):
    x = stored_activations(finished_laboratory, "train")
    (first, second) = plain_saes(finished_laboratory, "boosting/round", 1, 2)
    residual = (x - first.decode(first.encode(x))).astype(np.float16).astype(np.float64)
    residual = residual - second.decode(second.encode(residual))
    group = zarr.open_group(finished_laboratory.artefact("boosting/residual_2", 1).path, mode="r")
    stored: Any = group["train/activations"]
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored[:], residual, atol=2e-3)


# what is not made twice


def _stamps(root: Path) -> dict[Path, tuple[int, int]]:
    files = (file for file in root.rglob("*") if file.is_file() and "dagster" not in file.relative_to(root).parts)
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in files}


def _weights(laboratory: Laboratory, key: str, seed: int) -> bytes:
    return (laboratory.artefact(key, seed).path / "sae_weights.safetensors").read_bytes()


def test_the_same_run_in_another_root_gives_the_same_bits(finished_laboratory: Laboratory, empty: Laboratory):
    empty.run()
    for status in status_of(NAME):
        here, there = (
            laboratory.store.require(status.declaration.address, status.partition) for laboratory in (empty, finished_laboratory)
        )
        if status.declaration.address.name in ("cost", "report"):  # hold seconds
            continue
        assert here.data_version == there.data_version, status.declaration.address
        assert here.files == there.files
    for key in SAE_KEYS:
        assert _weights(empty, key, 1) == _weights(finished_laboratory, key, 1)


def test_a_second_run_computes_nothing_and_reports_it(finished: Laboratory):
    before = _stamps(finished.root)
    printed = finished.run()
    assert "nothing to do" in printed
    assert "no training" in printed
    assert "boosting" in printed  # the summary is there all the same
    assert _stamps(finished.root) == before


def test_materialising_again_through_dagster_is_a_cache_hit(finished: Laboratory):
    before = _stamps(finished.root)
    keys = [f"{NAME}/{key}" for key in ("bagging/member_1", "bagging/member_3", "boosting/residual_1", "boosting/residual_2", "eval/cost")]
    events = finished.materialise(keys, HERE)
    assert events.keys() == set(keys)
    for key, event in events.items():
        assert event.metadata["cache_hit"].value is True
        assert event.tags is not None
        assert event.tags["dagster/data_version"] == finished.artefact(key.removeprefix(f"{NAME}/"), SEEDS[0]).data_version
    assert _stamps(finished.root) == before


def test_removed_artefacts_alone_are_rebuilt_with_the_same_bits(finished: Laboratory, finished_laboratory: Laboratory):
    shutil.rmtree(finished.artefact("boosting/round_2", 1).path)
    before = _stamps(finished.root)
    finished.run()
    after = _stamps(finished.root)
    changed = {file.parent.name for file in after if file not in before or before[file] != after[file]}
    assert changed == {"round_2"}
    assert _weights(finished, "boosting/round_2", 1) == _weights(finished_laboratory, "boosting/round_2", 1)


def test_damaged_artefacts_alone_are_rebuilt_with_the_same_bits(finished: Laboratory, finished_laboratory: Laboratory):
    weights = finished.artefact("bagging/member_2", 1).path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (finished.artefact("boosting/boosting_ensemble", 2).path / "recipe.json").write_text("{")
    table = finished.artefact("eval/members", 2).path
    table.write_bytes(table.read_bytes()[:50])
    before = _stamps(finished.root)
    printed = finished.run()
    for damaged in (weights, finished.root / "experiments", table):
        assert str(damaged) in printed
    after = _stamps(finished.root)
    changed = {file for file in after if file not in before or before[file] != after[file]}
    folders = {file.parent.name for file in changed if file.name != "part.parquet"}
    assert folders == {"member_2", "boosting_ensemble"}
    assert [file for file in changed if file.name == "part.parquet"] == [table]
    assert _weights(finished, "bagging/member_2", 1) == _weights(finished_laboratory, "bagging/member_2", 1)
    assert finished.artefact("eval/members", 2).data_version == finished_laboratory.artefact("eval/members", 2).data_version
    assert {status.state for status in status_of(NAME)} == {"fresh"}


@pytest.mark.parametrize("methods", [("expanded", "expanded_l0_matched"), ("expanded_l0_matched", "expanded")])
def test_baselines_of_one_members_width_are_equal_and_trained_once(
    empty: Laboratory, monkeypatch: pytest.MonkeyPatch, methods: tuple[str, str]
):
    train, trained = training.train_saes, []

    def counted(workplace: Any, tasks: Any, *others: Any) -> None:
        trained.extend(task.declaration.address.name for task in tasks)
        train(workplace, tasks, *others)

    monkeypatch.setattr(training, "train_saes", counted)
    empty.declare(baselines=list(methods), expanded_sizes="all")
    empty.run(seeds=[1], select=[f"baseline/{method}_{n}" for method in methods for n in (1, 2)])
    assert sorted(trained) == sorted([f"{methods[0]}_1", f"{methods[0]}_2", f"{methods[1]}_2"])
    first, second = (empty.artefact(f"baseline/{method}_1", 1) for method in methods)
    assert second.data_version == first.data_version
    assert second.provenance["same_as"] == f"{NAME}/baseline/{methods[0]}_1"
    assert (second.path / "sae_weights.safetensors").samefile(first.path / "sae_weights.safetensors")


def test_a_member_trained_alone_has_the_bits_of_one_trained_with_the_others(empty: Laboratory, finished_laboratory: Laboratory):
    empty.run(select=["bagging/member_2"], seeds=[2])
    made = sorted(path.parent.relative_to(empty.root).as_posix() for path in empty.root.rglob("recipe.json"))
    source, saes_folder = f"sources/{NAME}", f"experiments/{NAME}/layer={LAYER}/seed=2/bagging/member_2"
    assert made == [saes_folder, f"{source}/layer={LAYER}/activations.zarr", f"{source}/tokens.zarr"]
    assert _weights(empty, "bagging/member_2", 2) == _weights(finished_laboratory, "bagging/member_2", 2)
    assert empty.artefact("bagging/member_2", 2).data_version == finished_laboratory.artefact("bagging/member_2", 2).data_version
    assert empty.artefact("bagging/member_2", 2).provenance["trained_together"] == 1


@pytest.mark.parametrize(("keep", "kept"), [("none", []), ("last", [2]), ("all", [1, 2])])
def test_residuals_read_on_the_fly_give_the_bits_of_stored_ones(
    empty: Laboratory, finished_laboratory: Laboratory, keep: str, kept: list[int]
):
    empty.declare(keep_residuals=keep)
    empty.run(select=[f"boosting/round_{MEMBERS}"], seeds=[1])
    residuals = {j: empty.artefact(f"boosting/residual_{j}", 1) for j in (1, 2)}
    assert [j for j, residual in residuals.items() if residual.files] == kept
    for j, residual in residuals.items():
        assert (residual.path / "train").is_dir() == (j in kept)
        there = finished_laboratory.artefact(f"boosting/residual_{j}", 1)
        assert residual.data_version == there.data_version
        assert residual.provenance["statistics"] == there.provenance["statistics"]
    for j in (1, 2, 3):
        assert _weights(empty, f"boosting/round_{j}", 1) == _weights(finished_laboratory, f"boosting/round_{j}", 1)


def test_a_dropped_residual_is_fresh_and_the_next_round_can_use_it(finished: Laboratory, finished_laboratory: Laboratory):
    assert not finished.artefact("boosting/residual_1", 1).files
    shutil.rmtree(finished.artefact("boosting/round_2", 1).path)
    finished.materialise([f"{NAME}/boosting/round_2"], HERE)
    assert _weights(finished, "boosting/round_2", 1) == _weights(finished_laboratory, "boosting/round_2", 1)


def test_layers_requested_together_share_one_forward_pass(
    empty: Laboratory, finished_laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    passes: list[list[int]] = []
    cache_activations = caching.cache_activations

    def counted(model: Any, tokens: Any, hook: Any, outputs: Any, *args: Any, **options: Any) -> Any:
        passes.append(sorted(outputs))
        return cache_activations(model, tokens, hook, outputs, *args, **options)

    monkeypatch.setattr(caching, "cache_activations", counted)
    empty.run(layers=[2, LAYER], select=["activations"])
    assert passes == [[LAYER, 2]]
    for layer in (LAYER, 2):
        assert empty.artefact("activations", layer=layer).provenance["layers_in_one_pass"] == 2
    assert finished_laboratory.artefact("activations").provenance["layers_in_one_pass"] == 1
    assert empty.artefact("activations").data_version == finished_laboratory.artefact("activations").data_version
    assert empty.artefact("activations").data_version != empty.artefact("activations", layer=2).data_version


def test_a_changed_k_retrains_on_the_existing_activations(finished: Laboratory):
    source = {file: stamp for file, stamp in _stamps(finished.root).items() if "sources" in file.parts}
    finished.declare(sae=EXPERIMENT["sae"] | {"k": 2}, ensemble={"members": 2, "seeds": [1]}, baselines=["expanded"])
    finished.run()
    assert {status.state for status in status_of(NAME)} == {"fresh"}
    assert {file: stamp for file, stamp in _stamps(finished.root).items() if "sources" in file.parts} == source
    assert _row(finished, "reconstruction", method="single", seed=1)["l0"] == pytest.approx(2, abs=0.05)


def test_a_run_of_some_seeds_leaves_out_tables_that_compare_all_seeds(empty: Laboratory):
    printed = empty.run(seeds=[2], select=["eval/stability"])
    assert "tables that compare seeds are left out" in printed
    assert not (empty.root / "tables").exists()
    assert not (empty.root / "experiments" / NAME / f"layer={LAYER}" / "seed=1").exists()
    assert empty.artefact("boosting/boosting_ensemble", 2)


# other experiments


def test_an_experiment_runs_with_one_member_and_one_seed(empty: Laboratory):
    empty.declare(source={"weights": "random"}, ensemble={"members": 1, "seeds": [7]}, baselines=[])
    empty.run()
    rows = {(row["method"], row["n_members"]): row for row in _table(empty, "stability").iter_rows(named=True)}
    assert rows.keys() == {("single", 1), ("bagging", 1), ("boosting", 1)}
    for row in rows.values():
        assert row["n_runs"] == 1
        assert (row["stability"], row["stability_pairwise"], row["stability_matched"]) == (None, None, None)
    assert set(_table(empty, "members")["mean_max_cosine_to_other_members"]) == {None}
    assert set(_table(empty, "cost")["residual_flops"]) == {0.0}
    assert set(_table(empty, "reconstruction")["language_model"]) == {"random"}
    assert len(set(_table(empty, "reconstruction")["mse"])) == 1


@pytest.mark.parametrize("sae", [{"architecture": "standard", "l1_coefficient": 0.5}, {"architecture": "jumprelu", "l0_coefficient": 0.1}])
def test_other_architectures_run_to_the_end(empty: Laboratory, sae: dict[str, Any]):
    empty.declare(sae=sae | {"d_sae": 24}, ensemble={"members": 2, "seeds": [1]}, baselines=["expanded"], expanded_sizes="all")
    empty.run()
    assert {status.state for status in status_of(NAME)} == {"fresh"}
    reconstruction = _table(empty, "reconstruction")
    assert set(reconstruction.filter(method="expanded").select("n_members", "n_features").iter_rows()) == {(1, 24), (2, 48)}
    assert reconstruction["mse"].is_finite().all()


# failures


def test_a_member_without_activations_names_its_missing_input(empty: Laboratory):
    with pytest.raises(MissingInputError, match=rf"{NAME}/activations \(layer {LAYER}\) is needed first.*saeens run"):
        empty.materialise([f"{NAME}/bagging/member_1"], HERE)
    assert not (empty.root / "experiments").exists()


def test_tokens_of_the_ui_are_refused_before_they_are_written(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    empty.declare({"context_length": 10**6})
    monkeypatch.setattr(sources, "write_tokens", lambda *_, **__: pytest.fail("tokens are written"))
    with pytest.raises(ConfigurationError, match="context_length: 1000000"):
        empty.materialise([f"{NAME}/tokens"], Partition())


def test_saes_of_the_ui_are_refused_for_a_baseline_that_cannot_be_built(finished: Laboratory):
    finished.declare(sae=EXPERIMENT["sae"] | {"k": D_SAE + 1})
    with pytest.raises(ConfigurationError, match=rf"attributes\.sae: {NAME}: .*k = {D_SAE + 1} is larger than d_sae = {D_SAE}"):
        finished.materialise([f"{NAME}/boosting/round_1"], HERE)


def test_k_larger_than_d_sae_is_refused_before_anything_is_computed(empty: Laboratory):
    empty.declare(sae=EXPERIMENT["sae"] | {"k": D_SAE + 1})
    with pytest.raises(ConfigurationError, match=rf"attributes\.sae: {NAME}: .*k = {D_SAE + 1} is larger than d_sae = {D_SAE}"):
        empty.run()
    assert not (empty.root / "sources").exists()


def test_k_is_compared_with_the_width_at_the_hook(empty: Laboratory):
    wide = "gpt_neox.layers.{layer}.mlp.dense_h_to_4h"  # twice d_model
    empty.declare(source={"hook": wide}, sae={"architecture": "topk", "expansion": 2, "k": D_SAE + 1}, baselines=[])
    empty.run(select=["bagging/member_1"], seeds=[1])
    assert PlainTopK(empty.artefact("bagging/member_1", 1).path).W_dec.shape == (2 * D_SAE, 2 * D_MODEL)


def test_too_short_a_corpus_is_refused_with_a_remedy_and_leaves_no_files(empty: Laboratory):
    empty.declare(source={"train_tokens": 10**6})
    with pytest.raises(SaeensError, match=r"train split has .* but 1,000,000 were asked for: lower `train_tokens` to at most"):
        empty.run()
    assert not list((empty.root / "sources" / NAME).iterdir())


def test_too_little_memory_for_evaluation_names_a_sufficient_budget(finished: Laboratory):
    finished.declare(evaluation_memory_gb=1e-6)
    shutil.rmtree(finished.root / "tables")
    with pytest.raises(SaeensError, match=r"evaluation_memory_gb: 1e-06 is too little to evaluate tiny, .*; 0\.01 is enough"):
        finished.run()
    finished.declare(evaluation_memory_gb=0.01)
    finished.run()
    assert (finished.root / "tables" / NAME / "coactivation").is_dir()


def test_a_full_disk_is_reported_and_keeps_existing_artefacts(finished: Laboratory, monkeypatch: pytest.MonkeyPatch):
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sm, "save_sae", no_space)
    before = _stamps(finished.root)
    finished.declare(sae=EXPERIMENT["sae"] | {"k": 5})
    with pytest.raises(SaeensError, match=r"the disk below .* is full"):
        finished.run()
    assert _stamps(finished.root) == before


def test_a_run_after_a_failed_one_resumes_it(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    empty.declare(ensemble={"members": 2, "seeds": [1]}, baselines=["expanded"])
    train, trained = training.train_saes, []

    def fail_at_round_2(workplace: Any, tasks: Any, *others: Any) -> None:
        trained.extend(task.declaration.address.name for task in tasks)
        if trained.count("round_2") == 1 and tasks[0].declaration.address.name == "round_2":
            raise RuntimeError("the power went")
        train(workplace, tasks, *others)

    monkeypatch.setattr(training, "train_saes", fail_at_round_2)
    with pytest.raises(RuntimeError, match="the power went"):
        empty.run()
    empty.run()
    assert sorted(trained) == ["expanded", "member_1", "member_2", "round_2", "round_2"]
    assert {status.state for status in status_of(NAME)} == {"fresh"}
