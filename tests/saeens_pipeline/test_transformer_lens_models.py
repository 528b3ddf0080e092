"""Models in TransformerLens' own format, in an environment that has it: `make test-transformer-lens`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_experiment import Laboratory
from tiny_models import CONTEXT_LENGTH, D_MODEL, END_OF_TEXT, N_LAYERS, VOCAB_SIZE, Architecture, edit_config, write_tiny_model
from tiny_transformer_lens import tiny_hooked, write_hooked

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.descriptions import HOOKS, LanguageModelDescription, validate_hook
from saeens_pipeline.language_models.loading import load_language_model, validate_modules
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.patching import PatchedWindows
from saeens_pipeline.language_models.tokens import TokenBatch
from saeens_pipeline.language_models.transformer_lens_models import REPOSITORIES

transformer_lens = pytest.importorskip("transformer_lens", reason="the optional extra transformer_lens is not installed")
pytestmark = [
    pytest.mark.transformer_lens,
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning"),
]

LAYERS = list(range(N_LAYERS))
GEMMA_2 = {
    "d_head": 8,
    "n_heads": 2,
    "n_key_value_heads": 1,
    "eps": 1e-6,
    "act_fn": "gelu_pytorch_tanh",
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 8,
    "window_size": CONTEXT_LENGTH // 2,
    "use_local_attn": True,
    "attn_types": ["local", "global", "local"],
    "attn_scores_soft_cap": 50.0,
    "output_logits_soft_cap": 30.0,
    "gated_mlp": True,
    "final_rms": True,
    "use_normalization_before_and_after": True,
    "original_architecture": "Gemma2ForCausalLM",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hooked(tmp_path_factory.mktemp("models") / "gelu", tiny_hooked())


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(1))


def _described(folder: Path) -> LanguageModelDescription:
    return describe_language_model(f"transformer_lens:{folder}")


def test_transformer_lens_descriptions_have_the_values_of_their_configuration(folder: Path):
    found = _described(folder)
    assert (found.d_model, found.n_layers, found.context_length, found.vocab_size) == (D_MODEL, N_LAYERS, CONTEXT_LENGTH, VOCAB_SIZE)
    assert (found.end_of_text, found.parallel_residual, found.tokenizer_file) == (END_OF_TEXT, False, folder / "tokenizer.json")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "final.pth"])
def test_hooks_equal_run_with_cache_exactly(tmp_path: Path, tokens: torch.Tensor, hook: str, pickled: bool):
    hooked = tiny_hooked()
    _, cache = hooked.run_with_cache(tokens)
    found = load_language_model(_described(write_hooked(tmp_path / "model", hooked, pickled=pickled))).activations(tokens, hook, LAYERS)
    for layer in LAYERS:
        assert torch.equal(found[layer], cache[f"blocks.{layer}.hook_{hook}"])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("hook", [*HOOKS, "blocks.{layer}.ln1.hook_normalized", "blocks.{layer}.hook_resid_post"])
def test_patching_equals_run_with_hooks_exactly(folder: Path, tokens: torch.Tensor, hook: str, layer: int):
    everywhere = torch.ones_like(tokens)
    windows = PatchedWindows(
        load_language_model(_described(folder)), TokenBatch(tokens, everywhere.bool(), everywhere, everywhere), hook, layer
    )
    hooked, name = tiny_hooked(), hook.format(layer=layer) if "{layer}" in hook else f"blocks.{layer}.hook_{hook}"
    with torch.no_grad():
        assert torch.equal(windows.logits(windows.activations), hooked(tokens))
        for replacement in (torch.zeros_like(windows.activations), windows.activations.flip(0)):
            expected = hooked.run_with_hooks(tokens, fwd_hooks=[(name, lambda *_, hook, replacement=replacement: replacement)])
            assert torch.equal(windows.logits(replacement), expected)
            assert not torch.allclose(expected, hooked(tokens))
    assert windows.loss(windows.rows).mean == pytest.approx(hooked(tokens, return_type="loss").item(), rel=1e-6)


def test_other_hooks_are_module_paths_of_transformer_lens(folder: Path, tokens: torch.Tensor):
    model = load_language_model(_described(folder))
    _, cache = tiny_hooked().run_with_cache(tokens)
    path = "blocks.{layer}.ln1.hook_normalized"
    assert torch.equal(model.activations(tokens, path, [2])[2], cache["blocks.2.ln1.hook_normalized"])
    with pytest.raises(ConfigurationError, match=r"has no module 'blocks.1.mlp.hook_mid'; it has"):
        model.activations(tokens, "blocks.{layer}.mlp.hook_mid", [1])


def test_a_transformer_lens_model_has_the_call_signature_of_transformers(folder: Path, tokens: torch.Tensor):
    model = load_language_model(_described(folder)).model
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, tiny_hooked()(tokens))
    assert model.device == torch.device("cpu")


def test_transformer_lens_unembedding_normalises_the_residual_stream(folder: Path, tokens: torch.Tensor):
    unembedding = load_language_model(_described(folder)).unembedding()
    assert unembedding is not None and unembedding.shape == (VOCAB_SIZE, D_MODEL)
    hooked = tiny_hooked()
    with torch.no_grad():
        logits, cache = hooked.run_with_cache(tokens)
        normalised = cache["ln_final.hook_normalized"] * hooked.ln_final.w + hooked.ln_final.b
        torch.testing.assert_close(normalised @ unembedding.T + hooked.b_U, logits)


def test_without_mlp_there_is_neither_mlp_out_nor_resid_mid(tmp_path: Path, tokens: torch.Tensor):
    hooked = tiny_hooked(attn_only=True)
    description = _described(write_hooked(tmp_path / "model", hooked, attn_only=True))
    for hook in ("mlp_out", "resid_mid"):
        with pytest.raises(ConfigurationError, match=rf"hook '{hook}' is not available in .*; available: resid_pre, resid_post, attn_out,"):
            validate_hook(description, hook, [0])
    _, cache = hooked.run_with_cache(tokens)
    assert torch.equal(load_language_model(description).activations(tokens, "resid_post", [1])[1], cache["blocks.1.hook_resid_post"])


def test_transformer_lens_random_weights_are_seeded_without_the_global_generator(folder: Path, tokens: torch.Tensor):
    (state, description) = torch.random.get_rng_state(), _described(folder)
    first, again, other = (
        load_language_model(description, "random", seed=seed).activations(tokens, "resid_post", [1])[1] for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_transformer_lens_modules_are_validated_without_reading_weights(tmp_path: Path):
    folder = write_hooked(tmp_path / "model", tiny_hooked())
    description = _described(folder)
    (folder / "model.safetensors").unlink()
    validate_modules(description, "resid_mid", LAYERS)
    with pytest.raises(ConfigurationError, match="has no module"):
        validate_modules(description, "blocks.{layer}.router", [0])


def test_weights_that_lack_a_tensor_or_have_another_shape_are_refused(tmp_path: Path):
    folder = write_hooked(tmp_path / "model", tiny_hooked())
    weights = tiny_hooked().state_dict()
    save_file({"embed.W_E": weights["embed.W_E"]}, folder / "model.safetensors")
    with pytest.raises(SaeensError, match=r"model.safetensors lacks \d+ tensors: blocks.0.attn.W_K"):
        load_language_model(_described(folder))
    edit_config(folder, d_vocab=VOCAB_SIZE + 1)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    with pytest.raises(SaeensError, match=r"has embed.W_E in another shape"):
        load_language_model(_described(folder))


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path):
    class Runs:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    folder = write_hooked(tmp_path / "model", tiny_hooked(), pickled=True)
    torch.save({"embed.W_E": Runs()}, folder / "model_final.pth")
    with pytest.raises(ConfigurationError, match="does not hold weights that can be read"):
        load_language_model(_described(folder))
    assert not (tmp_path / "ran").exists()


def test_model_aliases_equal_those_of_transformer_lens():
    from transformer_lens.supported_models import MODEL_ALIASES  # pyright: ignore[reportMissingImports]

    for alias, repository in REPOSITORIES.items():
        assert alias in MODEL_ALIASES[repository]


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gemma2"])
def test_hooks_read_the_activations_of_transformer_lens(architecture: Architecture, tmp_path: Path, tokens: torch.Tensor):
    """Models of transformers, which TransformerLens computes in its own way: equal up to rounding."""
    from transformer_lens import loading_from_pretrained  # pyright: ignore[reportMissingImports]

    path = write_tiny_model(tmp_path / "model", architecture)
    model = load_language_model(describe_language_model(str(path)))
    if architecture == "gemma2":  # which TransformerLens knows by the names of its releases only
        config = transformer_lens.HookedTransformerConfig(
            **GEMMA_2, d_model=D_MODEL, n_layers=N_LAYERS, n_ctx=CONTEXT_LENGTH, d_vocab=VOCAB_SIZE, d_mlp=32, device="cpu"
        )
    else:
        config = loading_from_pretrained.get_pretrained_model_config(str(path), device="cpu")
    hooked = transformer_lens.HookedTransformer(config)
    convert = {
        "gpt_neox": loading_from_pretrained.convert_neox_weights,
        "llama": loading_from_pretrained.convert_llama_weights,
        "gemma2": loading_from_pretrained.convert_gemma_weights,
    }
    state = convert[architecture](model.model, config)
    hooked.load_and_process_state_dict(state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    _, cache = hooked.run_with_cache(tokens)
    for hook in HOOKS:
        if hook == "resid_mid" and architecture == "gpt_neox":
            continue
        for layer, activations in model.activations(tokens, hook, LAYERS).items():
            torch.testing.assert_close(activations, cache[f"blocks.{layer}.hook_{hook}"], rtol=1e-4, atol=1e-5)


def test_an_experiment_runs_on_a_transformer_lens_model(folder: Path, empty: Laboratory):
    empty.declare({"language_model": f"transformer_lens:{folder}", "hook": "resid_mid", "packing": "concatenate"})
    printed = empty.run()
    assert "boosting" in printed
    made = empty.artefact("activations")
    assert made.provenance["statistics"]["train"]["rows"] == 600
    metadata = json.loads((empty.artefact("bagging/member_1", 1).path / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.1.hook_resid_mid"
