"""SAEs of the packages dictionary_learning and sparsify, both ways: the same codes and reconstructions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionary_learning.dictionary import (  # pyright: ignore[reportMissingImports]
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # pyright: ignore[reportMissingImports]
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # pyright: ignore[reportMissingImports]
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # pyright: ignore[reportMissingImports]
from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]
from random_weights import with_random_weights
from sparsify import SparseCoder  # pyright: ignore[reportMissingImports]
from sparsify.config import SparseCoderConfig  # pyright: ignore[reportMissingImports]
from torch import Tensor

import saeens_models as sm
from saeens_models import interop

pytestmark = pytest.mark.interop

D_IN, D_SAE, K = 16, 48, 6
CLASSES = {
    AutoEncoder: {}, AutoEncoderNew: {}, GatedAutoEncoder: {}, JumpReluAutoEncoder: {}, AutoEncoderTopK: {"k": K}, BatchTopKSAE: {"k": K},
    MatryoshkaBatchTopKSAE: {"k": K, "group_sizes": [16, 32]},
}  # fmt: skip
OWN_FIELDS: dict[str, dict[str, Any]] = {"standard": {}, "topk": {"k": K}, "jumprelu": {}, "gated": {}, "batch_topk": {"k": K}}


def activations() -> Tensor:
    return 3 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(9)) + 1


@torch.no_grad()
def assert_codes(sae: sm.SAE | sm.Ensemble, code: Tensor, reconstruction: Tensor) -> None:
    x = activations()
    assert 0 < (code > 0).float().mean() < 1
    torch.testing.assert_close(sae.encode(x), code, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), reconstruction, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dictionary_class", CLASSES)
def test_a_dictionary_loads_with_the_codes_of_load_dictionary(dictionary_class: Any, tmp_path: Path) -> None:
    own = CLASSES[dictionary_class]
    made = with_random_weights(dictionary_class(D_IN, D_SAE, **own), D_IN)
    if dictionary_class in (BatchTopKSAE, MatryoshkaBatchTopKSAE):
        made.threshold.fill_(0.4)
    torch.save(made.state_dict(), tmp_path / "ae.pt")
    about = {"dict_class": dictionary_class.__name__, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 2, "lm_name": "lm", **own}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": about, "buffer": {"ctx_len": 128}}))
    theirs, _ = load_dictionary(str(tmp_path), "cpu")
    ours = interop.load(tmp_path)
    assert_codes(ours, theirs.encode(activations()), theirs(activations()))


@torch.no_grad()
@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", OWN_FIELDS)
def test_load_dictionary_computes_the_codes_of_an_exported_sae(architecture: str, subtracts: bool, tmp_path: Path) -> None:
    config = sm.SAEConfig(architecture=architecture, d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=subtracts, **OWN_FIELDS[architecture])
    ours = with_random_weights(sm.build_sae(config), D_IN)
    interop.export(ours, "dictionary_learning", tmp_path / "out")
    theirs, _ = load_dictionary(str(tmp_path / "out"), "cpu")
    assert_codes(ours, theirs.encode(activations()), theirs(activations()))


def dense(output: Any) -> Tensor:
    code = torch.zeros(len(output.latent_acts), D_SAE)
    return code.scatter(1, output.latent_indices, output.latent_acts)


@torch.no_grad()
def test_a_sparse_coder_loads_with_its_codes(tmp_path: Path) -> None:
    made = with_random_weights(SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K)), D_IN)
    made.save_to_disk(tmp_path / "layers.1")
    output = SparseCoder.load_from_disk(tmp_path / "layers.1")(activations())
    assert_codes(interop.load(tmp_path / "layers.1"), dense(output), output.sae_out)


@torch.no_grad()
@pytest.mark.parametrize("subtracts", [True, False])
def test_sparsify_computes_the_codes_of_an_exported_sae(subtracts: bool, tmp_path: Path) -> None:
    config = sm.SAEConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K, apply_b_dec_to_input=subtracts)
    ours = with_random_weights(sm.build_sae(config), D_IN)
    interop.export(ours, "sparsify", tmp_path / "out")
    output = SparseCoder.load_from_disk(tmp_path / "out")(activations())
    assert_codes(ours, dense(output), output.sae_out)


@torch.no_grad()
def test_saes_of_two_packages_bag_and_boost(tmp_path: Path) -> None:
    dictionary = with_random_weights(AutoEncoderTopK(D_IN, D_SAE, K), D_IN)
    torch.save(dictionary.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK", "k": K}, "buffer": {}}))
    coder = with_random_weights(SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K)), D_IN)
    coder.save_to_disk(tmp_path / "coder")
    members: list[Any] = [interop.load(tmp_path), interop.load(tmp_path / "coder")]
    x = activations()
    codes = torch.cat([dictionary.encode(x), dense(coder(x))], 1) / 2
    assert_codes(sm.Bagging(members), codes, (dictionary(x) + coder(x).sae_out) / 2)
    rest = x - dictionary(x)
    codes = torch.cat([dictionary.encode(x), dense(coder(rest))], 1)
    assert_codes(sm.Boosting(members), codes, dictionary(x) + coder(rest).sae_out)
