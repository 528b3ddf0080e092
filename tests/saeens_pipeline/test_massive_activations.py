"""Rows of a norm far above all others: dropped where `max_norm` says so, and warned of where it does not."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_experiment import K, PlainTopK, plain_boosting, plain_explained_variance, plain_saes
from tiny_experiment import CORPUS, LAYER, MEMBERS, NAME, Laboratory
from tiny_models import CONTEXT_LENGTH, ListedCorpus
from typer.testing import CliRunner

from saeens_pipeline import cli, defs
from saeens_pipeline.assets import sources
from saeens_pipeline.assets.health import examine, warnings_of
from saeens_pipeline.assets.massive_activations import cautions, is_held_by_few
from saeens_pipeline.assets.registry import table_frame
from saeens_pipeline.assets.sources import activations_of
from saeens_pipeline.assets.tables import pareto
from saeens_pipeline.assets.tables.leaderboard import standings
from saeens_pipeline.assets.tables.pareto import PARETO
from saeens_pipeline.language_models.caching import cache_activations
from saeens_pipeline.language_models.installed_packages import InstalledPackages
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import TokenStore, open_tokens, write_tokens
from saeens_pipeline.orchestration.metadata import describe_artefact
from saeens_pipeline.report.pages import write_leaderboard
from saeens_pipeline.report.results import Results
from saeens_pipeline.settings.experiments import CheckSettings
from saeens_pipeline.settings.files import ExperimentFile
from saeens_pipeline.settings.sources import SourceSettings
from saeens_pipeline.storage import activation_writer
from saeens_pipeline.storage.activation_writer import ActivationWriter
from saeens_pipeline.storage.activations import ActivationStore, StreamingStatistics
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.tables import read_table

D_IN, N_TRAIN, N_TEST = 6, 500, 90
PLANTED = {"train": [3, 64, 65, 130, 131, 132, 499], "test": [0, 50, 89]}
QUICKSTART = Path(defs.__file__).parent / "quickstart" / "defs.yaml"
SOURCE = {"train_tokens": 1400, "test_tokens": 1100}


def _planted(split: str, n_rows: int) -> torch.Tensor:
    rows = torch.randn(n_rows, D_IN, generator=torch.Generator().manual_seed(n_rows)) + 1
    rows[PLANTED[split], 2] = 70_000.0  # more than float16 holds
    return rows


def _write(path: Path, rows: dict[str, torch.Tensor], *, batch: int = 40, stop_after: int | None = None) -> ActivationStore:
    with ActivationWriter(
        path, D_IN, "float16", {split: len(of_split) for split, of_split in rows.items()}, name="x", max_norm=10, chunk_rows=4, resume=True
    ) as writer:
        for split, of_split in rows.items():
            for first in range(writer.resumed_rows[split], len(of_split), batch):
                if split == "train" and stop_after is not None and first > stop_after:
                    raise KeyboardInterrupt
                numbers = torch.arange(first, min(first + batch, len(of_split)))
                writer.append(split, of_split[numbers], numbers // 7, numbers % 7)
    return ActivationStore(path)


def test_planted_rows_are_in_no_array_and_no_number(tmp_path):
    given = {split: _planted(split, n) for split, n in (("train", N_TRAIN), ("test", N_TEST))}
    store = _write(tmp_path / "a.zarr", given)
    for split, rows in given.items():
        left = np.delete(np.arange(len(rows)), PLANTED[split])
        stored = torch.cat(list(store.chunks(split)))
        assert torch.equal(stored, rows[left].half().float())
        assert store.dropped(split).tolist() == PLANTED[split]
        assert (store.document(split).tolist(), store.position(split).tolist()) == ((left // 7).tolist(), (left % 7).tolist())
        statistics = store.statistics(split)
        assert (statistics.rows, statistics.dropped) == (len(left), len(PLANTED[split]))
        assert statistics.norm_limit == pytest.approx(10 * float(given["train"][:40].norm(dim=1).median()))
        np.testing.assert_allclose(statistics.variance, stored.double().var(0, correction=0).numpy())


@pytest.mark.parametrize("stop_after", [0, 80, 130, 470])
def test_an_interrupted_write_drops_the_same_rows(tmp_path, stop_after):
    given = {split: _planted(split, n) for split, n in (("train", N_TRAIN), ("test", N_TEST))}
    whole = _write(tmp_path / "whole.zarr", given)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "left.zarr", given, stop_after=stop_after)
    resumed = _write(tmp_path / "left.zarr", given, batch=40 if stop_after == 0 else 23)  # the first batch decides the limit
    for split in given:
        assert torch.equal(torch.cat(list(resumed.chunks(split))), torch.cat(list(whole.chunks(split))))
        assert resumed.dropped(split).tolist() == whole.dropped(split).tolist()
        assert resumed.statistics(split).to_json() == whole.statistics(split).to_json()


def test_a_value_that_is_not_finite_is_refused_and_not_dropped(tmp_path):
    rows = _planted("train", N_TRAIN)
    rows[7, 0] = float("nan")
    with pytest.raises(activation_writer.SaeensError, match="NaN or infinite"):
        _write(tmp_path / "a.zarr", {"train": rows})


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1, 200), n_planted=st.integers(0, 5), n_rows=st.integers(100, 3000))
def test_top_share_is_the_share_of_the_rows_with_the_largest_deviations(seed, scale, n_planted, n_rows):
    generator = np.random.default_rng(seed)
    rows = generator.normal(3, 1, (n_rows, D_IN))
    rows[generator.choice(n_rows, n_planted, replace=False)] *= scale
    statistics = StreamingStatistics(D_IN)
    for chunk in torch.from_numpy(rows).split(256):
        statistics.update(chunk)
    found = statistics.compute()
    squares = np.sort(((rows - rows.mean(0)) ** 2).sum(1))[::-1]
    expected = squares[: -(-n_rows // 1000)].sum() / squares.sum()
    assert found.top_share == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("n_rows", "planted", "warns"), [(99, 1, False), (100, 1, True), (100, 0, False), (999, 1, True), (999, 0, False)])
def test_a_single_row_of_few_is_warned_of_from_100_rows_on(n_rows, planted, warns):
    rows = torch.randn(n_rows, D_IN, generator=torch.Generator().manual_seed(1))
    rows[:planted, 2] = 500.0
    statistics = StreamingStatistics(D_IN)
    statistics.update(rows)
    assert is_held_by_few(statistics.compute().top_share) == warns


def _masked(tokens: TokenStore, split: Any, dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and mask of a split, with the dropped ones of the kept positions cleared, written out."""
    batches = list(tokens.batches(split, 1000))
    ids, kept = (torch.cat([getattr(batch, name) for batch in batches]).numpy() for name in ("tokens", "kept"))
    places = np.flatnonzero(kept)
    kept.reshape(-1)[places[dropped]] = False
    return ids, kept


