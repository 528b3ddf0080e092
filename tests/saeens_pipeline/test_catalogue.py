"""Experiment files: errors give path, line, field and allowed values, and affect no other file."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from tiny_experiment import EXPERIMENT, NAME, Laboratory, experiment_file, experiment_settings, source_settings

from saeens_pipeline.assets.baselines.registry import names_of
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.settings.files import FOLDERS_VARIABLE

SAE, TRAINING = EXPERIMENT["sae"], EXPERIMENT["training"]


def _text(source: dict[str, Any] | None = None, /, **experiment: Any) -> str:
    return experiment_file(
        ("ActivationSource", source_settings("some/model", **(source or {}))), ("EnsembleExperiment", experiment_settings(**experiment))
    )


@pytest.fixture
def laboratory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    """One sound folder, called `sound`."""
    laboratory = Laboratory(tmp_path / "model", tmp_path / "defs", tmp_path / "data")
    laboratory.activate(monkeypatch)
    laboratory.write(_text({"name": "sound"}, name="sound", source="sound"), "sound")
    return laboratory


def _message(laboratory: Laboratory, text: str) -> tuple[Path, str]:
    """Return the error of a file; a valid one next to it stays loaded."""
    file = laboratory.write(text)
    catalogue = laboratory.catalogue
    assert "sound" in catalogue.sources
    assert "sound" in catalogue.experiments
    dg.Definitions.validate_loadable(catalogue.definitions())
    (message,) = catalogue.broken.values()
    return file, message


def _line(text: str, start: str) -> int:
    """The line that begins with this, indented or not, counted from 1: the last of several."""
    return max(number for number, line in enumerate(text.splitlines(), start=1) if line.strip().startswith(start))


def test_valid_files_are_loaded(laboratory: Laboratory):
    laboratory.write(_text())
    catalogue = laboratory.catalogue
    assert sorted(catalogue.sources) == sorted(catalogue.experiments) == ["sound", NAME]
    assert catalogue.broken == {}
    assert catalogue.experiment(NAME).sae.model_dump(exclude_unset=True) == SAE
    assert catalogue.sources[NAME].train_tokens == 600


def test_folders_without_an_experiment_file_are_ignored(laboratory: Laboratory):
    (laboratory.folder / "notes").mkdir()
    (laboratory.folder / "README.md").write_text("not a folder")
    assert sorted(laboratory.catalogue.experiments) == ["sound"]


WRONG_VALUES = {  # text, where it is wrong, field, what was found, what is allowed
    "dtype": (_text({"dtype": "float8"}), "dtype:", "dtype", "'float8'", ["float16", "bfloat16", "float32"]),
    "packing": (_text({"packing": "tight"}), "packing:", "packing", "'tight'", ["concatenate", "document"]),
    "weights": (_text({"weights": "some"}), "weights:", "weights", "'some'", ["trained", "random"]),
    "drop": (_text({"drop": ["last"]}), "- last", "drop.0", "'last'", ["special", "padding", "first"]),
    "corpus": (_text({"corpus": "wikipedia"}), "corpus:", "corpus", "'wikipedia'", ["builtin/installed_packages"]),
    "tokens in words": (_text({"train_tokens": "many"}), "train_tokens:", "train_tokens", "'many'", ["integer"]),
    "windows of one stream": (
        _text({"windows_per_document": 2, "packing": "concatenate"}),
        "windows_per_document:",
        "windows_per_document",
        "2",
        ["packing: document"],
    ),
    "windows without packing": (
        _text({"windows_per_document": 2, "packing": None}),
        "windows_per_document:",
        "windows_per_document",
        "2",
        ["packing: document"],
    ),
    "no windows": (_text({"windows_per_document": 0}), "windows_per_document:", "windows_per_document", "0", ["greater than 0"]),
    "zero tokens": (_text({"test_tokens": 0}), "test_tokens:", "test_tokens", "0", ["greater than 0"]),
    "a negative layer": (_text({"layers": [-1]}), "- -1", "layers.0", "-1", ["greater than or equal to 0"]),
    "a layer twice": (_text({"layers": [1, 1]}), "layers:", "layers", "[1, 1]", ["duplicates"]),
    "name": (_text(name="Tiny-1"), "name: Tiny", "name", "'Tiny-1'", ["lower-case letters, digits and _"]),
    "architecture": (
        _text(sae={"architecture": "p_anneal", "expansion": 2}),
        "architecture:",
        "sae.architecture",
        "'p_anneal'",
        ["jumprelu", "standard", "topk"],
    ),
    "no architecture": (_text(sae={"expansion": 2}), "sae:", "sae.architecture", "missing", ["jumprelu", "standard", "topk"]),
    "k": (_text(sae=SAE | {"k": "many"}), "k:", "sae.k", "'many'", ["integer"]),
    "no k": (_text(sae={"architecture": "topk", "expansion": 2}), "sae:", "sae.k", "", ["required"]),
    "two widths": (_text(sae=SAE | {"d_sae": 8}), "sae:", "sae", "", ["expansion", "d_sae"]),
    "learning rate": (_text(training={"learning_rate": -1}), "learning_rate:", "training.learning_rate", "-1", ["greater than 0"]),
    "what follows": (_text(training={"total_tokens": 5}), "training:", "training", "total_tokens", ["cannot be set"]),
    "seeds": (_text(ensemble={"members": 2, "seeds": [3, 3]}), "seeds:", "ensemble.seeds", "[3, 3]", ["duplicates"]),
    "no members": (_text(ensemble={"members": 0, "seeds": [3]}), "members:", "ensemble.members", "0", ["greater than or equal to 1"]),
    "baseline": (_text(baselines=["expanded", "wide"]), "- wide", "baselines.1", "'wide'", ["expanded", "expanded_l0_matched"]),
    "a baseline twice": (_text(baselines=["expanded", "expanded"]), "baselines:", "baselines", "expanded", ["duplicates"]),
    "table": (_text(evaluations=["speed"]), "- speed", "evaluations.0", "'speed'", ["reconstruction", "stability", "cost"]),
    "residuals": (_text(keep_residuals="some"), "keep_residuals:", "keep_residuals", "'some'", ["last", "all", "none"]),
    "automation": (_text(automation="sometimes"), "automation:", "automation", "'sometimes'", ["on", "off"]),
    "expanded sizes": (_text(expanded_sizes=[9]), "type:|expanded_sizes:", "", "expanded_sizes: 9", ["3 members"]),
    "no expanded sizes": (_text(expanded_sizes=[]), "expanded_sizes:", "expanded_sizes", "[]", []),
    "L0 that cannot be matched": (
        _text(sae={"architecture": "standard", "expansion": 2}),
        "- expanded_l0_matched",
        "baselines.1",
        "'standard'",
        ["topk"],
    ),
    "no name": (_text(name=None), "attributes:", "name", "", ["required"]),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_a_wrong_value_is_reported_with_path_line_field_and_allowed_values(laboratory: Laboratory, case: str):
    text, at, field, found, allowed = WRONG_VALUES[case]
    file, message = _message(laboratory, text)
    lines = {_line(text, start) + below for start in at.split("|") for below in (0, 1)}  # a missing field's parent has no value of its own
    assert any(f"{file}:{line}: " in message for line in lines), message
    assert ": " + f"attributes.{field}".rstrip(".") + ": " in message
    assert found in message
    for each in allowed:
        assert each in message


UNKNOWN_KEYS = {
    "of a source": (_text({"colour": "red"}), "colour:", "attributes.colour", "'red'", "context_length"),
    "of freshness": (_text(freshness={"fail_days": 7, "days": 3}), "days: 3", "attributes.freshness.days", "3", "warn_days"),
    "of an experiment": (_text(members=3), "members: 3", "attributes.members", "3", "ensemble"),
    "of an SAE": (_text(sae=SAE | {"topk": 7}), "topk:", "attributes.sae.topk", "7", "k_aux"),
    "of the training": (_text(training=TRAINING | {"lr": 0.5}), "lr:", "attributes.training.lr", "0.5", "learning_rate"),
    "of the ensemble": (_text(ensemble=EXPERIMENT["ensemble"] | {"size": 5}), "size:", "attributes.ensemble.size", "5", "members"),
}


@pytest.mark.parametrize("where", UNKNOWN_KEYS)
def test_an_unknown_key_is_reported_with_path_line_and_field(laboratory: Laboratory, where: str):
    text, at, field, found, _ = UNKNOWN_KEYS[where]
    file, message = _message(laboratory, text)
    assert f"{file}:{_line(text, at)}: {field}: " in message
    assert f"found: {found}" in message


@pytest.mark.parametrize("where", UNKNOWN_KEYS)
def test_an_unknown_key_is_reported_with_the_known_ones(laboratory: Laboratory, where: str):
    text, _, _, _, allowed = UNKNOWN_KEYS[where]
    assert allowed in _message(laboratory, text)[1]


def test_all_wrong_fields_of_a_document_are_reported_together(laboratory: Laboratory):
    text = _text({"dtype": "float8", "layers": []})
    file, message = _message(laboratory, text)
    assert {line.split(": ")[0] for line in message.splitlines()} == {f"{file}:{_line(text, 'dtype:')}", f"{file}:{_line(text, 'layers:')}"}


def test_an_unknown_source_is_reported_with_path_line_and_the_known_ones(laboratory: Laboratory):
    text = _text(source="elsewhere")
    file, message = _message(laboratory, text)
    assert f"{file}:{_line(text, 'source:')}: attributes.source: " in message
    assert "'elsewhere'" in message
    assert f"sound, {NAME}" in message


@pytest.mark.parametrize("what", ["source", "experiment"])
def test_a_duplicate_name_is_reported_with_path_and_line_and_the_first_file_is_kept(laboratory: Laboratory, what: str):
    text = _text({"name": "sound"}) if what == "source" else _text(name="sound", source="sound")
    file, message = _message(laboratory, text)
    line = next(number for number, line in enumerate(text.splitlines(), start=1) if line.strip() == "name: sound")
    assert f"{what} called 'sound'" in message
    assert f"{file}:{line}: attributes.name: " in message
    assert laboratory.catalogue.sources["sound"].language_model == "some/model"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (_text().replace("hook: resid_post", "hook: [resid_post"), _line(_text(), "hook:") + 1),
        (_text().replace("  hook: resid_post", "\thook: resid_post"), _line(_text(), "hook:")),
        (_text().replace("hook: resid_post", "hook: 'resid_post"), _line(_text(), "hook:")),
    ],
    ids=["an open bracket", "a tab", "an open quote"],
)
def test_invalid_yaml_is_reported_with_path_and_line(laboratory: Laboratory, text: str, line: int):
    file, message = _message(laboratory, text)
    assert str(file) in message
    assert f":{line}" in message or f"line {line}" in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a list\n",
        "type: saeens_pipeline.components.ActivationSource\n",
        _text().replace("ActivationSource", "Source"),
        _text().replace("saeens_pipeline", "another_package"),
    ],
    ids=["nothing", "a list", "no attributes", "an unknown type", "an unknown package"],
)
def test_a_file_that_is_no_experiment_file_is_reported_with_its_path(laboratory: Laboratory, text: str):
    file, message = _message(laboratory, text)
    assert message.startswith(str(file))
    assert len(message) > len(f"{file}: ") + 10


@pytest.mark.parametrize("text", [_text().replace("ActivationSource", "Source"), _text().replace("saeens_pipeline", "another_package")])
def test_an_unknown_component_type_is_reported_with_the_known_ones(laboratory: Laboratory, text: str):
    _, message = _message(laboratory, text)
    assert "saeens_pipeline.components.ActivationSource" in message
    assert "saeens_pipeline.components.EnsembleExperiment" in message


@pytest.mark.parametrize(
    "text",
    [
        _text().replace("name: tiny", "name: !unknown tiny"),
        _text().replace("name: tiny", "[a]: 1"),
        "type: saeens_pipeline.components.ActivationSource\nattributes: &a {source: *a}\n",
        _text() + "\n  training: !!python/object/apply:os.getcwd []\n",
    ],
    ids=["a tag", "a list as key", "a loop", "an object"],
)
def test_unusual_yaml_is_refused_and_affects_no_other_file(laboratory: Laboratory, text: str):
    file, message = _message(laboratory, text)
    assert message.startswith(str(file))


def _attributes(*lines: str, kind: str = "EnsembleExperiment") -> str:
    return "\n".join([f"type: saeens_pipeline.components.{kind}", "attributes:", *(f"  {line}" for line in lines), ""])


BOMB = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20))]
ODD_FILES: dict[str, tuple[bytes, int, str]] = {  # content, line, message
    "a date that does not exist": (_attributes("name: 2024-02-30").encode(), 3, "the name '2024-02-30' may hold"),
    "a tag whose value does not fit": (_attributes("name: x", "source: !!bool maybe").encode(), 4, "'maybe' cannot be read as bool"),
    "too many digits": (_attributes(f"name: {'9' * 4301}").encode(), 3, "has more than 18 digits"),
    "an alias bomb": (_attributes(*BOMB).encode(), 7, "more than 20,000 values, with aliases written out"),
    "deep nesting": (_attributes("name: " + "[" * 5000).encode(), 3, "more than 30 levels of nesting"),
    "a value that contains itself": (_attributes("name: &x", "  y: *x").encode(), 3, "a value contains itself"),
    "not UTF-8": (_attributes("name: x").encode() + b"  # caf\xe9", 4, "byte 81 is not UTF-8: save the file as UTF-8"),
    "a control character": (_attributes("name: x\0").encode(), 3, "the control character '\\x00' is not allowed"),
    "an empty file": (b"", 1, "the file is empty"),
    "only comments": (b"# nothing\n", 1, "the file is empty"),
    "a long value": (_attributes(f"name: {'x-' * 2000}").encode(), 3, "x-x ...' may hold"),
    "too large": (b"#" * 200_001, 1, "the file has 200,001 bytes, and an experiment file has at most 200,000"),
}


@pytest.mark.parametrize("case", ODD_FILES)
def test_an_odd_file_is_answered_with_its_line_soon_and_takes_no_other_down(laboratory: Laboratory, case: str):
    content, line, said = ODD_FILES[case]
    file = laboratory.write("", "odd")
    file.write_bytes(content)
    began = time.process_time()
    catalogue = laboratory.catalogue
    assert time.process_time() - began < 2
    assert "sound" in catalogue.experiments
    (message,) = catalogue.broken.values()
    found = [each for each in message.splitlines() if said in each]
    assert found, message
    assert re.match(rf"{re.escape(str(file))}:{line}: ", found[0]), found
    assert all(len(each) < 2000 for each in message.splitlines())


def test_a_byte_order_mark_is_passed_over(laboratory: Laboratory):
    file = laboratory.write(_text())
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert NAME in laboratory.catalogue.experiments


def test_files_that_end_in_yml_are_read(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FOLDERS_VARIABLE, str(laboratory.folder))
    text = _text().replace("name: tiny", "name: other").replace("source: tiny", "source: other")
    (laboratory.folder / "other.yml").write_text(text)
    (laboratory.folder / "folder").mkdir()
    (laboratory.folder / "folder" / "defs.yml").write_text(text.replace("other", "third"))
    assert sorted(laboratory.catalogue.experiments) == ["other", "sound", "third"]


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"sae": {"architcture": "topk", "expansion": 2, "k": 4}}, "sae.architcture: unknown key; .*; did you mean architecture"),
        ({"sae": SAE | {"expansoin": 3, "expansion": None}}, "sae.expansoin: unknown key; .*; did you mean expansion"),
        ({"ensemble": {"membres": 3, "seeds": [1]}}, "ensemble.membres: unknown key; .*; did you mean members"),
        ({"nmae": "x", "name": None}, "nmae: unknown key; .*; did you mean name"),
    ],
)
def test_a_misspelt_key_is_named_first(laboratory: Laboratory, changes: dict[str, Any], first: str):
    _, message = _message(laboratory, _text(**changes))
    assert re.search(first, message.splitlines()[0]), message


def test_a_key_given_twice_is_named_before_what_is_missing(laboratory: Laboratory):
    text = _text(name=None) + "  source: other\n"
    file, message = _message(laboratory, text)
    assert message == f"{file}:{_line(text, 'source: other')}: 'source' is given twice"


@pytest.mark.parametrize(("given", "hint"), [("1e6", "write 1_000_000"), ("1.5E3", "write 1_500")])
def test_a_number_that_yaml_reads_as_text_is_answered_with_how_to_write_it(laboratory: Laboratory, given: str, hint: str):
    text = _text({"train_tokens": 12345}).replace("12345", given)
    file, message = _message(laboratory, text)
    assert message == (
        f"{file}:{_line(text, 'train_tokens')}: attributes.train_tokens: expected a whole number (an integer): {hint} (found: '{given}')"
    )


def test_names_have_at_most_63_characters_with_the_suffix_of_a_sweep(laboratory: Laboratory):
    longest = "n" * 63
    laboratory.write(_text({"name": longest}, name=longest, source=longest))
    assert longest in laboratory.catalogue.experiments
    dg.Definitions.validate_loadable(laboratory.catalogue.definitions())
    text = _text(name=longest + "n")
    assert "has 64 characters, and at most 63 are possible" in _message(laboratory, text)[1]
    text = _text(name="n" * 60, sweep={"k": [4]})
    file, message = _message(laboratory, text)
    assert f"{file}:{_line(text, '- 4')}: attributes.sweep.k.0: the name" in message
    assert "has 65 characters" in message


@pytest.mark.parametrize(
    ("sae", "baselines"),
    [
        ({"architecture": "topk", "k": 4}, ["expanded", "expanded_l0_matched"]),
        ({"architecture": "standard"}, ["expanded"]),
        ({"architecture": "jumprelu"}, ["expanded"]),
        ({"architecture": "gated"}, ["expanded"]),
        ({"architecture": "gated", "l0_target": 4}, ["expanded", "expanded_l0_matched"]),
    ],
)
def test_default_baselines_fit_the_architecture(laboratory: Laboratory, sae: dict[str, Any], baselines: list[str]):
    laboratory.write(_text(sae=sae | {"expansion": 2}, baselines=None))
    assert laboratory.catalogue.broken == {}
    assert names_of(laboratory.catalogue.experiment(NAME)) == baselines


def test_a_schedule_of_a_date_that_does_not_exist_is_refused(laboratory: Laboratory):
    assert "not a cron expression" in _message(laboratory, _text(schedule="0 0 30 2 *"))[1]


def test_an_unknown_source_is_reported_although_a_source_has_the_experiments_name(laboratory: Laboratory):
    laboratory.write(experiment_file(("EnsembleExperiment", experiment_settings(name="sound_too", source="elsewhere"))), "first")
    laboratory.write(experiment_file(("ActivationSource", source_settings("some/model", name="sound_too"))), "second")
    (message,) = laboratory.catalogue.broken.values()
    assert "there is no source 'elsewhere'" in message


@pytest.mark.parametrize(
    ("changes", "line", "field", "said"),
    [
        (
            {"sae": {"architecture": "standard", "expansion": 2}, "baselines": ["matching_pursuit"]},
            "- matching_pursuit",
            ".baselines.0",
            "matching_pursuit has the L0 of all members: architecture 'standard' sets its L0 through a sparsity coefficient",
        ),
        (
            {"sae": {"architecture": "matching_pursuit", "expansion": 2, "max_iterations": 4}, "baselines": ["encoder_frozen"]},
            "- encoder_frozen",
            ".baselines.0",
            "encoder_frozen keeps W_enc, and matching_pursuit has no W_enc of its own: leave it out, or take decoder_frozen",
        ),
        ({"baselines": ["mp"]}, "- mp", ".baselines.0", "expected 'expanded', 'expanded_l0_matched', 'compute_matched'"),
        (
            {"baselines": ["expanded"], "baseline_training": {"compute_matched": {}}},
            "compute_matched:",
            ".baseline_training.compute_matched",
            "compute_matched is not among baselines: add it there, or leave this out",
        ),
        (
            {
                "baselines": ["compute_matched"],
                "ensemble": {"members": 2, "seeds": [1], "specialised": [{"member": 2, "documents": {"language": ["python"]}}]},
            },
            "- compute_matched",
            ".baselines.0",
            "compute_matched sees every row once per member, and specialised members with documents see fewer: leave it out",
        ),
        (
            {"sae": [{"architecture": "topk", "expansion": 2, "k": 4}] * 3, "baselines": ["compute_matched"]},
            "- compute_matched",
            ".baselines.0",
            "compute_matched is not defined where sae is a list",
        ),
        (
            {"baselines": ["expanded"], "baseline_training": {"expanded": {"batch": 5}}},
            "batch:",
            ".baseline_training.expanded.batch",
            "unknown key; one of: learning_rate, ",
        ),
        (
            {"training": {"learning_rate_warmup_fraction": 0.6}, "baselines": ["expanded"]}
            | {"baseline_training": {"expanded": {"learning_rate_decay_fraction": 0.6}}},
            "expanded:",
            ".baseline_training.expanded",
            "together with training: learning_rate_warmup_fraction and learning_rate_decay_fraction overlap",
        ),
    ],
)
def test_wrong_baselines_are_reported(laboratory: Laboratory, changes: dict[str, Any], line: str, field: str, said: str):
    text = _text(**changes)
    file, message = _message(laboratory, text)
    assert message.startswith(f"{file}:{_line(text, line)}: attributes{field}: {said}")


@pytest.mark.filterwarnings("ignore")  # what is beta or deprecated inside Dagster
def test_dagsters_component_loader_builds_the_same_assets(laboratory: Laboratory):
    import importlib

    from saeens_pipeline import defs

    tree = dg.ComponentTree.from_module(importlib.import_module(f"{defs.__name__}.sound"), laboratory.folder)
    made = {key for assets in tree.build_defs().assets or [] if isinstance(assets, dg.AssetsDefinition) for key in assets.keys}
    assert made == set(laboratory.catalogue.definitions().resolve_all_asset_keys()) - {
        dg.AssetKey("leaderboard"),
        dg.AssetKey(["leaderboard", "report"]),
    }


def test_a_requested_broken_experiment_reports_its_errors(laboratory: Laboratory):
    laboratory.write(_text(sae=SAE | {"k": -1}))
    with pytest.raises(ConfigurationError) as error:
        laboratory.catalogue.experiment(NAME)
    assert f"experiment '{NAME}' is left out for this; there are: sound" in str(error.value)
    assert "attributes.sae.k: " in str(error.value)


def test_a_corrected_file_is_read_again(laboratory: Laboratory):
    laboratory.write(_text(sae=SAE | {"k": -1}))
    assert NAME not in laboratory.catalogue.experiments
    laboratory.write(_text())
    assert laboratory.catalogue.experiment(NAME).sae.model_dump(exclude_unset=True) == SAE


def test_the_shipped_experiments_are_valid():
    from saeens_pipeline.orchestration.catalogue import Catalogue

    catalogue = Catalogue.load()
    assert catalogue.broken == {}
    assert "quickstart" in catalogue.experiments
    assert catalogue.experiment("quickstart").source == "quickstart"


# folders of one's own


@pytest.fixture
def own(laboratory: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that SAEENS_EXPERIMENTS names."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("SAEENS_EXPERIMENTS", str(folder))
    return folder


def test_files_of_user_folders_are_read_together_with_the_shipped_ones(laboratory: Laboratory, own: Path):
    (own / "mine.yaml").write_text(_text())
    (own / "folder").mkdir()
    (own / "folder" / "defs.yaml").write_text(_text({"name": "other"}, name="other", source="other"))
    (own / "folder" / "notes.yaml").write_text("no experiment")
    (own / "README.md").write_text("no experiment")
    catalogue = laboratory.catalogue
    assert catalogue.broken == {}
    assert sorted(catalogue.sources) == sorted(catalogue.experiments) == ["other", "sound", NAME]


def test_several_user_folders_are_read_once_each(laboratory: Laboratory, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    more = tmp_path / "more"
    more.mkdir()
    monkeypatch.setenv("SAEENS_EXPERIMENTS", os.pathsep.join([str(own), str(more), f"{own}/"]))
    (own / "mine.yaml").write_text(_text())
    (more / "theirs.yaml").write_text(_text({"name": "other"}, name="other", source="other"))
    catalogue = laboratory.catalogue
    assert catalogue.broken == {}
    assert sorted(catalogue.experiments) == ["other", "sound", NAME]


def test_an_experiment_and_its_source_can_be_in_different_folders(laboratory: Laboratory, own: Path):
    (own / "mine.yaml").write_text(experiment_file(("EnsembleExperiment", experiment_settings(name="mine", source="sound"))))
    assert laboratory.catalogue.experiment("mine").source == "sound"


def test_a_missing_user_folder_is_reported_with_its_path(laboratory: Laboratory, own: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_EXPERIMENTS", f"{own}{os.pathsep}{own}/nowhere")
    with pytest.raises(ConfigurationError, match=f"SAEENS_EXPERIMENTS: there is no folder {own}/nowhere"):
        laboratory.catalogue  # noqa: B018


def test_an_empty_variable_names_no_folder(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_EXPERIMENTS", "")
    assert sorted(laboratory.catalogue.experiments) == ["sound"]


def test_a_shipped_name_is_refused_in_a_user_file_with_path_and_line(laboratory: Laboratory, own: Path):
    text = _text({"name": "sound"})
    (own / "mine.yaml").write_text(text)
    (message,) = laboratory.catalogue.broken.values()
    assert f"{own / 'mine.yaml'}:{_line(text, 'name: sound')}: attributes.name: there already is a source called 'sound'" in message
    assert laboratory.catalogue.experiment("sound")


def test_a_broken_user_file_is_named_by_its_experiment(laboratory: Laboratory, own: Path):
    (own / "mine.yaml").write_text(_text(sae=SAE | {"k": -1}))
    with pytest.raises(ConfigurationError, match="experiment 'mine' is left out for this; there are: sound"):
        laboratory.catalogue.experiment("mine")


# what Dagster shows of broken files


def test_a_broken_file_is_an_asset_that_fails_with_its_errors(laboratory: Laboratory):
    text = _text(sae=SAE | {"k": "many"})
    file = laboratory.write(text)
    definitions = laboratory.catalogue.definitions()
    key = dg.AssetKey(["broken_experiments", NAME])
    (spec,) = [spec for spec in definitions.resolve_all_asset_specs() if spec.key == key]
    problem = f"{file}:{_line(text, 'k:')}: attributes.sae.k: "
    assert spec.group_name == "broken_experiments"
    assert problem in (spec.description or "")
    job = definitions.resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance, pytest.raises(ConfigurationError) as error:
        job.execute_in_process(instance=instance, asset_selection=[key])
    assert problem in str(error.value)


def test_every_broken_file_has_an_asset_of_its_own(laboratory: Laboratory, own: Path):
    laboratory.write("", "mine")
    for name in ("mine.yaml", "My-own file.yaml"):
        (own / name).write_text("")
    definitions = laboratory.catalogue.definitions()
    dg.Definitions.validate_loadable(definitions)
    broken = {spec.key.to_user_string() for spec in definitions.resolve_all_asset_specs() if spec.group_name == "broken_experiments"}
    assert broken == {f"broken_experiments/{name}" for name in ("mine", "mine__2", "my_own_file")}


def test_the_group_of_broken_files_is_refused_as_an_experiment_name(laboratory: Laboratory):
    _, message = _message(laboratory, _text(name="broken_experiments"))
    assert "'broken_experiments' would collide with a group of the asset graph" in message
