"""Sources that follow a set of language models: a source and an experiment for each, and the sensor that sees new ones."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from fake_hub import UNREACHABLE, FakeHub, reach
from tiny_experiment import EXPERIMENT, LAYER, NAME, Laboratory, experiment_file, experiment_settings, source_settings
from tiny_gguf import write_gguf

from saeens_pipeline import cli
from saeens_pipeline.components import ActivationSource, EnsembleExperiment
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import followed_models
from saeens_pipeline.language_models.followed_models import FILE, ask_hub
from saeens_pipeline.orchestration import new_models
from saeens_pipeline.orchestration.garbage import declared, find_garbage
from saeens_pipeline.orchestration.guard import Guard
from saeens_pipeline.orchestration.new_models import ADDRESS_VARIABLE, new_models_sensor
from saeens_pipeline.settings import SourceSettings
from saeens_pipeline.settings.files import blamed_on
from saeens_pipeline.settings.sources import EachModel
from saeens_pipeline.storage.names import numeric_order

EACH = {"language_model": {"each": "checkpoints/step-*"}}
HUB_NAME = "some-lab/some-model"


class Set:
    """The tiny experiment on a source that follows `checkpoints/step-*` next to its file."""

    def __init__(self, laboratory: Laboratory) -> None:
        self.laboratory = laboratory
        self.folder = laboratory.folder / NAME / "checkpoints"

    def add(self, *names: str) -> None:
        for name in names:
            shutil.copytree(self.laboratory.model, self.folder / name)

    @property
    def sources(self) -> list[str]:
        return self.laboratory.catalogue.followed[NAME].sources

    @property
    def waiting(self) -> list[str]:
        return self.laboratory.catalogue.followed[NAME].waiting


@pytest.fixture
def checkpoints(empty: Laboratory) -> Set:
    empty.declare(EACH)
    return Set(empty)


Saeens = Callable[..., tuple[int, str]]


@pytest.fixture
def saeens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Saeens:
    """Run a command; return its exit code and everything that it prints."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["saeens", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return call


# one source and one experiment for each


def test_each_checkpoint_is_a_source_and_an_experiment_of_its_own_in_numeric_order(checkpoints: Set):
    checkpoints.add("step-1000", "step-20", "step-3")
    catalogue = checkpoints.laboratory.catalogue
    assert catalogue.broken == {}
    names = [f"{NAME}__step_{n}" for n in (3, 20, 1000)]
    assert catalogue.followed[NAME].sources == list(catalogue.sources) == names
    assert [each.name for each in catalogue.named(NAME)] == list(catalogue.experiments) == names
    for name, folder in zip(names, ("step-3", "step-20", "step-1000"), strict=True):
        written = source_settings(checkpoints.folder / folder, name=name)
        assert catalogue.sources[name] == SourceSettings.model_validate(written, context={"file": catalogue.sources[name].file})
        assert catalogue.experiments[name].source == name
        assert catalogue.experiments[name].sae.model_dump(exclude_unset=True) == EXPERIMENT["sae"]


def test_a_followed_corpus_of_several_parts_is_that_of_the_file(checkpoints: Set):
    mixed = [{"corpus": "builtin/prose", "weight": 3}, {"corpus": "a/*.jsonl", "text_field": "body"}, {"corpus": "some/data", "weight": 2}]
    checkpoints.laboratory.declare(EACH | {"corpus": mixed})
    checkpoints.add("step-1")
    catalogue = checkpoints.laboratory.catalogue
    assert catalogue.sources[f"{NAME}__step_1"].corpus == catalogue.followed[NAME].settings.corpus


