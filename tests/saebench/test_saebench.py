"""SAEBench evaluates SAEs and ensembles: scores against computations of our own, on activations of transformers, from codes of our own."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sae_bench.evals.core.main as core  # pyright: ignore[reportMissingImports]  # in an environment of its own: `make test-saebench`
import sae_bench.evals.scr_and_tpp.main as scr_and_tpp  # pyright: ignore[reportMissingImports]
import sae_bench.evals.sparse_probing.main as sparse_probing  # pyright: ignore[reportMissingImports]
import sae_lens  # pyright: ignore[reportMissingImports]
import torch
from conftest import BIOS, CONTEXT, HOOK, LAYER, N_TEST, N_TRAIN, SENTIMENT, local_data_set
from sae_bench.evals.absorption.feature_absorption_calculator import (  # pyright: ignore[reportMissingImports]
    FeatureAbsorptionCalculator,
)
from sae_bench.sae_bench_utils import general_utils  # pyright: ignore[reportMissingImports]
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

import saeens_models as sm
from saeens_models import interop
from saeens_models.interop.saebench import for_saebench

Dictionaries = dict[str, sm.SAE | sm.Ensemble]
K_VALUES = [1, 2, 5]
A_TEXT = 1 / N_TEST
OPPOSITE = {"male / female": "female_data_only", "professor / nurse": "nurse_data_only"}
"""SAEBench's names of the texts of the other class."""
BIASED = "male_professor / female_nurse"


def probing_config() -> Any:
    return sparse_probing.SparseProbingEvalConfig(
        dataset_names=[f"{SENTIMENT}_sentiment"],
        probe_train_set_size=N_TRAIN,
        probe_test_set_size=N_TEST,
        context_length=CONTEXT,
        k_values=K_VALUES,
        llm_batch_size=80,
        llm_dtype="float32",
        model_name="reference",
    )


@torch.no_grad()
def probe_accuracies(sae: sm.SAE | sm.Ensemble, scaled: bool, activations: Callable[[str], Tensor]) -> list[float]:
    """Accuracy of sklearn's probe on the k features of the largest difference of means, for each k; codes are means over tokens."""
    norms = sae.W_dec.norm(dim=1)

    def pooled(split: str) -> tuple[np.ndarray, np.ndarray]:
        rows = local_data_set(SENTIMENT)[split]
        x = [activations(row["text"]) for row in rows]
        codes = [(sae.encode(each, scaled) if isinstance(sae, sm.Ensemble) else sae.encode(each)).mean(0) * norms for each in x]
        return torch.stack(codes).numpy(), np.array([row["rating"] == 1.0 for row in rows])

    (z, labels), (test_z, test_labels) = pooled("train"), pooled("test")
    order = np.argsort(-np.abs(z[labels].mean(0) - z[~labels].mean(0)))
    probes = [(order[:k], LogisticRegression(max_iter=1000).fit(z[:, order[:k]], labels)) for k in K_VALUES]
    return [probe.score(test_z[:, chosen], test_labels) for chosen, probe in probes]


def test_sparse_probing_is_a_probe_on_pooled_codes(
    dictionaries: Dictionaries, activations: Callable[[str], Tensor], tmp_path: Path
) -> None:
    selected = [(name, for_saebench(sae)) for name, sae in dictionaries.items()]
    selected.append(("bagging_unscaled", for_saebench(dictionaries["bagging"], scaled=False)))
    sparse_probing.run_eval(probing_config(), selected, "cpu", str(tmp_path / "out"), artifacts_path=str(tmp_path / "cache"))
    found: dict[str, list[float]] = {}
    for name, adapter in selected:
        results = json.loads((tmp_path / "out" / f"{name}_custom_sae_eval_results.json").read_text())
        found[name] = [results["eval_result_metrics"]["sae"][f"sae_top_{k}_test_accuracy"] for k in K_VALUES]
        expected = probe_accuracies(adapter.sae, adapter.cfg.scaled, activations)
        assert found[name] == pytest.approx(expected, abs=A_TEXT + 1e-6), name
        assert max(expected) > 0.6
        described = results["sae_cfg_dict"]
        assert (described["model_name"], described["hook_name"], described["d_sae"]) == ("reference", HOOK, len(adapter.W_dec))
    assert found["bagging"] != found["bagging_unscaled"]  # the penalty of the probes weighs more on codes divided by 3


