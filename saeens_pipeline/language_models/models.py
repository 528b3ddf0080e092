"""Language models: what one is, read from its files alone, and the activations that it gives at a hook."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import hub
from saeens_pipeline.language_models.fingerprints import fingerprint
from saeens_pipeline.settings.corpora import is_hub_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Weights = Literal["trained", "random"]

REFERENCE_MODEL = "builtin/reference"
TRANSFORMER_LENS = "transformer_lens:"
HOOKS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
READ_AT_INPUT = ("resid_pre", "resid_mid")
"""Hooks that are what a module is given; the others are what one returns."""

_PACKAGED_REFERENCE_MODEL = Path(__file__).parent / "reference_model_files"
_CHECKED_OUT_REFERENCE_MODEL = Path(__file__).parents[2] / "data" / "reference_model"
_WHOLLY_HASHED_BYTES = 64 * 2**20
_SAMPLE_BYTES = 64 * 2**10
_HUB_FILES = ("config.json", "tokenizer.json")
_HUB_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth")
_PARALLEL_RESIDUAL_TYPES = ("codegen", "cohere", "gpt_neox", "gptj", "phi")
_ATTENTION_NAMES = ("attention", "self_attn", "attn", "self_attention")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_MLP_NORM_NAMES = ("ln_2", "post_attention_layernorm", "ffn_norm", "norm_2")
_HOOKS_WITHOUT_MODULE = {
    **dict.fromkeys(("bloom", "glm4", "granite", "granitemoe"), ("attn_out", "mlp_out")),
    "mpt": ("mlp_out",),
    "openai-gpt": ("resid_mid",),
}
"""Hooks that are no module's input or output: what returns it adds the stream, or it is normalised or scaled afterwards."""


@dataclass(frozen=True)
class LanguageModelDescription:
    """What the files of a language model say of it, without loading its weights.

    `identity` is for recipes: it changes whenever activations or tokens may change with the files. Of a model of the hub it holds the
    commit. Of others, files of up to 64 MiB are hashed whole; of a larger weight file the size, the safetensors header and 64 samples of
    64 KiB spread evenly over it are hashed: every training run changes those, an edit of single values between two samples goes unseen.
    """

    name: str
    revision: str
    path: Path  # the folder, in transformers' format; of a model of the hub, without its weights
    model_type: str
    d_model: int
    n_layers: int
    context_length: int  # tokens
    vocab_size: int
    end_of_text: int | None  # token id that separates documents
    parallel_residual: bool  # attention and MLP of a block both read the block's input
    identity: dict[str, object] = field(hash=False)
    commit: str | None = None  # of the hub
    tokenizer_file: Path = field(default=Path(), kw_only=True)
    without: tuple[str, ...] = field(default=(), kw_only=True)  # hooks that its blocks do not have
    has_head: bool = field(default=True, kw_only=True)  # a language-modelling head, which gives next-token predictions