def test_a_sweep_on_a_followed_source_is_a_sweep_for_each(checkpoints: Set):
    checkpoints.laboratory.declare(EACH, sae={"architecture": "topk", "expansion": 2}, sweep={"k": [4, 2]})
    checkpoints.add("step-1", "step-2")
    catalogue = checkpoints.laboratory.catalogue
    assert catalogue.broken == {}
    assert list(catalogue.sweeps) == catalogue.sweeps_of(NAME) == [f"{NAME}__step_1", f"{NAME}__step_2"]
    assert [each.name for each in catalogue.named(NAME)] == [f"{NAME}__step_{n}__k_{k}" for n in (1, 2) for k in (4, 2)]
    assert [each.source for each in catalogue.named(f"{NAME}__step_2")] == [f"{NAME}__step_2"] * 2
    assert catalogue.pareto(f"{NAME}__step_1").outputs


def test_names_have_the_folders_from_the_first_wildcard_on(checkpoints: Set):
    checkpoints.laboratory.declare({"language_model": {"each": str(checkpoints.folder / "run_*" / "Step.*")}})  # absolute
    checkpoints.add("run_a/Step.1", "run_b/Step.1", "run_b/other")
    assert checkpoints.sources == [f"{NAME}__run_a_step_1", f"{NAME}__run_b_step_1"]


def test_gguf_files_are_followed_and_one_that_is_cut_off_waits(checkpoints: Set):
    checkpoints.laboratory.declare({"language_model": {"each": "models/*"}})
    file = write_gguf(checkpoints.folder.parent / "models" / "Tiny-1.gguf", quantised="Q4_1")
    (file.parent / "tiny-2.gguf").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (file.parent / "notes.txt").write_text("no model")
    assert checkpoints.sources == [f"{NAME}__tiny_1"]
    (sentence,) = checkpoints.waiting
    assert "tiny-2.gguf is not taken yet: " in sentence
    assert "is cut off" in sentence


def test_dagsters_components_have_the_assets_of_all_models(checkpoints: Set):
    checkpoints.add("step-1", "step-2")
    catalogue = checkpoints.laboratory.catalogue
    expected = {str(output.address) for op in catalogue.all_ops() for output in op.outputs} - {"leaderboard", "leaderboard/report"}
    ops = [*ActivationSource(NAME).ops(catalogue), *EnsembleExperiment(NAME).ops(catalogue)]
    assert {str(output.address) for op in ops for output in op.outputs} == expected


def test_an_error_about_one_model_has_the_line_of_the_set(checkpoints: Set):
    checkpoints.add("step-1")
    file = checkpoints.laboratory.folder / NAME / "defs.yaml"
    line = file.read_text().splitlines().index("  language_model:") + 1
    with (
        pytest.raises(ConfigurationError, match=re.escape(f"{file}:{line}: attributes.language_model: it is broken")),
        blamed_on(checkpoints.laboratory.catalogue.sources[f"{NAME}__step_1"], "language_model"),
    ):
        raise ConfigurationError("it is broken")


@pytest.mark.parametrize(("smaller", "larger"), [("step_2", "step_10"), ("a2_b10", "a10_b2"), ("9", "a"), ("v1_2", "v1_10"), ("x", "x1")])
def test_numeric_order(smaller: str, larger: str):
    assert sorted([larger, smaller], key=numeric_order) == [smaller, larger]


# what is not there, or not whole


def test_a_checkpoint_is_taken_when_all_its_files_are_there(checkpoints: Set, tmp_path: Path):
    """As a copy that writes one file after another, and each by and by."""
    checkpoints.add("step-1")
    target = checkpoints.folder / "step-2"
    target.mkdir()
    names = ["config.json", "tokenizer.json", "model.safetensors"]
    for name in names:
        content = (checkpoints.laboratory.model / name).read_bytes()
        for share in (0.0, 0.5):
            (target / name).write_bytes(content[: int(len(content) * share)])
            assert checkpoints.sources == [f"{NAME}__step_1"], (name, share)
            (sentence,) = checkpoints.waiting
            assert sentence.startswith(f"{target} is not taken yet: {name} is "), sentence
        (target / name).write_bytes(content)
    assert checkpoints.sources == [f"{NAME}__step_1", f"{NAME}__step_2"]
    assert checkpoints.waiting == []


