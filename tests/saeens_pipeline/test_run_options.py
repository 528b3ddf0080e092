"""Options of `saeens run`: --dry-run, --force and --set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from command_line import Saeens
from tiny_experiment import EXPERIMENT, LAYER, MEMBERS, NAME, SEEDS, SOURCE, Laboratory, experiment_file, experiment_settings, status_of

from saeens_pipeline.assets import training
from saeens_pipeline.assets.declarations import FORCED, Force
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models import caching
from saeens_pipeline.language_models.pinned_packages import PinnedPackages
from saeens_pipeline.settings.changes import Change
from saeens_pipeline.storage.disk import writing_nothing
from saeens_pipeline.storage.recipes import Artefact, all_artefacts, read_artefact


def _records(laboratory: Laboratory) -> dict[Path, dict[str, Any]]:
    """Everything about each artefact on disk, by path, for comparison."""
    found = [each.artefact for each in all_artefacts(laboratory.root) if not isinstance(each, SaeensError)]
    return {each.path: vars(each) | {"written": _written(each)} for each in found}


def _written(artefact: Artefact) -> float:
    return artefact.path.stat().st_mtime_ns


def _states() -> set[str]:
    return {each.state for each in status_of(NAME)}


# --dry-run


def test_a_dry_run_lists_the_artefacts_in_the_order_of_their_runs_and_writes_nothing(empty: Laboratory, saeens: Saeens):
    code, out, _ = saeens("run", NAME, "--dry-run", "--format", "json")
    rows = json.loads(out)
    assert code == 0
    assert [(row["asset"], row["layer"], row["seed"]) for row in rows[:2]] == [
        (f"{NAME}/tokens", None, None),
        (f"{NAME}/activations", 1, None),
    ]
    assert list(dict.fromkeys(row["seed"] for row in rows)) == [None, *SEEDS]
    assert {(row["state"], row["why"]) for row in rows} == {("missing", "not computed yet")}
    assert not empty.root.exists()
    made = empty.run()
    assert f"{NAME}: {len(rows)} artefacts to compute" in made


def test_a_dry_run_gives_the_reason_and_computes_nothing(finished: Laboratory, saeens: Saeens):
    assert saeens("run", NAME, "--dry-run").out == "nothing to do: all selected artefacts are fresh\n"
    finished.declare(sae=EXPERIMENT["sae"] | {"k": 5})
    before = _records(finished)
    code, out, err = saeens("run", NAME, "--dry-run", "--select", "bagging/member_1", "--seed", SEEDS[0])
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith(f"{NAME}/")]
    assert line.split()[:4] == [f"{NAME}/bagging/member_1", str(LAYER), str(SEEDS[0]), "stale"]
    assert "setting sae.k: 4 -> 5" in line
    assert "1 artefact would be computed (1 stale), in 1 run;" in out
    assert _records(finished) == before


def test_a_dry_run_is_refused_as_the_run_would_be(empty: Laboratory, saeens: Saeens):
    empty.declare(sae=EXPERIMENT["sae"] | {"k": 33})
    refused = saeens("run", NAME, "--dry-run")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == saeens("run", NAME).err
    assert "k = 33 is larger than d_sae = 32" in refused.message
    assert not empty.root.exists()


def test_checks_that_write_nothing_keep_no_texts(tmp_path: Path):
    with writing_nothing():
        PinnedPackages(tmp_path).require_readable()
    assert list(tmp_path.iterdir()) == []


# --force


def test_one_artefact_is_computed_anew_with_the_same_bits(finished: Laboratory, saeens: Saeens):
    before = _records(finished)
    code, out, err = saeens("run", NAME, "--force", "--select", "bagging/member_1", "--seed", SEEDS[0])
    assert (code, err) == (0, "")
    assert f"{NAME}: 1 artefact to compute" in out
    anew, after = finished.artefact("bagging/member_1", SEEDS[0]), _records(finished)
    changed = {path for path in before if before[path] != after[path]}
    assert {path for path in changed if "reports" not in path.parts} == {anew.path}
    assert anew.data_version == before[anew.path]["data_version"]
    assert anew.provenance["run_id"] != before[anew.path]["provenance"]["run_id"]
    assert _states() == {"fresh"}


def test_the_old_artefact_stays_until_the_new_one_is_whole(finished: Laboratory, saeens: Saeens, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise SaeensError("no power")

    before = _records(finished)
    monkeypatch.setattr(training, "_write", fail)
    refused = saeens("run", NAME, "--force", "--select", "bagging/member_1")
    assert (refused.code, "no power" in refused.err) == (1, True)
    assert _records(finished) == before
    assert _states() == {"fresh"}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the SAEs of each training."""
    train, names = training.train_saes, []

    def counted(context: Any, tasks: Any, *arguments: Any) -> None:
        names.append([task.declaration.address.name for task in tasks])
        train(context, tasks, *arguments)

    monkeypatch.setattr(training, "train_saes", counted)
    return names


