"""Rows of a norm far above all others: dropped where `max_norm` says so, and warned of where it does not."""

from __future__ import annotations

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
from tiny_experiment import CORPUS, LAYER, Laboratory
from tiny_models import CONTEXT_LENGTH, ListedCorpus

import saeens_models as sm
from saeens_pipeline.assets import sources
from saeens_pipeline.assets.health import examine, warnings_of
from saeens_pipeline.assets.sources import activations_of
from saeens_pipeline.language_models.tokens import TokenStore, open_tokens
from saeens_pipeline.report.results import Results
from saeens_pipeline.settings.experiments import CheckSettings
from saeens_pipeline.storage import activation_writer
from saeens_pipeline.storage.activation_writer import ActivationWriter
from saeens_pipeline.storage.activations import ActivationStore, StreamingStatistics
from saeens_pipeline.storage.names import Partition

D_IN, N_TRAIN, N_TEST = 6, 500, 90
PLANTED = {"train": [3, 64, 65, 130, 131, 132, 499], "test": [0, 50, 89]}
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
@given(seed=st.integers(0, 1000), scale=st.floats(1, 200), n_planted=st.integers(0, 5), n_rows=st.integers(1000, 3000))
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


def test_few_rows_have_no_top_share():
    statistics = StreamingStatistics(D_IN)
    statistics.update(torch.randn(999, D_IN))
    assert statistics.compute().top_share is None


def _masked(tokens: TokenStore, split: Any, dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and mask of a split, with the dropped ones of the kept positions cleared, written out."""
    batches = list(tokens.batches(split, 1000))
    ids, kept = (torch.cat([getattr(batch, name) for batch in batches]).numpy() for name in ("tokens", "kept"))
    places = np.flatnonzero(kept)
    kept.reshape(-1)[places[dropped]] = False
    return ids, kept


def test_tokens_without_a_row_are_not_kept_wherever_tokens_are_read(finished: Laboratory):
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


def _explained_variance(x: np.ndarray, x_hat: np.ndarray) -> float:
    return float((1 - ((x - x_hat) ** 2).sum(0) / ((x - x.mean(0)) ** 2).sum(0)).mean())


def test_explained_variance_is_that_of_the_other_rows(massive: Laboratory):
    massive.declare(source=SOURCE)
    massive.run(select=["activations"])
    unlimited = ActivationStore(massive.artefact("activations").path)
    rows, train = (torch.cat(list(unlimited.chunks(split))) for split in ("test", "train"))
    usual = rows.norm(dim=1) < 300
    assert 0 < (~usual).sum() < 50
    warnings = warnings_of(activations_of("tiny"), Partition(LAYER), massive.artefact("activations"), CheckSettings())
    first = int(rows.norm(dim=1).argmax())
    assert "0.1 % of the rows hold" in warnings[0]
    assert "max_norm: 10" in warnings[0]
    assert f"document {unlimited.document('test')[first]}, position {unlimited.position('test')[first]}," in " ".join(warnings)

    massive.declare(source={**SOURCE, "max_norm": 10}, evaluations=["reconstruction"], baselines=[])
    massive.run(select=["eval/reconstruction"])
    artefact = massive.artefact("activations")
    assert not examine(activations_of("tiny"), Partition(LAYER), artefact).warnings
    limited = ActivationStore(artefact.path)
    assert torch.equal(torch.cat(list(limited.chunks("test"))), rows[usual])
    table = massive.store.root / "tables/tiny/reconstruction/layer=1/seed=1/part.parquet"
    (row,) = pl.read_parquet(table).filter(method="single").to_dicts()
    sae = sm.load_sae(massive.artefact("bagging/member_1", 1).path)
    with torch.no_grad():
        x_hat = sae(rows[usual])
    assert row["explained_variance"] == pytest.approx(_explained_variance(rows[usual].double().numpy(), x_hat.double().numpy()), abs=1e-5)
    assert row["explained_variance"] > 0.3
    assert (row["tokens"], row["test_rows_dropped"]) == (int(usual.sum()), int((~usual).sum()))
    assert row["train_rows_dropped"] == int((train.norm(dim=1) >= 300).sum())
    assert row["top_rows_variance"] < 0.1


@pytest.mark.parametrize(("share", "said"), [(0.84, "84% of the variance"), (0.05, ""), (None, "")])
def test_explained_variance_is_marked_where_few_rows_hold_the_variance(share, said):
    rows = pl.DataFrame({"method": "single", "n_members": 1, "seed": [1, 2], "explained_variance": 0.5, "top_rows_variance": share})
    caution = Results("tiny", 1, {"reconstruction": rows}).caution
    assert said in caution
    assert bool(said) == bool(caution)