@torch.no_grad()
def test_spurious_correlation_removal_is_the_ablation_of_our_codes(dictionaries: Dictionaries, tmp_path: Path) -> None:
    pair, n_values = ("professor", "nurse"), [2, 10]
    config = scr_and_tpp.ScrAndTppEvalConfig(
        dataset_names=[f"{BIOS}_class_set1"],
        column1_vals_lookup={f"{BIOS}_class_set1": [pair]},
        perform_scr=True,
        train_set_size=N_TRAIN,
        test_set_size=N_TEST,
        context_length=CONTEXT,
        n_values=n_values,
        llm_batch_size=80,
        llm_dtype="float32",
        model_name="reference",
    )
    selected = [(name, for_saebench(sae)) for name, sae in dictionaries.items()]
    scr_and_tpp.run_eval(config, selected, "cpu", str(tmp_path / "out"), artifacts_path=str(tmp_path / "cache"))
    (file,) = tmp_path.glob("cache/scr/*/*/*_activations.pt")
    activations = torch.load(file)
    (file,) = tmp_path.glob("cache/scr/*/*/*_probes.pkl")
    probes = {name: probe.net for name, probe in pickle.loads(file.read_bytes())["llm_probes"].items()}
    for name, sae in dictionaries.items():
        results = json.loads((tmp_path / "out" / "scr" / f"{name}_custom_sae_eval_results.json").read_text())
        found = results["eval_result_metrics"]["scr_metrics"]
        for direction, (removed, kept) in enumerate(permutations(OPPOSITE), 1):
            expected = ablated_accuracies(sae, probes, activations, removed=removed, kept=kept, n_values=n_values)
            scale = expected.ideal - expected.before
            assert scale > 0.05
            for n, after in zip(n_values, expected.after, strict=True):
                score = (after - expected.before) / scale
                assert found[f"scr_dir{direction}_threshold_{n}"] == pytest.approx(score, abs=A_TEXT / scale + 1e-6), (name, direction, n)


class Accuracies(NamedTuple):
    """Of the biased probe before and after the ablation of the n features, and of the probe of the wanted property."""

    before: float
    after: list[float]
    ideal: float


def ablated_accuracies(
    sae: sm.SAE | sm.Ensemble,
    probes: dict[str, Any],
    activations: dict[str, dict[str, Tensor]],
    *,
    removed: str,
    kept: str,
    n_values: list[int],
) -> Accuracies:
    """Ablate the features with the largest effect on the probe ``removed``; accuracies on the labels of ``kept``."""

    def pool(values: Tensor, x: Tensor) -> Tensor:
        return values.sum(1) / (x.sum(-1) != 0).sum(1, keepdim=True)  # activations of padding are 0

    def mean_code(x: Tensor) -> Tensor:
        return pool(sae.encode(x) * (x.sum(-1, keepdim=True) != 0), x).mean(0)

    train = activations["train"]
    change = mean_code(train[removed]) - mean_code(train[OPPOSITE[removed]])
    effect = (change * (sae.W_dec @ probes[removed].weight[0])).abs()

    def accuracy(probe: str, n: int) -> float:
        chosen, right = effect.topk(n).indices, []
        for side, label in ((kept, True), (OPPOSITE[kept], False)):
            x = activations["test"][side]
            ablated = x - sae.encode(x)[..., chosen] @ sae.W_dec[chosen]
            right.append((probes[probe](pool(ablated, x)).squeeze(-1) > 0) == label)
        return torch.cat(right).float().mean().item()

    return Accuracies(accuracy(BIASED, 0), [accuracy(BIASED, n) for n in n_values], accuracy(kept, 0))


