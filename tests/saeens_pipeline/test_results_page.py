"""The page of Markdown with the results, its rules for claims, and its figures: every number is that of a table."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory, experiment_file, experiment_settings, source_settings, write_rows

from saeens_pipeline import cli
from saeens_pipeline.assets.over_seeds import written
from saeens_pipeline.assets.registry import table_frame
from saeens_pipeline.assets.tables.cost import TOTALS
from saeens_pipeline.report.claims import FAILS, HOLDS, UNKNOWN, Verdict, verdicts
from saeens_pipeline.report.figures import all_charts, by_members
from saeens_pipeline.report.methods import method
from saeens_pipeline.report.pictures import COLUMN, PAGE, printed
from saeens_pipeline.report.results import Results

METHODS = ["single", "bagging", "boosting", "expanded", "expanded_l0_matched"]
SUBJECT = {"experiment": "e", "layer": 0, "language_model": "trained", "sae_data_versions": "v"}
MORE_EV, STABLER, NARROWER = 0, 5, 9  # places of claims


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `saeens report`."""
    monkeypatch.setattr("sys.argv", ["saeens", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    code = ended.value.code
    return code if isinstance(code, int) else 0, said.out, said.err


def _table(laboratory: Laboratory, name: str) -> pl.DataFrame:
    parts = sorted((laboratory.root / "tables" / NAME / name).rglob("part.parquet"))
    return pl.concat([pl.read_parquet(part, hive_partitioning=False) for part in parts])


def _section(page: str, title: str) -> str:
    return page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def _rows(section: str) -> list[dict[str, str]]:
    """The first table of a section."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(heads, row, strict=True)) for row in rows]


@pytest.fixture
def page(finished: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    code, out, _ = _run(monkeypatch, capsys, NAME, "--markdown", tmp_path / "results.md")
    assert (code, out.split()) == (0, [str(tmp_path / "results.md")])
    return (tmp_path / "results.md").read_text()


def test_numbers_of_the_methods_equal_those_of_the_tables(finished: Laboratory, page: str):
    rows = {row["method"]: row for row in _rows(_section(page, "Methods"))}
    assert list(rows) == [method(name).label for name in METHODS]
    reconstruction, cost = _table(finished, "reconstruction"), _table(finished, "cost")
    for name in METHODS:
        largest, spent = (
            table.filter(method=name).filter(pl.col("n_members") == pl.col("n_members").max()).sort("seed")
            for table in (reconstruction, cost)
        )
        row, ev = rows[method(name).label], largest["explained_variance"].to_list()
        assert row["n"] == str(largest["n_members"][0])
        assert row["EV"] == f"{np.mean(ev):.4f}"
        assert row["EV by seed"] == ", ".join(dict.fromkeys(f"{value:.4f}" for value in ev))
        assert row["L0"] == f"{np.mean(largest['l0'].to_list()):.1f}"
        assert row["features"] == f"{largest['n_features'][0]:,}"
        assert row["training tokens"] == f"{spent['train_tokens'][0]:,}"
        flops = sum(spent[part].to_numpy() for part in TOTALS["total_flops"])
        assert row["training FLOPs"] == written(float(np.mean(flops)), ".3g")


def test_stability_stands_beside_its_reference_and_chance_levels(finished: Laboratory, page: str):
    rows = {row["method"]: row for row in _rows(_section(page, "Stability"))}
    bagging = _table(finished, "stability").filter(method="bagging", n_members=MEMBERS).sort("seed")
    columns = {
        "stability": "stability",
        "at equal candidates": "stability_equal_candidates",
        "one SAE, as many features": "stability_reference",
        "chance: random": "stability_chance_isotropic",
    }
    for title, column in columns.items():
        assert rows["bagging"][title].split()[0] == f"{np.mean(bagging[column].to_list()):.4f}", title
    distinct = {row["method"]: row["distinct features"] for row in _rows(_section(page, "Diversity and coactivation"))}
    diversity = _table(finished, "coactivation").filter(method="boosting", n_members=MEMBERS)["diversity"].to_list()
    assert distinct["boosting"] == f"{np.mean(diversity):,.0f}"


def test_the_page_says_what_was_run_and_what_was_not_measured(page: str):
    run = _section(page, "What was run")
    for words in ("| tokens for training | 600 of ", "| SAE | architecture topk", f"| ensemble seeds | {', '.join(map(str, SEEDS))} |"):
        assert words in run
    assert re.search(r"\| hours \| [\d.e-]+ \(activations [\d.e-]+, training [\d.e-]+, tables [\d.e-]+\) \|", run)
    assert re.search(r"\| disk \| [\d.e-]+ GB \|", run)
    assert "`compute_matched` is not among the `baselines`" in _section(page, "At equal compute")
    assert "`concept_detection` is not among the `evaluations`" in _section(page, "Concept detection")
    assert "There is no control" in page


def test_every_figure_of_the_page_is_an_svg_beside_it_with_text_as_text(page: str, tmp_path: Path):
    named = re.findall(r"!\[[^\n]*\]\(([^)]*)\)\n", page)
    there = sorted(file.relative_to(tmp_path).as_posix() for file in (tmp_path / "results").iterdir())
    assert sorted(named) == there and "results/explained_variance_by_members.svg" in there
    for name in named:
        svg = ET.parse(tmp_path / name).getroot()
        words = {"".join(element.itertext()).strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")}
        assert "bagging" in words
        assert svg.attrib["width"] == f"{PAGE * 72:g}pt"


def test_the_verdicts_of_the_page_follow_from_the_table_of_differences(finished: Laboratory, page: str):
    rows = {row["claim"]: row for row in _rows(_section(page, "What holds and what does not of the paper's claims"))}
    found = _table(finished, "differences").filter(metric="explained_variance")
    sides = []
    claim = rows["Boosting explains more variance than bagging."]
    for seed in SEEDS:
        pair = {"method": "bagging", "n_members": MEMBERS, "other_method": "boosting", "other_n_members": MEMBERS, "seed": seed}
        (row,) = found.filter(**pair).iter_rows(named=True)
        shown = f"seed {seed}: {-row['difference']:.4f} [{-row['high']:.4f}, {-row['low']:.4f}]"
        assert shown in claim["difference, 95 % interval"]
        sides.append((-row["high"] > 0) - (-row["low"] < 0))
    assert claim["verdict"].startswith({2: "**holds**", -2: "**does not hold**"}.get(sum(sides), "**cannot be told**"))
    assert rows["Bagging explains more variance than a single SAE."]["verdict"].startswith("**")


def test_the_control_stands_beside_the_numbers(
    finished: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source = source_settings(finished.model, name="untrained", weights="random")
    alike = experiment_settings(name="control", source="untrained")
    finished.write(experiment_file(("ActivationSource", source), ("EnsembleExperiment", alike)), "untrained")
    for part in sorted((finished.root / "tables" / NAME / "reconstruction").rglob("part.parquet")):
        rows = pl.read_parquet(part, hive_partitioning=False)
        rows = rows.with_columns(pl.col("explained_variance") / 2, experiment=pl.lit("control"))
        target = finished.root / "tables" / "control" / part.relative_to(finished.root / "tables" / NAME)
        target.parent.mkdir(parents=True)
        write_rows(finished.store, target, rows, like=part)
    assert _run(monkeypatch, capsys, NAME, "--markdown", tmp_path / "page.md")[0] == 0
    for row in _rows(_section((tmp_path / "page.md").read_text(), "Methods")):
        assert float(row["EV untrained"]) == pytest.approx(float(row["EV"]) / 2, abs=1e-4)


def test_missing_tables_are_named_with_the_command_and_nothing_is_written(
    finished: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for part in (finished.root / "tables" / NAME / "stability").rglob("part.parquet"):
        part.unlink()
    next((finished.root / "tables" / NAME / "cost").rglob("part.parquet")).unlink()  # of one seed
    code, _, err = _run(monkeypatch, capsys, NAME, "--markdown", tmp_path / "page.md")
    assert code == 1
    assert f"no table stability and cost of layer {LAYER}" in err and f"`saeens run {NAME}` computes them" in err
    assert list(tmp_path.glob("page*")) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((NAME, "--markdown", "page.txt"), "give a file whose name ends with .md"),
        ((NAME, "--markdown", "nowhere/page.md"), "there is no folder nowhere"),
        (("--markdown", "page.md"), "--markdown needs the name of an experiment"),
        (("--figures", "figures"), "--figures needs the name of an experiment"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    finished: Laboratory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    arguments: Sequence[str],
    complaint: str,
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, _, err = _run(monkeypatch, capsys, *arguments)
    assert (code, complaint in err) == (2, True), err
    assert sorted(tmp_path.iterdir()) == before


def test_figures_are_svg_and_pdf_in_both_widths_and_the_same_every_time(
    finished: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "figures"
    monkeypatch.setattr("saeens_pipeline.report.markdown.all_charts", lambda results: {"members": all_charts(results)["members"][:1]})
    code, out, _ = _run(monkeypatch, capsys, NAME, "--figures", folder)
    assert code == 0 and sorted(out.split()) == sorted(map(str, folder.iterdir()))
    results = Results.read(finished.root, NAME, LAYER, SEEDS)
    chart = next(chart for chart in by_members(results) if chart.name == "explained_variance_by_members")
    stems = [f"{chart.name}_{width}" for width in ("column", "page")]
    assert {file.name for file in folder.iterdir()} == {f"{stem}.{form}" for stem in stems for form in ("svg", "pdf")}
    for name, inches in (("column", COLUMN), ("page", PAGE)):
        svg = (folder / f"{chart.name}_{name}.svg").read_bytes()
        assert ET.fromstring(svg).attrib["width"] == f"{inches * 72:g}pt"
        assert printed(chart, inches, "svg") == svg
        pdf = (folder / f"{chart.name}_{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and printed(chart, inches, "pdf") == pdf


def test_figures_are_those_of_the_page_of_the_report(
    finished: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("saeens_pipeline.report.markdown.printed", lambda chart, inches, form: b"")  # drawing all takes half a minute
    code, _, _ = _run(monkeypatch, capsys, NAME, "--figures", tmp_path)
    page = (finished.root / "reports" / NAME / f"layer={LAYER}" / "index.html").read_text()
    shown = re.findall(r'data-figure="(\w+)"', page)
    written = sorted(file.name for file in tmp_path.glob("*_column.svg"))
    assert code == 0 and written == sorted(f"{name}_column.svg" for name in shown) and len(shown) > 15


def _results(
    ev: Mapping[str, tuple[float, float]], low: float, high: float, *, seeds: Sequence[int] = (1, 2), **tables: pl.DataFrame
) -> Results:
    """Results with explained variance and L0 by method, and one interval of bagging minus single in each seed."""
    rows = [
        SUBJECT | {"method": name, "n_members": 2 if name == "bagging" else 1, "seed": seed, "explained_variance": value, "l0": l0}
        for name, (value, l0) in ev.items()
        for seed in seeds
    ]
    pair = {"method": "single", "n_members": 1, "other_method": "bagging", "other_n_members": 2, "metric": "explained_variance"}
    turned = {"difference": -(low + high) / 2, "low": -high, "high": -low}
    differences = [SUBJECT | pair | turned | {"seed": seed} for seed in seeds]
    found = {"reconstruction": table_frame("reconstruction", rows), "differences": table_frame("differences", differences)}
    return Results("e", 0, found | tables)


def _judged(results: Results, place: int, untrained: Results | None = None) -> Verdict:
    return list(verdicts(results, untrained))[place]


EQUAL = {"single": (0.7, 8.0), "bagging": (0.8, 8.0)}


@pytest.mark.parametrize(
    ("low", "high", "l0", "control", "word", "why"),
    [
        (0.05, 0.15, 8.0, None, HOLDS, "above 0"),
        (-0.15, -0.05, 8.0, None, FAILS, "below 0"),
        (-0.05, 0.15, 8.0, None, UNKNOWN, "spans 0"),
        (0.05, 0.15, 9.0, None, UNKNOWN, "different L0"),
        (0.05, 0.15, 8.5, None, HOLDS, "above 0"),
        (-0.15, -0.05, 16.0, None, FAILS, "below 0"),
        (-0.15, -0.05, 4.0, None, UNKNOWN, "different L0"),
        (0.05, 0.15, 8.0, (0.01, 0.02), UNKNOWN, "control"),
        (0.05, 0.15, 8.0, (-0.01, 0.02), HOLDS, "above 0"),
        (-0.15, -0.05, 8.0, (-0.02, -0.01), FAILS, "below 0"),
    ],
)
def test_a_claim_is_judged_by_interval_l0_and_control(
    *, low: float, high: float, l0: float, control: tuple[float, float] | None, word: str, why: str
):
    results = _results(EQUAL | {"bagging": (0.8, l0)}, low, high)
    verdict = _judged(results, MORE_EV, _results(EQUAL, *control) if control else None)
    assert (verdict.word, any(why in each for each in verdict.why)) == (word, True), verdict
    assert verdict.effect and verdict.effect.intervals[0][:3] == pytest.approx(((low + high) / 2, low, high))


def test_a_control_without_intervals_says_nothing_about_a_claim():
    control = _results(EQUAL, 0.0, 0.0)
    verdict = _judged(_results(EQUAL, 0.05, 0.15), MORE_EV, Results("control", 0, {"reconstruction": control.tables["reconstruction"]}))
    assert (verdict.word, verdict.why) == (UNKNOWN, ["the control, an untrained language model, has no interval"])


def test_a_claim_without_its_method_or_with_seeds_that_disagree_cannot_be_told():
    verdict = _judged(_results({"single": (0.7, 8.0)}, 0.1, 0.2), MORE_EV)
    assert (verdict.word, verdict.why) == (UNKNOWN, ["not measured: bagging is not in the table reconstruction"])
    results = _results(EQUAL, 0.05, 0.15)
    of_one = pl.when(seed=1)
    other = results.tables["differences"].with_columns(low=of_one.then(0.05).otherwise("low"), high=of_one.then(0.15).otherwise("high"))
    assert _judged(Results("e", 0, {**results.tables, "differences": other}), MORE_EV).word == UNKNOWN


def _stabilities(ours: Sequence[float], theirs: Sequence[float]) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for name, n, values in (("bagging", 2, ours), ("single", 1, theirs)):
        rows += [
            SUBJECT | {"method": name, "n_members": n, "seed": seed, "stability_equal_candidates": value, "n_runs": len(values)}
            for seed, value in enumerate(values, start=1)
        ]
    return table_frame("stability", rows)


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [
        ([0.9, 0.9], [0.5, 0.5], UNKNOWN),  # two seeds
        ([0.9, 0.8, 0.7], [0.5, 0.6, 0.65], HOLDS),
        ([0.9, 0.8, 0.6], [0.5, 0.6, 0.65], UNKNOWN),
        ([0.3, 0.4, 0.45], [0.5, 0.6, 0.65], FAILS),
    ],
)
def test_what_compares_seeds_is_told_apart_from_three_seeds_with_all_points(ours: list[float], theirs: list[float], word: str):
    results = _results(EQUAL, 0.1, 0.2, seeds=range(1, len(ours) + 1), stability=_stabilities(ours, theirs))
    assert _judged(results, STABLER).word == word


def test_rounds_are_compared_by_students_t_over_seeds():
    densities = {1: (0.02, 0.03, 0.025), 2: (0.5, 0.5, 0.5), 3: (0.01, 0.012, 0.011)}
    rows = [
        SUBJECT | {"method": "boosting", "n_members": 3, "seed": seed, "member": member, "index": index, "density": density}
        for member, values in densities.items()
        for seed, value in enumerate(values, start=1)
        for index, density in enumerate([value / 2, value, 0.9, *[0.0] * 4 * member])  # most features of later rounds are dead
    ]
    verdict = _judged(_results(EQUAL, 0.1, 0.2, features=table_frame("features", rows)), NARROWER)
    gaps = np.subtract(densities[1], densities[3])
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(gaps), scale=scipy.stats.sem(gaps))
    assert verdict.word == HOLDS and verdict.effect
    assert verdict.effect.intervals[0][1:3] == pytest.approx((low, high))


def test_probes_are_compared_over_data_sets():
    accuracy = {"single": (0.6, 0.7, 0.65), "bagging": (0.72, 0.8, 0.77)}
    rows = [
        SUBJECT | {"method": name, "n_members": 1, "seed": 1, "dataset": str(i), "label": label, "n_probe_features": 1,
                   "accuracy": value + shift, "code_scale": scale}
        for name, values in accuracy.items() for i, value in enumerate(values) for scale in ("unscaled", "1/J")
        for label, shift in (("yes", 0.02), ("no", -0.02))
    ]  # fmt: skip
    results = _results(EQUAL, 0.1, 0.2, concept_detection=table_frame("concept_detection", rows))
    (verdict,) = (each for each in verdicts(results, None) if each.claim.metric == "accuracy with 1 feature")
    gaps = np.subtract(accuracy["bagging"], accuracy["single"])
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(gaps), scale=scipy.stats.sem(gaps))
    assert verdict.word == HOLDS and verdict.effect
    assert verdict.effect.intervals[0][:3] == pytest.approx((np.mean(gaps), low, high))
