"""The `saeens` command: output, exit codes and messages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import dagster as dg
import polars as pl
import pytest
import typer
from command_line import Outcome, Saeens
from rich.console import Console
from tiny_experiment import EXPERIMENT, LAYER, NAME, SEEDS, Laboratory, run_and_print
from typer.core import TyperGroup

from saeens_pipeline import cli
from saeens_pipeline.assets import training
from saeens_pipeline.assets.registry import listed
from saeens_pipeline.cli import output
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration import runs
from saeens_pipeline.storage.tables import read_table


def _assert_one_message(outcome: Outcome, code: int, *parts: str) -> None:
    assert outcome.code == code, outcome
    assert outcome.err.startswith("error: "), outcome
    assert "Traceback" not in outcome.out + outcome.err
    assert not outcome.out
    for part in parts:
        assert part in outcome.message


# what works


def test_help_imports_neither_torch_nor_dagster_nor_transformers():
    heavy = ("torch", "dagster", "transformers", "zarr")
    script = f"""
import sys
sys.argv = ["saeens", *sys.argv[1:]]
from saeens_pipeline.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    for arguments in (["--help"], ["run", "--help"], ["table", "--help"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True)
        assert "Usage" in done.stdout
        assert done.stderr.strip() == "[]"


def test_help_names_every_command(saeens: Saeens):
    outcome = saeens("--help")
    assert outcome.code == 0
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    assert {"run", "status", "table"} <= group.commands.keys()
    for command in group.commands:
        assert f" {command} " in outcome.out


def test_experiments_are_listed(empty: Laboratory, saeens: Saeens):
    outcome = saeens("experiments")
    assert (outcome.code, outcome.err) == (0, "")
    (line,) = [line for line in outcome.out.splitlines() if line.startswith(NAME)]
    assert "topk" in line


def test_run_materialises_the_selection_and_prints_plain_lines(empty: Laboratory, saeens: Saeens):
    outcome = saeens("run", NAME, "--select", "bagging/member_1", "--seed", SEEDS[1])
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{NAME}: 3 artefacts to compute" in outcome.out
    assert f"{NAME}/tokens: 800 tokens in" in outcome.out
    assert f"{NAME}/bagging/member_1, layer {LAYER}, seed {SEEDS[1]}: 600 tokens in" in outcome.out
    assert "\x1b" not in outcome.out
    assert empty.artefact("bagging/member_1", SEEDS[1])


def test_a_second_run_reports_no_training_and_ends_with_the_table(finished: Laboratory, saeens: Saeens):
    outcome = saeens("run", NAME)
    assert (outcome.code, outcome.err) == (0, "")
    assert "nothing to do" in outcome.out
    assert "no training" in outcome.out
    reconstruction = read_table(finished.root, NAME, "reconstruction")
    mean = reconstruction.filter(method="boosting", n_members=3)["explained_variance"].mean()
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("boosting")]
    assert f"{mean:.4f}" in line
    assert str(finished.root) in outcome.out
    assert "saeens ui" in outcome.out


def test_the_summary_covers_the_declared_seeds(finished: Laboratory, saeens: Saeens):
    finished.declare(ensemble=EXPERIMENT["ensemble"] | {"seeds": [SEEDS[0]]})
    outcome = saeens("run", NAME)
    assert outcome.code == 0
    (value,) = read_table(finished.root, NAME, "reconstruction").filter(method="boosting", n_members=3, seed=SEEDS[0])["explained_variance"]
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("boosting")]
    assert f"{value:.4f}" in line


def test_status_distinguishes_fresh_stale_and_missing(finished: Laboratory, saeens: Saeens):
    shutil.rmtree(finished.artefact("baseline/expanded", 2).path)
    finished.declare(training=EXPERIMENT["training"] | {"learning_rate": 0.5})
    outcome = saeens("status", NAME)
    assert (outcome.code, outcome.err) == (0, "")
    rows = {tuple(line.split()[:3]): line.split()[3:] for line in outcome.out.splitlines() if "seed" not in line}
    assert f"{NAME}/tokens fresh" in " ".join(outcome.out.split())
    assert rows[f"{NAME}/baseline/expanded", str(LAYER), "2"][0] == "missing"
    assert rows[f"{NAME}/bagging/member_1", str(LAYER), "1"][0] == "stale"
    assert "training.learning_rate: 0.01" in outcome.out


