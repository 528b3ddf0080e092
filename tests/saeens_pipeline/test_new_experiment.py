"""`saeens new`: a file that loads and runs as it is, with the model's own sizes, never over another file."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_experiment import NAME, Laboratory
from tiny_models import CONTEXT_LENGTH, D_MODEL, N_LAYERS, edit_config

from saeens_models.architectures import architectures
from saeens_pipeline import cli
from saeens_pipeline.cli.new_experiment import corpus_of, new_experiment, parse_layers
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.gguf_models import SMOLLM2
from saeens_pipeline.settings import ExperimentSettings, SourceSettings
from saeens_pipeline.settings.experiments import EnsembleSettings


@pytest.fixture
def own(empty: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that SAEENS_EXPERIMENTS names."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("SAEENS_EXPERIMENTS", str(folder))
    return folder


def test_the_written_file_is_valid_and_fits_the_models_dimensions(empty: Laboratory, own: Path):
    written = new_experiment("mine", str(empty.model), [2, 0])
    assert written.path == own / "mine.yaml"
    assert written.is_read
    catalogue = empty.catalogue
    assert catalogue.broken == {}
    source, experiment = catalogue.sources["mine"], catalogue.experiment("mine")
    assert source.language_model == str(empty.model)
    assert source.layers == [0, 2]
    assert source.context_length == CONTEXT_LENGTH
    assert (source.packing, source.drop, source.weights) == ("concatenate", ["first"], "trained")
    assert experiment.source == "mine"
    assert (experiment.automation, experiment.keep_residuals) == ("off", "last")
    assert experiment.sae.model_dump(exclude_unset=True) == {"architecture": "topk", "expansion": 8, "k": 1}
    text = written.path.read_text()
    assert f"gpt_neox, {N_LAYERS} layers, d_in {D_MODEL}, context {CONTEXT_LENGTH}" in text
    assert f"of 0 to {N_LAYERS - 1}" in text
    assert f"architecture: topk # one of {', '.join(architectures())}\n" in text
    assert "``" not in text


def test_the_written_file_runs_at_a_smaller_size(empty: Laboratory, tmp_path: Path):
    path = new_experiment("mine", str(empty.model), [1], tmp_path / "mine.yaml").path
    text = path.read_text().replace("1_000_000", "300").replace("50_000", "100").replace("members: 8", "members: 2")
    empty.write(text.replace("mine", NAME))  # in place of the tiny experiment
    empty.run(select=["bagging_ensemble"])
    assert empty.artefact("bagging/bagging_ensemble", 42)
    assert empty.artefact("activations", layer=1).provenance["statistics"]["train"]["rows"] == 300


def test_prose_is_proposed_for_smollm2():
    assert corpus_of(None, SMOLLM2) == "builtin/prose"


@pytest.mark.parametrize(
    ("model", "corpus", "expected"),
    [
        ("builtin/reference", None, "builtin/installed_packages"),
        (None, None, {"files": "texts/*.jsonl", "text_field": "text"}),
        (None, "builtin/installed_packages", "builtin/installed_packages"),
        (None, "builtin/prose", "builtin/prose"),
        (None, "monology/pile-uncopyrighted", {"name": "monology/pile-uncopyrighted", "split": "train"}),
        (None, "texts/*.jsonl.zst", {"files": str(Path.cwd() / "texts/*.jsonl.zst")}),
        (None, "texts/a.parquet", {"files": str(Path.cwd() / "texts/a.parquet")}),
    ],
)
def test_the_corpus_is_the_one_given_and_the_builtin_one_is_proposed_for_the_embedded_model_only(
    empty: Laboratory, own: Path, model: str | None, corpus: str | None, expected: Any
):
    written = new_experiment("mine", model or str(empty.model), [1], None, corpus)
    source = next(yaml.safe_load_all(written.path.read_text()))["attributes"]
    assert source["corpus"] == expected
    assert empty.catalogue.broken == {}


def test_every_field_is_set_or_named_in_a_comment(empty: Laboratory, own: Path):
    text = new_experiment("mine", "builtin/reference", [1]).path.read_text()
    for settings in (SourceSettings, ExperimentSettings, EnsembleSettings):
        for field in settings.model_fields:
            assert f" {field}:" in text, field


def test_k_follows_the_width_of_the_model(empty: Laboratory, own: Path, tiny_model: Path, tmp_path: Path):
    for d_model, k in ((192, 8), (768, 32), (2304, 128)):
        model = shutil.copytree(tiny_model, tmp_path / f"model_{d_model}")
        edit_config(model, hidden_size=d_model)
        new_experiment(f"width_{d_model}", str(model), [1])
        assert empty.catalogue.experiment(f"width_{d_model}").saes[0].l0 == k


def test_long_contexts_are_limited_and_models_without_a_separator_use_document_packing(
    empty: Laboratory, own: Path, tiny_model: Path, tmp_path: Path
):
    model = shutil.copytree(tiny_model, tmp_path / "another")
    edit_config(model, max_position_embeddings=32768, eos_token_id=None)
    new_experiment("mine", str(model), [1])
    source = empty.catalogue.sources["mine"]
    assert (source.context_length, source.packing) == (2048, "document")


@pytest.mark.parametrize("folder", ["a: model #1", "[model]", 'the "model"', "~model"])
def test_folder_names_are_quoted_for_yaml(empty: Laboratory, own: Path, tmp_path: Path, folder: str):
    model = shutil.copytree(empty.model, tmp_path / folder)
    new_experiment("mine", str(model), [1])
    assert empty.catalogue.sources["mine"].language_model == str(model)


def test_a_relative_folder_is_written_as_an_absolute_one(
    empty: Laboratory, own: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tiny_model.parent)
    new_experiment("mine", tiny_model.name, [1])
    assert empty.catalogue.sources["mine"].language_model == str(tiny_model)


# where it is written


def test_without_user_folders_the_file_is_written_to_the_shipped_folder_of_a_checkout(empty: Laboratory, tmp_path: Path):
    (tmp_path / "pyproject.toml").touch()  # two folders above the experiments', as in the checkout
    laboratory_of_checkout = tmp_path / "package" / "defs"
    laboratory_of_checkout.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Laboratory(empty.model, laboratory_of_checkout, empty.root).activate(monkeypatch)
        written = new_experiment("mine", "builtin/reference", [1])
    assert written.path == laboratory_of_checkout / "mine" / "defs.yaml"
    assert written.is_read


def test_without_user_folders_and_checkout_a_path_is_required(empty: Laboratory):
    with pytest.raises(ConfigurationError, match=r"--output, or set SAEENS_EXPERIMENTS"):
        new_experiment("mine", "builtin/reference", [1])


def test_a_file_outside_the_read_folders_is_written_with_a_warning(empty: Laboratory, tmp_path: Path):
    written = new_experiment("mine", "builtin/reference", [1], tmp_path / "new" / "file.yaml")
    assert written.path.exists()
    assert not written.is_read


def test_existing_files_are_not_overwritten(empty: Laboratory, own: Path):
    (own / "mine.yaml").write_text("# empty, so that no experiment has the name")
    with pytest.raises(ConfigurationError, match=r"mine\.yaml exists and is not overwritten"):
        new_experiment("mine", "builtin/reference", [1])
    assert (own / "mine.yaml").read_text().startswith("# empty")


# what is refused, with nothing written


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a layer beyond the depth": ({"layers": [1, 4]}, "builtin/reference has no layer 4: it has layers 0 to 3"),
    "a layer twice": ({"layers": [1, 1]}, "duplicates"),
    "a name that is taken": ({"name": NAME}, f"there already is an experiment called '{NAME}'"),
    "a name that cannot be": ({"name": "My-model"}, "lower-case letters"),
    "a group's name": ({"name": "leaderboard"}, "collide with a group"),
    "no such folder": ({"model": "./nowhere"}, "there is no such folder"),
    "no such builtin model": ({"model": "builtin/other"}, "there is no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_are_refused_and_leave_no_file(empty: Laboratory, own: Path, case: str):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        new_experiment(**({"name": "mine", "model": "builtin/reference", "layers": [1]} | changes))
    assert list(own.iterdir()) == []


def test_layers_are_given_with_commas_or_one_by_one():
    assert parse_layers(["2,4", "6"]) == [2, 4, 6]
    for wrong in (["x"], ["1,"], ["-1"], ["1.5"]):
        with pytest.raises(ConfigurationError, match=r"--layers: .* is not a layer; give whole numbers from 0, such as 2,4,6"):
            parse_layers(wrong)


# the command


def _saeens(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["saeens", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_new_command_prints_the_path_and_the_experiment_is_listed(
    empty: Laboratory, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert _saeens(monkeypatch, "new", "mine", "--model", "builtin/reference", "--layers", "1,2", "--layers", 3) == 0
    assert f"written to {own / 'mine.yaml'}" in capsys.readouterr().out
    assert _saeens(monkeypatch, "experiments") == 0
    assert "1, 2, 3" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mine"))
    assert [document["attributes"]["name"] for document in yaml.safe_load_all((own / "mine.yaml").read_text())] == ["mine", "mine"]


def test_the_new_command_refuses_with_exit_code_2(
    empty: Laboratory, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert _saeens(monkeypatch, "new", "mine", "--model", "builtin/reference", "--layers", "9") == 2
    assert "it has layers 0 to 3" in " ".join(capsys.readouterr().err.split())
