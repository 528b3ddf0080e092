"""Models of the hub: downloads, identity, and errors of unavailable models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from fake_hub import UNREACHABLE, FakeHub, reach
from tiny_experiment import SEEDS, Laboratory
from tiny_models import write_tiny_model
from torch.nn.functional import cross_entropy

from saeens_pipeline.cli.new_experiment import new_experiment
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import TokenStore, open_tokens

NAME = "some-lab/some-model"


@pytest.fixture
def hub(fake_hub: FakeHub, tmp_path: Path, tiny_model: Path) -> FakeHub:
    """A hub with one model."""
    repository = Path(shutil.copytree(tiny_model, tmp_path / "repository"))
    (repository / "README.md").write_text("A model card.")
    (repository / "pytorch_model.bin").write_bytes(b"a pickle")
    (repository / "onnx").mkdir()
    (repository / "onnx" / "model.safetensors").write_bytes(b"other weights")
    fake_hub.repositories[f"models/{NAME}"] = repository
    return fake_hub


def test_describing_a_model_downloads_only_its_configuration_and_tokenizer(hub: FakeHub, tiny_model: Path):
    found, local = describe_language_model(NAME), describe_language_model(str(tiny_model))
    assert hub.downloaded() == {"config.json", "tokenizer.json"}
    assert (found.d_model, found.n_layers, found.vocab_size) == (local.d_model, local.n_layers, local.vocab_size)
    assert found.commit == hub.commit(f"models/{NAME}")
    assert found.identity == {"name": NAME, "revision": found.commit}


def test_a_branch_and_its_commit_are_the_same_model(hub: FakeHub):
    by_branch = describe_language_model(NAME, "main")
    assert describe_language_model(NAME, by_branch.commit or "").identity == by_branch.identity


def test_loading_downloads_safetensors_and_gives_the_activations_of_the_folder(hub: FakeHub, tiny_model: Path):
    model = load_language_model(describe_language_model(NAME))
    assert hub.downloaded() == {"config.json", "tokenizer.json", "model.safetensors"}
    assert not [request for request in hub.requests if "onnx" in request]
    tokens = torch.arange(16).reshape(2, 8)
    expected = load_language_model(describe_language_model(str(tiny_model))).activations(tokens, "resid_post", [1])[1]
    assert torch.equal(model.activations(tokens, "resid_post", [1])[1], expected)


def test_untrained_weights_need_no_download(hub: FakeHub):
    load_language_model(describe_language_model(NAME), "random")
    assert hub.downloaded() == {"config.json", "tokenizer.json"}


def test_cached_files_are_not_requested_again_and_need_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    first = describe_language_model(NAME)
    load_language_model(first)
    hub.requests.clear()
    assert describe_language_model(NAME) == first
    assert hub.requests == []
    reach(monkeypatch, UNREACHABLE)
    load_language_model(describe_language_model(NAME))


def test_a_model_with_pickles_alone_is_refused_before_a_download(hub: FakeHub):
    (hub.repositories[f"models/{NAME}"] / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"only as pytorch_model.bin, a pickle.*convert it to safetensors and give the folder"):
        describe_language_model(NAME)
    assert "pytorch_model.bin" not in hub.downloaded()


def test_a_gated_model_gives_the_hubs_reason_and_the_command(hub: FakeHub):
    hub.gated.add(f"models/{NAME}")
    message = (
        rf"'{NAME}' is gated: .*you are not in the authorized list\. Accept its terms at {hub.url}/{NAME} and log in with `hf auth login`"
    )
    with pytest.raises(ConfigurationError, match=message):
        describe_language_model(NAME)


def test_a_missing_model_is_reported_as_neither_local_nor_on_the_hub(hub: FakeHub):
    with pytest.raises(ConfigurationError, match=r"'some-lab/other': there is no such folder here, and no such language model on the hub"):
        describe_language_model("some-lab/other")


def test_a_missing_revision_is_reported(hub: FakeHub):
    with pytest.raises(ConfigurationError, match="has no revision 'v2' on the hub"):
        describe_language_model(NAME, "v2")


def test_without_a_hub_the_error_names_the_download_command(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    reach(monkeypatch, UNREACHABLE)
    with pytest.raises(SaeensError, match=rf"hub cannot be reached.*`hf download {NAME} --local-dir FOLDER`; copy FOLDER here"):
        describe_language_model(NAME)


def test_a_local_folder_takes_precedence_over_a_hub_model(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / NAME)
    assert describe_language_model(NAME).commit is None
    assert hub.requests == []


def test_an_experiment_runs_on_a_model_of_the_hub_and_is_fresh_without_one(
    hub: FakeHub, empty: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    empty.declare({"language_model": NAME, "language_model_dtype": "bfloat16"})
    empty.run(select=["bagging_ensemble", "reconstruction"])
    recipe = empty.artefact("activations").recipe["settings"]
    assert recipe["language_model"] == {"name": NAME, "revision": hub.commit(f"models/{NAME}")}
    assert recipe["language_model_dtype"] == "bfloat16"
    reach(monkeypatch, UNREACHABLE)
    assert "nothing to do" in empty.run(select=["bagging_ensemble", "reconstruction"])
    measured = empty.artefact("eval/reconstruction", SEEDS[0]).provenance["next_token_loss"]["clean"]
    tokens = open_tokens(empty.artefact("tokens", layer=None).path)
    assert measured == pytest.approx(_loss(tokens, "bfloat16"), rel=1e-6)
    assert measured != pytest.approx(_loss(tokens, "float32"), rel=1e-6)


def _loss(tokens: TokenStore, dtype: Literal["float32", "bfloat16"]) -> float:
    """The model's own next-token loss over the test split, in the dtype, by PyTorch alone."""
    model, losses = load_language_model(describe_language_model(NAME), dtype=dtype).model, []
    for batch in tokens.batches("test", 1000):
        with torch.no_grad():
            logits = model(batch.tokens).logits.float()
        losses.append(cross_entropy(logits[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none")[batch.is_text[:, 1:]])
    return torch.cat(losses).double().mean().item()


def test_a_new_experiment_of_a_hub_model_downloads_no_weights(
    hub: FakeHub, empty: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SAEENS_EXPERIMENTS", str(tmp_path))
    new_experiment("mine", NAME, [1])
    assert empty.catalogue.sources["mine"].language_model == NAME
    assert "model.safetensors" not in hub.downloaded()
