"""Formats of other tools: codes against each format's formula written out, round trips, and files that are refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saeens_models as sm
from saeens_models import interop

D_IN, D_SAE, K = 6, 20, 3


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Weights of every format: rows of D have norms other than 1."""
    torch.manual_seed(0)
    return {
        "E": torch.randn(D_SAE, D_IN), "b": torch.randn(D_SAE) * 0.3, "D": torch.randn(D_SAE, D_IN), "c": torch.randn(D_IN),
        "gate": torch.randn(D_SAE) * 0.3, "r": torch.randn(D_SAE) * 0.3, "t": torch.rand(D_SAE), "x": torch.randn(50, D_IN) * 2,
    }  # fmt: skip


def top(z: Tensor) -> Tensor:
    """The k largest of each row."""
    chosen = z.topk(K, dim=1)
    return torch.zeros_like(z).scatter(1, chosen.indices, chosen.values)


Weights = dict[str, Tensor]
CLASSES: dict[str, tuple[Callable[[Weights], Weights], Callable[[Weights], Tensor], Callable[[Weights], Tensor]]] = {
    # dictionary class: state dict, code and dictionary as its encode and decode compute them
    "AutoEncoder": (
        lambda w: {"bias": w["c"], "encoder.weight": w["E"], "encoder.bias": w["b"], "decoder.weight": w["D"].T.contiguous()},
        lambda w: torch.relu((w["x"] - w["c"]) @ w["E"].T + w["b"]) * w["D"].norm(dim=1),
        lambda w: w["D"] / w["D"].norm(dim=1)[:, None],
    ),
    "AutoEncoderNew": (
        lambda w: {"encoder.weight": w["E"], "encoder.bias": w["b"], "decoder.weight": w["D"].T.contiguous(), "decoder.bias": w["c"]},
        lambda w: torch.relu(w["x"] @ w["E"].T + w["b"]),
        lambda w: w["D"],
    ),
    "GatedAutoEncoder": (
        lambda w: {
            "decoder_bias": w["c"], "encoder.weight": w["E"], "r_mag": w["r"], "gate_bias": w["gate"], "mag_bias": w["b"],
            "decoder.weight": w["D"].T.contiguous(),
        },
        lambda w: ((w["x"] - w["c"]) @ w["E"].T + w["gate"] > 0) * torch.relu(w["r"].exp() * ((w["x"] - w["c"]) @ w["E"].T) + w["b"]),
        lambda w: w["D"],
    ),
    "JumpReluAutoEncoder": (
        lambda w: {"W_enc": w["E"].T.contiguous(), "b_enc": w["b"], "W_dec": w["D"], "b_dec": w["c"], "threshold": w["t"] - 0.2},
        lambda w: torch.relu((pre := w["x"] @ w["E"].T + w["b"]) * (pre > w["t"] - 0.2)),
        lambda w: w["D"],
    ),
    "AutoEncoderTopK": (
        lambda w: {
            "encoder.weight": w["E"], "encoder.bias": w["b"], "decoder.weight": w["D"].T.contiguous(), "b_dec": w["c"],
            "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(-1.0),
        },
        lambda w: top(torch.relu((w["x"] - w["c"]) @ w["E"].T + w["b"])),
        lambda w: w["D"],
    ),
    "BatchTopKSAE": (
        lambda w: {
            "encoder.weight": w["E"], "encoder.bias": w["b"], "decoder.weight": w["D"].T.contiguous(), "b_dec": w["c"],
            "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7),
        },
        lambda w: (z := torch.relu((w["x"] - w["c"]) @ w["E"].T + w["b"])) * (z > 0.7),
        lambda w: w["D"],
    ),
    "MatryoshkaBatchTopKSAE": (
        lambda w: {
            "W_enc": w["E"].T.contiguous(), "b_enc": w["b"], "W_dec": w["D"], "b_dec": w["c"], "k": torch.tensor(K, dtype=torch.int),
            "threshold": torch.tensor(-1.0), "group_sizes": torch.tensor([5, 15]),
        },
        lambda w: torch.relu((w["x"] - w["c"]) @ w["E"].T + w["b"]),
        lambda w: w["D"],
    ),
}  # fmt: skip