def test_all_is_computed_anew_once_and_equal_recipes_are_linked(finished: Laboratory, saeens: Saeens, trained: list[list[str]]):
    times = {"reports", "cost", "marginal_gain"}  # their content depends on the time that training takes
    before = {path: each["data_version"] for path, each in _records(finished).items() if not times.intersection(path.parts)}
    assert saeens("run", NAME, "--force").code == 0
    members = [f"member_{j}" for j in range(1, MEMBERS + 1)]
    assert trained == [members, ["expanded"], ["expanded_l0_matched"], ["round_2"], ["round_3"]] * len(SEEDS)
    after = _records(finished)
    assert {path: each["data_version"] for path, each in after.items() if path in before} == before
    (request,) = {each["provenance"][FORCED] for path, each in after.items() if "leaderboard" not in path.parts}
    assert len(request) == 8
    member, first = (finished.artefact(f"{name}", SEEDS[0]) for name in ("bagging/member_1", "boosting/round_1"))
    assert first.provenance["same_as"] == f"{NAME}/bagging/member_1"
    assert len({(each.path / "sae_weights.safetensors").stat().st_ino for each in (member, first)}) == 1
    residuals = [finished.artefact(f"boosting/residual_{j}", SEEDS[0]) for j in range(1, MEMBERS)]
    assert [bool(each.files) for each in residuals] == [False] * (MEMBERS - 2) + [True]  # keep_residuals: last
    assert _states() == {"fresh"}


def test_a_link_that_is_selected_alone_is_trained(finished: Laboratory, saeens: Saeens, trained: list[list[str]]):
    before = finished.artefact("boosting/round_1", SEEDS[0])
    assert "same_as" in before.provenance
    assert saeens("run", NAME, "--force", "--select", "boosting/round_1", "--seed", SEEDS[0]).code == 0
    after = finished.artefact("boosting/round_1", SEEDS[0])
    assert trained == [["round_1"]]
    assert "same_as" not in after.provenance
    assert after.data_version == before.data_version


def test_layers_that_are_computed_anew_together_share_a_forward_pass(empty: Laboratory, saeens: Saeens, monkeypatch: pytest.MonkeyPatch):
    cache, passes = caching.cache_activations, []

    def counted(model: Any, tokens: Any, hook: str, folders: dict[int, Path], *arguments: Any, **named: Any) -> Any:
        passes.append(sorted(folders))
        return cache(model, tokens, hook, folders, *arguments, **named)

    monkeypatch.setattr(caching, "cache_activations", counted)
    for options in ([], ["--force"], []):
        assert saeens("run", NAME, "--layer", 0, "--layer", 1, "--select", "activations", *options).code == 0
    assert passes == [[0, 1], [0, 1]]


def test_a_dry_run_lists_what_would_be_computed_anew(finished: Laboratory, saeens: Saeens):
    out = saeens("run", NAME, "--force", "--dry-run", "--select", "bagging/member_2", "--format", "json").out
    assert [(row["asset"], row["seed"], row["state"], row["why"]) for row in json.loads(out)] == [
        (f"{NAME}/bagging/member_2", seed, "fresh", "computed anew: --force") for seed in SEEDS
    ]


def test_what_this_machine_could_only_compute_in_part_is_not_computed_anew(finished: Laboratory):
    from dataclasses import replace

    declaration = finished.declarations()[f"{NAME}/eval/cost"]
    assert Force("request").concerns(declaration)
    assert not Force("request", frozenset({f"{NAME}/eval/members"})).concerns(declaration)
    assert not Force("request").concerns(replace(declaration, unavailable=lambda: {"endpoint": "not configured"}))