@pytest.mark.parametrize("name", [table.name for table in listed(over_experiments=False) if table.by_default])
def test_tables_in_csv_and_json_are_the_only_output_and_can_be_parsed(finished: Laboratory, saeens: Saeens, name: str):
    expected = read_table(finished.root, NAME, name)
    csv, in_json = (saeens("table", NAME, name, "--format", form) for form in ("csv", "json"))
    assert (csv.code, csv.err, in_json.code, in_json.err) == (0, "", 0, "")
    assert pl.read_csv(io.StringIO(csv.out), schema=expected.schema).equals(expected)
    assert pl.DataFrame(json.loads(in_json.out), schema=expected.schema).equals(expected)


def test_tables_are_printed_with_a_header_and_one_line_per_row(finished: Laboratory, saeens: Saeens, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    outcome = saeens("table", NAME, "stability")
    assert (outcome.code, outcome.err) == (0, "")
    header, *rows = outcome.out.splitlines()
    assert {"layer", "seed", "method", "stability"} <= set(header.split())
    assert len(rows) == 18


def test_a_long_table_is_cut_after_its_first_rows(finished: Laboratory, saeens: Saeens, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli.tables, "_SHOWN_ROWS", 5)
    outcome = saeens("table", NAME, "stability")
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 6
    assert "these are the first 5 of 18 rows: --format csv or json prints all" in outcome.err
    assert len(saeens("table", NAME, "stability", "--format", "csv").out.splitlines()) == 19


def test_the_summary_fits_into_120_columns(finished: Laboratory):
    printed = io.StringIO()
    run_and_print(NAME, console=Console(file=printed, width=120))
    lines = printed.getvalue().splitlines()
    header = next(line for line in lines if line.startswith("method"))
    assert header.split()[:7] == ["method", "n", "EV", "CE", "rec.", "bits", "L0"]
    assert sum(line.startswith("expanded_l0_matched ") for line in lines) == 1
    reconstruction = read_table(finished.root, NAME, "reconstruction").filter(method="boosting", n_members=3)
    (line,) = [line for line in lines if line.startswith("boosting")]
    assert f"{reconstruction['ce_loss_recovered'].mean():.4f}" in line
    assert f"{reconstruction['description_length_bits'].mean():.0f}" in line.split()


def test_the_cost_in_the_summary_includes_passes_over_residuals(finished: Laboratory, saeens: Saeens):
    (line,) = [line for line in saeens("run", NAME).out.splitlines() if line.startswith("boosting")]
    cost = read_table(finished.root, NAME, "cost").filter(method="boosting", n_members=3)
    assert (cost["residual_flops"] > 0).all()
    flops, seconds = ((cost[f"train_{of}"] + cost[f"residual_{of}"]).mean() for of in ("flops", "seconds"))
    assert line.split()[-2:] == [f"{flops:.2g}", f"{seconds:.1f}"]


def test_doctor_finds_nothing_wrong(finished: Laboratory, saeens: Saeens):
    outcome = saeens("doctor", "--verify")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert all(line.startswith("ok ") for line in outcome.out.splitlines())
    assert "44 read, 0 differences" in outcome.out
    assert "torch" in outcome.out


# what cannot be


@pytest.mark.parametrize("arguments", [["run"], ["run", NAME, "--layer", "one"], ["sing"], ["table", NAME, "cost", "--format", "xml"]])
def test_wrong_usage_exits_with_2(empty: Laboratory, saeens: Saeens, arguments: list[str]):
    outcome = saeens(*arguments)
    assert outcome.code == 2
    assert "Usage" in outcome.err
    assert not outcome.out


@pytest.mark.parametrize("command", [["run", "nope"], ["status", "nope"], ["table", "nope", "cost"], ["table", "..", "cost"]])
def test_an_unknown_experiment_exits_with_2_and_lists_the_known_ones(empty: Laboratory, saeens: Saeens, command: list[str]):
    _assert_one_message(saeens(*command), 2, command[1], f"there are: {NAME}")


@pytest.mark.parametrize(
    "escapes", ["\x1b[2J{}\x1b[31m", "\x1b]0;title\x07{}", "\x1b]8;;http://evil.example\x1b\\{}", "\x9b2J{}\x7f", "\x1bc\x08{}\r"]
)
@pytest.mark.parametrize("command", [["status", "{}"], ["run", "{}"], ["{}"], ["--{}"], ["report", "--layer", "1", "{}"]])
def test_escape_sequences_of_arguments_do_not_reach_the_terminal(empty: Laboratory, saeens: Saeens, command: list[str], escapes: str):
    outcome = saeens(*(part.format(escapes.format("other")) for part in command))
    assert outcome.code == 2
    said = outcome.out + outcome.err
    assert "other" in said
    assert "evil.example" not in said
    assert said.replace("\n", "").isprintable()


@pytest.mark.parametrize("table", ["speed", "../reconstruction"])
def test_an_unknown_table_exits_with_2_and_lists_the_known_ones(finished: Laboratory, saeens: Saeens, table: str):
    _assert_one_message(saeens("table", NAME, table), 2, table, *(each.name for each in listed(over_experiments=False)))


def test_a_missing_table_exits_with_1_and_names_the_command_that_computes_it(empty: Laboratory, saeens: Saeens):
    _assert_one_message(saeens("table", NAME, "cost"), 1, "cost", f"saeens run {NAME}")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--layer", "7"], ["no layer 7", "layers 0 to 2"]),
        (["--layer", "1", "--layer", "-1"], ["no layer -1", "layers 0 to 2"]),
        (["--seed", "9"], ["no seed 9", "it has 1, 2"]),
        (["--select", "bagging/member_4"], ["bagging/member_4", f"{NAME}/bagging/member_3", f"{NAME}/eval/stability"]),
        (["--select", ""], ["--select"]),
    ],
    ids=["layer", "negative layer", "seed", "asset", "no asset"],
)
def test_unknown_assets_layers_and_seeds_exit_with_2_and_list_the_known_ones(
    empty: Laboratory, saeens: Saeens, arguments: list[str], parts: list[str]
):
    _assert_one_message(saeens("run", NAME, *arguments), 2, *parts)
    assert not (empty.root / "sources").exists()


