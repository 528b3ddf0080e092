"""`saeens plan`: forecasts against measurements of the same experiment and against independent counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import constants
from safetensors import safe_open
from tiny_experiment import LAYER, MEMBERS, SEEDS, Laboratory
from tiny_models import CONTEXT_LENGTH, D_MODEL, Architecture, edit_config, write_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from saeens_pipeline.assets import forecast as forecasts
from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.assets.forecast import Line, Machine, forecast, readable
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.loading import block_parameters, load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.patching import PatchedWindows
from saeens_pipeline.language_models.shipped_models import describe_shipped_model
from saeens_pipeline.language_models.tokens import open_tokens
from saeens_pipeline.orchestration.catalogue import Catalogue
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import Store


def _lines(
    laboratory: Laboratory, layers: tuple[int, ...] = (LAYER,), compute: Compute | None = None, machine: Machine | None = None
) -> list[Line]:
    catalogue = laboratory.catalogue
    experiment = catalogue.experiment("tiny")
    source, ops = catalogue.sources[experiment.source], catalogue.ops(experiment)
    compute = compute or Compute(device="cpu")
    return forecast(source, experiment, ops, layers=layers, store=laboratory.store, compute=compute, machine=machine)


def _amounts(*args: Any, **kwargs: Any) -> dict[tuple[str, str], float | None]:
    return {(line.section, line.item): line.amount for line in _lines(*args, **kwargs)}


def _known(amount: float | None) -> float:
    assert amount is not None
    return amount


def _saes(laboratory: Laboratory) -> list[dict[str, Any]]:
    """Provenance of every SAE that was trained, by itself."""
    found = [
        laboratory.store.require(declaration.address, Partition(LAYER, seed)).provenance | {"kind": declaration.address.kind}
        for declaration in laboratory.declarations().values()
        for seed in SEEDS
        if declaration.builder == "sae"
    ]
    return [each for each in found if "same_as" not in each]


def test_forecast_computation_equals_that_of_the_run(finished: Laboratory):
    amounts, saes = _amounts(finished), _saes(finished)
    for kind in ("bagging", "boosting"):
        assert amounts["computation", f"training, {kind}"] == sum(each["train_flops"] for each in saes if each["kind"] == kind)
    baselines = sum(each["train_flops"] for each in saes if each["kind"] == "baseline")
    expected = [_known(amounts["computation", f"training, {name}"]) for name in ("expanded", "expanded_l0_matched")]
    assert sum(expected) == baselines
    residuals = [
        finished.store.require(Address("tiny", "boosting", f"residual_{j}"), Partition(LAYER, seed)).provenance["flops"]
        for j in range(1, MEMBERS)
        for seed in SEEDS
    ]
    assert amounts["computation", "residuals"] == sum(residuals)


def test_forecast_disk_equals_that_of_the_run(finished: Laboratory):
    saes = [file for file in finished.root.rglob("sae_weights.safetensors") if "round_1" not in file.parts]
    numbers = sum(tensor.nbytes for file in saes for tensor in _tensors(file))
    assert _amounts(finished)["disk", "SAEs"] == numbers


def _tensors(file: Path) -> list[torch.Tensor]:
    with safe_open(file, "pt") as tensors:
        return [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118  # it is no mapping


@pytest.mark.parametrize(("keep", "kept", "besides"), [("last", 1, 1), ("all", MEMBERS - 1, 0), ("none", 0, 0)])
def test_forecast_residuals_on_disk_follow_their_retention(empty: Laboratory, keep: str, kept: int, besides: int):
    empty.declare(keep_residuals=keep)
    amounts, one = _amounts(empty), 600 * D_MODEL * 2
    assert amounts["disk", "residuals"] == kept * one * len(SEEDS)
    parts = [_known(amounts["disk", item]) for item in ("tokens", "activations", "residuals", "SAEs", "checkpoints")]
    assert amounts["disk", "all"] == sum(parts) + besides * one


def test_more_layers_take_more_disk_and_training_and_one_forward_pass(empty: Laboratory):
    one, two = _amounts(empty, (1,)), _amounts(empty, (0, 1))
    for key in (("disk", "activations"), ("disk", "SAEs"), ("computation", "training, bagging"), ("computation", "evaluation")):
        assert two[key] == 2 * _known(one[key])
    assert two["computation", "language model"] == one["computation", "language model"]


def test_activations_on_demand_take_less_disk_and_more_forward_passes(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_ACTIVATION_CACHE_GB", "0")
    stored = _amounts(empty)
    empty.declare({"keep_activations": "test"}, mixing="contiguous", keep_residuals="none", baselines=["expanded", "compute_matched"])
    amounts = _amounts(empty)
    train, origin = 600 * D_MODEL * 2, 800 * 8
    assert stored["disk", "activations"] == stored["activations", "keep_activations: all"] == 800 * D_MODEL * 2 + origin
    assert amounts["disk", "activations"] == amounts["activations", "keep_activations: test"] == 200 * D_MODEL * 2 + origin
    monkeypatch.setenv("SAEENS_ACTIVATION_CACHE_GB", "1")  # more than all rows
    assert _amounts(empty)["disk", "activations"] == 200 * D_MODEL * 2 + origin + train
    # For each seed: members, the expanded SAE, MEMBERS epochs of compute_matched, and each residual's statistics and training.
    passes = (1 + 1 + MEMBERS + 2 * (MEMBERS - 1)) * len(SEEDS)
    once = _known(amounts["computation", "language model"])
    assert amounts["computation", "activations on demand"] == pytest.approx(passes * once * 600 / 800)
    assert _amounts(empty)["computation", "activations on demand"] == pytest.approx(once * 600 / 800)


def test_a_disk_that_is_too_small_gets_a_proposal(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_ACTIVATION_CACHE_GB", "0")
    needed = _known(_amounts(empty)["disk", "all"])
    assert ("fits", "with less disk") not in _amounts(empty)
    monkeypatch.setattr(forecasts, "free_bytes", lambda path: needed - 1)
    proposed = _known(_amounts(empty)["fits", "with less disk"])
    empty.declare({"keep_activations": "test"}, mixing="contiguous", keep_residuals="none")
    assert proposed == _known(_amounts(empty)["disk", "all"]) < needed


@pytest.mark.parametrize(("devices", "turns"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_time_is_that_of_the_runs_of_one_layer_and_seed_on_so_many_devices(empty: Laboratory, devices: int, turns: int):
    machine = Machine(tflops=1e-6, devices=devices, price=3.0)
    amounts = _amounts(empty, (0, 1), machine=machine)  # two layers and two seeds
    forward, everything = (_known(amounts["computation", item]) for item in ("language model", "all"))
    assert amounts["time", "language model"] == pytest.approx(forward / 1e6 / 3600)
    assert amounts["time", "training, evaluation"] == pytest.approx(turns * (everything - forward) / 4 / 1e6 / 3600)
    assert amounts["time", "price"] == pytest.approx(3 * everything / 1e6 / 3600)  # idle devices are not counted
    row_bytes, rounds, residuals = D_MODEL * 2, MEMBERS - 1, MEMBERS - 1
    # For each layer and seed: members, two baselines and residual 1 read activations; rounds and later residuals read residuals.
    assert amounts["time", "read from stores"] == 4 * (3 + 1 + rounds + residuals - 1) * 600 * row_bytes
    assert amounts["time", "written"] == 2 * (800 * row_bytes + 800 * 8) + 4 * residuals * 600 * row_bytes


def test_without_a_machine_no_time_is_estimated(empty: Laboratory):
    assert not [section for section, _ in _amounts(empty) if section == "time"]


def test_layers_and_hooks_that_the_model_lacks_are_refused(empty: Laboratory):
    with pytest.raises(ConfigurationError, match="has no layer 7"):
        _lines(empty, (1, 7))
    empty.declare({"hook": "resid_mid"})
    with pytest.raises(ConfigurationError, match=r"defs\.yaml:\d+: attributes\.hook: hook 'resid_mid' is not available"):
        _lines(empty)


def test_what_the_model_makes_wrong_is_named_by_file_line_and_field(empty: Laboratory):
    file = empty.declare({"layers": [1, 7]}, sae={"architecture": "topk", "d_sae": 8, "k": 9})
    lines = file.read_text().splitlines()
    layers = next(i for i, line in enumerate(lines, start=1) if line.strip() == "layers:")
    with pytest.raises(ConfigurationError, match=rf"^{file}:{layers}: attributes\.layers: .* has no layer 7"):
        _lines(empty, (1, 7))
    with pytest.raises(ConfigurationError, match=r"defs\.yaml:\d+: attributes\.sae: .*k = 9 is larger than d_sae = 8"):
        _lines(empty)


def test_concurrent_boosting_has_no_residuals_in_the_forecast(empty: Laboratory):
    empty.declare(ensemble={"members": MEMBERS, "seeds": list(SEEDS), "boosting": "concurrent"})
    amounts = _amounts(empty)
    assert amounts["disk", "residuals"] == amounts["computation", "residuals"] == 0


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gemma2", "gpt2"])
def test_parameters_are_counted_over_the_blocks_of_the_forward_pass(tmp_path: Path, architecture: Architecture):
    path = write_tiny_model(tmp_path / "model", architecture)
    description = describe_language_model(str(path))
    model = load_language_model(description)
    blocks = [model.module("resid_post", layer) for layer in range(description.n_layers)]
    assert block_parameters(description) == [sum(weights.numel() for weights in block.parameters()) for block in blocks]


def test_two_operations_per_parameter_equal_pytorchs_count(tiny_model: Path):
    description = describe_language_model(str(tiny_model))
    model = load_language_model(description)
    tokens = torch.zeros(8, CONTEXT_LENGTH, dtype=torch.long)
    model.activations(tokens, "resid_post", [LAYER])  # checks the hook
    with FlopCounterMode(display=False) as counter:  # which leaves out biases and norms
        model.activations(tokens, "resid_post", [LAYER])
    assert 2 * sum(block_parameters(description)[: LAYER + 1]) == pytest.approx(counter.get_total_flops() / (8 * CONTEXT_LENGTH), rel=0.1)


@pytest.mark.parametrize("hook", ["resid_pre", "resid_post"])
def test_operations_of_the_next_token_loss_equal_pytorchs_count(finished: Laboratory, empty: Laboratory, hook: str):
    empty.declare({"hook": hook}, ce_loss_tokens=100)
    model = load_language_model(describe_language_model(str(empty.model)))
    tokens = open_tokens(finished.artefact("tokens", layer=None).path)
    positions = 0
    with FlopCounterMode(display=False) as counter:
        for batch in tokens.sample("test", 100, 8):
            windows, positions = PatchedWindows(model, batch, hook, LAYER), positions + batch.tokens.numel()
            for _ in range(2 + 2 * MEMBERS + 2):  # as it is, zeros, both ensembles in every size, two baselines
                windows.logits(windows.activations)
    found = _known(_amounts(empty)["computation", "next-token loss"]) / (100 * len(SEEDS))
    assert found == pytest.approx(counter.get_total_flops() / positions, rel=0.15)  # biases, norms


def test_without_a_loss_to_measure_a_plan_has_none(empty: Laboratory):
    with_loss = _amounts(empty)
    empty.declare(ce_loss_tokens=0)
    without = _amounts(empty)
    assert {("memory", "next-token loss"), ("computation", "next-token loss")} == with_loss.keys() - without.keys()
    difference = _known(with_loss["computation", "all"]) - _known(without["computation", "all"])
    assert difference == pytest.approx(_known(with_loss["computation", "next-token loss"]))


def test_members_of_different_sizes_are_counted_each_at_its_own(empty: Laboratory):
    saes = [{"architecture": "topk", "expansion": n, "k": 4} for n in range(2, 2 + MEMBERS)]
    empty.declare(sae=saes, baselines=[])
    amounts = _amounts(empty)
    assert amounts["computation", "training, bagging"] == sum(10 * D_MODEL * D_MODEL * n for n in (2, 3, 4)) * 600 * len(SEEDS)
    special = [{"member": 2, "documents": {"language": ["python"]}}]
    empty.declare(sae=saes, baselines=[], ensemble={"members": MEMBERS, "seeds": list(SEEDS), "specialised": special})
    again = _amounts(empty)
    assert again["computation", "all"] == amounts["computation", "all"]
    notes = {line.item: line.note for line in _lines(empty)}
    assert notes["training, bagging"].startswith("at most: members that see a part")


@pytest.mark.parametrize(
    ("config", "hook", "message"),
    [
        ({"architectures": ["GPTNeoXModel"]}, "resid_post", "has no language-modelling head"),
    ],
)
def test_a_loss_that_cannot_be_measured_is_refused_in_the_plan(
    empty: Laboratory, tmp_path: Path, config: dict[str, Any], hook: str, message: str
):
    edit_config(write_tiny_model(tmp_path / "model"), **config)
    source = {"language_model": str(tmp_path / "model"), "hook": hook}
    empty.declare(source, ce_loss_tokens=100)
    for ask in (lambda: _lines(empty), empty.run):
        with pytest.raises(ConfigurationError, match=message):
            ask()
    assert not list(empty.root.rglob("recipe.json"))
    empty.declare(source)
    assert ("computation", "next-token loss") not in _amounts(empty)


def test_the_forecast_compares_the_need_with_free_disk(empty: Laboratory):
    notes = {line.item: line.note for line in _lines(empty)}
    assert notes["free disk"].startswith("enough, below")
    empty.declare({"train_tokens": 10**14})
    assert " too little, below" in {line.item: line.note for line in _lines(empty)}["free disk"]


def test_the_forecast_of_an_unreachable_model_gives_the_known_amounts(empty: Laboratory):
    empty.declare({"language_model": "some-lab/some-model"})
    lines = _lines(empty)
    assert "the hub cannot be reached" in lines[0].note
    amounts = {(line.section, line.item): line.amount for line in lines}
    assert amounts["disk", "tokens"] == 800 * 13
    for key in (("disk", "activations"), ("disk", "all"), ("computation", "all")):
        assert amounts[key] is None
    assert readable(lines[2]) == "not known"


def test_the_forecast_of_a_gated_model_gives_the_hubs_reason_and_the_command(fake_hub: FakeHub, empty: Laboratory):
    fake_hub.repositories["models/some-lab/some-model"] = empty.model
    fake_hub.gated.add("models/some-lab/some-model")
    empty.declare({"language_model": "some-lab/some-model"})
    assert "authorized list. Accept its terms at " in _lines(empty)[0].note
    assert "log in with `hf auth login`" in _lines(empty)[0].note
    with pytest.raises(ConfigurationError, match=r"is gated: .*log in with `hf auth login`"):
        empty.run()


def test_the_forecast_downloads_only_the_configuration_of_a_model(fake_hub: FakeHub, empty: Laboratory):
    fake_hub.repositories["models/some-lab/some-model"] = empty.model
    empty.declare({"language_model": "some-lab/some-model"})
    known = {line.item: line.amount for line in _lines(empty) if line.section != "time"}
    empty.declare()
    assert known.pop("some-lab/some-model") == D_MODEL
    here = {line.item: line.amount for line in _lines(empty) if line.section != "time"}
    assert {item: here[item] for item in known if item != "free disk"} == {item: known[item] for item in known if item != "free disk"}
    assert "model.safetensors" not in fake_hub.downloaded()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (Line("disk", "x", 1_230_000_000_000, "bytes"), "1.23 TB"),
        (Line("disk", "x", 34_000_000_000_000_000, "bytes"), "34,000 TB"),
        (Line("computation", "x", 2.7e19, "FLOPs"), "2.7e+19 FLOPs"),
        (Line("model", "x", 2304, "dimensions"), "2,304 dimensions"),
    ],
)
def test_amounts_are_readable(line: Line, shown: str):
    assert readable(line) == shown


def test_the_plan_command_prints_json_alone_and_writes_nothing(
    empty: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from saeens_pipeline import cli

    def saeens(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["saeens", "plan", "tiny", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    rows = json.loads(saeens("--format", "json", "--layer", "2"))
    assert {"experiment": "tiny", "section": "model", "item": str(empty.model), "amount": 16.0, "unit": "dimensions"}.items() <= rows[
        0
    ].items()
    assert saeens("--format", "csv").startswith("experiment,section,item,amount,unit,note\n")
    assert "training, largest group" in saeens()
    timed = json.loads(saeens("--format", "json", "--tflops", "2", "--devices", "4", "--price", "1.5"))
    assert [row["item"] for row in timed if row["section"] == "time"][-1] == "price"
    monkeypatch.setattr("sys.argv", ["saeens", "plan", "tiny", "--devices", "4"])
    with pytest.raises(SystemExit) as refused:
        cli.main()
    assert refused.value.code == 2
    assert "need --tflops" in capsys.readouterr().err
    assert not empty.root.exists()


@pytest.mark.parametrize(
    ("name", "parameters", "of_block"),
    [
        ("EleutherAI/pythia-160m", 162_322_944, 7_087_872),
        ("google/gemma-2-2b", 2_614_341_888, 77_865_984),
    ],
)
def test_shipped_configurations_have_the_published_number_of_parameters(name: str, parameters: int, of_block: int):
    description = describe_shipped_model(name, "main")
    assert description is not None
    with torch.device("meta"):
        model = load_language_model(description, "random", device="meta").model
    assert sum(weights.numel() for weights in model.parameters()) == parameters
    assert block_parameters(description) == [of_block] * description.n_layers


def test_the_shipped_gelu_1l_has_its_block():
    description = describe_shipped_model("transformer_lens:gelu-1l", "main")
    assert description is not None
    assert (description.d_model, description.n_layers, description.context_length, description.vocab_size) == (512, 1, 1024, 48262)
    attention, mlp = 4 * 512 * 512 + 4 * 512, 2 * 512 * 2048 + 2048 + 512
    assert block_parameters(description) == [attention + mlp + 2 * 2 * 512]  # weights and biases of two norms


@pytest.mark.parametrize("name", ["pythia_160m", "gemma_2_2b", "gelu_1l", "gelu_1l_small"])
def test_plans_of_the_papers_settings_need_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAEENS_EXPERIMENTS", raising=False)
    catalogue = Catalogue.load()
    experiment = catalogue.experiment(name)
    source = catalogue.sources[experiment.source]
    lines = forecast(
        source, experiment, catalogue.ops(experiment), layers=source.layers, store=Store(tmp_path), compute=Compute(device="cpu")
    )
    assert "sizes are from the configuration that comes with saeens" in lines[0].note
    assert [line.item for line in lines if line.amount is None] == []
    assert not (tmp_path / "cache").exists()


def test_another_revision_has_no_shipped_configuration():
    assert describe_shipped_model("EleutherAI/pythia-160m", "step1000") is None
    assert describe_shipped_model("some-lab/some-model", "main") is None


def test_a_model_in_the_cache_is_not_replaced_by_its_shipped_configuration(fake_hub: FakeHub, empty: Laboratory):
    fake_hub.repositories["models/EleutherAI/pythia-160m"] = empty.model
    empty.declare({"language_model": "EleutherAI/pythia-160m"})
    first = _lines(empty)[0]
    assert (first.amount, "comes with saeens" in first.note) == (D_MODEL, False)
