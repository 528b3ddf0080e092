"""The tutorial notebook: its cells run unchanged, its results are correct, and its text agrees with its saved outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import polars as pl
import pytest
import torch
import zarr
from matplotlib import pyplot as plt
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, SOURCE, Laboratory

from saeens_pipeline.storage.tables import read_table

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def found(finished_laboratory: Laboratory) -> Iterator[dict[str, Any]]:
    """All names that the cells leave, run in order on the tiny experiment."""
    parameters = {
        "MODEL": str(finished_laboratory.model),
        "HOOK": SOURCE["hook"],
        "LAYER": LAYER,
        "SOURCE": NAME,
        "EXPERIMENT": NAME,
        "SEED": SEEDS[0],
        "OTHER_SEED": SEEDS[1],
        "TEST_ROWS": SOURCE["test_tokens"],
        "TEXT": "def step(x, w):",
    }
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as monkeypatch, mpl.rc_context({"backend": "agg"}), torch.no_grad():
        monkeypatch.setenv("SAEENS_DATA", str(finished_laboratory.root))
        for cell in CODE:
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {cell['id']}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                assert parameters.keys() == {name for name in names if name.isupper()}
                names.update(parameters)
        yield names
    plt.close("all")


def _transformers_loss(found: dict[str, Any]) -> float:
    return found["model"].model(input_ids=found["ids"], labels=found["ids"]).loss.item()


def test_the_loss_with_patched_activations_is_the_language_models_own(found):
    assert found["own"].mean().item() == pytest.approx(_transformers_loss(found), rel=1e-6)


def test_ablating_a_feature_equals_subtracting_it_from_the_blocks_output(found):
    feature, acts = found["feature"], found["acts"]
    contribution = torch.zeros_like(found["activations"])
    for t, value in enumerate(acts[:, feature].tolist(), start=1):
        contribution[0, t] = value * found["bag"].members[0].W_dec[feature]
    block = found["model"].model.gpt_neox.layers[LAYER]
    handle = block.register_forward_hook(lambda _, args, output: output - contribution)
    try:
        expected = _transformers_loss(found)
    finally:
        handle.remove()
    assert found["ablated"].mean().item() == pytest.approx(expected, rel=1e-5)
    assert expected - _transformers_loss(found) == pytest.approx(found["change"][feature], abs=1e-5)
    assert abs(found["change"][feature]) > 1e-3
    assert max(found["change"].values()) == found["change"][feature]


def test_the_strongest_held_out_token_agrees_with_the_stored_activations(found, finished_laboratory):
    stored = finished_laboratory.artefact("activations").path
    rows = torch.from_numpy(zarr.open_group(stored, mode="r")["test/activations"][:])  # pyright: ignore
    acts = found["member"].encode(rows.float())[:, found["feature"]]
    assert [value for value, _, _ in found["strongest"]] == pytest.approx(acts[acts > 0].sort(descending=True).values.tolist(), rel=0.01)


def test_the_same_feature_is_searched_in_every_member(found):
    bag = found["bag"]
    assert [bag.feature(i).member for i in found["twins"]] == list(range(MEMBERS))
    assert bag.feature(found["twins"][0]).index == found["feature"]
    for i in found["twins"]:
        member, index = bag.feature(i)
        cosines = torch.cosine_similarity(bag[member].W_dec, found["member"].W_dec[found["feature"]], dim=1)
        assert cosines.argmax() == index


def test_the_tutorials_metrics_equal_those_of_the_tables(found, finished_laboratory):
    of_seed = pl.col("seed") == SEEDS[0]
    table = read_table(finished_laboratory.root, NAME, "reconstruction").filter(of_seed)
    for kind in ("bagging", "boosting"):
        expected = table.filter(pl.col("method") == kind).sort("n_members")["explained_variance"].to_list()
        assert len(expected) == MEMBERS
        assert [metric.compute().explained_variance for metric in found["explained"][kind]] == pytest.approx(expected, rel=1e-3)
    stability = read_table(finished_laboratory.root, NAME, "stability").filter(of_seed, method="boosting", n_members=MEMBERS)
    assert found["kind"] == "boosting"
    assert found["whole"] == pytest.approx(stability["stability"].item(), rel=1e-5)


def test_the_notebook_is_valid_and_was_run_from_top_to_bottom():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", each) for each in ids)
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {(output["output_type"], output.get("name")) for output in outputs} == {("stream", "stdout"), ("display_data", None)}


def test_statements_about_the_control_agree_with_the_documented_table():
    lines = (NOTEBOOK.parent / "concepts" / "comparison.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| | single | bagging |"))
    methods, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : start + 6])
    values = {name: dict(zip(methods[1:], map(float, numbers), strict=True)) for name, *numbers in rows}
    for metric in ("EV", "stability"):
        trained, untrained = values[f"{metric}, trained model"], values[f"{metric}, untrained model"]
        orders = [sorted(figures.keys() - {"compute_matched"}, key=figures.__getitem__) for figures in (trained, untrained)]
        assert orders[0] == orders[1]
        all_alike = sorted(trained, key=trained.__getitem__) == sorted(untrained, key=untrained.__getitem__)
        assert all_alike == (metric == "EV")
    assert values["stability, trained model"]["compute_matched"] > values["stability, trained model"]["bagging"]
    text = " ".join("".join(CELLS[-1]["source"]).split())
    assert "gives the same order of all methods by explained variance, and of all but `compute_matched` by stability" in text
    assert "`compute_matched`, whose stability is larger than the bag's" in text


def test_numbers_in_the_tutorials_text_are_in_its_code_or_outputs():
    """Decimal numbers, and whole ones of three digits or more: feature numbers and sizes."""
    text = "".join(line for cell in CELLS if cell["cell_type"] == "markdown" for line in cell["source"])
    shown = "".join(line for cell in CODE for line in cell["source"])
    shown += "".join(line for cell in CODE for output in cell["outputs"] for line in output.get("text", []))
    number = r"(?<![\w.])(?:\d+\.\d+|\d{3,})(?![\w.]*\d)"
    figures = set(re.findall(number, text))
    assert len(figures) >= 5
    assert figures <= set(re.findall(number, shown))