@pytest.mark.parametrize("name", ["member", "bagging", "boosting", "consensus"])
def test_core_is_the_loss_of_the_spliced_model(
    name: str, dictionaries: Dictionaries, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sae, n_batches, seen = dictionaries[name], 2, []
    store = sae_lens.ActivationsStore
    draw = store.get_batch_tokens
    monkeypatch.setattr(store, "get_batch_tokens", lambda *args, **kwargs: seen.append(draw(*args, **kwargs)) or seen[-1])
    core.multiple_evals(
        [(name, for_saebench(sae))],
        n_eval_reconstruction_batches=n_batches,
        n_eval_sparsity_variance_batches=n_batches,
        eval_batch_size_prompts=4,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        context_size=CONTEXT,
        output_folder=str(tmp_path),
        device="cpu",
    )
    results = json.loads((tmp_path / f"{name}_custom_sae_eval_results.json").read_text())
    found = results["eval_result_metrics"]
    assert len(seen) == 2 * n_batches
    tokens = torch.cat(seen[:n_batches])
    used = tokens != 0  # neither end of text nor padding
    assert not used.all()
    edits: dict[str, Callable[[Tensor], Tensor]] = {
        "ce_loss_without_sae": lambda x: x,
        "ce_loss_with_sae": lambda x: torch.where(used[..., None], sae(x), x),
        "ce_loss_with_ablation": torch.zeros_like,
    }
    for key, edit in edits.items():
        assert found["model_performance_preservation"][key] == pytest.approx(spliced_loss(model, tokens, used, edit), rel=1e-4), key
    tokens = torch.cat(seen[n_batches:])
    with torch.no_grad():
        x = model(tokens, output_hidden_states=True).hidden_states[LAYER + 1][tokens != 0]
        z, W_enc, W_dec = sae.encode(x), sae.W_enc, sae.W_dec
        assert found["sparsity"]["l0"] == pytest.approx((z > 0).sum(1).float().mean().item(), rel=1e-4)
        assert found["sparsity"]["l1"] == pytest.approx((z @ W_dec.norm(dim=1)).mean().item(), rel=1e-3)
        assert found["reconstruction_quality"]["cossim"] == pytest.approx(F.cosine_similarity(x, sae(x)).mean().item(), rel=1e-3)
        features = results["eval_result_details"]
        assert [each["feature_density"] for each in features] == pytest.approx((z > 0).float().mean(0).tolist(), abs=1e-3)
        cosines = F.cosine_similarity(W_enc.T, W_dec).tolist()
        assert [each["encoder_decoder_cosine_sim"] for each in features] == pytest.approx(cosines, abs=1e-4)


@torch.no_grad()
def spliced_loss(model: Any, tokens: Tensor, used: Tensor, edit: Callable[[Tensor], Tensor]) -> float:
    """Mean next-token loss of transformers' model after `used` tokens, with an edited output of the block."""
    handle = model.gpt_neox.layers[LAYER].register_forward_hook(lambda module, args, output: edit(output))
    try:
        logits = model(tokens).logits
    finally:
        handle.remove()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
    return losses[used[:, :-1]].mean().item()


@torch.no_grad()
def test_absorption_projects_our_codes_onto_the_direction(
    dictionaries: Dictionaries, hooked: Any, activations: Callable[[str], Tensor]
) -> None:
    """The words come from the tokenizer, the direction is random: the probe of a first letter takes a model that can spell."""
    words, features = ["value", "name", "index", "size"], [0, 1, 2, 3]
    calculator = FeatureAbsorptionCalculator(hooked, icl_word_list=[])
    for name, sae in dictionaries.items():
        direction = F.normalize(torch.randn(sae.W_dec.shape[1], generator=torch.Generator().manual_seed(1)), dim=0)
        cosines = F.cosine_similarity(sae.W_dec, direction, dim=-1)
        results = calculator.calculate_absorption(for_saebench(sae), words, direction, features, LAYER).word_results
        assert [each.word for each in results] == words
        for each in results:
            x = activations(each.prompt)[calculator.word_token_pos]
            contributions = sae.encode(x) * sae.W_dec.norm(dim=1)
            assert each.probe_projection == pytest.approx((x @ direction).item(), abs=1e-3)
            expected = (contributions * cosines).topk(calculator.topk_feats)
            found = each.top_projection_feature_scores
            assert [score.probe_projection for score in found] == pytest.approx(expected.values.tolist(), rel=1e-3, abs=1e-4), name
            assert [score.activation for score in each.main_feature_scores] == pytest.approx(contributions[features].tolist(), abs=1e-3)


def test_a_bag_scores_as_the_same_sae_of_saelens(dictionaries: Dictionaries, hooked: Any, tmp_path: Path) -> None:
    """A bag of ReLU SAEs is one plain SAE of SAELens, whose rows SAELens scales to norm 1 itself."""
    bag, members = dictionaries["bagging"], []
    assert isinstance(bag, sm.Ensemble)
    for sae in bag:
        standard = sm.build_sae(sm.SAEConfig(architecture="standard", d_in=sae.config.d_in, d_sae=sae.config.d_sae))
        standard.load_state_dict(sae.state_dict())
        standard.metadata = sae.metadata
        members.append(standard)
    interop.export(sm.Bagging(members), "sae_lens", tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    theirs.fold_W_dec_norm()
    ours = for_saebench(sm.Bagging(members))
    for name in ("W_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name).detach(), rtol=1e-4, atol=1e-5)
    general_utils.load_and_format_sae("theirs", theirs, "cpu")  # adds the fields of older versions of SAELens
    found, expected = (
        sparse_probing.run_eval_single_sae(probing_config(), sae, hooked, "cpu", str(tmp_path / "cache"))[0] for sae in (ours, theirs)
    )
    keys = [f"sae_top_{k}_test_accuracy" for k in K_VALUES]
    assert [found[key] for key in keys] == pytest.approx([expected[key] for key in keys], abs=A_TEXT + 1e-6)