def write_dictionary(folder: Path, dict_class: str, tensors: Any, **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    about = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "lm", "layer": 4, **trainer}
    about["submodule_name"] = "resid_post_layer_4"
    (folder / "config.json").write_text(json.dumps({"trainer": about, "buffer": {"ctx_len": 128}}))
    return folder


def write_sparsify(folder: Path, w: Weights, dtype: torch.dtype = torch.float32, **cfg: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"encoder.weight": w["E"], "encoder.bias": w["b"], "W_dec": w["D"], "b_dec": w["c"]}
    save_file({name: each.to(dtype) for name, each in tensors.items()}, folder / "sae.safetensors")
    base = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K, "multi_topk": False}
    (folder / "cfg.json").write_text(json.dumps({**base, "skip_connection": False, "transcode": False, "d_in": D_IN, **cfg}))
    return folder


def write_gemma_scope(folder: Path, w: Weights) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"W_enc": w["E"].T, "W_dec": w["D"], "b_enc": w["b"], "b_dec": w["c"], "threshold": w["t"]}
    np.savez(folder / "params.npz", allow_pickle=False, **{name: each.numpy() for name, each in arrays.items()})
    return folder


def assert_is(sae: sm.SAE | sm.Ensemble, code: Tensor, dictionary: Tensor, bias: Tensor, x: Tensor) -> None:
    assert 0 < (code > 0).float().mean() < 1, "neither dead nor dense"
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), code, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x), code @ dictionary + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dict_class", CLASSES)
def test_dictionary_learning_has_the_codes_of_its_own_loader(dict_class: str, weights: Weights, tmp_path: Path):
    tensors, code, dictionary = CLASSES[dict_class]
    folder = write_dictionary(tmp_path / "ae", dict_class, tensors(weights), k=K)
    for where in (folder, folder / "ae.pt"):
        sae = interop.load(where)
        assert_is(sae, code(weights), dictionary(weights), weights["c"], weights["x"])
    assert sae.metadata == {
        "model_name": "lm", "hook_layer": 4, "hook_name": "blocks.4.hook_resid_post", "context_size": 128,
        "converted_from": f"dictionary_learning {dict_class}",
    }  # fmt: skip


def test_sparsify_keeps_the_k_largest(weights: Weights, tmp_path: Path):
    folder = write_sparsify(tmp_path / "layers.3", weights)
    sae = interop.load(folder)
    code = top(torch.relu((weights["x"] - weights["c"]) @ weights["E"].T + weights["b"]))
    assert_is(sae, code, weights["D"], weights["c"], weights["x"])
    assert sae.metadata["hookpoint"] == "layers.3"
    half = {name: weights[name].bfloat16().float() for name in ("E", "b", "D", "c")}
    code = top(torch.relu((weights["x"] - half["c"]) @ half["E"].T + half["b"]))
    assert_is(interop.load(write_sparsify(tmp_path / "half", weights, torch.bfloat16)), code, half["D"], half["c"], weights["x"])


def test_gemma_scope_is_jumprelu_and_its_folders_say_what_it_is_of(weights: Weights, tmp_path: Path):
    folder = write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71", weights)
    sae = interop.load(folder)
    pre = weights["x"] @ weights["E"].T + weights["b"]
    assert_is(sae, pre * (pre > weights["t"]), weights["D"], weights["c"], weights["x"])
    assert sae.metadata == {
        "converted_from": "gemma_scope", "hook_layer": 20, "model_name": "google/gemma-2-2b", "hook_name": "blocks.20.hook_resid_post"
    }  # fmt: skip