def describe_language_model(name: str, revision: str = "main") -> LanguageModelDescription:
    """Describe `builtin/reference`, a local folder in transformers' format, a model of the hub, or `transformer_lens:NAME`.

    Of a model of the hub only its configuration and its tokenizer are downloaded, where the hub's cache lacks them. Needs neither
    torch nor transformers. Raises ConfigurationError where there is no such folder or model, where it lacks config.json, tokenizer.json
    or safetensors weights, where the configuration does not say what a language model's has to, and where the hub refuses it;
    SaeensError where the hub cannot be reached.
    """
    if name.startswith(TRANSFORMER_LENS):
        from saeens_pipeline.language_models.transformer_lens_models import describe_transformer_lens_model

        return describe_transformer_lens_model(name, revision)
    folder = locate_model(name, revision, _HUB_FILES)
    config = read_config(name, folder.path)
    text = config.get("text_config", config)  # of a multimodal model, the language part
    end_of_text = text.get("eos_token_id", config.get("eos_token_id"))
    model_type = str(text.get("model_type", config.get("model_type", "unknown")))
    classes = [str(each) for each in config.get("architectures") or []]
    headless = bool(classes) and all(each.endswith("Model") and not each.endswith("LMHeadModel") for each in classes)
    parallel = bool(text.get("use_parallel_residual", text.get("parallel_attn", model_type in _PARALLEL_RESIDUAL_TYPES)))
    return LanguageModelDescription(
        name=name,
        revision=revision,
        path=folder.path,
        model_type=model_type,
        d_model=read_size(text, folder.path, "hidden_size", "n_embd", "d_model"),
        n_layers=read_size(text, folder.path, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        context_length=read_size(text, folder.path, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
        vocab_size=read_size(text, folder.path, "vocab_size"),
        end_of_text=next(iter(end_of_text), None) if isinstance(end_of_text, list) else end_of_text,
        parallel_residual=parallel,
        identity=_identity(name, revision, folder),
        commit=folder.commit,
        tokenizer_file=require_tokenizer(name, folder),
        without=_HOOKS_WITHOUT_MODULE.get(model_type, ()),
        has_head=not headless,
    )


def validate_hook(description: LanguageModelDescription, hook: str, layers: Collection[int]) -> None:
    """Raise ConfigurationError for a layer or a named hook that the model does not have, without loading its weights.

    Whether the hook's modules are there is seen in the model's structure: `validate_modules` builds that.
    """
    if not layers:
        raise ConfigurationError(f"no layers given: {description.name} has layers 0 to {description.n_layers - 1}")
    outside = sorted(layer for layer in layers if not 0 <= layer < description.n_layers)
    if outside:
        missing = ", ".join(map(str, outside))
        raise ConfigurationError(f"{description.name} has no layer {missing}: it has layers 0 to {description.n_layers - 1}")
    if "{layer}" in hook:
        return
    lacking = {*description.without, *(["resid_mid"] if description.parallel_residual else [])}
    others = f"available: {', '.join(each for each in HOOKS if each not in lacking)}, or a module path with {{layer}}"
    if hook == "resid_mid" and description.parallel_residual:
        why = f"{description.name} computes attention and MLP in parallel, so that there is nothing between them"
        raise ConfigurationError(f"hook 'resid_mid' is not available: {why}; {others}")
    if hook in lacking:
        raise ConfigurationError(f"hook {hook!r} is not available in {description.name} ({description.model_type}); {others}")
    if hook not in HOOKS:
        raise ConfigurationError(f"hook {hook!r} is not known; {others}, such as 'model.layers.{{layer}}.mlp'")


def validate_modules(description: LanguageModelDescription, hook: str, layers: Collection[int]) -> None:
    """Raise ConfigurationError where a layer lacks the module of a hook, or where transformers does not know the architecture.

    Takes the seconds that transformers needs to be imported.
    """
    model = _structure(description)
    for layer in layers:
        model.module(hook, layer)


def block_parameters(description: LanguageModelDescription) -> list[int]:
    """Parameters of each block, without embeddings. Raises as `validate_modules`."""
    of_blocks = [0] * description.n_layers
    for name, weights in _structure(description).model.named_parameters():
        found = re.search(r"\.(\d+)\.", name)
        if found and int(found[1]) < len(of_blocks):
            of_blocks[int(found[1])] += weights.numel()
    return of_blocks


def _structure(description: LanguageModelDescription) -> LanguageModel:
    """The model without weights, or memory for them."""
    import torch

    with torch.device("meta"):
        return load_language_model(description, "random", device="meta")


def load_language_model(
    description: LanguageModelDescription,
    weights: Weights = "trained",
    device: str = "cpu",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    seed: int = 0,
) -> LanguageModel:
    """Load the model in evaluation mode. No code from the folder is run, and no pickle that could.

    Trained weights of a model of the hub are downloaded where its cache lacks them. `weights="random"` builds the same architecture
    untrained, initialised from `seed`: the control against which a result on the trained model is read. Raises SaeensError
    where weights that the architecture needs are not in the files, ConfigurationError where transformers does not know the architecture
    or cannot read the files.
    """
    import torch
    from safetensors import SafetensorError

    torch_dtype: torch.dtype = getattr(torch, dtype)
    if description.name.startswith(TRANSFORMER_LENS):
        from saeens_pipeline.language_models.transformer_lens_models import load_transformer_lens_model

        return load_transformer_lens_model(description, weights, device, torch_dtype, seed)
    if weights == "trained" and description.commit:
        hub.download(description.name, description.commit, [*_HUB_FILES, *_HUB_WEIGHTS])
        _weight_files(description.name, description.path)
    try:
        with _quiet_transformers():
            model = _trained(description, torch_dtype) if weights == "trained" else _untrained(description, torch_dtype, seed)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(f"transformers cannot load {description.path} as a causal language model: {error}") from error
    cast("torch.nn.Module", model.eval()).to(device)
    return LanguageModel(description, model)


def _trained(description: LanguageModelDescription, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        description.path,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    head = model.get_output_embeddings()
    unused = set() if description.has_head or head is None else {id(weights) for weights in head.parameters()}
    unused_names = {name for name, weights in model.named_parameters() if id(weights) in unused}
    missing = sorted(set(report["missing_keys"]) - unused_names)
    if missing:  # transformers would fill them with random numbers
        raise SaeensError(f"the weights in {description.path} lack {len(missing)} tensors that config.json asks for: {missing[0]}, ...")
    return model


def _untrained(description: LanguageModelDescription, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(description.path, local_files_only=True, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


class LanguageModel:
    """A causal language model of transformers, and where in it activations are read.

    `resid_pre` and `resid_post` are a block's input and output, `attn_out` and `mlp_out` what its attention and its MLP add to the
    stream (where a block has norms after them, as Gemma 2 has, behind these), and `resid_mid` is the stream between the two. Any other
    hook is the path of a module with `{layer}` in it, whose output is read. The last layer's `resid_post` is the block's own output,
    before the final norm (transformers' `hidden_states` has it after).
    """

    stream_passes_modules = False
    """Whether the stream between attention and MLP passes through a module of its own."""

    def __init__(self, description: LanguageModelDescription, model: PreTrainedModel) -> None:
        self.description = description
        self.model = model

    def activations(self, tokens: torch.Tensor, hook: str, layers: Collection[int]) -> dict[int, torch.Tensor]:
        """Activations `[b, L, d]` of token ids `[b, L]` at `hook` of each layer, from one forward pass.

        The pass stops as soon as the deepest layer's activations are there. Attention is causal, so padding at the end of a
        window changes nothing before it. Raises ConfigurationError as `validate_hook` does, and for a module that does not exist.
        """
        import torch

        validate_hook(self.description, hook, layers)
        captured: dict[int, torch.Tensor] = {}

        def capture(layer: int, value: Any) -> None:
            activations = value[0] if isinstance(value, tuple) else value
            if not isinstance(activations, torch.Tensor) or activations.shape[:-1] != tokens.shape:
                raise ConfigurationError(f"hook {hook!r}, layer {layer}, does not give one vector per token: choose another module")
            captured[layer] = activations
            if len(captured) == len(set(layers)):
                raise _AllCaptured

        with ExitStack() as hooks, torch.no_grad():
            for layer in set(layers):
                hooks.enter_context(self._register(hook, layer, capture))
            try:
                self.model(input_ids=tokens.to(self.model.device), use_cache=False)
            except _AllCaptured:
                return {layer: captured[layer] for layer in layers}
        never_run = sorted(set(layers) - set(captured))
        raise SaeensError(f"hook {hook!r} was not reached in layers {never_run}: its module takes no part in the forward pass")

    def widths(self, hook: str, layers: Collection[int]) -> dict[int, int]:
        """The size of one activation vector at `hook`, by layer: d_model, except for some module paths."""
        import torch

        return {layer: found.shape[-1] for layer, found in self.activations(torch.zeros(1, 2, dtype=torch.long), hook, layers).items()}

    @contextmanager
    def _register(self, hook: str, layer: int, capture: Callable[[int, Any], None]) -> Iterator[None]:
        module = self.module(hook, layer)
        if hook in READ_AT_INPUT:
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs: capture(layer, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        else:
            handle = module.register_forward_hook(lambda _, args, output: capture(layer, output))
        try:
            yield
        finally:
            handle.remove()

    def module(self, hook: str, layer: int) -> torch.nn.Module:
        """The module whose input or output `hook` is. Raises ConfigurationError for one that does not exist."""
        if hook in ("resid_pre", "resid_post"):
            return self._blocks[layer]
        if hook in HOOKS:
            return _part(self._blocks[layer], hook)
        path = hook.replace("{layer}", str(layer))
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            last_part = path.rsplit(".", 1)[-1]
            modules = [name for name, _ in self.model.named_modules() if name]
            similar = [name for name in modules if name.endswith(last_part)] or [name for name in modules if f".{layer}." in name]
            raise ConfigurationError(f"{self.description.name} has no module {path!r}; it has {', '.join(similar[:8])}, ...") from None

    def unembedding(self) -> torch.Tensor | None:
        """The weights `[vocabulary, d_model]` that make logits of the normalised stream; None without a language-modelling head."""
        head = self.model.get_output_embeddings() if self.description.has_head else None
        return None if head is None else cast("torch.Tensor", head.weight).detach()

    def blocks_before(self, hook: str, layer: int) -> list[torch.nn.Module]:
        """The blocks whose outputs do not depend on what is put at a hook; none where the model's blocks cannot be told."""
        try:
            blocks = list(self._blocks)
        except ConfigurationError:
            return []
        if "{layer}" not in hook:
            return blocks[: layer + 1] if hook == "resid_post" else blocks[:layer]
        module = self.module(hook, layer)
        holding = [i for i, block in enumerate(blocks) if any(module is each for each in block.modules())]
        return blocks[: holding[0]] if holding else []

    @property
    def _blocks(self) -> torch.nn.ModuleList:
        """The list of transformer blocks: the one outermost module list that is as long as the model has layers."""
        import torch

        lists = {
            name: m for name, m in self.model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == self.description.n_layers
        }
        outermost = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
        if len(outermost) != 1:
            raise ConfigurationError(
                f"the blocks of {self.description.name} ({self.description.model_type}) could not be told from its structure: "
                "give the hook as a module path with {layer}"
            )
        return outermost[0]


class _AllCaptured(Exception):
    """Ends a forward pass: everything that was asked for has been read."""


def _part(block: torch.nn.Module, hook: str) -> torch.nn.Module:
    """The module of a block whose output is `attn_out` or `mlp_out`, or whose input is `resid_mid`."""
    children = dict(block.named_children())
    norms_after = "post_feedforward_layernorm" in children  # Gemma 2 and 3, OLMo 2: what is added has been normalised
    match hook:
        case "attn_out":
            names = ("post_attention_layernorm",) if norms_after else _ATTENTION_NAMES
        case "mlp_out":
            names = ("post_feedforward_layernorm",) if norms_after else _MLP_NAMES
        case _:
            names = ("pre_feedforward_layernorm", *_MLP_NAMES) if norms_after else _MLP_NORM_NAMES
    for name in names:
        if name in children:
            return children[name]
    raise ConfigurationError(
        f"hook {hook!r} is not available in this model: give the path of one of its block's modules ({', '.join(children)})"
    )


class ModelFolder(NamedTuple):
    """Where a model's files are, and of one of the hub the commit that they are from."""

    path: Path
    commit: str | None = None


def locate_model(name: str, revision: str, files: Sequence[str]) -> ModelFolder:
    """The folder of a language model: the embedded one, a local one, or one in the hub's cache with `files` in it."""
    if name == REFERENCE_MODEL:
        _refuse_revision(name, revision)
        for path in (_PACKAGED_REFERENCE_MODEL, _CHECKED_OUT_REFERENCE_MODEL):
            if path.is_dir():
                return ModelFolder(path)
        raise SaeensError(
            f"the embedded model is not in {_CHECKED_OUT_REFERENCE_MODEL}: restore it, or train it with `saeens reference-model train`"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_revision(name, revision)
        return ModelFolder(path)
    if not is_hub_name(name) or name.startswith("builtin/"):
        raise ConfigurationError(
            f"language model {name!r}: there is no such folder. It can be {REFERENCE_MODEL}, a folder in transformers' format, the name of "
            f"a model on the Hugging Face hub, or {TRANSFORMER_LENS}NAME"
        )
    commit = hub.resolve_commit(name, revision, "model")
    return ModelFolder(hub.download(name, commit, files), commit)


def _refuse_revision(name: str, revision: str) -> None:
    if revision != "main":
        raise ConfigurationError(f"revision {revision!r} of {name}: builtin and local models have no revisions; leave it out")


def read_config(name: str, path: Path) -> dict[str, Any]:
    """What config.json says. Raises ConfigurationError where there is none that can be read."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            f"language model {name!r}: {path} has no config.json, so it is not a model in transformers' format"
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"language model {name!r}: {path / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigurationError(f"language model {name!r}: {path / 'config.json'} does not hold a JSON object")
    return config


def read_size(config: Mapping[str, Any], path: Path, *keys: str) -> int:
    """The number that a configuration gives under one of several names. Raises ConfigurationError where it has none of them."""
    for key in keys:
        if isinstance(config.get(key), int):
            return config[key]
    raise ConfigurationError(f"{path / 'config.json'} gives none of {', '.join(keys)}: add the one that the model has")


def require_tokenizer(name: str, folder: ModelFolder) -> Path:
    """The tokenizer's file. Raises ConfigurationError where there is none."""
    file = folder.path / "tokenizer.json"
    if not file.is_file():
        where = folder.path if folder.commit is None else "a copy of the model in a folder of your own"
        raise ConfigurationError(f"{name!r} has no tokenizer.json: save its fast tokenizer into {where} with save_pretrained()")
    return file


def _identity(name: str, revision: str, folder: ModelFolder) -> dict[str, object]:
    if folder.commit is not None:
        _require_hub_weights(name, folder.commit, folder.path)
        return {"name": name, "revision": folder.commit}
    files = [folder.path / "config.json", require_tokenizer(name, folder), *_weight_files(name, folder.path)]
    return {"name": name, "revision": revision, "sha256": {file.name: weights_fingerprint(file) for file in files}}


def _require_hub_weights(name: str, commit: str, path: Path) -> None:
    """Raise ConfigurationError where the hub has the weights in a form that is not read, without downloading them."""
    if any(path.glob("*.safetensors")):
        return
    there = hub.sizes(name, commit, [*_HUB_WEIGHTS, *_PICKLES])
    if there and not any(file.endswith(".safetensors") for file in there):
        raise ConfigurationError(
            f"language model {name!r}: the hub has its weights only as {min(there)}, a pickle, which can run code: convert it to "
            "safetensors and give the folder"
        )


def _weight_files(name: str, path: Path) -> list[Path]:
    """The files that hold the weights. Raises ConfigurationError where one is missing."""
    if (path / "model.safetensors.index.json").is_file():
        index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        weights = [path / file for file in sorted(set(index["weight_map"].values()))]
    else:
        weights = [path / "model.safetensors"]
    absent = [file.name for file in weights if not file.is_file()]
    if absent:
        pickled = sorted(file.name for file in path.glob("*.bin"))
        advice = f"it has only {pickled[0]}, a pickle, which can run code: convert it to safetensors" if pickled else "copy them there"
        raise ConfigurationError(f"language model {name!r}: {path} lacks its weights, {', '.join(absent)}; {advice}")
    return weights


def weights_fingerprint(file: Path) -> str:
    """SHA-256 of a model's file; of large weights, of samples."""
    with file.open("rb") as stream:
        header_bytes = min(int.from_bytes(stream.read(8), "little"), _WHOLLY_HASHED_BYTES)
    return fingerprint(file, whole_bytes=_WHOLLY_HASHED_BYTES, sample_bytes=_SAMPLE_BYTES, head=range(8, 8 + header_bytes))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Loading bars and advice of transformers would tear our own progress display."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
