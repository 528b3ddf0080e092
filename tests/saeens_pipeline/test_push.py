"""`saeens push` and `saeens pull`, with a hub on this machine."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from fake_hub import UNREACHABLE, FakeHub, reach
from huggingface_hub import HfApi, constants
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory
from tiny_models import D_MODEL

import saeens_models as sm
from saeens_models import interop
from saeens_pipeline import cli
from saeens_pipeline.assets.publication import without_paths
from saeens_pipeline.report.model_card import BIBTEX
from saeens_pipeline.storage.names import Address, Partition

Saeens = Callable[..., tuple[int, str, str]]
TOKEN = "hf_" + "secret" * 5
REPO = "some-lab/ensembles"
PLACE, REPOSITORY = f"hub:{REPO}", f"models/{REPO}"
WHERE = f":layer={LAYER},seed={SEEDS[0]}"
BOOSTING, BAGGING = f"{NAME}/boosting{WHERE}", f"{NAME}/bagging{WHERE}"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def saeens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Saeens:
    """Runs a command; returns its exit code, and what it prints on standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["saeens", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert TOKEN not in printed.out + printed.err
        return int(ended.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def hub(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    """A hub that a token may write to, large files by LFS."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake_hub.tokens[TOKEN] = "write"
    return fake_hub


def _on_disk(laboratory: Laboratory, name: str) -> tuple[Any, list[Path]]:
    """The ensemble or SAE of a name such as `bagging/member_1`, and the folders of its SAEs."""
    kind, _, single = name.partition("/")
    address = Address(NAME, kind, single or f"{kind}_ensemble")  # pyright: ignore[reportArgumentType]
    path = laboratory.store.require(address, Partition(LAYER, SEEDS[0])).path
    if single:
        return sm.load_sae(path), [path]
    member = "round" if kind == "boosting" else "member"
    return sm.load_ensemble(path), [path.parent / f"{member}_{j}" for j in range(1, MEMBERS + 1)]


def _codes(sae: Any) -> torch.Tensor:
    x = torch.randn(20, sae.W_dec.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return sae.encode(x)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("where", ["", "/layer_1/some.folder", "@trial"])
@pytest.mark.parametrize("name", ["boosting", "bagging", "bagging/member_1", "baseline/expanded"])
def test_a_push_is_one_commit_that_loads_with_equal_codes_and_pulls_as_it_was(
    finished: Laboratory, hub: FakeHub, saeens: Saeens, tmp_path: Path, *, name: str, where: str
):
    code, out, err = saeens("push", f"{NAME}/{name}{WHERE}", PLACE + where, "--license", "cc-by-4.0")
    assert code == 0, err
    repository = hub.pushed[REPOSITORY]
    assert len(repository.messages) == 2  # that of the new repository, and one
    branch, folder = ("trial", "") if "@" in where else ("main", where.removeprefix("/"))
    commit = repository.branches[branch]
    assert out.splitlines()[-1] == f"hub:{REPO}{f'/{folder}' if folder else ''}@{commit}"
    prefix = f"{folder}/" if folder else ""
    there = {path.removeprefix(prefix): content for path, content in repository.files(branch).items() if path.startswith(prefix)}
    there.pop(".gitattributes", None)

    ours, folders = _on_disk(finished, name)
    for path in folders:
        inside = f"{path.name}/" if len(folders) > 1 else ""
        assert _sha256(there[f"{inside}sae_weights.safetensors"]) == _sha256((path / "sae_weights.safetensors").read_bytes())
    listed = json.loads(there["lineage.json"])["files"]
    assert {file: [len(content), _sha256(content)] for file, content in there.items() if file != "lineage.json"} == listed
    loaded = interop.load(f"{PLACE}{where}")
    assert torch.equal(_codes(loaded), _codes(ours))
    assert loaded.metadata["model_name"] == "tiny_model"

    code, _, err = saeens("pull", f"{PLACE}{where}", tmp_path / "new" / "pulled")
    assert code == 0, err
    pulled = tmp_path / "new" / "pulled"
    assert {file.relative_to(pulled).as_posix(): file.read_bytes() for file in pulled.rglob("*") if file.is_file()} == there
    assert [each.name for each in pulled.parent.iterdir()] == ["pulled"]
    assert torch.equal(_codes(interop.load(pulled)), _codes(ours))


def test_a_dry_run_prints_files_and_card_and_sends_no_request(
    finished: Laboratory, hub: FakeHub, saeens: Saeens, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_TOKEN")  # it needs none
    code, out, err = saeens("push", BOOSTING, PLACE, "--dry-run")
    assert (code, hub.requests, hub.pushed) == (0, [], {}), err
    assert "nothing was sent" in err
    assert "the model card states no licence" in err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    files = hub.pushed[REPOSITORY].files()
    assert files["README.md"].decode() in out
    assert re.findall(r"^(\S+)  +[\d.,]+ \w+$", out.split("---")[0], re.MULTILINE) == _in_order(out, files)


def _in_order(out: str, files: dict[str, bytes]) -> list[str]:
    return sorted(files.keys() - {".gitattributes"}, key=lambda name: out.index(f"\n{name} "))


def test_figures_of_the_card_are_those_of_the_tables(finished: Laboratory, hub: FakeHub, saeens: Saeens):
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    files = hub.pushed[REPOSITORY].files()
    card = files["README.md"].decode()
    cells = {row[0]: row[1:] for row in _rows(card) if len(row) == 4}

    def column(table: str, name: str, seed: int) -> float:
        part = finished.root / "tables" / NAME / table
        rows = pl.concat(pl.read_parquet(file, hive_partitioning=False) for file in part.rglob("*.parquet"))
        return rows.filter(seed=seed, method="boosting", n_members=MEMBERS)[name].item()

    for label, table, name, form in (
        ("explained variance", "reconstruction", "explained_variance", ".4f"),
        ("mean squared error", "reconstruction", "mse", ".4g"),
        ("dead features", "reconstruction", "dead_features", ".1%"),
        ("stability", "stability", "stability", ".4f"),
        ("connectivity", "coactivation", "connectivity", ".4f"),
    ):
        values = [column(table, name, seed) for seed in SEEDS]
        assert cells[label][0] == format(values[0], form)
        assert cells[label][1] == ", ".join(format(value, form) for value in values)
    differences = pl.read_parquet(next((finished.root / "tables" / NAME / "differences").rglob(f"seed={SEEDS[0]}/*.parquet")))
    of_single = differences.filter(metric="explained_variance", method="single", other_method="boosting")
    (found,) = (row for row in _rows(card) if row[0] == "explained_variance" and row[1].startswith("single"))
    assert found[2] == f"{-of_single['difference'].item():+.4g}"  # boosting minus single
    assert found[3] == f"{-of_single['high'].item():+.4g} to {-of_single['low'].item():+.4g}"
    members = pl.read_parquet(io.BytesIO(files["tables/members.parquet"])).sort("member")
    assert [row[1] for row in _rows(card) if len(row) == 5 and row[0].isdigit()] == [f"{ev:.4g}" for ev in members["explained_variance"]]
    assert "* `concept_detection`: How much of a concept is in a few features?" in card


def _rows(card: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]


def test_tables_have_the_rows_of_the_subject_alone(finished: Laboratory, hub: FakeHub, saeens: Saeens):
    assert saeens("push", BAGGING, PLACE)[0] == 0
    files = hub.pushed[REPOSITORY].files()
    tables = {Path(name).stem: pl.read_parquet(io.BytesIO(content)) for name, content in files.items() if name.startswith("tables/")}
    assert {"reconstruction", "members", "stability", "differences", "cost", "training_curves"} <= tables.keys()
    assert tables["reconstruction"].select("method", "n_members", "seed").rows() == [("bagging", n, SEEDS[0]) for n in (1, 2, 3)]
    assert tables["members"]["member"].to_list() == [1, 2, 3]
    pairs = tables["differences"].select("method", "other_method").unique().rows()
    assert pairs
    assert all("bagging" in pair for pair in pairs)
    of_stability = json.loads(files["lineage.json"])["tables"][[*tables].index("stability")]
    assert of_stability["asset"] == f"{NAME}/eval/stability"


def test_rows_of_other_versions_of_the_saes_are_left_out(finished: Laboratory, hub: FakeHub, saeens: Saeens):
    """An SAE that was trained again is not described by the tables of the one before."""
    bagging = finished.root / "experiments" / NAME / f"layer={LAYER}" / f"seed={SEEDS[0]}" / "bagging"
    shutil.rmtree(bagging / "member_1")
    shutil.copytree(bagging / "member_2", bagging / "member_1")
    code, out, err = saeens("push", BAGGING, PLACE)
    assert (code, out) == (1, "")
    assert re.search(r"is the ensemble of member_1 \w+, which is \w+ now: `saeens run tiny` computes the ensemble again", err)
    shutil.rmtree(bagging / "member_2")
    shutil.copytree(bagging / "member_3", bagging / "member_2")
    other_seed = bagging.parents[1] / f"seed={SEEDS[1]}" / "bagging"
    shutil.rmtree(bagging / "member_3")
    shutil.copytree(other_seed / "member_3", bagging / "member_3")
    assert saeens("push", f"{NAME}/bagging/member_3{WHERE}", PLACE, "--dry-run")[1].count("tables/") == 1  # "All rows are in `tables/`"


def test_a_lineage_leads_to_the_language_model_and_has_no_paths_of_this_machine(finished: Laboratory, hub: FakeHub, saeens: Saeens):
    assert str(finished.model) in (finished.artefact("activations").path / "recipe.json").read_text()
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    files = hub.pushed[REPOSITORY].files()
    for name, content in files.items():
        assert not re.search(rb"/tmp/|/root|/home/|pytest-of", content), name
    lineage = json.loads(files["lineage.json"])
    artefacts = {each["data_version"]: each for each in lineage["artefacts"]}
    assert lineage["subject"] == {
        "asset": f"{NAME}/boosting/boosting_ensemble",
        "layer": LAYER,
        "seed": SEEDS[0],
        "data_version": finished.artefact("boosting/boosting_ensemble", SEEDS[0]).data_version,
    }
    for each in artefacts.values():
        assert set(each["recipe"]["inputs"].values()) <= artefacts.keys()
    assert {each["recipe"]["builder"] for each in artefacts.values()} == {"ensemble", "sae", "residual", "activations", "tokens"}
    (activations,) = (each for each in artefacts.values() if each["recipe"]["builder"] == "activations")
    assert activations["recipe"]["settings"]["language_model"]["name"] == "tiny_model"
    assert lineage["tables"][0]["asset"] == f"{NAME}/eval/reconstruction"
    assert json.loads(files["round_1/cfg.json"])["metadata"]["model_name"] == "tiny_model"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/models/pythia", "pythia"),
        ("C:\\Users\\me\\pythia", "pythia"),
        ("~/texts/*.jsonl", "*.jsonl"),
        ("it lies in /home/me/models/pythia, and 'D:\\x\\y'", "it lies in pythia, and 'y'"),
        ({"/home/me/a": ["/home/me/b", 1, None]}, {"a": ["b", 1, None]}),
        *[
            (same, same)
            for same in ("EleutherAI/pythia-160m", "https://arxiv.org/abs/1", "shipped/quickstart/defs.yaml", "a / b", "/", 1.5)
        ],
    ],
)
def test_paths_of_this_machine_are_shortened_and_names_stay(value: object, expected: object):
    assert without_paths(value) == (expected if value != "/" else "")


def test_a_bag_of_standard_saes_has_the_plain_sae_of_saelens(empty: Laboratory, hub: FakeHub, saeens: Saeens, tmp_path: Path):
    standard = {"architecture": "standard", "expansion": 2, "l1_coefficient": 0.1}
    empty.declare(sae=standard, baselines=[])
    empty.run(seeds=SEEDS[:1], select=["bagging_ensemble"])
    assert saeens("push", BAGGING, PLACE)[0] == 0
    files = hub.pushed[REPOSITORY].files()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / name).write_bytes(files[f"sae_lens/{name}"])
    torch.testing.assert_close(_codes(interop.load(tmp_path / "plain")), _codes(interop.load(PLACE)))
    card = files["README.md"].decode()
    assert f'SAE.from_pretrained("{REPO}", "sae_lens")' in card
    assert "No table measures this SAE" in card
    assert "`reconstruction`: How well does each dictionary rebuild activations?" in card


def test_a_baseline_is_named_with_the_number_of_members_that_it_is_compared_with(empty: Laboratory, hub: FakeHub, saeens: Saeens):
    evaluations = ["reconstruction", "differences"]
    empty.declare(baselines=["compute_matched"], evaluations=evaluations, ensemble={"members": 2, "seeds": [SEEDS[0]]}, ce_loss_tokens=0)
    empty.run()
    assert saeens("push", BAGGING, PLACE)[0] == 0
    assert "one SAE, trained as long as 2 members together | " in hub.pushed[REPOSITORY].files()["README.md"].decode()


def test_metadata_of_the_card_name_the_hubs_model_and_the_licence(
    empty: Laboratory, hub: FakeHub, saeens: Saeens, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.repositories["models/some-lab/some-model"] = tiny_model
    empty.declare({"language_model": "some-lab/some-model"}, baselines=[])
    empty.run(seeds=SEEDS[:1], select=["member_1"])
    assert saeens("push", f"{NAME}/bagging/member_1{WHERE}", f"{PLACE}/inside", "--license", "apache-2.0", "--private")[0] == 0
    repository = hub.pushed[REPOSITORY]
    assert repository.private
    card = repository.files()["inside/README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "license": "apache-2.0",
        "library_name": "saeens",
        "tags": ["sparse-autoencoder", "interpretability", "saeens", "saelens", "bagging", "topk"],
        "base_model": "some-lab/some-model",
    }
    assert f"some-lab/some-model, revision `{hub.commit('models/some-lab/some-model')}`" in card
    assert f'SAE.from_pretrained("{REPO}", "inside")' in card


def test_published_members_are_named_without_their_path(empty: Laboratory, hub: FakeHub, saeens: Saeens, tmp_path: Path):
    entries = []
    for member in range(1, MEMBERS + 1):
        sae = sm.build_sae(sm.SAESettings.model_validate({"architecture": "topk", "d_sae": 24, "k": 4}).config(D_MODEL, member))
        interop.export(sae, "sparsify", tmp_path / f"download_{member}")
        entries.append({"member": member, "sae": str(tmp_path / f"download_{member}")})
    trained = dict.fromkeys(("sae", "training", "baselines", "keep_residuals"))
    empty.declare(**trained, ensemble={"members": MEMBERS, "seeds": [SEEDS[0]], "published": entries})
    empty.run(select=["bagging_ensemble"])
    assert saeens("push", BAGGING, PLACE)[0] == 0
    files = hub.pushed[REPOSITORY].files()
    assert "| member 2 | not trained here: download_2 |" in files["README.md"].decode()
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert torch.equal(_codes(interop.load(PLACE)), _codes(_on_disk(empty, "bagging")[0]))


def test_the_citation_is_that_of_the_project():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    assert f"title = {{{paper['title']}}}" in BIBTEX
    authors = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    assert f"author = {{{authors}}}" in BIBTEX
    assert f"year = {{{paper['year']}}}" in BIBTEX
    assert paper["identifiers"][0]["value"] == "arXiv:" + re.findall(r"eprint = {(.*)}", BIBTEX)[0]
    assert f"url = {{{paper['url']}}}" in BIBTEX


def test_large_files_go_in_parts_where_the_hub_says_so(finished: Laboratory, hub: FakeHub, saeens: Saeens):
    hub.part_bytes = 1000
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    assert [request for request in hub.requests if request.endswith("/whole")]
    assert torch.equal(_codes(interop.load(PLACE)), _codes(_on_disk(finished, "boosting")[0]))


@pytest.mark.parametrize(
    ("request_that_fails", "status"),
    [("PUT /lfs/", 400), ("/verify", 400), ("/objects/batch", 400), ("/preupload/", 400), ("/commit/", 400), ("/commit/", 503)],
)
def test_an_interrupted_push_leaves_no_commit(finished: Laboratory, hub: FakeHub, saeens: Saeens, *, request_that_fails: str, status: int):
    hub.fails, hub.fails_with = request_that_fails, status
    code, _, err = saeens("push", BOOSTING, PLACE)
    assert code == (2 if status < 500 else 1)
    assert f"{request_that_fails} failed for" in err
    assert "signature" not in err
    assert hub.pushed[REPOSITORY].messages == ["initial commit"]
    hub.fails = ""
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    assert len(hub.pushed[REPOSITORY].messages) == 2


@pytest.mark.parametrize(
    ("rights", "why"),
    [
        ("", "there is no access token: log in with `hf auth login`, or set HF_TOKEN"),
        ("unknown", "the hub refuses the access token: .*Invalid credentials.*`hf auth login` or HF_TOKEN gives another"),
        ("read", "the hub refuses the access token: .*you have no rights to write here"),
    ],
)
def test_a_refused_token_is_reported_and_never_printed(
    finished: Laboratory, hub: FakeHub, saeens: Saeens, monkeypatch: pytest.MonkeyPatch, *, rights: str, why: str
):
    hub.tokens = {TOKEN: rights} if rights == "read" else {}
    if not rights:
        monkeypatch.delenv("HF_TOKEN")
    code, _, err = saeens("push", BOOSTING, PLACE)
    assert (code, bool(re.search(why, err))) == (2, True), err
    assert hub.pushed == {}


def test_a_token_that_the_hub_repeats_is_not_in_a_traceback(finished: Laboratory, hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    import traceback

    hub.fails = "/commit/"
    monkeypatch.setattr(sys, "argv", ["saeens", "--debug", "push", BOOSTING, PLACE])
    with pytest.raises(Exception, match=r"failed for \*\*\*") as raised:
        cli.main()
    assert TOKEN not in "".join(traceback.format_exception(raised.value))


def test_a_push_of_the_same_files_makes_no_commit(finished: Laboratory, hub: FakeHub, saeens: Saeens):
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    code, _, err = saeens("push", BOOSTING, PLACE)
    assert (code, "the repository has these files already" in err) == (0, True)
    assert len(hub.pushed[REPOSITORY].messages) == 2


def test_a_new_version_replaces_the_earlier_push_and_leaves_other_files(finished: Laboratory, hub: FakeHub, saeens: Saeens):
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    repository = hub.pushed[REPOSITORY]
    first = repository.branches["main"]
    repository.commit("main", {**repository.files(), "notes.md": b"by hand"}, "by hand")
    shutil.rmtree(finished.root / "tables" / NAME / "cost")
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    there = repository.files()
    assert there["notes.md"] == b"by hand"
    assert repository.files(first).keys() - there.keys() == {"tables/cost.parquet"}
    assert "* `cost`: " in there["README.md"].decode()
    assert "* `cost`: " not in repository.files(first)["README.md"].decode()


def test_files_in_the_way_are_replaced_only_on_request(finished: Laboratory, hub: FakeHub, saeens: Saeens):
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    repository = hub.pushed[REPOSITORY]
    pushed = repository.files()
    for files, subject, why in (
        (pushed, BAGGING, f"has {NAME}/boosting/boosting_ensemble, not {NAME}/bagging/bagging_ensemble"),
        ({**pushed, "README.md": b"edited"}, BOOSTING, "README.md was edited after it was pushed"),
        ({"README.md": b"# By hand"}, BOOSTING, "has files that were not pushed from here: README.md"),
        ({"lineage.json": b"{}"}, BOOSTING, "lineage.json is not one that `saeens push` writes"),
    ):
        before = repository.commit("main", files, f"before {why}")
        code, _, err = saeens("push", subject, PLACE)
        assert (code, why in err, "--overwrite" in err) == (2, True, True), err
        assert repository.branches["main"] == before
        assert saeens("push", subject, PLACE, "--overwrite")[0] == 0
    assert torch.equal(_codes(interop.load(PLACE)), _codes(_on_disk(finished, "boosting")[0]))
    assert not any(name.startswith("member_") for name in repository.files())


def test_a_commit_in_between_makes_the_push_fail(finished: Laboratory, hub: FakeHub, saeens: Saeens, monkeypatch: pytest.MonkeyPatch):
    upload = HfApi.preupload_lfs_files

    def upload_late(api: HfApi, *arguments: Any, **options: Any) -> None:
        upload(api, *arguments, **options)
        hub.pushed[REPOSITORY].commit("main", {"other.txt": b""}, "another's")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", upload_late)
    code, _, err = saeens("push", BOOSTING, PLACE)
    assert (code, "A commit has happened since" in err) == (2, True), err
    assert hub.pushed[REPOSITORY].files() == {"other.txt": b""}


def test_files_that_are_replaced_during_a_push_are_not_committed(
    finished: Laboratory, hub: FakeHub, saeens: Saeens, monkeypatch: pytest.MonkeyPatch
):
    weights = _on_disk(finished, "boosting")[1][1] / "sae_weights.safetensors"
    create = HfApi.create_repo

    def create_late(api: HfApi, *arguments: Any, **options: Any) -> Any:
        replacement = weights.with_name("new")
        replacement.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
        replacement.rename(weights)
        return create(api, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_repo", create_late)
    code, _, err = saeens("push", BOOSTING, PLACE)
    assert (code, "was replaced while it was pushed; nothing is committed" in err) == (1, True), err
    assert hub.pushed[REPOSITORY].messages == ["initial commit"]
    code, _, err = saeens("push", BOOSTING, PLACE)
    assert (code, "is damaged" in err) == (1, True), err


def test_wrong_arguments_are_refused_before_a_request(finished: Laboratory, hub: FakeHub, saeens: Saeens):
    for arguments, why in (
        ((BOOSTING, REPO), "write hub:OWNER/REPO"),
        ((BOOSTING, f"{PLACE}/../other"), "write hub:OWNER/REPO"),
        ((BOOSTING, f"{PLACE}/a b"), "may have letters, digits"),
        ((BOOSTING, f"{PLACE}@{'0' * 40}"), "a commit cannot be pushed to"),
        ((BOOSTING, PLACE, "--license", "Apache 2"), "give the identifier that the hub has"),
        ((f"{NAME}/boosting:layer=77", PLACE), "is not on disk; there are"),
        ((f"{NAME}/eval/stability:layer={LAYER}", PLACE), "is no SAE and no ensemble"),
    ):
        code, _, err = saeens("push", *arguments)
        assert (code, why in err) == (2, True), err
    assert hub.requests == []


def test_a_public_repository_is_no_private_one(finished: Laboratory, hub: FakeHub, saeens: Saeens):
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    code, _, err = saeens("push", BAGGING, f"{PLACE}/inside", "--private")
    assert (code, "the repository is public already" in err) == (2, True), err


def test_without_a_network_push_and_pull_say_so(
    finished: Laboratory, hub: FakeHub, saeens: Saeens, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    reach(monkeypatch, UNREACHABLE)
    for arguments in (("push", BOOSTING, PLACE), ("pull", PLACE, tmp_path / "new" / "pulled")):
        code, _, err = saeens(*arguments)
        assert (code, f"{PLACE}: the hub cannot be reached" in err) == (1, True), err
    assert not (tmp_path / "new").exists()


def test_a_pull_is_of_one_commit(finished: Laboratory, hub: FakeHub, saeens: Saeens, tmp_path: Path):
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    repository = hub.pushed[REPOSITORY]
    first, edited = repository.branches["main"], {**repository.files(), "README.md": b"edited on the hub", "later.txt": b""}
    repository.commit("main", edited, "by hand")
    assert saeens("pull", f"{PLACE}@{first}", tmp_path / "first")[0] == 0
    assert (tmp_path / "first" / "README.md").read_bytes() == repository.files(first)["README.md"]
    assert saeens("pull", PLACE, tmp_path / "last")[0] == 0
    assert (tmp_path / "last" / "README.md").read_bytes() == b"edited on the hub"  # a card may be
    assert not (tmp_path / "last" / "later.txt").exists()  # it was not pushed
    assert saeens("pull", f"{PLACE}@{first}", tmp_path / "first")[0] == 0  # it has these files


def test_what_is_pulled_is_compared_with_the_lineage_and_appears_whole_or_not_at_all(
    finished: Laboratory, hub: FakeHub, saeens: Saeens, tmp_path: Path
):
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    repository = hub.pushed[REPOSITORY]
    pushed = repository.files()
    weights, lineage = pushed["round_2/sae_weights.safetensors"], json.loads(pushed["lineage.json"])

    def with_files(**files: Any) -> bytes:
        return json.dumps({**lineage, "files": files}).encode()

    size_and_hash = [5, "0" * 64]
    for files, why, expected in (
        ({**pushed, "round_2/sae_weights.safetensors": weights[:-1] + b"\7"}, "round_2/sae_weights.safetensors is not the file", 1),
        ({name: content for name, content in pushed.items() if name != "ensemble.json"}, "ensemble.json is missing", 1),
        ({**pushed, "lineage.json": b"[]"}, "lineage.json is not one that `saeens push` writes", 2),
        ({**pushed, "lineage.json": json.dumps(lineage | {"format_version": 2}).encode()}, "format_version is 2, expected 1", 2),
        ({**pushed, "lineage.json": with_files(**{"../x": size_and_hash})}, "files has '../x': expected a path inside the folder", 2),
        ({**pushed, "lineage.json": with_files(**{"/x": size_and_hash})}, "files has '/x'", 2),
        ({**pushed, "lineage.json": with_files(x=[10**15, "0" * 64])}, "has 1,000,000,000,000,000 bytes, and", 1),
        ({"cfg.json": b"{}"}, "there is no lineage.json, so that `saeens push` has not pushed it", 2),
    ):
        repository.commit("main", files, f"before {why}")
        code, _, err = saeens("pull", PLACE, tmp_path / "new" / "pulled")
        assert (code, why in err) == (expected, True), err
        assert not (tmp_path / "new").exists()


def test_a_pull_leaves_other_folders_alone(finished: Laboratory, hub: FakeHub, saeens: Saeens, tmp_path: Path):
    assert saeens("push", BOOSTING, PLACE)[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.txt").write_text("mine")
    code, _, err = saeens("pull", PLACE, tmp_path / "mine")
    assert (code, "exists with other content than" in err) == (2, True), err
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["file.txt"]
    code, _, err = saeens("pull", PLACE, tmp_path / "mine" / "file.txt" / "inside")
    assert (code, "Not a directory" in err) == (1, True), err
    (tmp_path / "empty").mkdir()
    assert saeens("pull", PLACE, tmp_path / "empty")[0] == 0
    for place, why in ((f"{PLACE}@v2", "has no revision 'v2'"), ("hub:some-lab/other", "the hub has no such repository, or it is private")):
        code, _, err = saeens("pull", place, tmp_path / "new")
        assert (code, why in err) == (2, True), err
    assert not list(tmp_path.glob("*new*"))
