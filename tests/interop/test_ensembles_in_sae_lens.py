"""Ensembles as SAEs of SAELens: the same codes, moves between number types and devices, folding, and models with one spliced in."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens  # pyright: ignore[reportMissingImports]  # in an environment of its own: `make test-interop`
import torch
from random_weights import with_random_weights
from torch import Tensor
from transformer_lens import HookedTransformerConfig  # pyright: ignore[reportMissingImports]

import saeens_models as sm
import saeens_models.interop.sae_lens
from saeens_models import interop

pytestmark = pytest.mark.interop

D_IN, D_SAE, K, HOOK = 16, 24, 4, "blocks.0.hook_resid_post"
OWN_FIELDS: dict[str, dict[str, Any]] = {"standard": {}, "topk": {"k": K}, "jumprelu": {}, "gated": {}, "batch_topk": {"k": K}}


def ensemble(kind: type[sm.Bagging] | type[sm.Boosting], architectures: tuple[str, ...]) -> sm.Ensemble:
    return kind([member(each, seed) for seed, each in enumerate(architectures)])


def member(architecture: str, seed: int) -> sm.SAE:
    """An SAE whose weights are all random, with unequal decoder norms."""
    sae = sm.build_sae(sm.SAEConfig(architecture=architecture, d_in=D_IN, d_sae=D_SAE, **OWN_FIELDS[architecture]))
    with_random_weights(sae, D_IN, seed)
    sae.metadata = {"model_name": "tiny", "hook_name": HOOK}
    return sae


def activations() -> Tensor:
    return 3 * torch.randn(2, 40, D_IN, generator=torch.Generator().manual_seed(9))


ENSEMBLES = [
    (sm.Boosting, ("topk", "topk", "topk")),
    (sm.Boosting, ("standard", "gated", "batch_topk")),
    (sm.Bagging, ("topk", "jumprelu")),
    (sm.Bagging, ("jumprelu", "jumprelu", "standard")),  # one plain SAE
    (sm.Bagging, ("gated", "gated")),
]


@pytest.mark.parametrize(("kind", "architectures"), ENSEMBLES)
def test_saelens_computes_the_codes_of_an_exported_ensemble(kind: Any, architectures: tuple[str, ...], tmp_path: Path) -> None:
    ours, x = ensemble(kind, architectures), activations()
    interop.export(ours, "sae_lens", tmp_path / "out", {"release": "mine"})
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    with torch.no_grad():
        z = ours.encode(x)
        assert 0 < (z > 0).float().mean() < 1
        torch.testing.assert_close(theirs.encode(x), z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.decode(z), ours.decode(z), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.W_dec, ours.W_dec)
    assert (theirs.cfg.d_sae, theirs.cfg.metadata.model_name, theirs.cfg.metadata.release) == (ours.n_features, "tiny", "mine")
    theirs.save_model(tmp_path / "again")
    again = sae_lens.SAE.load_from_disk(tmp_path / "again", dtype="float64")
    with torch.no_grad():
        torch.testing.assert_close(again.encode(x).float(), z, rtol=1e-4, atol=1e-4)
    assert again.dtype == torch.float64 and again.W_dec.dtype == torch.float64
    assert again.to("cpu", torch.float32).encode(x).dtype == torch.float32


def test_importing_the_module_twice_registers_once() -> None:
    importlib.reload(saeens_models.interop.sae_lens)


def test_decoder_norms_are_folded_where_codes_may_follow_them(tmp_path: Path) -> None:
    ours, x = ensemble(sm.Boosting, ("standard", "jumprelu", "gated")), activations()
    interop.export(ours, "sae_lens", tmp_path / "out")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out", fold_W_dec_norm=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs.W_dec.norm(dim=1), torch.ones(ours.n_features))
        torch.testing.assert_close(theirs.encode(x), ours.encode(x) * ours.W_dec.norm(dim=1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)
    interop.export(ensemble(sm.Boosting, ("topk", "topk")), "sae_lens", tmp_path / "topk")
    with pytest.raises(NotImplementedError, match="topk member cannot be folded"):
        sae_lens.SAE.load_from_disk(tmp_path / "topk", fold_W_dec_norm=True)


def test_an_ensemble_is_spliced_into_a_model(tmp_path: Path) -> None:
    cfg = HookedTransformerConfig(n_layers=2, d_model=D_IN, n_ctx=32, d_head=8, n_heads=2, d_vocab=50, act_fn="relu", seed=0)
    model = sae_lens.HookedSAETransformer(cfg)
    ours = ensemble(sm.Boosting, ("topk", "topk"))
    interop.export(ours, "sae_lens", tmp_path / "out")
    tokens = torch.arange(20)[None]
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    with torch.no_grad():
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[theirs])
        right = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda x, hook: ours(x))])
        torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-5)
        _, plain = model.run_with_cache(tokens)
        torch.testing.assert_close(cache[f"{HOOK}.hook_sae_acts_post"], ours.encode(plain[HOOK]), rtol=1e-4, atol=1e-5)


def test_the_configuration_is_plain_json(tmp_path: Path) -> None:
    interop.export(ensemble(sm.Boosting, ("topk", "topk")), "sae_lens", tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["kind"], len(cfg["members"])) == ("saeens_ensemble", "boosting", 2)
