"""The tables of downstream tasks through a whole tiny experiment: their rows, their recipes, and refusals before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from test_experiment import PlainTopK
from test_labelled_texts import CodeCorpus
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory, status_of
from tiny_models import CONTEXT_LENGTH
from tokenizers import Tokenizer

from saeens_pipeline.assets.lineage import lineage
from saeens_pipeline.assets.measurements import probing
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.labelled_texts import reading
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.tables import read_table

TABLES = ["concept_detection", "spurious_correlation"]


def _write_texts(folder: Path, n: int = 20) -> dict[str, Any]:
    """Texts of two attributes in two files, and the settings that read them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [
            {"text": f"{a}{(i * 7) % 10}{b}{i}{split}", "label": a, "spurious": b, "letter": a}
            for a in ("de", "fn")
            for b in ("((", "::")
            for i in range(n)
        ]
        rows += [{"text": "without", "label": None, "spurious": "((", "letter": None}]
        rows += [{"text": "two", "label": a, "spurious": "((", "letter": a} for a in ("de", "fn")]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = {"name": "mine", "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    few = {"train_texts": 24, "test_texts": 16}
    return {
        "concept_detection": {"datasets": [mine], **few},
        "spurious_correlation": {"datasets": [mine | {"target": ["de", "fn"], "spurious": ["((", "::"]}], **few},
    }


@pytest.fixture(scope="module")
def probed(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """The tiny experiment with its downstream tasks, made from the SAEs that were there already."""
    home = tmp_path_factory.mktemp("probed")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        shutil.copytree(finished_laboratory.root, laboratory.root, ignore=shutil.ignore_patterns("dagster"))
        laboratory.declare(evaluations=TABLES, **_write_texts(home / "texts"))
        laboratory.run()
    return laboratory


def _table(laboratory: Laboratory, table: str, **wanted: Any) -> pl.DataFrame:
    return read_table(laboratory.root, NAME, table).filter(**wanted)


def test_every_method_and_size_has_probing_rows(probed: Laboratory):
    sizes = {("single", 1), ("expanded", 3), ("expanded_l0_matched", 3), ("raw", 1)}
    sizes |= {(method, n) for method in ("bagging", "boosting") for n in (1, 2, 3)}
    for table in TABLES:
        rows = _table(probed, table)
        assert set(rows.select("method", "n_members").unique().iter_rows()) == sizes
        assert sorted(rows["seed"].unique()) == list(SEEDS)
        for method, n, versions in rows.select("method", "n_members", "sae_data_versions").iter_rows():
            n_saes = {"raw": 0, "bagging": n, "boosting": n}.get(method, 1)
            assert len(list(filter(None, versions.split(",")))) == n_saes
    concepts = _table(probed, "concept_detection", seed=SEEDS[0], method="bagging", n_members=3, label="de")
    numbers = [1, 2, 3, 5, 6, 15]
    assert list(concepts.select("n_probe_features", "code_scale").iter_rows()) == [
        (n, scale) for scale in ("unscaled", "1/J") for n in numbers
    ]
    correlations = _table(probed, "spurious_correlation", seed=SEEDS[0], method="bagging", n_members=3)
    tasks = ["mine, de or fn without (( or ::", "mine, (( or :: without de or fn"]
    assert list(correlations.select("task", "n_ablated").iter_rows()) == [
        (t, n) for t in tasks for n in (0, 2, 5, 6, 10, 15, 20, 30, 50, 60)
    ]
    single, first_of_bag = (
        _table(probed, "concept_detection", method=method, n_members=1).drop("method") for method in ("single", "bagging")
    )
    assert single.equals(first_of_bag)


def test_accuracies_equal_those_of_scikit_learn_on_plain_codes(probed: Laboratory):
    model = load_language_model(describe_language_model(str(probed.model)))
    saes = [PlainTopK(probed.artefact(f"bagging/member_{j}", SEEDS[0]).path) for j in (1, 2, 3)]
    tokenizer = Tokenizer.from_file(str(probed.model / "tokenizer.json"))

    def pooled(text: str) -> np.ndarray:
        tokens = torch.tensor([tokenizer.encode(text).ids[:CONTEXT_LENGTH]])
        x = model.activations(tokens, "resid_post", [LAYER])[LAYER][0, 1:].double().numpy()  # drop: [first]
        return np.concatenate([sae.encode(x).mean(0) for sae in saes])

    drawn = _drawn(probed)
    train, test = ([(pooled(text), label == "de") for label, texts in of_split.items() for text in texts] for of_split in drawn)
    (x_train, y_train), (x_test, y_test) = ((np.stack([x for x, _ in rows]), np.array([y for _, y in rows])) for rows in (train, test))
    rows = _table(probed, "concept_detection", seed=SEEDS[0], method="bagging", n_members=3, label="de")
    for n, scale, accuracy in rows.select("n_probe_features", "code_scale", "accuracy").iter_rows():
        factor = 1 / 3 if scale == "1/J" else 1
        probe = make_pipeline(SelectKBest(_difference_of_means, k=n), LogisticRegression(C=1.0, max_iter=1000))
        probe.fit(x_train * factor, y_train)
        assert accuracy == pytest.approx(probe.score(x_test * factor, y_test)), (n, scale)


def _difference_of_means(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(x[y].mean(0) - x[~y].mean(0))


def _drawn(laboratory: Laboratory) -> tuple[Any, Any]:
    """Return the drawn texts; test_labelled_texts tests the drawing."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        settings = laboratory.catalogue.experiment(NAME).concept_detection
    drawn = reading.read_concepts(settings.datasets[0], settings.count, 42)
    return drawn.train, drawn.test


def test_scr_in_the_table_equals_the_formula_of_its_accuracies(probed: Laboratory):
    rows = _table(probed, "spurious_correlation")
    for row in rows.iter_rows(named=True):
        possible = row["accuracy_clean"] - row["accuracy_biased"]
        expected = (row["accuracy_ablated"] - row["accuracy_biased"]) / possible if possible >= 0.001 else 0
        assert row["scr"] == pytest.approx(expected)
        assert row["worst_group_accuracy"] <= row["accuracy_ablated"]
        assert row["scr_metric"] in (None, row["scr"])
    untouched = rows.filter(n_ablated=0)
    assert (untouched["accuracy_ablated"] == untouched["accuracy_biased"]).all()
    metric = rows.filter(pl.col("scr_metric").is_not_null())
    assert metric["task"].n_unique() <= 1  # one direction, or neither


def test_a_row_of_the_activations_references_activations_and_no_sae(probed: Laboratory, monkeypatch: pytest.MonkeyPatch):
    probed.activate(monkeypatch)
    row = f"tiny/concept_detection:layer={LAYER},seed={SEEDS[0]},method=raw,label=de,n_probe_features=1"
    parents = [parent.title for parent in lineage(probed.store, probed.declarations().values(), row).parents]
    assert parents == [f"tiny/activations, layer {LAYER}"]


# recipes


def _stale() -> dict[str, str]:
    return {status.declaration.address.name: status.reason for status in status_of(NAME) if status.state == "stale"}


def test_a_probing_table_is_recomputed_only_for_changed_texts_or_settings(probed: Laboratory, empty: Laboratory, tmp_path: Path):
    shutil.copytree(probed.root, empty.root)
    settings = _write_texts(tmp_path / "texts")

    def declare(**changes: Any) -> None:
        empty.declare(evaluations=TABLES, **(settings | changes))

    original = json.loads(json.dumps(settings).replace(str(tmp_path), str(probed.folder.parent)))
    empty.declare(evaluations=TABLES, **original, evaluation_memory_gb=1)
    assert _stale() == {}
    declare(concept_detection=settings["concept_detection"] | {"context_length": 8})
    assert "context_length: 128 -> 8" in _stale()["concept_detection"]
    empty.declare(evaluations=TABLES, **original)
    file = probed.folder.parent / "texts" / "train.jsonl"
    before = file.read_text()
    try:
        file.write_text(before + before.splitlines()[0].replace("train", "more") + "\n")
        assert _stale().keys() == {*TABLES, "report"}
        assert "sha256" in _stale()["spurious_correlation"]
    finally:
        file.write_text(before)
    assert _stale() == {}


# what is refused before anything is made


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        (
            "concept_detection",
            {"text_field": "body"},
            "mine: .*train.jsonl:1: there is no column 'body'; the columns are 'text', 'label', 'spurious', 'letter'",
        ),
        ("concept_detection", {"labels": ["de", "gn"]}, "mine, train split: no text has the label 'gn'; the labels are 'de', 'fn'"),
        ("concept_detection", {"train": "nowhere.jsonl"}, "mine: there is no file /.*/nowhere.jsonl"),
        ("spurious_correlation", {"spurious": ["((", "--"]}, r"no text has the label '--'; the labels are '\(\(', '::'"),
    ],
)
def test_unsuitable_texts_are_refused_before_training(empty: Laboratory, tmp_path: Path, table: str, changes: dict[str, Any], message: str):
    settings = _write_texts(tmp_path / "texts")
    settings[table]["datasets"][0] |= changes
    empty.declare(evaluations=TABLES, **settings)
    with pytest.raises(SaeensError, match=message):
        empty.run()
    assert not empty.root.exists() or not list(empty.root.rglob("recipe.json"))


def test_too_few_texts_are_refused_before_training(empty: Laboratory, tmp_path: Path):
    empty.declare(evaluations=TABLES, **_write_texts(tmp_path / "texts", n=5))
    with pytest.raises(SaeensError, match=r"mine: 12 train texts of 'de' are needed, and there are 10 different ones: lower train_texts"):
        empty.run()
    assert not list(empty.root.rglob("recipe.json"))


@pytest.mark.parametrize("sweep", [{}, {"sweep": {"k": [2, 4]}}])
def test_paths_of_texts_are_relative_to_the_experiment_file(
    empty: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: dict[str, Any]
):
    there = json.dumps(_write_texts(tmp_path / "texts"))
    file = empty.declare(evaluations=TABLES, **sweep, **json.loads(there))
    absolute = _texts(empty)
    file = empty.declare(evaluations=TABLES, **sweep, **json.loads(there.replace(str(tmp_path), ".")))
    shutil.copytree(tmp_path / "texts", file.parent / "texts")
    monkeypatch.chdir(tmp_path)
    assert _texts(empty) == absolute
    assert len(absolute) == len(TABLES) * (len(sweep["sweep"]["k"]) if sweep else 1)
    (file.parent / "texts" / "train.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=f"mine: there is no file {file.parent}/texts/train.jsonl"):
        _texts(empty)


def _texts(laboratory: Laboratory) -> dict[str, Any]:
    """Return the recipe entry of each table's texts, by address."""
    catalogue = laboratory.catalogue
    experiments = [experiment for name, experiment in catalogue.experiments.items() if name.startswith(NAME)]
    declarations = [each for experiment in experiments for op in catalogue.ops(experiment) for each in op.outputs]
    partition = Partition(LAYER, SEEDS[0])
    return {str(each.address): each.partition_settings(partition)["texts"] for each in declarations if each.address.name in TABLES}


def test_a_text_without_a_counted_token_is_refused_before_training(empty: Laboratory, tmp_path: Path):
    settings = _write_texts(tmp_path / "texts")
    short = [{"text": letter, "label": label} for label, letters in (("de", "abcdefgh"), ("fn", "ijklmnop")) for letter in letters]
    with (tmp_path / "texts" / "train.jsonl").open("a") as file:
        file.write("".join(json.dumps(row | {"spurious": "((", "letter": "a"}) + "\n" for row in short))
    settings["concept_detection"] |= {"train_texts": 96}
    empty.declare(evaluations=TABLES, **settings)  # of position 0, the only one, the source has no activations
    with pytest.raises(SaeensError, match=r"the text '[a-p]' has no token that counts for .*: leave such short texts out"):
        empty.run()
    assert not list(empty.root.rglob("recipe.json"))


def test_a_run_of_the_ui_refuses_unsuitable_texts_before_training(empty: Laboratory, tmp_path: Path):
    settings = _write_texts(tmp_path / "texts")
    empty.declare(evaluations=TABLES, **settings)
    empty.run(select=["activations"])
    (tmp_path / "texts" / "train.jsonl").write_text('{"text": "a", "label": "de"}\n')
    member, where = f"{NAME}/bagging/member_1", Partition(LAYER, SEEDS[0])
    with pytest.raises(SaeensError, match="mine: the only label is 'de'"):
        empty.materialise([member], where)
    assert not (empty.root / "experiments").exists()
    empty.declare()
    assert member in empty.materialise([member], where)


def test_a_table_of_the_ui_is_refused_before_any_text_is_encoded(finished: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    finished.declare(evaluations=TABLES, **_write_texts(tmp_path / "texts"))
    (tmp_path / "texts" / "train.jsonl").write_text('{"text": "a", "label": "de"}\n')
    monkeypatch.setattr(probing, "probe", lambda making: pytest.fail("the rows are computed"))
    with pytest.raises(SaeensError, match="mine: the only label is 'de'"):
        finished.materialise([f"{NAME}/eval/concept_detection"], Partition(LAYER, SEEDS[0]))


def test_embedded_tasks_are_checked_before_training(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "open_corpus", lambda name: CodeCorpus([], []))
    few = {"train_texts": 8, "test_texts": 8}
    empty.declare(
        evaluations=TABLES[:1], concept_detection={"datasets": [{"name": "builtin/language", "labels": ["python", "rust"]}], **few}
    )
    with pytest.raises(SaeensError, match=r"builtin/language, train split: no text has the label 'rust'; the labels are 'cpp_header', "):
        empty.run()
    empty.declare(evaluations=TABLES[1:], spurious_correlation={"train_texts": 400, "test_texts": 40})
    with pytest.raises(SaeensError, match=r"builtin/language_and_documentation: 200 train texts of 'python' and 'documentation'"):
        empty.run()
    assert not list(empty.root.rglob("recipe.json"))


def test_a_wrong_probing_field_is_reported_with_its_line(empty: Laboratory):
    file = empty.declare(evaluations=TABLES, concept_detection={"datasets": [{"name": "builtin/language", "labls": []}]})
    with pytest.raises(
        ConfigurationError, match=rf"{file}:\d+: attributes.concept_detection.datasets.0.labls: unknown key; one of: name, revision"
    ):
        empty.run()


def test_the_ui_shows_means_by_method_and_number_of_features(probed: Laboratory, monkeypatch: pytest.MonkeyPatch):
    probed.activate(monkeypatch)
    events = probed.materialise([f"{NAME}/eval/{table}" for table in TABLES], Partition(LAYER, SEEDS[0]))
    for table, value in (("concept_detection", "accuracy"), ("spurious_correlation", "scr metric")):
        metadata = events[f"{NAME}/eval/{table}"].metadata
        assert metadata["rows left out of mine"].value == "2 without a text or a label, 4 with several labels"
        shown = str(metadata["summary"].value).splitlines()
        numbers = "1 | 2 | 5" if table == "concept_detection" else "0 | 2 | 5 | 10 | 20"
        assert shown[0] == f"| {value} with n = | {numbers} |"
        assert [line.split("|")[1].strip() for line in shown[2:]] == [
            "single",
            "bagging",
            "boosting",
            "expanded",
            "expanded_l0_matched",
            "raw",
        ]
    accuracy = _table(probed, "concept_detection", seed=SEEDS[0], method="raw", n_probe_features=1)["accuracy"].mean()
    (line,) = [line for line in str(events[f"{NAME}/eval/concept_detection"].metadata["summary"].value).splitlines() if "raw" in line]
    assert line.startswith(f"| raw | {accuracy:.3f} |")
