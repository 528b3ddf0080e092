"""The table of explanations: with an endpoint, without one, and with a later one; against dense codes of stored activations."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import child_process
import numpy as np
import polars as pl
import pytest
import torch
import zarr
from fake_endpoint import FakeEndpoint, Question, failure, serving
from tiny_experiment import LAYER, NAME, Laboratory, status_of
from tiny_models import CONTEXT_LENGTH
from tokenizers import Tokenizer
from typer.testing import CliRunner

import saeens_models as sm
from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.assets.forecast import as_frame, forecast
from saeens_pipeline.assets.measurements.autointerp import WINDOWS
from saeens_pipeline.assets.tables.autointerp import outcome
from saeens_pipeline.assets.tables.contexts import RADIUS
from saeens_pipeline.cli import app
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.autointerp.answers import FOLDER
from saeens_pipeline.language_models.autointerp.endpoint import KEY_VARIABLE, URL_VARIABLE
from saeens_pipeline.orchestration.garbage import declared, find_garbage
from saeens_pipeline.orchestration.metadata import column_lineage
from saeens_pipeline.storage.names import Partition

SEED = 1
KEY = "sk-very-secret-0123456789"
EXPLAINED: dict[str, Any] = {
    "evaluations": ["contexts", "autointerp"],
    "ensemble": {"members": 2, "seeds": [SEED]},
    "baselines": [],
    "autointerp": {"model": "fake", "features": 20, "requests_at_once": 2, "retries": 0},
}
LETTERS = "aeiou"


def rule(question: Question) -> str:
    """Explains a feature by the vowel that is most frequent in its texts; a text fits that has it."""
    if question.explanation is None:
        return f"the letter {max(LETTERS, key=''.join(question.texts).count)}"
    return json.dumps([int(question.explanation[-1] in text) for text in question.texts])


@pytest.fixture(scope="module")
def without_endpoint(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory):
    """The tiny experiment with these two tables, run without an endpoint; for reading only."""
    home = tmp_path_factory.mktemp("autointerp")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        monkeypatch.delenv(URL_VARIABLE, raising=False)
        laboratory.declare(**EXPLAINED)
        laboratory.run()
    return laboratory


@pytest.fixture
def laboratory(without_endpoint: Laboratory, empty: Laboratory, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    """A copy of it, to change at will."""
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    shutil.copytree(without_endpoint.root, empty.root)
    empty.declare(**EXPLAINED)
    return empty


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, laboratory: Laboratory) -> Iterator[FakeEndpoint]:
    with serving(FakeEndpoint(rule)) as endpoint:
        monkeypatch.setenv(URL_VARIABLE, endpoint.url)
        monkeypatch.setenv(KEY_VARIABLE, KEY)
        yield endpoint


def _table(laboratory: Laboratory, name: str = "autointerp") -> pl.DataFrame:
    return pl.read_parquet(laboratory.artefact(f"eval/{name}", SEED).path, hive_partitioning=False)


def _made(laboratory: Laboratory) -> dict[str, Any]:
    return laboratory.artefact("eval/autointerp", SEED).provenance["autointerp"]


def _state() -> tuple[str, str]:
    (status,) = [status for status in status_of(NAME) if status.declaration.address.name == "autointerp"]
    return status.state, status.reason


def _declare(laboratory: Laboratory, **changes: Any) -> None:
    laboratory.declare(**EXPLAINED | {"autointerp": EXPLAINED["autointerp"] | changes})


# Not configured, and configured later


def test_without_an_endpoint_the_table_is_empty_and_its_metadata_give_the_reason(laboratory: Laboratory):
    assert len(_table(laboratory)) == 0
    assert _made(laboratory)["status"] == "not configured"
    assert _state() == ("fresh", "")
    metadata = laboratory.materialise([f"{NAME}/eval/autointerp"], Partition(LAYER, SEED))[f"{NAME}/eval/autointerp"].metadata
    assert metadata["status"].value == "not configured"
    assert not (laboratory.root / FOLDER).exists()
    printed = CliRunner().invoke(app, ["table", NAME, "autointerp", "--format", "csv"])
    assert printed.exit_code == 0 and printed.stdout.startswith("experiment,") and len(printed.stdout.splitlines()) == 1
    assert f"No feature was asked about. No endpoint was configured. Set `{URL_VARIABLE}`" in printed.stderr


def test_a_run_without_an_endpoint_names_the_variable_to_set(laboratory: Laboratory):
    laboratory.artefact("eval/autointerp", SEED).path.unlink()
    assert f"not configured: set {URL_VARIABLE}" in laboratory.run()
    assert "nothing to do" in laboratory.run()


def test_a_table_computed_with_an_endpoint_stays_fresh_without_one(
    fake: FakeEndpoint, laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    state, reason = _state()
    assert state == "stale" and "not configured" in reason
    laboratory.run()
    made = _table(laboratory)
    assert made.filter(status="scored").height > 10
    assert _made(laboratory)["status"] == "made" and _state() == ("fresh", "")
    monkeypatch.delenv(URL_VARIABLE)
    assert _state() == ("fresh", "")
    assert "nothing to do" in laboratory.run()
    laboratory.materialise([f"{NAME}/eval/autointerp"], Partition(LAYER, SEED))
    assert _table(laboratory).equals(made)
    monkeypatch.setenv(URL_VARIABLE, "http://127.0.0.1:9/v1")  # another address is no other recipe
    assert "nothing to do" in laboratory.run()


def test_a_removed_table_is_rebuilt_from_stored_answers_with_and_without_an_endpoint(
    fake: FakeEndpoint, laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    laboratory.run()
    made, n_requests = _table(laboratory), len(fake.requests)
    laboratory.artefact("eval/autointerp", SEED).path.unlink()
    monkeypatch.delenv(URL_VARIABLE)
    laboratory.run()
    assert _table(laboratory).equals(made.filter(status="scored"))
    assert _made(laboratory)["status"] == "not configured"
    monkeypatch.setenv(URL_VARIABLE, fake.url)
    assert _state()[0] == "stale"
    laboratory.run()
    assert _table(laboratory).equals(made)
    assert len(fake.requests) == n_requests and _made(laboratory)["requests"] == 0


def test_adding_features_requests_explanations_of_the_new_ones_only(fake: FakeEndpoint, laboratory: Laboratory):
    _declare(laboratory, features=8, control=False)
    laboratory.run()
    few, before = _table(laboratory), list(fake.requests)
    _declare(laboratory, features=16, control=False)
    laboratory.run()
    more = _table(laboratory)
    assert few.join(more, on=more.columns, how="anti", nulls_equal=True).is_empty()
    assert (len(few), len(more)) == (16, 32)
    assert not [request for request in fake.requests[len(before) :] if request in before]


@pytest.mark.parametrize(
    "changed", [{"retries": 3}, {"requests_at_once": 5}, {"timeout_seconds": 7}, {"prices": {"input": 1, "output": 2}}]
)
def test_request_settings_are_not_in_the_recipe(changed: dict[str, Any], fake: FakeEndpoint, laboratory: Laboratory):
    laboratory.run()
    _declare(laboratory, **changed)
    assert _state() == ("fresh", "")


@pytest.mark.parametrize("changed", [{"model": "other"}, {"features": 3}, {"control": False}, {"parameters": {}}])
def test_question_settings_are_in_the_recipe(changed: dict[str, Any], fake: FakeEndpoint, laboratory: Laboratory):
    laboratory.run()
    _declare(laboratory, **changed)
    assert _state()[0] == "stale"


# What is asked, and what comes of it


def test_scores_equal_the_rules_accuracy_on_active_and_silent_texts(fake: FakeEndpoint, laboratory: Laboratory):
    laboratory.run()
    table, contexts = _table(laboratory), _table(laboratory, "contexts")
    silent = _silent_texts(laboratory)
    held_out_of, explained = {}, {}
    for row in contexts.iter_rows(named=True):
        texts = ["".join(context["tokens"]) for context in json.loads(row["contexts"])]
        held_out_of[row["method"], row["member"], row["index"]] = texts[1::2]
        explained[row["method"], row["member"], row["index"]] = f"the letter {max(LETTERS, key=''.join(texts[::2]).count)}"
    asked = [question for question in fake.questions if question.explanation]
    scored = table.filter(status="scored")
    assert len(scored) > 10 and set(scored["method"]) == {"bagging", "boosting"}
    for row in scored.iter_rows(named=True):
        feature = row["method"], row["member"], row["index"]
        held_out = held_out_of[feature]
        assert row["explanation"] == explained[feature]
        assert row["n_examples"] == 2 * len(held_out)
        of_feature = [
            question
            for question in asked
            if question.explanation == row["explanation"]
            and not _without(question.texts, held_out) & set(held_out)
            and len(_without(question.texts, held_out)) == len(held_out)
            and _without(question.texts, held_out) <= silent[feature]
        ]
        fits = [(row["explanation"][-1] in text) for text in held_out]
        false = {sum(row["explanation"][-1] in text for text in _without(question.texts, held_out)) for question in of_feature}
        assert row["true_positive_rate"] == pytest.approx(np.mean(fits))
        assert row["false_positive_rate"] in {n / len(held_out) for n in false}
        assert row["detection_score"] == pytest.approx((row["true_positive_rate"] + 1 - row["false_positive_rate"]) / 2)


def _without(texts: list[str], some: list[str]) -> set[str]:
    """Return texts without `some`, or all of them if `some` is not contained."""
    rest = list(texts)
    for text in some:
        if text not in rest:
            return set(texts)
        rest.remove(text)
    return set(rest)


def _silent_texts(laboratory: Laboratory) -> dict[tuple[str, int, int], set[str]]:
    """By feature, texts of windows around every test token on no token of which its dense code is active."""
    group: Any = zarr.open_group(laboratory.artefact("activations").path, mode="r")
    x = torch.from_numpy(np.asarray(group["test/activations"][:], np.float32))
    stored: Any = zarr.open_group(laboratory.artefact("tokens", layer=None).path, mode="r")["test"]
    tokens, kept, document = (stored[name][:] for name in ("tokens", "kept", "document"))
    tokenizer = Tokenizer.from_file(str(laboratory.model / "tokenizer.json"))
    found: dict[tuple[str, int, int], set[str]] = {}
    for method, kind, prefix in (("bagging", sm.Bagging, "bagging/member"), ("boosting", sm.Boosting, "boosting/round")):
        saes = [sm.load_sae(laboratory.artefact(f"{prefix}_{j}", SEED).path) for j in (1, 2)]
        code = kind(saes).encode(x).detach().numpy()
        of_windows = np.zeros((*kept.shape, code.shape[1]))
        of_windows[kept] = code
        d_sae = saes[0].config.d_sae
        for window, at in itertools.product(range(len(kept)), range(CONTEXT_LENGTH)):
            if kept[window, at]:
                around = [p for p in range(max(0, at - RADIUS), min(CONTEXT_LENGTH, at + RADIUS + 1)) if document[window, p] >= 0]
                text = "".join(tokenizer.decode([tokens[window, p]]) for p in around)
                for feature in np.flatnonzero(of_windows[window, around].max(axis=0) == 0).tolist():
                    found.setdefault((method, feature // d_sae + 1, feature % d_sae), set()).add(text)
    return found


def test_a_perfect_detector_scores_one_and_a_constant_one_scores_chance(fake: FakeEndpoint, laboratory: Laboratory):
    contexts = _table(laboratory, "contexts")["contexts"]
    of_features = [["".join(context["tokens"]) for context in json.loads(row)] for row in contexts]
    known: dict[str, set[frozenset[str]]] = {}
    for texts in filter(None, of_features):
        known.setdefault(json.dumps(texts[::2]), set()).add(frozenset(texts[1::2]))

    def oracle(question: Question) -> str:
        if question.explanation is None:
            return json.dumps([text.replace("⟦", "").replace("⟧", "") for text in question.texts])
        return json.dumps([int(any(text in held_out for held_out in known[question.explanation])) for text in question.texts])

    fake.rule = oracle
    laboratory.run()
    table = _table(laboratory).filter(status="scored")
    told_apart = [explanation for explanation, of_features in known.items() if len(of_features) == 1]  # others are shown with equal texts
    assert set(table.filter(pl.col("explanation").is_in(told_apart))["detection_score"]) == {1.0}
    fake.rule = lambda question: "all" if question.explanation is None else json.dumps([1] * len(question.texts))
    _declare(laboratory, model="agreeable")
    laboratory.run()
    assert set(_table(laboratory).filter(status="scored")["detection_score"]) == {0.5}


def test_the_control_is_the_explanation_of_another_feature_of_the_same_ensemble(fake: FakeEndpoint, laboratory: Laboratory):
    numbers = itertools.count()
    fake.rule = lambda question: f"number {next(numbers)}" if question.explanation is None else json.dumps([1] * len(question.texts))
    _declare(laboratory, requests_at_once=1)
    laboratory.run()
    table = _table(laboratory).filter(status="scored")
    assert table["control_score"].null_count() == 0
    explanations: dict[tuple[str, ...], list[str]] = {}
    for question in fake.questions:
        if question.explanation:
            explanations.setdefault(tuple(question.texts), []).append(question.explanation)
    methods: dict[str, set[str]] = {}
    for method, explanation in table.select("method", "explanation").rows():
        methods.setdefault(explanation, set()).add(method)
    for of_texts in explanations.values():
        assert len(of_texts) >= 2 and len(set(of_texts)) == len(of_texts)
        assert any(methods[a] & methods[b] for a, b in itertools.pairwise(of_texts))
    used = [explanation for of_texts in explanations.values() for explanation in of_texts]
    assert {used.count(explanation) for explanation in methods} <= {2, 3, 4}  # once as its own, once as another's, in either ensemble


def test_features_with_too_few_texts_have_rows_and_no_requests(fake: FakeEndpoint, laboratory: Laboratory):
    laboratory.run()
    table = _table(laboratory)
    assert table.group_by("method").len()["len"].to_list() == [20, 20]
    for row in table.filter(pl.col("status") != "scored").iter_rows(named=True):
        assert row["status"] in ("too few contexts", "too few silent windows")
        assert row["explanation"] is row["detection_score"] is row["n_examples"] is None
    n_contexts = {
        (row["method"], row["member"], row["index"]): len(json.loads(row["contexts"]))
        for row in _table(laboratory, "contexts").iter_rows(named=True)
    }
    too_few = set(table.filter(status="too few contexts").select("method", "member", "index").rows())
    all_rows = table.select("method", "member", "index").rows()
    assert too_few == {row for row in all_rows if n_contexts[row] < 4}
    assert all(n_contexts[row] > 0 for row in all_rows)
    assert WINDOWS >= 200


def test_metadata_count_requests_and_outcomes(fake: FakeEndpoint, laboratory: Laboratory):
    key = f"{NAME}/eval/autointerp"
    metadata = laboratory.materialise([key], Partition(LAYER, SEED))[key].metadata
    table = _table(laboratory)
    assert metadata["status"].value == "made"
    assert metadata["requests asked"].value == len(fake.requests)
    assert metadata["tokens in"].value == 100 * len(fake.requests)
    mean = table.filter(method="boosting")["detection_score"].mean()
    assert f"| boosting | {table.filter(method='boosting', status='scored').height} | {mean:.3f} |" in str(metadata["summary"].value)
    assert "too few" in str(metadata["not scored"].value)


def test_the_outcome_has_the_counts_of_the_table_and_their_reasons(fake: FakeEndpoint, laboratory: Laboratory):
    refused = []

    def moody(question: Question) -> str:
        if question.explanation is None and not refused and len(fake.requests) > 5:
            refused.append(question)
            fake.canned = [failure(400, "I do not like this")]
        return "no idea" if question.explanation and len(question.texts[0]) % 2 else rule(question)

    fake.rule = moody
    printed = laboratory.run()
    counts = dict(_table(laboratory)["status"].value_counts().iter_rows())
    assert {"scored", "malformed answer", "refused"} <= counts.keys()
    found = outcome(laboratory.store, NAME, [SEED])
    n_asked = sum(counts.get(status, 0) for status in ("scored", "malformed answer", "refused"))
    assert found.startswith(f"Of 40 features that were drawn, fake was asked about {n_asked}; {counts['scored']} are scored. Not scored: ")
    assert f"{counts['malformed answer']} (malformed answer: no answer that could be read)" in found
    assert f"{counts['refused']} (refused: the endpoint refused a request)" in found
    assert all(f"{n} ({status}: not asked about" in found for status, n in counts.items() if status.startswith("too few"))
    assert f"eval/autointerp, layer {LAYER}, seed {SEED}: {found}" in printed
    assert found in CliRunner().invoke(app, ["table", NAME, "autointerp"]).stderr
    assert outcome(laboratory.store, NAME, [SEED], LAYER) == found
    assert outcome(laboratory.store, NAME, [SEED + 1]) == outcome(laboratory.store, NAME, [SEED], LAYER + 1) == ""


def test_the_outcome_from_stored_answers_reports_the_missing_endpoint(
    fake: FakeEndpoint, laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    laboratory.run()
    laboratory.artefact("eval/autointerp", SEED).path.unlink()
    monkeypatch.delenv(URL_VARIABLE)
    laboratory.run()
    found = outcome(laboratory.store, NAME, [SEED])
    assert "are scored. No endpoint was configured: these answers are from earlier runs. Set `SAEENS_LLM_BASE_URL`" in found


def test_a_run_without_a_readable_answer_fails_and_keeps_the_earlier_table(fake: FakeEndpoint, laboratory: Laboratory):
    fake.rule = lambda question: ""
    _declare(laboratory, features=2)
    with pytest.raises(SaeensError, match=r"features none is scored, since none of \d+ answers can be read as explanations"):
        laboratory.run()
    assert len(_table(laboratory)) == 0 and _made(laboratory)["status"] == "not configured"
    fake.rule = rule
    laboratory.run()
    assert set(_table(laboratory)["status"]) & {"scored"}


def test_column_lineage_of_explanations_points_to_contexts(laboratory: Laboratory):
    found = column_lineage(laboratory.declarations()[f"{NAME}/eval/autointerp"]).deps_by_column
    assert [(dep.asset_key.path[-1], dep.column_name) for dep in found["explanation"]] == [("contexts", "contexts")]
    assert ("activations", "test/activations") in [(dep.asset_key.path[-1], dep.column_name) for dep in found["detection_score"]]


# When something goes wrong


def test_an_endpoint_failure_fails_the_asset_and_the_next_run_resumes(fake: FakeEndpoint, laboratory: Laboratory):
    def until_down(question: Question) -> str:
        if len(fake.requests) == 15:
            fake.always = failure(503, "down for maintenance")
        return rule(question)

    fake.rule = until_down
    with pytest.raises(SaeensError, match="down for maintenance"):
        laboratory.run()
    assert _state()[0] == "stale" and len(_table(laboratory)) == 0
    answered = len(list((laboratory.root / FOLDER).glob("*/*.json")))
    assert answered >= 14
    fake.always, fake.rule, fake.requests = None, rule, []
    printed = laboratory.run()
    assert f"{answered} answers are on disk" in printed
    assert len(fake.requests) == len({json.dumps(request) for request in fake.requests})
    assert _made(laboratory)["requests"] == len(fake.requests)
    assert _made(laboratory)["answers_from_disk"] >= answered


@pytest.mark.parametrize(("status", "message"), [(401, KEY_VARIABLE), (404, "no model 'fake'")])
def test_a_wrong_key_or_model_fails_at_once(status: int, message: str, fake: FakeEndpoint, laboratory: Laboratory):
    fake.always = failure(status, "no")
    with pytest.raises(ConfigurationError, match=message):
        laboratory.run()
    assert len(fake.requests) <= 2


def ask_until_interrupted(model: str, folder: str, root: str) -> None:
    """Run until Ctrl-C is pressed; called in a child process. The signal is taken by a thread that does not wait for answers."""

    def take_signals() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        threading.Event().wait()

    laboratory = Laboratory(Path(model), Path(folder), Path(root))
    threading.Thread(target=take_signals, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        try:
            laboratory.run()
        except KeyboardInterrupt:
            child_process.tell(interrupted=True)


@pytest.mark.slow
def test_ctrl_c_stops_the_interview_and_the_next_run_resumes(fake: FakeEndpoint, laboratory: Laboratory):
    interrupted = threading.Event()

    def until_interrupted(question: Question) -> str:
        if len(fake.requests) == 12:
            child.send_signal(signal.SIGINT)
            interrupted.set()
        if interrupted.is_set():
            stopped.wait(60)  # what is asked from then on is answered when nobody waits any more
        return rule(question)

    stopped = threading.Event()
    fake.rule = until_interrupted
    child = child_process.start(ask_until_interrupted, laboratory.model, laboratory.folder, laboratory.root)
    assert child_process.finish(child) == {"interrupted": True}
    stopped.set()
    answered = len(list((laboratory.root / FOLDER).glob("*/*.json")))
    assert 8 <= answered <= 11
    fake.rule, fake.requests = rule, []
    laboratory.run()
    assert _table(laboratory).filter(status="scored").height > 10
    assert len(list((laboratory.root / FOLDER).glob("*/*.json"))) == answered + len({json.dumps(each) for each in fake.requests})


@pytest.mark.parametrize("status", [200, 401, 500])
def test_the_api_key_is_in_no_file_below_the_root_and_in_no_log_line(
    status: int, fake: FakeEndpoint, laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    laboratory.activate(monkeypatch, keep_events=True)
    monkeypatch.setenv("DAGSTER_HOME", str(laboratory.root / "dagster"))
    fake.rule = lambda question: f"{KEY} {rule(question)}"
    fake.always = failure(status, f"what a nice key: {KEY}") if status != 200 else None
    with caplog.at_level(logging.DEBUG):
        if status == 200:
            printed = laboratory.run()
        else:
            with pytest.raises(SaeensError) as caught:
                laboratory.run()
            printed = str(caught.value)
    assert KEY not in printed and KEY not in caplog.text
    files = [file for file in laboratory.root.rglob("*") if file.is_file()]
    assert any("dagster" in file.parts for file in files)
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    if status == 200:
        assert not _table(laboratory).filter(pl.col("explanation").str.contains(KEY)).height
        assert _table(laboratory).filter(status="scored").height > 10


def test_a_wrong_endpoint_address_is_refused_before_anything_is_computed(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(URL_VARIABLE, "localhost")
    with pytest.raises(ConfigurationError, match=URL_VARIABLE):
        laboratory.run()
    assert _state()[0] == "stale"  # it can be asked for all the same


# What a user declares, and is told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autointerp": None}, "evaluations.1: autointerp asks a language model: name one"),
        ({"evaluations": ["autointerp"]}, "evaluations.0: autointerp is computed from the table contexts: add it"),
        ({"autointerp": {"features": 3}}, "autointerp.model: required"),
        ({"autointerp": {"model": ""}}, "autointerp.model: "),
        ({"autointerp": {"model": "fake", "features": 0}}, r"autointerp.features: .*greater than 0 \(found: 0\)"),
        ({"autointerp": {"model": "fake", "key": "sk-1"}}, "autointerp.key: unknown key; one of: model, features"),
        ({"autointerp": {"model": "fake", "parameters": {"api_key": "sk-1"}}}, "autointerp.parameters: api_key: cannot be set here"),
        ({"autointerp": {"model": "fake", "prices": {"input": 1}}}, "autointerp.prices.output: required"),
        ({"autointerp": {"model": "fake", "requests_at_once": 0}}, "autointerp.requests_at_once: "),
        ({"autointerp": {"model": "fake", "timeout_seconds": 0}}, "autointerp.timeout_seconds: "),
    ],
)
def test_wrong_autointerp_settings_are_refused_with_their_line(changes: dict[str, Any], message: str, empty: Laboratory):
    file = empty.declare(**EXPLAINED | changes)
    with pytest.raises(ConfigurationError, match=message) as caught:
        empty.catalogue.experiment(NAME)
    assert str(file) in str(caught.value)


def test_the_forecast_of_requests_is_not_below_the_number_sent(fake: FakeEndpoint, laboratory: Laboratory):
    _declare(laboratory, prices={"input": 3.0, "output": 15.0})
    catalogue = laboratory.catalogue
    experiment = catalogue.experiment(NAME)
    lines = forecast(
        catalogue.sources[NAME], experiment, catalogue.ops(experiment), layers=[LAYER], store=laboratory.store, compute=Compute()
    )
    planned = dict(as_frame(lines).filter(section="autointerp").select("item", "amount").iter_rows())
    printed = laboratory.run()
    assert planned["requests"] == 2 * 20 * 3 >= len(fake.requests)
    assert planned["tokens in"] >= sum(len(m["content"]) for request in fake.requests for m in request["messages"]) / 3
    assert planned["price"] == pytest.approx((planned["tokens in"] * 3 + planned["tokens out"] * 15) / 1e6)
    assert f"at most {planned['requests']:,.0f} requests" in printed and f"{planned['price']:,.2f} at the given prices" in printed


def test_gc_keeps_stored_answers(fake: FakeEndpoint, laboratory: Laboratory):
    laboratory.run()
    found = find_garbage(laboratory.root, declared(laboratory.catalogue))
    assert not found.garbage and not [each for each in found.unknown if FOLDER in each.path.parts]
