"""`saeens export`: SAEs and ensembles of an experiment, for other tools."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory

import saeens_models as sm
from saeens_models import interop
from saeens_pipeline import cli
from saeens_pipeline.storage.names import Address, Partition

Export = Callable[..., tuple[int, str]]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """Runs `saeens export`; returns its exit code and what it prints on standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["saeens", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


WHERE = f":layer={LAYER},seed={SEEDS[0]}"


@pytest.mark.parametrize(
    ("subject", "address"),
    [
        (f"{NAME}/boosting", Address(NAME, "boosting", "boosting_ensemble")),
        (f"{NAME}/bagging", Address(NAME, "bagging", "bagging_ensemble")),
        (f"{NAME}/bagging/member_1", Address(NAME, "bagging", "member_1")),
    ],
)
def test_what_is_exported_has_the_codes_and_the_data_version(
    finished: Laboratory, export: Export, tmp_path: Path, subject: str, address: Address
):
    code, err = export(subject + WHERE, tmp_path / "out")
    assert code == 0
    artefact = finished.store.require(address, Partition(LAYER, SEEDS[0]))
    ours = sm.load_ensemble(artefact.path) if "ensemble" in address.name else sm.load_sae(artefact.path)
    exported = interop.load(tmp_path / "out")
    x = torch.randn(20, ours.W_dec.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(exported.encode(x), ours.encode(x))
    assert exported.metadata.items() >= {"saeens_asset": str(address), "saeens_data_version": artefact.data_version}.items()
    assert exported.metadata.items() >= {name: ours.metadata[name] for name in ("model_name", "hook_name")}.items()
    is_registered = json.loads((tmp_path / "out" / "cfg.json").read_text())["architecture"] == "saeens_ensemble"
    assert ("import saeens_models.interop.sae_lens" in err) == is_registered


def test_errors_of_an_export_leave_nothing_behind(finished: Laboratory, export: Export, tmp_path: Path):
    for arguments, why in (
        ((f"{NAME}/bagging", tmp_path / "out"), f"{NAME}/bagging/bagging_ensemble{WHERE}"),
        ((f"{NAME}/eval/stability:layer={LAYER}", tmp_path / "out"), "is no SAE and no ensemble: name one, such as"),
        ((f"{NAME}/boosting{WHERE}", tmp_path / "out", "--to", "dictionary_learning"), "encodes what the earlier rounds leave"),
        ((f"{NAME}/boosting{WHERE}", finished.root), "is not an empty folder"),
        ((f"{NAME}/boosting:layer=77", tmp_path / "out"), "is not on disk; there are"),
    ):
        code, err = export(*arguments)
        assert (code, why in err) == (2, True), err
    assert not list(tmp_path.glob("*out*"))