def test_a_sharded_checkpoint_waits_for_the_files_of_its_index(checkpoints: Set):
    checkpoints.add("step-1")
    folder = checkpoints.folder / "step-1"
    whole = folder / "model.safetensors"
    whole.rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00001-of-')
    assert (checkpoints.sources, checkpoints.waiting) == ([], [f"{folder} is not taken yet: {index.name} is incomplete"])
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    assert checkpoints.sources == []
    assert "lacks its weights, model-00002-of-00002.safetensors" in checkpoints.waiting[0]
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    assert checkpoints.sources == [f"{NAME}__step_1"]


def test_untrained_models_need_no_weights(checkpoints: Set):
    checkpoints.laboratory.declare(EACH | {"weights": "random"})
    checkpoints.add("step-1")
    (checkpoints.folder / "step-1" / "model.safetensors").unlink()
    assert checkpoints.sources == [f"{NAME}__step_1"]


def test_a_set_without_models_is_no_error_and_says_so(checkpoints: Set, saeens: Saeens):
    catalogue = checkpoints.laboratory.catalogue
    assert catalogue.broken == {}
    dg.Definitions.validate_loadable(catalogue.definitions())
    said = f"nothing matches {checkpoints.folder}/step-* yet"
    code, printed = saeens("experiments")
    assert code == 0
    assert f"source {NAME}: {said}" in printed.splitlines()
    for command in ("run", "plan", "status"):
        code, printed = saeens(command, NAME)
        assert code == 1
        assert printed == f"error: {NAME}: source {NAME} follows language models, and none is there: {said}\n"


def test_the_set_itself_is_no_experiment_and_no_source(checkpoints: Set, saeens: Saeens):
    checkpoints.add("step-1", "step-2")
    catalogue = checkpoints.laboratory.catalogue
    names = f"{NAME}__step_1, {NAME}__step_2"
    with pytest.raises(ConfigurationError, match=f"'{NAME}' follows a set of language models: name one of its experiments, {names}"):
        catalogue.experiment(NAME)
    with pytest.raises(ConfigurationError, match=f"'{NAME}' follows a set of language models: name one of its sources, {names}"):
        catalogue.source(NAME)


def test_run_and_status_of_a_set_are_those_of_all_its_experiments(checkpoints: Set, saeens: Saeens):
    checkpoints.add("step-1", "step-2")
    code, printed = saeens("run", NAME, "--select", "tokens")
    assert code == 0, printed
    for n in (1, 2):
        assert (checkpoints.laboratory.root / "sources" / f"{NAME}__step_{n}" / "tokens.zarr").is_dir()
    code, printed = saeens("status", NAME, "--format", "json")
    assert code == 0
    assert {row["asset"].split("/")[0] for row in json.loads(printed)} == {f"{NAME}__step_1", f"{NAME}__step_2"}


def test_set_changes_the_experiment_of_all_models(checkpoints: Set, saeens: Saeens):
    checkpoints.add("step-1", "step-2")
    catalogue = type(checkpoints.laboratory.catalogue).load_with(NAME, ["sae.k=2", "train_tokens=500"])
    assert [each.sae.k for each in catalogue.named(NAME)] == [2, 2]
    assert [each.train_tokens for each in catalogue.sources.values()] == [500, 500]
    code, printed = saeens("run", f"{NAME}__step_1", "--set", "train_tokens=500", "--dry-run")
    assert code == 2
    assert f"the source {NAME}, which {NAME}__step_2 uses, too" in printed


def test_a_checkpoint_that_disappears_leaves_the_catalogue_and_its_data_stay(checkpoints: Set, saeens: Saeens):
    checkpoints.add("step-1", "step-2")
    saeens("run", NAME, "--select", "tokens")
    shutil.rmtree(checkpoints.folder / "step-1")
    catalogue = checkpoints.laboratory.catalogue
    assert list(catalogue.experiments) == [f"{NAME}__step_2"]
    assert (checkpoints.laboratory.root / "sources" / f"{NAME}__step_1" / "tokens.zarr").is_dir()
    code, printed = saeens("status", NAME)
    assert code == 0, printed
    assert f"{NAME}__step_1" not in printed
    garbage = find_garbage(checkpoints.laboratory.root, declared(catalogue)).garbage
    assert [each.reason for each in garbage] == [f"there is no source {NAME}__step_1 any more"]