def test_k_larger_than_d_sae_exits_with_2(empty: Laboratory, saeens: Saeens):
    empty.declare(sae=EXPERIMENT["sae"] | {"k": 33})
    _assert_one_message(saeens("run", NAME), 2, "k = 33 is larger than d_sae = 32")
    assert not (empty.root / "sources").exists()


def test_an_unknown_module_exits_with_2(empty: Laboratory, saeens: Saeens):
    empty.declare(source={"hook": "gpt_neox.layers.{layer}.router"})
    _assert_one_message(saeens("run", NAME), 2, "gpt_neox.layers.1.router", "it has", "gpt_neox.layers.1.mlp")
    assert not empty.root.exists()


def test_a_context_longer_than_the_model_allows_exits_with_2(empty: Laboratory, saeens: Saeens):
    empty.declare(source={"context_length": 17})
    _assert_one_message(saeens("run", NAME), 2, "context_length: 17", "takes 2 to 16")
    assert not empty.root.exists()


def test_a_missing_local_model_is_named(empty: Laboratory, saeens: Saeens):
    empty.declare(source={"language_model": "/no/such/model"})
    _assert_one_message(saeens("run", NAME), 2, "/no/such/model")
    assert not (empty.root / "sources").exists()


def test_a_broken_experiment_file_exits_with_2_and_affects_no_other(empty: Laboratory, saeens: Saeens):
    sound = (empty.folder / NAME / "defs.yaml").read_text()
    file = empty.write(
        sound.replace("k: 4", "k: lots").replace("name: tiny", "name: broken").replace("source: tiny", "source: broken"), "broken"
    )
    line = sound.splitlines().index("    k: 4") + 1
    where = f"{file}:{line}: attributes.sae.k: "
    _assert_one_message(saeens("run", "broken"), 2, where, "'lots'", f"there are: {NAME}")
    listing = saeens("experiments")
    assert listing.code == 2
    assert NAME in listing.out
    assert where in listing.message
    assert saeens("status", NAME).code == 0
    doctor = saeens("doctor")
    assert doctor.code == 1
    assert where in " ".join(doctor.out.split())