def test_a_saelens_folder_of_scaled_activations_needs_their_scale(weights: Weights, tmp_path: Path):
    sae = sm.build_sae(sm.SAEConfig(architecture="standard", d_in=D_IN, d_sae=D_SAE))
    sae.load_state_dict({"W_enc": weights["E"].T, "b_enc": weights["b"], "W_dec": weights["D"], "b_dec": weights["c"]})
    interop.export(sae, "sae_lens", tmp_path / "sae")
    file = tmp_path / "sae" / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalize_activations": "expected_average_only_in"}))
    with pytest.raises(ValueError, match=r"cfg\.json: normalize_activations is 'expected_average_only_in'.*input_scale, sqrt\(d_in\)"):
        interop.load(tmp_path / "sae")
    scaled = interop.load(tmp_path / "sae", input_scale=0.25)
    code = torch.relu((0.25 * weights["x"] - weights["c"]) @ weights["E"].T + weights["b"])
    assert_is(scaled, code, 4 * weights["D"], 4 * weights["c"], weights["x"])
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalize_activations": "layer_norm"}))
    with pytest.raises(ValueError, match="normalize_activations is 'layer_norm'"):
        interop.load(tmp_path / "sae")
    for folder in (write_sparsify(tmp_path / "s", weights), write_gemma_scope(tmp_path / "g", weights)):
        with pytest.raises(ValueError, match="take activations as they are"):
            interop.load(folder, input_scale=2.0)


def trained_like(architecture: str, weights: Weights, *, subtracts: bool, seed: int = 0, **fields: Any) -> sm.SAE:
    torch.manual_seed(seed)
    config = sm.SAEConfig(architecture=architecture, d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=subtracts, **fields)
    sae = sm.build_sae(config)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            weight.copy_(torch.rand(weight.shape) if name == "threshold" else torch.randn(weight.shape) * (1 if weight.ndim > 1 else 0.3))
    sae.metadata = {"model_name": "lm", "hook_layer": 2, "hook_name": "blocks.2.hook_resid_post", "context_size": 64}
    return sae


FIELDS: dict[str, dict[str, Any]] = {"standard": {}, "jumprelu": {}, "gated": {}, "topk": {"k": K}, "batch_topk": {"k": K}}
WRITTEN = [
    *(("sae_lens", name) for name in FIELDS),
    *(("dictionary_learning", name) for name in FIELDS),
    ("sparsify", "topk"),
]


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize(("format", "architecture"), WRITTEN)
def test_a_round_trip_keeps_codes_and_metadata(format: str, architecture: str, subtracts: bool, weights: Weights, tmp_path: Path):
    sae = trained_like(architecture, weights, subtracts=subtracts, **FIELDS[architecture])
    interop.export(sae, format, tmp_path / "out")
    with torch.no_grad():
        assert_is(interop.load(tmp_path / "out"), sae.encode(weights["x"]), sae.W_dec, sae.b_dec, weights["x"])
    assert interop.load(tmp_path / "out").metadata.items() >= sae.metadata.items()


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize(
    "kinds", [("standard",) * 3, ("jumprelu",) * 3, ("gated",) * 3, ("standard", "jumprelu"), ("batch_topk", "jumprelu")]
)
def test_a_bag_is_one_plain_sae(kinds: tuple[str, ...], subtracts: bool, weights: Weights, tmp_path: Path):
    bag = sm.Bagging([trained_like(kind, weights, subtracts=subtracts, seed=i, **FIELDS[kind]) for i, kind in enumerate(kinds)])
    bag[0].metadata["source"] = "hub:someone/first@main"
    one = interop.as_one_sae(bag)
    with torch.no_grad():
        assert_is(one, bag.encode(weights["x"]), bag.W_dec, bag.b_dec, weights["x"])
        interop.export(bag, "sae_lens", tmp_path / "bag", {"release": "mine"})
        loaded = sm.load_sae(tmp_path / "bag")
        assert_is(loaded, bag.encode(weights["x"]), bag.W_dec, bag.b_dec, weights["x"])
    assert loaded.metadata.items() >= {"release": "mine", "model_name": "lm"}.items()
    assert "source" not in one.metadata, "the bag is not what one of its members is"


