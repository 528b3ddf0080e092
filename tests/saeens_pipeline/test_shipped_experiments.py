"""The shipped experiments: the paper's hyperparameters, and commands without a hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import yaml
from fake_hub import FakeHub
from tiny_experiment import LAYER, NAME, Laboratory
from tiny_models import CONTEXT_LENGTH, Architecture, write_tiny_model, write_tiny_tokenizer
from tiny_transformer_lens import tiny_hooked, write_hooked

from saeens_pipeline import cli, components
from saeens_pipeline import defs as shipped_files
from saeens_pipeline.assets.baselines.registry import names_of
from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.assets.forecast import forecast
from saeens_pipeline.orchestration import catalogue as catalogues
from saeens_pipeline.orchestration.catalogue import Catalogue
from saeens_pipeline.settings.corpora import HubDataset
from saeens_pipeline.settings.files import MODELS
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

PAPER: dict[str, dict[str, Any]] = {  # the table of its settings
    "gelu_1l": {
        "model": "transformer_lens:gelu-1l", "layer": 0, "context": 1024, "d_in": 512, "d_sae": 16384,
        "sae": {"architecture": "standard", "expansion": 32, "l1_coefficient": 0.75},
    },
    "pythia_160m": {
        "model": "EleutherAI/pythia-160m", "layer": 8, "context": 2048, "d_in": 768, "d_sae": 16128,
        "sae": {"architecture": "topk", "expansion": 21, "k": 128},
    },
    "gemma_2_2b": {
        "model": "google/gemma-2-2b", "layer": 12, "context": 8192, "d_in": 2304, "d_sae": 16128,
        "sae": {"architecture": "jumprelu", "expansion": 7, "l0_target": 82},  # of Gemma Scope: the paper gives no L0
    },
}  # fmt: skip
SHIPPED = [name + size for name in PAPER for size in ("", "_small")]
CONFIGURATIONS: dict[str, dict[str, Any]] = {  # of the models, as published
    "EleutherAI/pythia-160m": {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 2048, "vocab_size": 50304, "eos_token_id": 0,
        "use_parallel_residual": True, "rotary_pct": 0.25,
    },
    "google/gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216, "max_position_embeddings": 8192,
        "vocab_size": 256000, "eos_token_id": 1, "bos_token_id": 2,
    },
    "NeelNanda/GELU_1L512W_C4_Code": {
        "d_model": 512, "n_layers": 1, "d_mlp": 2048, "d_head": 64, "n_heads": 8, "n_ctx": 1024, "d_vocab": 48262, "act_fn": "gelu",
        "attn_only": False, "normalization": "LN", "tokenizer_name": "NeelNanda/gpt-neox-tokenizer-digits",
    },
}  # fmt: skip
PARAMETERS = {"EleutherAI/pythia-160m": 9 * 7_087_872, "google/gemma-2-2b": 13 * 77_865_984}
"""Of the blocks up to the hook: 12 d^2 + 13 d each; and 4 * 2304 * 256 * (8 + 4) / 2 + 3 * 2304 * 9216 + 4 * 2304."""


EXPERIMENT_ON_SMOLLM2 = """\
type: saeens_pipeline.components.ActivationSource
attributes: {name: mine, language_model: builtin/smollm2, layers: [2], context_length: 64, train_tokens: 900, test_tokens: 90}
---
type: saeens_pipeline.components.EnsembleExperiment
attributes: {name: mine, source: mine, sae: {architecture: topk, expansion: 2, k: 8}, ensemble: {members: 2, seeds: [1]}}
"""


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    monkeypatch.setenv("SAEENS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DAGSTER_HOME", "")
    monkeypatch.delenv("SAEENS_EXPERIMENTS", raising=False)
    return Catalogue.load()


@pytest.mark.parametrize("name", SHIPPED)
def test_hyperparameters_equal_those_of_the_paper(catalogue: Catalogue, name: str):
    paper, is_small = PAPER[name.removesuffix("_small")], name.endswith("_small")
    experiment = catalogue.experiment(name)
    source = catalogue.sources[experiment.source]
    assert all(sae.to_json() | paper["sae"] == sae.to_json() for sae in experiment.saes)
    training = experiment.complete_training
    assert (training["learning_rate"], tuple(training["adam_betas"]), training["batch_tokens"]) == (3e-4, (0.0, 0.999), 10_000)
    scaled = "expected_average_only_in" if "l0_target" in paper["sae"] else "none"  # the paper scales none
    assert (training["unit_norm_decoder"], training["normalize_activations"]) == (True, scaled)
    assert (training["learning_rate_warmup_fraction"], training["sparsity_warmup_fraction"]) == (0, 0)
    assert experiment.ensemble.members == 8
    assert experiment.ensemble.seeds == ([42, 43] if is_small else [42, 43, 44, 46])
    assert (source.language_model, source.hook, source.layers) == (paper["model"], "resid_post", [paper["layer"]])
    assert (source.train_tokens, source.test_tokens) == ((20_000_000, 500_000) if is_small else (800_000_000, 7_000_000))
    assert (source.packing, source.drop, source.weights) == ("concatenate", [], "trained")
    if not is_small:
        assert source.context_length == paper["context"]
    assert isinstance(source.corpus, HubDataset)
    assert (source.corpus.name, source.corpus.split, source.corpus.test_split) == ("monology/pile-uncopyrighted", "train", "test")


def test_shipped_experiments_load_without_automation(catalogue: Catalogue):
    assert catalogue.broken == {}
    assert set(SHIPPED) | {"quickstart", "synthetic", "smollm2", "smollm2_full", "smollm2_random"} <= set(catalogue.experiments)
    assert "recovery" in (catalogue.experiment("synthetic").evaluations or ())
    definitions = catalogue.definitions()
    dg.Definitions.validate_loadable(definitions)
    for name in SHIPPED:
        assert catalogue.experiment(name).automation == "off"
        specs = [spec for spec in definitions.resolve_all_asset_specs() if spec.key.path[0] == name]
        assert len(specs) > 30
        assert {spec.automation_condition for spec in specs} == {None}


@pytest.mark.parametrize("installed", [True, False])
def test_the_ui_shows_what_can_run_here_and_tags_what_needs_a_hub(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
):
    monkeypatch.setattr(catalogues, "lacks_package", lambda name: name == "builtin/smollm2" and not installed)
    shown = catalogue.shown()
    assert ("smollm2" in shown.experiments) == ("smollm2_random" in shown.experiments) == ("smollm2" in shown.sources) == installed
    assert {"quickstart", "synthetic"} <= set(shown.experiments)
    own = tmp_path / "experiments" / "mine.yaml"
    own.parent.mkdir()
    own.write_text(EXPERIMENT_ON_SMOLLM2)
    monkeypatch.setenv("SAEENS_EXPERIMENTS", str(own.parent))
    assert "mine" in Catalogue.load().shown().experiments  # it fails with the command that installs the package
    needs = {
        op.outputs[0].source: op.outputs[0].tags.get("saeens/needs") for name in catalogue.sources for op in catalogue.source_ops(name)
    }
    assert needs["pythia_160m"] == needs["gemma_2_2b"] == "hub"
    assert needs["quickstart"] == needs["synthetic"] == needs["smollm2"] is None
    specs = catalogue.definitions(disk_checks=False).resolve_all_asset_specs()
    of_experiments = {spec.tags["experiment"]: spec.tags.get("saeens/needs") for spec in specs if "experiment" in spec.tags}
    assert of_experiments["pythia_160m"] == of_experiments["gemma_2_2b"] == "hub"
    assert of_experiments["quickstart"] == of_experiments["synthetic"] == of_experiments["smollm2"] is None


@pytest.mark.parametrize("arguments", [("experiments",), ("status", "{}"), ("gc",), ("leaderboard",), ("doctor",), ("plan", "{}")])
def test_commands_on_shipped_experiments_work_without_a_hub(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
):
    for name in SHIPPED if "{}" in arguments else [""]:
        monkeypatch.setattr(sys, "argv", ["saeens", *(argument.format(name) for argument in arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, capsys.readouterr().err
    assert "pythia_160m" in capsys.readouterr().out or arguments[0] in ("gc", "leaderboard", "plan")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_run_without_a_hub_fails_at_once_with_a_remedy(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, tmp_path: Path
):
    monkeypatch.setattr(sys, "argv", ["saeens", "run", name])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "the hub cannot be reached" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("recipe.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_plan_of_a_shipped_experiment_needs_only_the_models_configuration(
    catalogue: Catalogue, fake_hub: FakeHub, tmp_path: Path, name: str
):
    for repository, configuration in CONFIGURATIONS.items():
        _publish(fake_hub, tmp_path / repository, repository, configuration)
    _publish(fake_hub, tmp_path / "tokenizer", "NeelNanda/gpt-neox-tokenizer-digits", None)
    experiment, paper = catalogue.experiment(name), PAPER[name.removesuffix("_small")]
    source = catalogue.sources[experiment.source]
    compute = Compute(device="cpu")
    lines = forecast(source, experiment, catalogue.ops(experiment), layers=source.layers, store=Store(data_root()), compute=compute)
    amounts = {(line.section, line.item): line.amount for line in lines}
    d_in, d_sae = paper["d_in"], paper["d_sae"]
    rows = source.train_tokens + source.test_tokens
    assert lines[0].amount == d_in
    assert amounts["disk", "activations"] == rows * (2 * d_in + 8)
    assert amounts["computation", "training, bagging"] == 8 * 10 * d_in * d_sae * source.train_tokens * len(experiment.ensemble.seeds)
    assert amounts["computation", "training, expanded"] == amounts["computation", "training, bagging"]
    if source.language_model in PARAMETERS:
        attention = 2 * source.context_length * d_in * (paper["layer"] + 1)
        assert amounts["computation", "language model"] == rows * (2 * PARAMETERS[str(source.language_model)] + attention)


def _publish(hub: FakeHub, folder: Path, repository: str, configuration: dict[str, Any] | None) -> None:
    folder.mkdir(parents=True)
    if configuration:
        (folder / "config.json").write_text(json.dumps(configuration))
    if not configuration or "model_type" in configuration:
        write_tiny_tokenizer(folder)
    hub.repositories[f"models/{repository}"] = folder


FAMILIES: dict[str, Architecture] = {"pythia_160m": "gpt_neox", "gemma_2_2b": "gemma2"}


@pytest.mark.parametrize("name", FAMILIES)
def test_shipped_experiments_run_on_a_tiny_model_of_the_family(
    catalogue: Catalogue, empty: Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
):
    _run_in_small(catalogue, empty, monkeypatch, name, str(write_tiny_model(tmp_path / "family", FAMILIES[name])))


@pytest.mark.transformer_lens
def test_the_gelu_1l_experiment_runs_on_a_tiny_model_of_its_architecture(
    catalogue: Catalogue, empty: Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    pytest.importorskip("transformer_lens", reason="the optional extra transformer_lens is not installed")
    model = f"transformer_lens:{write_hooked(tmp_path / 'family', tiny_hooked(n_layers=1), n_layers=1)}"
    _run_in_small(catalogue, empty, monkeypatch, "gelu_1l", model, layer=0)


def _run_in_small(
    catalogue: Catalogue, laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, name: str, model: str, *, layer: int = LAYER
) -> None:
    """The shipped experiment with another model and other sizes, everything else as it is; its tables have all that it asks for."""
    shipped = catalogue.experiment(name)
    source = catalogue.sources[name].model_dump(exclude={"name", "language_model", "corpus"})
    sizes = {"layers": [layer], "context_length": CONTEXT_LENGTH, "train_tokens": 600, "test_tokens": 200}
    (sae,) = {json.dumps(each.to_json()): each.to_json() for each in shipped.saes}.values()
    sae = sae | {"expansion": 2} | {name: 4 for name in ("k", "l0_target") if name in sae}
    ensemble = {"members": 2, "seeds": [42, 43]}
    fields = shipped.model_dump(include={"baselines", "keep_residuals", "evaluations", "automation"})
    laboratory.activate(monkeypatch)
    training = shipped.training | {"batch_tokens": 50}
    laboratory.declare({"language_model": model} | source | sizes, **fields, sae=sae, ensemble=ensemble, training=training)
    laboratory.run()
    assert laboratory.artefact("eval/reconstruction", 42, layer).provenance["next_token_loss"]["tokens"] >= 150
    table = pl.read_parquet(laboratory.root / "tables" / NAME / "reconstruction")
    assert set(table["method"]) == {"single", "bagging", "boosting", *names_of(shipped)}
    assert set(table["seed"]) == {42, 43}
    assert table["explained_variance"].is_finite().all()
    assert table["ce_loss_recovered"].is_finite().all()
    assert "nothing to do" in laboratory.run()


def test_shipped_files_fit_the_json_schema_when_read_as_yaml_1_1():
    """`dg check yaml` makes this comparison. YAML 1.1 reads `off` as false."""
    for file in Path(next(iter(shipped_files.__path__))).glob("*/defs.yaml"):
        for document in yaml.safe_load_all(file.read_text()):
            properties = MODELS[document["type"]].model_json_schema()["properties"]
            values = {name: value for name, value in document["attributes"].items() if "enum" in properties[name]}
            assert [name for name, value in values.items() if value not in properties[name]["enum"]] == []
            assert "automation" in values or document["type"].endswith("ActivationSource")


def test_dagsters_own_check_of_the_components_finds_only_those_with_settings():
    classes = [each for each in vars(components).values() if isinstance(each, type) and issubclass(each, dg.Component)]
    assert {each.__name__: each.get_model_cls() for each in classes} == {name.rpartition(".")[2]: model for name, model in MODELS.items()}