def test_tokens_without_a_row_are_not_kept_by_any_reader_of_tokens(finished: Laboratory):
    path = finished.artefact("tokens", layer=None).path
    dropped = np.array([0, 5, 6, 90, 199])
    ids, kept = _masked(open_tokens(path), "test", dropped)
    tokens = open_tokens(path, {"test": dropped})
    places = np.flatnonzero(kept)
    assert tokens.n_rows("test") == len(places) == 195
    assert np.concatenate(list(tokens.places("test", 50))).tolist() == places.tolist()
    assert torch.cat([batch.kept for batch in tokens.batches("test", 3)]).numpy().tolist() == kept.tolist()
    assert tokens.token_ids("test", np.arange(195)).tolist() == ids.reshape(-1)[places].tolist()
    n_windows = len(ids)
    chosen = np.linspace(0, n_windows - 1, -(-60 * n_windows // 200)).round().astype(int)
    sampled = torch.cat([batch.kept for batch in tokens.sample("test", 60, 2)]).numpy()
    assert sampled.tolist() == kept[chosen].tolist()
    around = tokens.around("test", places[3:9], 2)
    for place, of_place in zip(places[3:9], around.kept, strict=True):
        window, column = divmod(place, CONTEXT_LENGTH)
        expected = [0 <= c < CONTEXT_LENGTH and bool(kept[window, c]) for c in range(column - 2, column + 3)]
        assert of_place.tolist() == expected
    assert torch.cat([batch.kept for batch in tokens.batches("train", 1000)]).sum() == 600


def _with_massive_token(laboratory: Laboratory, folder: Path) -> Path:
    """Copy the model, with an embedding that gives its token (a digit) massive activations in one dimension."""
    shutil.copytree(laboratory.model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][ord("7") - ord("!") + 1, 3] = 3000.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def massive(empty: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    corpus = ListedCorpus(
        [f"{text} {i}" for i in range(2) for text in CORPUS.train], [f"{text} {i}" for i in range(2) for text in CORPUS.test]
    )
    monkeypatch.setattr(sources, "open_corpus", lambda _: corpus)
    return Laboratory(_with_massive_token(empty, tmp_path / "massive"), empty.folder, empty.root)


def _reconstructions(laboratory: Laboratory, x: np.ndarray) -> dict[str, np.ndarray]:
    """Return the reconstruction of each method, from its files, in float64."""
    members, rounds = (plain_saes(laboratory, kind, 1, MEMBERS) for kind in ("bagging/member", "boosting/round"))
    expanded, l0_matched = (
        PlainTopK(laboratory.artefact(f"baseline/{name}", 1).path, k) for name, k in (("expanded", K), ("expanded_l0_matched", K * MEMBERS))
    )
    of_members = [sae.decode(sae.encode(x)) for sae in members]
    found = {"single": of_members[0], "bagging": np.mean(of_members, axis=0), "boosting": plain_boosting(rounds, x)[0]}
    return found | {"expanded": expanded.decode(expanded.encode(x)), "expanded_l0_matched": l0_matched.decode(l0_matched.encode(x))}


def _measured(laboratory: Laboratory) -> dict[str, dict[str, Any]]:
    """Return the row of each method at its full size in the table `reconstruction` of the first seed."""
    rows = read_table(laboratory.root, NAME, "reconstruction").filter(seed=1).to_dicts()
    return {row["method"]: row for row in rows if row["n_members"] == MEMBERS or row["method"] == "single"}


def test_explained_variance_and_loss_are_computed_on_the_other_rows(massive: Laboratory):
    massive.declare(source=SOURCE, evaluations=["reconstruction"])
    massive.run(seeds=[1], select=["eval/reconstruction"])
    unlimited = ActivationStore(massive.artefact("activations").path)
    rows, train = (torch.cat(list(unlimited.chunks(split))) for split in ("test", "train"))
    usual = rows.norm(dim=1) < 300
    assert 0 < (~usual).sum() < 50
    warnings = warnings_of(activations_of("tiny"), Partition(LAYER), massive.artefact("activations"), CheckSettings())
    first = int(rows.norm(dim=1).argmax())
    assert "0.1 % of the rows (at least one) hold" in warnings[0]
    assert "max_norm: 10" in warnings[0]
    assert f"document {unlimited.document('test')[first]}, position {unlimited.position('test')[first]}," in " ".join(warnings)
    with_them, all_rows = _measured(massive), rows.double().numpy()
    for method, x_hat in _reconstructions(massive, all_rows).items():
        assert with_them[method]["explained_variance"] == pytest.approx(plain_explained_variance(all_rows, x_hat), abs=1e-3), method
        assert with_them[method]["top_rows_variance"] > 0.1
    _require_marks(massive)

    massive.declare(source={**SOURCE, "max_norm": 10}, evaluations=["reconstruction"])
    massive.run(seeds=[1], select=["eval/reconstruction"])
    artefact = massive.artefact("activations")
    assert not examine(activations_of("tiny"), Partition(LAYER), artefact).warnings
    limited = ActivationStore(artefact.path)
    assert torch.equal(torch.cat(list(limited.chunks("test"))), rows[usual])
    without_them, left = _measured(massive), all_rows[usual.numpy()]
    for method, x_hat in _reconstructions(massive, left).items():
        row = without_them[method]
        assert row["explained_variance"] == pytest.approx(plain_explained_variance(left, x_hat), abs=1e-3), method
        assert row["explained_variance"] > max(0.3, with_them[method]["explained_variance"])
        assert (row["tokens"], row["test_rows_dropped"]) == (int(usual.sum()), int((~usual).sum()))
        assert row["train_rows_dropped"] == int((train.norm(dim=1) >= 300).sum())
        assert row["top_rows_variance"] < 0.1
    assert "(!)" not in CliRunner().invoke(cli.app, ["table", NAME, "reconstruction"]).output

    # dropped positions keep their activations while the others are replaced
    model = load_language_model(describe_language_model(str(massive.model)))
    windows = next(open_tokens(massive.artefact("tokens", layer=None).path).batches("test", 1000))

    def loss(kept: torch.Tensor, replacement: np.ndarray) -> float:
        def replace(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            return output.masked_scatter(kept[..., None], torch.from_numpy(replacement).float())

        handle = model.module("resid_post", LAYER).register_forward_hook(replace)
        with torch.no_grad():
            found = model.model(input_ids=windows.tokens, labels=windows.tokens.masked_fill(windows.document < 0, -100)).loss.item()
        handle.remove()
        return found

    kept = windows.kept.clone()
    kept[windows.kept] = usual
    left = model.activations(windows.tokens, "resid_post", [LAYER])[LAYER][kept].double().numpy()  # as computed, not as stored
    clean, ablated = loss(kept, left), loss(kept, np.zeros_like(left))
    assert loss(windows.kept, np.zeros_like(all_rows)) != pytest.approx(ablated, rel=2e-4)
    recorded = massive.artefact("eval/reconstruction", 1).provenance["next_token_loss"]
    assert {name: recorded[name] for name in ("clean", "ablated", "tokens")} == pytest.approx(
        {"clean": clean, "ablated": ablated, "tokens": len(left)}, rel=1e-4
    )
    for method, x_hat in _reconstructions(massive, left).items():
        expected = (ablated - loss(kept, x_hat)) / (ablated - clean)
        assert without_them[method]["ce_loss_recovered"] == pytest.approx(expected, abs=2e-3), method


def _require_marks(laboratory: Laboratory) -> None:
    """Check that explained variance is marked in the tables of the command line, in Dagster, and on the page over all experiments."""
    for command, heading in (
        (["table", NAME, "reconstruction"], "explained_variance (!)"),
        (["leaderboard"], "EV (!)"),
    ):
        printed = CliRunner().invoke(cli.app, command)
        assert printed.exit_code == 0, printed.output
        assert heading in printed.stdout
        assert "% of the variance: explained variance is mostly about these rows" in printed.stderr
    assert "(!)" not in CliRunner().invoke(cli.app, ["table", NAME, "reconstruction", "--format", "csv"]).stdout
    table, board = laboratory.declarations()[f"{NAME}/eval/reconstruction"], laboratory.catalogue.leaderboard().outputs[0]
    for declaration, partition, name in ((table, Partition(LAYER, 1), "summary"), (board, Partition(), "best")):
        artefact = laboratory.store.require(declaration.address, partition)
        metadata = describe_artefact(laboratory.store, declaration, partition, artefact, is_hit=False)
        assert "(!)" in metadata[name].value
        assert "explained variance is mostly about these rows" in metadata["caution"]
    page = laboratory.root.parent / "page"
    page.mkdir()
    write_leaderboard(page, standings(laboratory.store, board), {})
    assert "explained variance is mostly about these rows" in (page / "index.html").read_text()


def test_explained_variance_of_a_sweep_is_marked():
    rows = table_frame(PARETO, [{"field": "k", "layer": 1, "explained_variance": 0.5, "top_rows_variance": share} for share in (0.2, 0.05)])
    assert "EV (!)" in pareto.for_reading(rows).columns
    assert "EV" in pareto.for_reading(rows[1:]).columns
    assert list(cautions(rows)) == [
        "(!) layer 1: 0.1 % of the held-out rows (at least one) hold 20% of the variance: explained variance is mostly about these rows"
    ]


@pytest.mark.slow
def test_the_quickstart_drops_nothing(tmp_path: Path):
    (source,) = [each for each in ExperimentFile(QUICKSTART).settings() if isinstance(each, SourceSettings)]
    assert source.max_norm == 10
    texts = [document.text for document in itertools.islice(InstalledPackages().documents("test"), 120)]
    description = describe_language_model(str(source.language_model))
    windows = source.model_dump(include={"context_length", "packing", "windows_per_document", "drop"})
    write_tokens(tmp_path / "tokens", ListedCorpus(texts[20:], texts[:20]), description, **windows, train_tokens=12_000, test_tokens=2_000)
    (layer,) = source.layers
    found = cache_activations(
        load_language_model(description),
        open_tokens(tmp_path / "tokens"),
        source.hook,
        {layer: tmp_path / "x"},
        source.dtype,
        max_norm=source.max_norm,
    )[layer]
    for split, statistics in found.items():
        assert (statistics.dropped, statistics.rows) == (0, {"train": 12_000, "test": 2_000}[split])
        assert statistics.top_share is not None
        assert statistics.top_share < 0.1
    norms = torch.cat(list(ActivationStore(tmp_path / "x").chunks("train"))).norm(dim=1)
    assert found["train"].norm_limit == pytest.approx(10 * norms.median().item(), rel=0.1)  # of the first batch


@pytest.mark.parametrize(("share", "said"), [(0.84, "84% of the variance"), (0.05, ""), (None, "")])
def test_explained_variance_is_marked_where_few_rows_hold_the_variance(share, said):
    rows = pl.DataFrame({"method": "single", "n_members": 1, "seed": [1, 2], "explained_variance": 0.5, "top_rows_variance": share})
    caution = Results("tiny", 1, {"reconstruction": rows}).caution
    assert said in caution
    assert bool(said) == bool(caution)