def test_what_is_more_than_one_sae_is_said(weights: Weights, tmp_path: Path):
    topk = [trained_like("topk", weights, subtracts=True, seed=i, k=K) for i in range(2)]
    for ensemble, why in ((sm.Bagging(topk), "a bag of topk SAEs"), (sm.Boosting(topk), "encodes what the earlier rounds leave")):
        with pytest.raises(ValueError, match=why):
            interop.as_one_sae(ensemble)
        with pytest.raises(ValueError, match=f"dictionary_learning has one SAE in a folder: .*{why}"):
            interop.export(ensemble, "dictionary_learning", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    pursuit = sm.build_sae(sm.SAEConfig(architecture="matching_pursuit", d_in=D_IN, d_sae=D_SAE, max_iterations=2))
    for format, why in (("dictionary_learning", "no class for a matching_pursuit SAE"), ("sparsify", "TopK SAEs only")):
        with pytest.raises(ValueError, match=why):
            interop.export(pursuit, format, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(ValueError, match="'gemma_scope' is not written; one of sae_lens, sparsify, dictionary_learning"):
        interop.export(topk[0], "gemma_scope", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        interop.export(topk[0], "sae_lens", tmp_path / "full")


def test_ensembles_are_loaded_and_have_what_tools_for_one_sae_ask_for(weights: Weights, tmp_path: Path):
    ensemble = sm.Boosting([trained_like("topk", weights, subtracts=True, seed=i, k=K) for i in range(2)])
    ensemble[1].metadata["context_size"] = 32
    sm.save_ensemble(ensemble, tmp_path / "e")
    loaded = interop.load(tmp_path / "e")
    assert isinstance(loaded, sm.Boosting)
    assert (loaded.d_sae, loaded.device.type, loaded.dtype, loaded.W_enc.shape) == (2 * D_SAE, "cpu", torch.float32, (D_IN, 2 * D_SAE))
    assert torch.equal(loaded.W_enc[:, D_SAE:], ensemble[1].W_enc)
    assert loaded.metadata.items() >= {"model_name": "lm", "hook_layer": 2}.items() and "context_size" not in loaded.metadata


@pytest.mark.parametrize("kind", [sm.Bagging, sm.Boosting])
def test_an_ensemble_for_saelens_comes_back(kind: type[sm.Bagging] | type[sm.Boosting], weights: Weights, tmp_path: Path):
    ensemble = kind([trained_like("topk", weights, subtracts=True, k=K), trained_like("gated", weights, subtracts=False, seed=1)])
    interop.export(ensemble, "sae_lens", tmp_path / "out", {"release": "mine"})
    loaded = interop.load(tmp_path / "out")
    assert type(loaded) is kind and loaded.metadata.items() >= {"release": "mine", "model_name": "lm"}.items()
    with torch.no_grad():
        assert torch.equal(loaded.encode(weights["x"]), ensemble.encode(weights["x"]))
    file = tmp_path / "out" / "cfg.json"
    cfg = json.loads(file.read_text())
    for wrong, why in (
        ({"kind": "stacking"}, "kind: Input should be 'bagging' or 'boosting'"),
        ({"members": []}, "members: List should have at least 1 item"),
        ({"members": cfg["members"][:1]}, r"d_sae is \d+, and that of the members is \d+"),
        ({"members": cfg["members"][:1], "d_sae": cfg["members"][0]["d_sae"]}, r"unknown tensors ensemble\.members\.1"),
        (
            {"members": [cfg["members"][0], {**cfg["members"][1], "d_sae": 7}], "d_sae": cfg["members"][0]["d_sae"] + 7},
            r"member 2 of .*W_dec",
        ),
        ({"members": [cfg["members"][0], {**cfg["members"][1], "d_in": 2**62}]}, r"members\.1\.d_in must be a positive integer"),
        ({"d_in": 3}, "d_in is 3, and that of the members is"),
    ):
        file.write_text(json.dumps({**cfg, **wrong}))
        with pytest.raises(ValueError, match=why):
            interop.load(tmp_path / "out")


REFUSED = {
    "skip connection": (lambda d, w: write_sparsify(d, w, skip_connection=True), "skip_connection: a skip connection"),
    "transcoder": (lambda d, w: write_sparsify(d, w, transcode=True), "transcode: a transcoder"),
    "groupmax": (lambda d, w: write_sparsify(d, w, activation="groupmax"), "activation 'groupmax' is not supported"),
    "other width": (lambda d, w: write_sparsify(d, w, num_latents=21), "says d_sae = 21, and the weights have 20"),
    "k as text": (lambda d, w: write_sparsify(d, w, k="3"), r"cfg\.json: k must be a whole number, found '3'"),
    "k as truth": (lambda d, w: write_sparsify(d, w, k=True), r"cfg\.json: k must be a whole number, found True"),
    "no k": (lambda d, w: write_sparsify(d, w, k="many"), "k must be a whole number, found 'many'"),
    "k beyond width": (lambda d, w: write_sparsify(d, w, k=21), "larger than d_sae"),
    "no encoder": (lambda d, w: write_dictionary(d, "AutoEncoderTopK", {"b_dec": w["c"]}, k=K), r"missing \['decoder.weight', 'encoder"),
    "identity": (lambda d, w: write_dictionary(d, "IdentityDict", {}), "dict_class 'IdentityDict' is not supported; one of AutoEncoder"),
    "other k": (
        lambda d, w: write_dictionary(d, "AutoEncoderTopK", CLASSES["AutoEncoderTopK"][0](w), k=4), r"k = 4, and ae\.pt says 3",
    ),
    "whole object": (lambda d, w: write_dictionary(d, "AutoEncoder", torch.nn.Linear(2, 2)), "nothing else is unpickled"),
    "not tensors": (lambda d, w: write_dictionary(d, "AutoEncoder", {"bias": 3}), "expected a dict of tensors by name"),
    "larger than its file": (
        lambda d, w: write_dictionary(
            d, "AutoEncoderNew", {**CLASSES["AutoEncoderNew"][0](w), "encoder.bias": torch.zeros(1).expand(10**12)}
        ),
        "encoder.bias is not a plain tensor",
    ),
    "shapes": (
        lambda d, w: write_dictionary(d, "AutoEncoderNew", {**CLASSES["AutoEncoderNew"][0](w), "encoder.bias": torch.zeros(7)}),
        r"b_enc \[7\] \(expected \[20\]\)",
    ),
    "an encoder of three dimensions": (
        lambda d, w: write_dictionary(
            d, "AutoEncoderNew", {**CLASSES["AutoEncoderNew"][0](w), "encoder.weight": w["E"][None].contiguous()}
        ),
        "not a valid file of dictionary_learning: RuntimeError",
    ),
    "a tensor without values": (
        lambda d, w: write_dictionary(
            d, "AutoEncoderNew", {**CLASSES["AutoEncoderNew"][0](w), "encoder.bias": torch.zeros(20, device="meta")}
        ),
        "encoder.bias is not a plain tensor",
    ),
    "k of a fraction": (
        lambda d, w: write_dictionary(d, "AutoEncoderTopK", {**CLASSES["AutoEncoderTopK"][0](w), "k": torch.tensor(4.7)}),
        "k = 4.699.*, expected a whole number",
    ),
    "infinite k": (
        lambda d, w: write_dictionary(d, "AutoEncoderTopK", {**CLASSES["AutoEncoderTopK"][0](w), "k": torch.tensor(float("inf"))}),
        "k = inf, expected a whole number",
    ),
    "a threshold of each feature": (
        lambda d, w: write_dictionary(d, "BatchTopKSAE", {**CLASSES["BatchTopKSAE"][0](w), "threshold": w["t"]}, k=K),
        r"threshold is \[20\], expected one number",
    ),
    "a decoder row of zeros": (
        lambda d, w: write_dictionary(d, "AutoEncoder", {**CLASSES["AutoEncoder"][0](w), "decoder.weight": w["D"].T.contiguous() * 0}),
        "decoder row 0 is zero",
    ),
    "not finite": (lambda d, w: write_gemma_scope(d, {**w, "b": w["b"] * float("nan")}), "b_enc holds values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(case: str, weights: Weights, tmp_path: Path):
    write, why = REFUSED[case]
    folder = write(tmp_path / "sae", weights)
    with pytest.raises(ValueError, match=why) as raised:
        interop.load(folder)
    assert str(folder) in str(raised.value), "the error names the file"


def test_one_of_several_checkpoints_has_to_be_named(weights: Weights, tmp_path: Path):
    folder = write_dictionary(tmp_path / "d", "AutoEncoder", CLASSES["AutoEncoder"][0](weights))
    (folder / "ae.pt").rename(folder / "ae_50.pt")
    assert interop.files_of(folder) == [folder / "ae_50.pt", folder / "config.json"]
    (folder / "ae_100.pt").write_bytes((folder / "ae_50.pt").read_bytes())
    with pytest.raises(ValueError, match=r"has ae_100\.pt, ae_50\.pt: name one of these files"):
        interop.load(folder)
    assert interop.files_of(folder / "ae_100.pt") == [folder / "ae_100.pt", folder / "config.json"]
    assert isinstance(interop.load(folder / "ae_100.pt"), sm.SAE)


def test_load_sae_takes_every_format_and_no_ensemble(weights: Weights, tmp_path: Path):
    folder = write_sparsify(tmp_path / "s", weights)
    assert torch.equal(sm.load_sae(folder).W_dec, interop.load(folder).W_dec)
    interop.export(sm.Boosting([sm.load_sae(folder), sm.load_sae(folder)]), "sae_lens", tmp_path / "e")
    with pytest.raises(ValueError, match="saeens_ensemble"):
        sm.load_sae(tmp_path / "e")
    with pytest.raises(FileNotFoundError, match=r"cfg\.json is missing"):
        sm.load_sae(tmp_path / "nothing")


def test_an_array_instead_of_an_archive_is_refused(tmp_path: Path):
    with (tmp_path / "params.npz").open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(ValueError, match=r"params\.npz is not"):
        interop.load(tmp_path)


class _Hostile:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return Path.touch, (self.touched,)


def test_a_hostile_pickle_is_not_run(weights: Weights, tmp_path: Path):
    folder = write_dictionary(tmp_path / "ae", "AutoEncoder", CLASSES["AutoEncoder"][0](weights))
    for write in (
        lambda f: torch.save({"bias": _Hostile(tmp_path / "touched")}, f),
        lambda f: f.write_bytes(pickle.dumps(_Hostile(tmp_path / "touched"))),
    ):
        write(folder / "ae.pt")
        with pytest.raises(ValueError, match="nothing else is unpickled"):
            interop.load(folder)
    arrays = {"W_enc": np.array([_Hostile(tmp_path / "touched")], dtype=object)}
    np.savez(folder / "params.npz", allow_pickle=True, **arrays)
    with pytest.raises(ValueError, match="npz file of plain arrays"):
        interop.load(folder / "params.npz")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files_are_named(share: float, weights: Weights, tmp_path: Path):
    made = [
        write_dictionary(tmp_path / "d", "AutoEncoder", CLASSES["AutoEncoder"][0](weights)) / "ae.pt",
        write_sparsify(tmp_path / "s", weights) / "sae.safetensors",
        write_gemma_scope(tmp_path / "g", weights) / "params.npz",
    ]
    for file in made:
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        with pytest.raises(ValueError, match=str(file)):
            interop.load(file.parent)


def test_an_unknown_folder_names_the_formats_and_saes_inside_it(weights: Weights, tmp_path: Path):
    for layer in (0, 1):
        write_sparsify(tmp_path / "run" / f"layers.{layer}", weights)
    with pytest.raises(
        ValueError, match=r"sparsify has cfg\.json and sae\.safetensors.*its folders layers\.0, layers\.1 are SAEs: name one"
    ):
        interop.load(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        interop.load(tmp_path / "nowhere")
    (tmp_path / "other.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="not a file of weights of any format"):
        interop.load(tmp_path / "other.bin")
    (tmp_path / "run" / "layers.0" / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cfg\.json is missing"):
        interop.load(tmp_path / "run" / "layers.0")
    assert load_file(tmp_path / "run" / "layers.1" / "sae.safetensors").keys() >= {"W_dec"}
