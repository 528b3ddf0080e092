"""SAEs of the hub in other tools' formats, from a hub on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_hub import UNREACHABLE, FakeHub, reach
from safetensors.torch import save_file

import saeens_models as sm
from saeens_models import interop

REPO = "someone/sae-tiny-32k"


@pytest.fixture
def published(fake_hub: FakeHub, tmp_path: Path) -> FakeHub:
    """A repository of sparsify, with two layers, an ensemble of ours, and a large file that nobody asked for."""
    folder = tmp_path / "published"
    torch.manual_seed(0)
    for layer in (0, 1):
        at = folder / f"layers.{layer}"
        at.mkdir(parents=True)
        weights = {"encoder.weight": torch.randn(8, 4), "encoder.bias": torch.randn(8), "W_dec": torch.randn(8, 4), "b_dec": torch.randn(4)}
        save_file(weights, at / "sae.safetensors")
        (at / "cfg.json").write_text(json.dumps({"activation": "topk", "num_latents": 8, "k": 2, "d_in": 4}))
        (at / "optimizer.pt").write_bytes(bytes(1000))
    saes = [sm.build_sae(sm.SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2, init_seed=seed)) for seed in (0, 1)]
    sm.save_ensemble(sm.Boosting(saes), folder / "boosting")
    fake_hub.repositories[f"models/{REPO}"] = folder
    return fake_hub


@pytest.mark.parametrize("place", ["layers.1", "layers.1/sae.safetensors"])
@pytest.mark.parametrize("at", ["", "@main", "@COMMIT"])
def test_a_published_sae_is_that_of_its_folder_at_one_commit(published: FakeHub, place: str, at: str):
    commit = published.commit(f"models/{REPO}")
    sae = interop.load(f"hub:{REPO}/{place}{at.replace('COMMIT', commit)}")
    here = interop.load(published.repositories[f"models/{REPO}"] / "layers.1")
    x = torch.randn(10, 4)
    assert torch.equal(sae.encode(x), here.encode(x))
    assert sae.metadata["source"] == f"hub:{REPO}/{place}@{commit}"
    assert published.downloaded() <= {"sae.safetensors", "cfg.json"}, "nothing else is downloaded"


def test_published_members_bag_and_a_published_ensemble_comes_whole(published: FakeHub):
    bag = sm.Bagging([interop.load(f"hub:{REPO}/layers.{layer}") for layer in (0, 1)])  # pyright: ignore[reportArgumentType]
    assert len(bag) == 2 and bag[0].metadata["source"] != bag[1].metadata["source"]
    boosting = interop.load(f"hub:{REPO}/boosting")
    assert isinstance(boosting, sm.Boosting)
    assert boosting.metadata["source"] == f"hub:{REPO}/boosting@{published.commit(f'models/{REPO}')}"


def test_what_the_hub_does_not_have_is_named(published: FakeHub, monkeypatch: pytest.MonkeyPatch):
    for where, why in (
        ("hub:someone", "write hub:OWNER/REPO"),
        (f"hub:{REPO}/../other", "write hub:OWNER/REPO"),
        (f"hub:{REPO}/layers.9", r"no SAE there, none of .*sae\.safetensors.*There are SAEs in"),
        (f"hub:{REPO}/layers.1@v9", "has no revision 'v9'"),
        ("hub:someone/nothing", "no such repository, or it is private"),
        (f"hub:{REPO}", r"There are SAEs in boosting/member_1, boosting/member_2, layers\.0, layers\.1"),
    ):
        with pytest.raises(ValueError, match=why):
            interop.load(where)
    published.gated.add(f"models/{REPO}")
    with pytest.raises(ValueError, match="gated: accept its terms"):
        interop.load(f"hub:{REPO}/layers.0")
    reach(monkeypatch, UNREACHABLE)
    with pytest.raises(ConnectionError, match="the hub cannot be reached"):
        interop.load("hub:someone/else")