# --set


def test_a_setting_of_the_command_line_is_in_the_recipe_and_the_record(finished: Laboratory, saeens: Saeens):
    before = _records(finished)
    selected = ("--select", "bagging/member_1", "--seed", SEEDS[0])
    assert saeens("run", NAME, "--set", "sae.k=2", "--set", "training.learning_rate=0.5", *selected).code == 0
    made = finished.artefact("bagging/member_1", SEEDS[0])
    assert (made.recipe["settings"]["sae"]["k"], made.recipe["settings"]["training"]["learning_rate"]) == (2, 0.5)
    assert made.provenance["set_on_command_line"] == {"sae.k": 2, "training.learning_rate": 0.5}
    after = _records(finished)
    assert {path for path in before if before[path] != after[path] and "reports" not in path.parts} == {made.path}
    reasons = {each.declaration.address.name: each.reason for each in status_of(NAME) if each.partition.seed == SEEDS[0]}
    assert "setting sae.k: 2 -> 4" in reasons["member_1"]
    assert "set on the command line: sae.k=2, training.learning_rate=0.5" in saeens("lineage", made.data_version).out
    assert saeens("run", NAME, *selected).code == 0
    again = finished.artefact("bagging/member_1", SEEDS[0])
    assert again.data_version == before[made.path]["data_version"]
    assert "set_on_command_line" not in again.provenance


def test_the_run_is_tagged_with_the_settings(empty: Laboratory, saeens: Saeens, monkeypatch: pytest.MonkeyPatch):
    told: list[dict[str, str]] = []
    execute = dg.JobDefinition.execute_in_process

    def recorded(job: dg.JobDefinition, *arguments: Any, **named: Any) -> Any:
        told.append(named["tags"])
        return execute(job, *arguments, **named)

    monkeypatch.setattr(dg.JobDefinition, "execute_in_process", recorded)
    assert saeens("run", NAME, "--set", "train_tokens=500", "--set", "drop=[]", "--select", "tokens").code == 0
    assert told[0]["saeens/set"] == "train_tokens=500, drop=[]"
    made = empty.artefact("tokens", layer=None)
    assert made.provenance["set_on_command_line"] == {"train_tokens": 500, "drop": []}
    assert (made.recipe["settings"]["train_tokens"], made.recipe["settings"]["drop"]) == (500, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sae.k=0", "--set sae.k: has to be greater than 0 (found: 0)"),
        ("sae.k=lots", "--set sae.k: expected a whole number (an integer) (found: 'lots')"),
        ("sae.k=33", "--set sae.k: sae: "),
        ("sae.kk=3", "--set sae.kk: unknown key; one of: "),
        ("training.learning_rat=3", "did you mean learning_rate? (found: 3)"),
        ("baseline=3", "--set baseline: unknown key; one of: "),
        ("baseline=3", "did you mean baselines?"),
        ("ensemble.seeds=3", "--set ensemble.seeds: expected a list (found: 3)"),
        ("ensemble.members=2", "specialised.0.member: there is no member 3: the ensemble has 2 (with --set ensemble.members)"),
        (
            "baselines.first=3",
            "--set baselines.first: baselines is ['expanded', 'expanded_l0_matched'] in the experiment file, without fields",
        ),
        ("evaluations=[speed]", "--set evaluations: evaluations.0: "),
        ("context_length=17", "--set context_length: 17 is not possible: "),
        ("sae.k", "--set sae.k: write FIELD=VALUE"),
        ("=3", "write FIELD=VALUE"),
        ("sae={k: 3}", "--set sae: '{k: 3}' is a mapping: give each field, such as --set sae.k=VALUE"),
        ("sae.k=[", "--set sae.k: '[' is no YAML value"),
        ("sae.k=!!python/name:os.system x", "--set sae.k: "),
        ("name=other", "--set name: another name is another experiment"),
        ("layers=[0]", "--set layers: `--layer` chooses layers"),
    ],
)
def test_wrong_settings_are_refused_by_their_option(empty: Laboratory, saeens: Saeens, given: str, message: str):
    empty.declare(ensemble=EXPERIMENT["ensemble"] | {"specialised": [{"member": 3, "start_from": 1}]})
    refused = saeens("run", NAME, "--set", given)
    assert refused.code == 2
    assert message in refused.message
    if given != "ensemble.members=2":
        assert "defs.yaml" not in refused.message
    assert not empty.root.exists()