def test_too_short_a_corpus_exits_with_1_and_the_whole_message(empty: Laboratory, saeens: Saeens):
    empty.declare(source={"train_tokens": 10**6})
    outcome = saeens("run", NAME)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "with packing: document and drop: [first], but 1,000,000 were asked for: lower `train_tokens` to at most" in outcome.message


@pytest.fixture
def unwritable(empty: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root below a regular file: the superuser, too, cannot write there."""
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "data"
    monkeypatch.setenv("SAEENS_DATA", str(root))
    return root


def test_a_read_only_root_exits_with_1(unwritable: Path, saeens: Saeens):
    _assert_one_message(saeens("run", NAME), 1, f"{unwritable} cannot be written", "SAEENS_DATA")


def test_doctor_finds_a_read_only_root(unwritable: Path, saeens: Saeens):
    outcome = saeens("doctor")
    assert outcome.code == 1
    assert f"{unwritable} cannot be written" in outcome.out


def test_brackets_in_a_path_are_printed_as_they_are(empty: Laboratory, tmp_path: Path, saeens: Saeens, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "[red]").write_text("")
    (tmp_path / "a[").mkdir()
    (tmp_path / "a[" / "b]").write_text("")
    for root in (tmp_path / "[red]" / "data", tmp_path / "a[" / "b]" / "data"):
        monkeypatch.setenv("SAEENS_DATA", str(root))
        _assert_one_message(saeens("run", NAME), 1, f"{root} cannot be written")


# damage


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_flip_a_byte, Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1])])
def test_doctor_verify_finds_a_damaged_artefact(finished: Laboratory, saeens: Saeens, damage: Callable[[Path], None]):
    file = finished.artefact("bagging/member_3", 1).path / "sae_weights.safetensors"
    damage(file)
    outcome = saeens("doctor", "--verify")
    assert (outcome.code, outcome.err) == (1, "")
    assert str(file) in outcome.out
    assert "1 difference from" in outcome.out
    assert saeens("doctor").code == 0


def test_doctor_verify_finds_a_damaged_table_and_checks_the_rest(finished: Laboratory, saeens: Saeens):
    tables = [finished.artefact(f"eval/{name}", 1).path for name in ("cost", "members")]
    tables[0].write_bytes(tables[0].read_bytes()[:-100])
    content = tables[1].read_bytes()
    tables[1].write_bytes(content[:4] + bytes(60) + content[64:])
    outcome = saeens("doctor", "--verify")
    assert (outcome.code, outcome.err) == (1, "")
    assert all(str(table) in outcome.out for table in tables)


def test_status_shows_a_truncated_artefact_with_its_sizes_and_the_rest(
    finished: Laboratory, saeens: Saeens, monkeypatch: pytest.MonkeyPatch
):
    file = finished.artefact("bagging/member_3", 1).path / "sae_weights.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(output.out, "width", 1000)
    outcome = saeens("status", NAME)
    assert (outcome.code, outcome.err) == (0, "")
    (line,) = [line for line in outcome.out.splitlines() if line.split()[3:4] == ["damaged"]]
    assert line.split()[:4] == [f"{NAME}/bagging/member_3", str(LAYER), "1", "damaged"]
    assert f"{file} has {size - 1} bytes, its recipe says {size} bytes" in line
    assert f"{NAME}/eval/stability" in outcome.out


# tracebacks


def test_the_version_is_that_of_the_package(saeens: Saeens):
    code, out, _ = saeens("--version")
    assert (code, out.split(",")[0]) == (0, f"saeens {importlib.metadata.version('saeens')}")


def test_a_shell_completes_names_of_experiments():
    asked = {"_SAEENS_COMPLETE": "complete_bash", "COMP_WORDS": "saeens run quickstart_", "COMP_CWORD": "2"}
    command = [Path(sys.executable).parent / "saeens"]
    completed = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=True).stdout.split()
    assert {"quickstart_full", "quickstart_random"} <= set(completed)
    assert "quickstart" not in completed


def test_debug_prints_the_traceback(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["saeens", "--debug", "run", "nope"])
    with pytest.raises(ConfigurationError):
        cli.main()


def test_an_unexpected_error_is_one_message_without_debug(empty: Laboratory, saeens: Saeens, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("[a] broken thing")

    monkeypatch.setattr(runs, "experiment_status", fail)
    _assert_one_message(saeens("status", NAME), 1, "ZeroDivisionError: [a] broken thing", "saeens --debug")
    monkeypatch.setattr(sys, "argv", ["saeens", "--debug", "status", NAME])
    with pytest.raises(ZeroDivisionError):
        cli.main()


# interrupts


class _Referent:
    """Something that a weak reference can be taken to."""


def _interrupt_training(monkeypatch: pytest.MonkeyPatch, signum: signal.Signals = signal.SIGINT) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signum)
        time.sleep(60)

    monkeypatch.setattr(training, "train_saes", interrupt)


def _terminate_training(monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt_training(monkeypatch, signal.SIGTERM)


def _interrupt_in_a_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python swallows exceptions of a weak reference's callback."""
    partition_key = runs.partition_key

    def interrupt(*arguments: Any) -> str | None:
        referent = _Referent()
        reference = weakref.ref(referent, lambda _: signal.raise_signal(signal.SIGINT))
        del referent
        assert reference() is None
        return partition_key(*arguments)

    monkeypatch.setattr(runs, "partition_key", interrupt)


def _interrupt_at_the_end_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster's own handler of signals records an interrupt there, and nothing reads the record."""
    handle, handler = dg.DagsterInstance.handle_new_event, signal.getsignal(signal.SIGINT)

    def interrupt(self: dg.DagsterInstance, event: dg.EventLogEntry, *options: Any, **named: Any) -> None:
        handle(self, event, *options, **named)
        if event.is_dagster_event and event.dagster_event_type == dg.DagsterEventType.RUN_SUCCESS:
            assert signal.getsignal(signal.SIGINT) != handler
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(dg.DagsterInstance, "handle_new_event", interrupt)


INTERRUPTS = {
    "training": _interrupt_training,
    "SIGTERM in training": _terminate_training,
    "callback": _interrupt_in_a_callback,
    "end of a stage": _interrupt_at_the_end_of_a_stage,
}


def run_interrupted(model: str, folder: str, root: str, interrupt: str, *arguments: str) -> None:
    """Press Ctrl-C during `saeens run tiny ...`; called in a child process."""
    swallowed: list[str] = []
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(printed):
        Laboratory(Path(model), Path(folder), Path(root)).activate(monkeypatch)
        INTERRUPTS[interrupt](monkeypatch)
        monkeypatch.setattr(sys, "argv", ["saeens", "run", NAME, *arguments])
        monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: swallowed.append(unraisable.exc_type.__name__))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    child_process.tell(code=ended.value.code, err=printed.getvalue(), swallowed=swallowed)


