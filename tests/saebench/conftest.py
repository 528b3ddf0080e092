"""The embedded language model in TransformerLens, dictionaries trained on it, and texts of templates under the names of SAEBench's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping  # pyright: ignore[reportMissingImports]
import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig  # pyright: ignore[reportMissingImports]
from transformer_lens.pretrained.weight_conversions.neox import convert_neox_weights  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import saeens_models as sm
from saeens_models.consensus import consensus

FOLDER = Path(__file__).parents[2] / "data" / "reference_model"
LAYER, HOOK, CONTEXT = 1, "blocks.1.hook_resid_post", 32
SENTIMENT, BIOS, CORPUS = "canrager/amazon_reviews_mcauley_1and5", "LabHC/bias_in_bios", "Skylion007/openwebtext"
N_TRAIN, N_TEST = 160, 80  # texts of a probe

torch.set_num_threads(1)
jaxtyping.config.update("jaxtyping_disable", True)  # as JAXTYPING_DISABLE=1: see docs/how_to/saebench.md

LINES = {
    "python": ["def {a}(self, {b}):", "    return self.{a}[{b}]", "for {a} in {b}:", "import {a}", "    raise ValueError({a})"],
    "c": ["static int {a}(int {b}) {{", "  return {a}->{b};", "#include <{a}.h>", "const char *{a} = {b};", "  if ({a} == NULL)"],
    "test": ["assert {a} == {b}", "check the {a} of {b}", "expected {a}, got {b}", "a test of {a}"],
    "parse": ["parse {a} into {b}", "split the {a} at {b}", "a token of {a}", "read {a} from {b}"],
    "other": ["{a} and {b}", "see {a}", "the {b} has a {a}", "{a}: {b}"],
}
WORDS = ["value", "name", "index", "size", "node", "key", "path", "item", "count", "data"]


def text(generator: random.Random, *kinds: str) -> str:
    """Eight lines, each of one of the kinds or of no kind."""
    kinds = (*kinds, "other", "other")
    lines = [generator.choice(LINES[generator.choice(kinds)]) for _ in range(8)]
    return "\n".join(line.format(a=generator.choice(WORDS), b=generator.choice(WORDS)) for line in lines)


def reviews(seed: int, n: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    kinds = {1.0: ("python", "python", "c"), 5.0: ("c", "c", "python")}
    return [{"text": text(generator, *kinds[rating]), "rating": rating} for rating in kinds for _ in range(n // 2)]


def bios(seed: int, n: int) -> list[dict[str, Any]]:
    """As many texts of each profession and gender as half the size of a probe, and one: SAEBench wants more than it takes."""
    generator = random.Random(seed)
    return [
        {"hard_text": text(generator, of_profession, of_gender), "profession": profession, "gender": gender}
        for profession, of_profession in ((21, "python"), (13, "c"))
        for gender, of_gender in ((0, "test"), (1, "parse"))
        for _ in range(n // 2 + 1)
    ]


DATA_SETS: dict[str, Callable[[int, int], list[dict[str, Any]]]] = {SENTIMENT: reviews, BIOS: bios}


def local_data_set(name: str, **kwargs: Any) -> Any:
    """In place of datasets.load_dataset."""
    import datasets

    if name == CORPUS:
        generator = random.Random(5)
        kinds = [kind for kind in LINES if kind != "other"]
        return datasets.Dataset.from_list([{"text": text(generator, *generator.sample(kinds, 2))} for _ in range(60)])
    return {"train": DATA_SETS[name](1, N_TRAIN), "test": DATA_SETS[name](2, N_TEST)}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, hooked: Any) -> Iterator[None]:
    """Texts and model are local; gradients, which SAEBench switches off, are on again after each test."""
    import sae_bench.evals.scr_and_tpp.dataset_creation  # pyright: ignore[reportMissingImports]
    import sae_bench.sae_bench_utils.dataset_utils  # pyright: ignore[reportMissingImports]
    import sae_lens.training.activations_store  # pyright: ignore[reportMissingImports]

    for module in (
        sae_bench.evals.scr_and_tpp.dataset_creation,
        sae_bench.sae_bench_utils.dataset_utils,
        sae_lens.training.activations_store,
    ):
        monkeypatch.setattr(module, "load_dataset", local_data_set)
    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", lambda name, **kwargs: hooked)
    with torch.enable_grad():
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def model() -> Any:
    """The embedded model in transformers."""
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def hooked(model: Any, tokenizer: Any) -> Any:
    """The same model in TransformerLens."""
    config = model.config
    d_head = config.hidden_size // config.num_attention_heads
    settings = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        d_head=d_head,
        d_mlp=config.intermediate_size,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        eps=config.layer_norm_eps,
        act_fn=config.hidden_act,
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=round(config.rope_parameters["partial_rotary_factor"] * d_head),
        rotary_adjacent_pairs=False,
        parallel_attn_mlp=True,
        default_prepend_bos=False,
        device="cpu",
    )
    converted = HookedTransformer(settings, tokenizer=tokenizer)
    converted.load_state_dict(convert_neox_weights(model, settings), strict=False)
    tokens = torch.arange(1, 65)[None]
    torch.testing.assert_close(converted(tokens), model(tokens).logits, rtol=1e-3, atol=1e-3)
    return converted.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def activations(model: Any, tokenizer: Any) -> Callable[[str], Tensor]:
    """Return the activations of a text, computed by transformers: `[n, d_in]`."""

    def compute(text: str) -> Tensor:
        tokens = tokenizer(text, truncation=True, max_length=CONTEXT, return_tensors="pt")["input_ids"]
        return model(tokens, output_hidden_states=True).hidden_states[LAYER + 1][0]

    return compute


@pytest.fixture(scope="session")
def dictionaries(activations: Callable[[str], Tensor]) -> dict[str, sm.SAE | sm.Ensemble]:
    """A member, both ensembles and a consensus dictionary, whose decoder rows have all sorts of norms."""
    rows = torch.cat([activations(row["text"]) for row in local_data_set(SENTIMENT)["train"]])

    def settings(x: Tensor) -> sm.TrainingConfig:
        return sm.TrainingConfig(
            learning_rate=2e-3, unit_norm_decoder=False, dead_after_tokens=10_000, input_mean=tuple(x.mean(0).tolist())
        )

    def batches(x: Tensor) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [x[torch.randint(len(x), (256,), generator=generator)] for _ in range(150)]

    def train(x: Tensor, seeds: range) -> list[sm.SAE]:
        configs = [sm.SAEConfig(architecture="topk", d_in=x.shape[1], d_sae=96, k=8, init_seed=seed) for seed in seeds]
        saes = sm.train(configs, iter(batches(x)), settings(x))
        for sae in saes:
            sae.metadata = {"model_name": "reference", "hook_name": HOOK, "hook_layer": LAYER, "context_size": CONTEXT}
        return saes

    members = train(rows, range(3))
    with torch.no_grad():
        left = rows - members[0](rows)
    found = consensus(members, iter(batches(rows)), settings(rows), threshold=0.5).sae
    found.metadata = dict(members[0].metadata)
    return {
        "member": members[0],
        "bagging": sm.Bagging(members),
        "boosting": sm.Boosting([members[0], *train(left, range(5, 6))]),
        "consensus": found,
    }