def test_a_setting_is_given_once(empty: Laboratory, saeens: Saeens):
    refused = saeens("run", NAME, "--set", "sae.k=3", "--set", "sae.k=4")
    assert (refused.code, refused.message) == (2, "error: --set sae.k is given twice")


def test_another_wrong_file_is_not_blamed_on_the_option(empty: Laboratory, saeens: Saeens):
    empty.write("type: nothing\n", "broken")
    assert saeens("run", NAME, "--set", "sae.k=3", "--dry-run").code == 0


def test_a_source_that_other_experiments_use_is_not_changed(empty: Laboratory, saeens: Saeens):
    empty.write(experiment_file(("EnsembleExperiment", experiment_settings(name="other"))), "other")
    refused = saeens("run", NAME, "--set", f"train_tokens={SOURCE['train_tokens'] // 2}")
    assert refused.code == 2
    assert f"--set train_tokens: this is a field of the source {NAME}, which other uses, too" in refused.message
    assert saeens("run", NAME, "--set", "sae.k=3", "--dry-run").code == 0


@pytest.fixture
def swept(empty: Laboratory) -> Laboratory:
    empty.declare(sae={"architecture": "topk", "expansion": 2}, sweep={"k": [3, 4]})
    return empty


def test_a_setting_of_a_sweep_concerns_all_its_experiments(swept: Laboratory, saeens: Saeens):
    options = ("--select", "bagging/member_1", "--seed", SEEDS[0])
    assert saeens("run", NAME, "--set", "sae.expansion=3", "--set", "train_tokens=500", *options).code == 0
    records = [read_artefact(file.parent) for file in sorted(swept.root.glob("experiments/*/*/*/bagging/member_1/recipe.json"))]
    assert [(each.recipe["settings"]["sae"]["k"], each.recipe["settings"]["sae"]["expansion"]) for each in records] == [(3, 3), (4, 3)]


def test_the_field_of_a_sweep_has_its_values_from_the_sweep(swept: Laboratory, saeens: Saeens):
    for name in (NAME, f"{NAME}__k_3"):
        refused = saeens("run", name, "--set", "sae.k=5")
        assert (refused.code, f"--set sae.k: the sweep {NAME} gives this field its values" in refused.message) == (2, True)
    refused = saeens("run", f"{NAME}__k_3", "--set", "train_tokens=500")
    assert f"which {NAME}__k_4 uses, too" in refused.message


def test_a_wrong_sae_of_a_sweep_is_named_by_file_and_line(empty: Laboratory, saeens: Saeens):
    file = empty.declare(sae={"architecture": "topk", "expansion": 2}, sweep={"k": [33]})
    refused = saeens("run", f"{NAME}__k_33")
    assert refused.code == 2
    assert f"{file}:" in refused.message
    assert "k = 33 is larger than d_sae = 32" in refused.message


def test_a_plan_takes_settings(empty: Laboratory, saeens: Saeens):
    def disk(*options: str) -> float:
        rows = json.loads(saeens("plan", NAME, "--format", "json", *options).out)
        return next(row["amount"] for row in rows if (row["section"], row["item"]) == ("disk", "tokens"))

    assert disk("--set", "train_tokens=200") == disk() / 2


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (("sae", "k"), {"sae": {"k": 9}, "twin": {"k": 1}, "list": [{"k": 1}, 2]}),
        (("list", "0", "k"), {"sae": {"k": 1}, "twin": {"k": 1}, "list": [{"k": 9}, 2]}),
        (("checks", "l0_tolerance"), {"sae": {"k": 1}, "twin": {"k": 1}, "list": [{"k": 1}, 2], "checks": {"l0_tolerance": 9}}),
    ],
)
def test_a_change_leaves_other_fields_also_aliases(location: tuple[str, ...], expected: dict[str, Any]):
    shared = {"k": 1}
    attributes = {"sae": shared, "twin": shared, "list": [shared, 2]}
    assert Change("type", "name", location, 9).applied(attributes) == expected
    assert shared == {"k": 1}