def _interrupted(laboratory: Laboratory, interrupt: str, *arguments: object) -> tuple[Outcome, list[str]]:
    """Return the output of a child process: the outcome, and exceptions that Python swallowed."""
    child = child_process.start(run_interrupted, laboratory.model, laboratory.folder, laboratory.root, interrupt, *arguments)
    told = child_process.finish(child)
    return Outcome(told["code"], "", told["err"]), told["swallowed"]


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", ["training", "SIGTERM in training"])
def test_an_interrupt_during_training_exits_with_130_names_the_artefact_and_keeps_finished_ones(empty: Laboratory, interrupt: str):
    outcome, _ = _interrupted(empty, interrupt, "--select", "bagging/member_1", "--seed", SEEDS[0])
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert "Finished artefacts are kept" in outcome.message
    assert f"{NAME}/bagging" in outcome.message
    assert empty.artefact("activations")


@pytest.mark.slow
def test_an_interrupt_swallowed_by_python_between_stages_ends_the_run(empty: Laboratory):
    outcome, swallowed = _interrupted(empty, "callback", "--select", "activations")
    assert swallowed == ["KeyboardInterrupt"]
    assert outcome.code == 130
    assert "finished artefacts are kept" in outcome.message
    assert empty.artefact("tokens", layer=None)
    assert not (empty.root / "sources" / NAME / f"layer={LAYER}").exists()


@pytest.mark.slow
def test_an_interrupt_dropped_by_dagster_at_the_end_of_a_stage_ends_the_run(empty: Laboratory):
    outcome, _ = _interrupted(empty, "end of a stage", "--select", "tokens")
    assert outcome.code == 130
    assert empty.artefact("tokens", layer=None)