def test_gc_removes_nothing_of_a_set_of_which_no_model_is_there(checkpoints: Set, saeens: Saeens):
    checkpoints.add("step-1", "step-2")
    saeens("run", NAME, "--select", "tokens")
    checkpoints.folder.rename(checkpoints.folder.with_name("away"))
    code, printed = saeens("gc", "--delete")
    assert code == 2
    assert f"source {NAME}: nothing matches {checkpoints.folder}/step-* yet\nnothing is removed" in printed
    folders = checkpoints.laboratory.root / "sources"
    assert len(list(folders.iterdir())) == 2
    checkpoints.folder.with_name("away").rename(checkpoints.folder)
    shutil.rmtree(checkpoints.folder / "step-1")
    code, printed = saeens("gc", "--delete")
    assert code == 0, printed
    assert [folder.name for folder in folders.iterdir()] == [f"{NAME}__step_2"]


# wrong settings


def _hub(**changes: Any) -> dict[str, Any]:
    return {"language_model": HUB_NAME} | changes


WRONG: dict[str, tuple[dict[str, Any], str, str, str]] = {  # source, the beginning of the line, field, what is said
    "an unknown key": ({"language_model": {"each": "a/*", "every": "b"}}, "every:", "language_model.every", "unknown key; one of: each"),
    "no pattern": ({"language_model": {}}, "language_model:", "language_model.each", "required"),
    "an empty pattern": ({"language_model": {"each": ""}}, "each:", "language_model.each", "expected a text of at least 1 characters"),
    "a number": ({"language_model": 3}, "language_model:", "language_model", "expected a text: put it in quotes (found: 3)"),
    "a list": ({"language_model": ["a"]}, "language_model:", "language_model", "expected a text: put it in quotes"),
    "all folders": ({"language_model": {"each": "/**/step-*"}}, "each:", "language_model.each", "** is not possible here: write a *"),
    "revision of a folder": (EACH | {"revision": "main"}, "revision:", "revision", "only models on the hub have revisions"),
    "revisions of folders": (EACH | {"revisions": ["a"]}, "revisions:", "revisions", "only models on the hub have revisions, and "),
    "revisions of a folder": (
        {"language_model": "./model", "revisions": "follow"},
        "revisions:",
        "revisions",
        "only models on the hub have revisions",
    ),
    "revisions of a file": ({"language_model": "a.gguf", "revisions": ["a"]}, "revisions:", "revisions", "only models on the hub have"),
    "revisions of ours": (
        {"language_model": "builtin/reference", "revisions": ["a"]},
        "revisions:",
        "revisions",
        "only models on the hub have revisions, and builtin/reference is none: leave this out",
    ),
    "both": (_hub(revisions=["a"], revision="main"), "revisions:", "revisions", "revision is given, too: leave out one of the two"),
    "no revisions": (_hub(revisions=[]), "revisions:", "revisions", "expected a list of at least one revision, or follow (found: [])"),
    "one twice": (_hub(revisions=["a", "a"]), "revisions:", "revisions", "['a', 'a'] has duplicates"),
    "another word": (_hub(revisions="all"), "revisions:", "revisions", "expected 'follow' (found: 'all')"),
    "a revision that is a number": (_hub(revisions=[1000]), "- 1000", "revisions.0", "expected a text: put it in quotes (found: 1000)"),
    "revisions of one name": (
        _hub(revisions=["step-1", "step_1"]),
        "revisions:",
        "revisions",
        f"step-1 and step_1 both give the name {NAME}__step_1: rename one of them, or leave one out",
    ),
    "a revision without a name": (_hub(revisions=["--"]), "revisions:", "revisions", "'--' has no letter and no digit"),
    "a revision with a long name": (
        _hub(revisions=["x" * 60]),
        "revisions:",
        "revisions",
        f"{'x' * 60}: the name '{NAME}__{'x' * 57}'... has 66 characters, and at most 63 are possible",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_set_is_reported_with_path_line_and_field(empty: Laboratory, case: str):
    source, line, field, said = WRONG[case]
    file = empty.declare(source)
    catalogue = empty.catalogue
    (message,) = catalogue.broken.values()
    assert catalogue.experiments == catalogue.sources == {}
    number = max(i for i, each in enumerate(file.read_text().splitlines(), start=1) if each.strip().startswith(line))
    assert message.startswith(f"{file}:{number}: attributes.{field}: {said}"), message
    assert "\n" not in message
    dg.Definitions.validate_loadable(catalogue.definitions())


def test_two_folders_of_one_name_are_reported_and_the_rest_works_again_after_one_is_renamed(checkpoints: Set):
    checkpoints.add("step-1", "step-1.0", "step-1_0")
    (message,) = checkpoints.laboratory.catalogue.broken.values()
    assert f": attributes.language_model: step-1.0 and step-1_0 both give the name {NAME}__step_1_0" in message
    (checkpoints.folder / "step-1_0").rename(checkpoints.folder / "step-2")
    assert len(checkpoints.sources) == 3
    assert checkpoints.laboratory.catalogue.broken == {}


def test_an_experiment_whose_name_is_too_long_with_a_model_is_reported(checkpoints: Set):
    name = "e" * 56
    other = checkpoints.laboratory.write(experiment_file(("EnsembleExperiment", experiment_settings(name=name))), "other")
    checkpoints.add("step-1")
    catalogue = checkpoints.laboratory.catalogue
    line = other.read_text().splitlines().index(f"  name: {name}") + 1
    reason = f"the name '{name}__step_'... has 64 characters, and at most 63 are possible"
    assert catalogue.broken == {other: f"{other}:{line}: attributes.name: with a language model of source {NAME}: {reason}"}
    assert list(catalogue.experiments) == [f"{NAME}__step_1"]


def test_a_name_of_a_model_that_is_taken_is_reported(checkpoints: Set):
    taken = source_settings(checkpoints.laboratory.model, name=f"{NAME}__step_1")
    file = checkpoints.laboratory.write(experiment_file(("ActivationSource", taken)), "another")
    checkpoints.add("step-1")
    (message,) = checkpoints.laboratory.catalogue.broken.values()
    assert f": attributes.language_model: there already is a source called '{NAME}__step_1'" in message
    experiment = experiment_settings(name=f"{NAME}__step_1", source=f"{NAME}__step_2")
    file.write_text(experiment_file(("ActivationSource", taken | {"name": f"{NAME}__step_2"}), ("EnsembleExperiment", experiment)))
    (message,) = checkpoints.laboratory.catalogue.broken.values()
    assert f": attributes.source: there already is an experiment called '{NAME}__step_1'" in message


def test_the_json_schema_has_both_kinds_of_language_models():
    properties = SourceSettings.model_json_schema()["properties"]
    assert {json.dumps(each) for each in properties["language_model"]["oneOf"]} == {'{"type": "string"}', '{"$ref": "#/$defs/EachModel"}'}
    (kinds, _null) = properties["revisions"]["anyOf"]
    assert {each["type"] for each in kinds["oneOf"]} == {"array", "string"}
    assert isinstance(SourceSettings.model_validate(source_settings("x", **EACH)).language_model, EachModel)


# revisions on the hub


@pytest.fixture
def hub(fake_hub: FakeHub, tiny_model: Path) -> FakeHub:
    fake_hub.repositories[f"models/{HUB_NAME}"] = tiny_model
    fake_hub.tags[f"models/{HUB_NAME}"] = ["step1000", "step200"]
    return fake_hub


def test_listed_revisions_need_no_hub_when_files_are_read(hub: FakeHub, empty: Laboratory):
    empty.declare(_hub(revisions=["step1000", "step200"]))
    catalogue = empty.catalogue
    assert {name: each.revision for name, each in catalogue.sources.items()} == {
        f"{NAME}__step200": "step200",
        f"{NAME}__step1000": "step1000",
    }
    assert catalogue.sources[f"{NAME}__step200"] == SourceSettings.model_validate(
        source_settings(HUB_NAME, name=f"{NAME}__step200", revision="step200"), context={"file": empty.folder / NAME / "defs.yaml"}
    )
    assert hub.requests == []


def test_followed_revisions_are_those_of_the_last_answer_of_the_hub(hub: FakeHub, empty: Laboratory, saeens: Saeens):
    empty.declare(_hub(revisions="follow"))
    catalogue = empty.catalogue
    assert catalogue.followed[NAME].sources == []
    assert catalogue.followed[NAME].waiting == [
        f"the hub was not asked for the revisions of {HUB_NAME} yet: `saeens run` and the sensor new_models ask it"
    ]
    assert hub.requests == []
    code, printed = saeens("run", NAME, "--select", "tokens")
    assert code == 0, printed
    assert f"GET /api/models/{HUB_NAME}/refs" in hub.requests
    hub.requests.clear()
    assert list(empty.catalogue.sources) == [f"{NAME}__main", f"{NAME}__step200", f"{NAME}__step1000"]
    assert hub.requests == []
    for n in (200, 1000):
        assert (empty.root / "sources" / f"{NAME}__step{n}" / "tokens.zarr").is_dir()
    hub.tags[f"models/{HUB_NAME}"] = ["step1000"]
    ask_hub(HUB_NAME)
    assert list(empty.catalogue.sources) == [f"{NAME}__main", f"{NAME}__step1000"]


def test_without_the_hub_run_uses_known_revisions_and_says_so(
    hub: FakeHub, empty: Laboratory, saeens: Saeens, monkeypatch: pytest.MonkeyPatch
):
    empty.declare(_hub(revisions="follow"))
    saeens("run", NAME, "--select", "tokens")
    reach(monkeypatch, UNREACHABLE)
    code, printed = saeens("run", NAME, "--select", "tokens")
    assert code == 0, printed
    assert f"note: language model '{HUB_NAME}': the hub cannot be reached to list its revisions (" in printed
    assert printed.count("nothing to do") == 3


def test_a_model_that_the_hub_lacks_is_reported(hub: FakeHub):
    with pytest.raises(ConfigurationError, match="no such language model on the hub"):
        ask_hub("some-lab/other")


def test_a_damaged_file_of_revisions_is_reported_and_not_overwritten(hub: FakeHub, empty: Laboratory):
    empty.declare(_hub(revisions="follow"))
    empty.root.mkdir()
    for content in ("{", "[]", '{"a": 1}', '{"a": [1]}'):
        (empty.root / FILE).write_text(content)
        (message,) = empty.catalogue.broken.values()
        assert message.endswith(f"attributes.revisions: {empty.root / FILE} is damaged: remove it; the hub is asked again")
        with pytest.raises(ConfigurationError, match="is damaged"):
            ask_hub(HUB_NAME)
        assert (empty.root / FILE).read_text() == content


def test_revisions_are_kept_by_one_writer_at_a_time_and_gc_leaves_them(hub: FakeHub, empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    """Eight processes' worth of answers at once: none is lost."""
    monkeypatch.setattr(followed_models.hub, "list_revisions", lambda name: [f"{name}-1"])
    names = [f"lab/{i}" for i in range(8)]
    threads = [threading.Thread(target=ask_hub, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert followed_models.known_revisions() == {name: [f"{name}-1"] for name in names}
    inventory = find_garbage(empty.root, declared(empty.catalogue))
    assert (inventory.garbage, inventory.unknown) == ([], [])
    assert [path.name for path in empty.root.iterdir() if path.is_file()] == [FILE]


# the sensor


class Webserver:
    """Stands for the webserver: refuses what the guard refuses, and remembers reloads."""

    def __init__(self) -> None:
        self.reloads: list[dict[str, Any]] = []
        self.answer: dict[str, Any] = {"__typename": "WorkspaceLocationEntry"}
        self.status = 200
        guard, outer = Guard(lambda *_: None), self  # pyright: ignore[reportArgumentType]

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                """Nothing is printed."""

            def do_POST(self) -> None:
                headers = [(name.encode(), value.encode()) for name, value in self.headers.items()]
                scope = {"type": "http", "method": "POST", "path": self.path, "query_string": b"", "headers": headers}
                status = outer.status if guard.refusal(scope) is None and self.path == "/graphql" else 403
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.reloads += [asked["variables"]] if status == 200 else []
                body = json.dumps({"data": {"reloadRepositoryLocation": outer.answer}}).encode() if status == 200 else b"refused: no\n"
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def webserver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webserver]:
    webserver = Webserver()
    monkeypatch.setenv(ADDRESS_VARIABLE, webserver.url)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not asked
    yield webserver
    webserver.server.shutdown()
    webserver.server.server_close()


class Ticks:
    """Ticks of the sensor of one code location, which is loaded again by `load` alone."""

    def __init__(self, laboratory: Laboratory) -> None:
        self.laboratory, self.cursor = laboratory, None
        self.load()

    def load(self) -> None:
        self.sensor = new_models_sensor(self.laboratory.catalogue)

    def tick(self) -> str:
        """Return the reason of the tick."""
        with dg.DagsterInstance.ephemeral() as instance, dg.build_sensor_context(instance, cursor=self.cursor) as context:
            result = self.sensor(context)
            self.cursor = context.cursor
        assert isinstance(result, dg.SkipReason)
        assert result.skip_message
        return result.skip_message


def test_a_new_checkpoint_has_the_code_location_reloaded_once(checkpoints: Set, webserver: Webserver):
    checkpoints.add("step-1")
    ticks = Ticks(checkpoints.laboratory)
    assert ticks.tick() == f"No new language model. Followed: {NAME}, 1 in all."
    assert webserver.reloads == []
    checkpoints.add("step-10", "step-9")
    told = f"source {NAME}: new: {NAME}__step_9, {NAME}__step_10; "
    assert ticks.tick() == f"{told}the code location is being reloaded"
    assert ticks.tick() == f"{told}a reload of the code location was asked for"
    assert webserver.reloads == [{"location": "saeens"}]
    checkpoints.add("step-11")
    assert "is being reloaded" in ticks.tick()
    ticks.load()
    assert ticks.tick() == f"No new language model. Followed: {NAME}, 4 in all."
    shutil.rmtree(checkpoints.folder / "step-1")
    assert ticks.tick() == f"source {NAME}: gone: {NAME}__step_1; the code location is being reloaded"
    assert len(webserver.reloads) == 3


def test_a_reload_without_effect_is_asked_for_again_later(checkpoints: Set, webserver: Webserver, monkeypatch: pytest.MonkeyPatch):
    ticks = Ticks(checkpoints.laboratory)
    checkpoints.add("step-1")
    ticks.tick()
    monkeypatch.setattr(new_models, "RELOAD_SECONDS", 0)
    ticks.tick()
    assert len(webserver.reloads) == 2


def test_an_incomplete_checkpoint_is_told_and_not_reloaded(checkpoints: Set, webserver: Webserver):
    ticks = Ticks(checkpoints.laboratory)
    assert ticks.tick() == f"source {NAME}: nothing matches {checkpoints.folder}/step-* yet"
    checkpoints.add("step-1")
    (checkpoints.folder / "step-1" / "tokenizer.json").unlink()
    folder = checkpoints.folder / "step-1"
    assert ticks.tick() == f"source {NAME}: {folder} is not taken yet: tokenizer.json is missing or incomplete"
    assert webserver.reloads == []


def test_models_of_one_name_are_told_and_not_reloaded(checkpoints: Set, webserver: Webserver):
    checkpoints.add("step-1")
    ticks = Ticks(checkpoints.laboratory)
    checkpoints.add("step_1")
    checkpoints.laboratory.declare({"language_model": {"each": "checkpoints/step*"}})
    ticks.load()
    assert ticks.tick().startswith(f"source {NAME}: step-1 and step_1 both give the name {NAME}__step_1")
    assert webserver.reloads == []
    (checkpoints.folder / "step_1").rename(checkpoints.folder / "step_2")
    assert "the code location is being reloaded" in ticks.tick()


def test_without_a_webserver_the_tick_says_what_to_do(checkpoints: Set, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    ticks = Ticks(checkpoints.laboratory)
    checkpoints.add("step-1")
    assert ticks.tick() == (
        f"source {NAME}: new: {NAME}__step_1; reload the code location in the UI. `saeens ui` does so by itself, and other webservers with "
        "SAEENS_UI=ADDRESS"
    )
    monkeypatch.setenv(ADDRESS_VARIABLE, "http://127.0.0.1:9")
    assert "the webserver at http://127.0.0.1:9 does not reload the code location (ConnectionRefusedError: " in ticks.tick()


def test_an_answer_of_the_webserver_that_is_no_reload_is_told(checkpoints: Set, webserver: Webserver):
    ticks = Ticks(checkpoints.laboratory)
    checkpoints.add("step-1")
    webserver.answer = {"__typename": "RepositoryLocationNotFound"}
    assert "does not reload the code location (RepositoryLocationNotFound): reload it in the UI" in ticks.tick()
    webserver.answer = {"__typename": "PythonError", "message": "no such module"}
    assert "(no such module)" in ticks.tick()
    webserver.status = 403
    assert "(status 403: refused: no)" in ticks.tick()
    webserver.status, webserver.answer = 200, {"__typename": "WorkspaceLocationEntry"}
    assert "the code location is being reloaded" in ticks.tick()


def test_the_sensor_asks_the_hub_now_and_then_and_tells_once_per_tick_that_it_is_out_of_reach(
    hub: FakeHub, empty: Laboratory, webserver: Webserver, monkeypatch: pytest.MonkeyPatch
):
    empty.declare(_hub(revisions="follow"))
    ticks = Ticks(empty)
    reach(monkeypatch, UNREACHABLE)
    for _ in range(2):
        told = ticks.tick()
        assert told.count("the hub cannot be reached to list its revisions") == 1
        assert "\n" not in told
    reach(monkeypatch, hub.url)
    assert "the hub cannot be reached" in ticks.tick(), "the hub is not asked in every tick"
    assert hub.requests == []
    monkeypatch.setattr(new_models, "HUB_SECONDS", 0)
    told = ticks.tick()
    assert told == f"source {NAME}: new: {NAME}__main, {NAME}__step200, {NAME}__step1000; the code location is being reloaded"
    reach(monkeypatch, UNREACHABLE)
    ticks.load()
    assert "the hub cannot be reached" in ticks.tick()
    assert list(empty.catalogue.sources) == [f"{NAME}__main", f"{NAME}__step200", f"{NAME}__step1000"]
    assert len(webserver.reloads) == 1


def test_the_sensor_is_there_for_followed_sets_alone(checkpoints: Set):
    def sensors() -> set[str]:
        return {sensor.name for sensor in checkpoints.laboratory.catalogue.definitions().sensors or ()}

    assert "new_models" in sensors()
    checkpoints.laboratory.declare()
    assert "new_models" not in sensors()


def test_revisions_that_cannot_be_kept_are_a_line(hub: FakeHub, empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(followed_models, "write_atomically", refuse)
    with pytest.raises(SaeensError, match=f"{FILE} cannot be written .Permission denied."):
        ask_hub(HUB_NAME)


def test_followed_layers_are_partitions_of_each_source(checkpoints: Set):
    checkpoints.add("step-1", "step-2")
    catalogue = checkpoints.laboratory.catalogue
    assert {source.layers[0] for source in catalogue.sources.values()} == {LAYER}
    specs = catalogue.definitions().resolve_all_asset_specs()
    names = {spec.partitions_def.name for spec in specs if isinstance(spec.partitions_def, dg.DynamicPartitionsDefinition)}
    assert names == {f"{NAME}__step_1_layers", f"{NAME}__step_2_layers"}
