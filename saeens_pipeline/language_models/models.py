"""Language models: what one is, read from its files alone, and the activations that it gives at a hook."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from saeens_pipeline.errors import ConfigurationError, SaeensError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Weights = Literal["trained", "random"]

REFERENCE_MODEL = "builtin/reference"
HOOKS = ("resid_pre", "resid_post", "attn_out", "mlp_out")

_PACKAGED_REFERENCE_MODEL = Path(__file__).parent / "reference_model_files"
_CHECKED_OUT_REFERENCE_MODEL = Path(__file__).parents[2] / "data" / "reference_model"
_WHOLLY_HASHED_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 2**10
_PARALLEL_RESIDUAL_TYPES = ("codegen", "cohere", "gpt_neox", "gptj", "phi")
_ATTENTION_NAMES = ("attention", "self_attn", "attn", "self_attention")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


@dataclass(frozen=True)
class LanguageModelDescription:
    """What the files of a language model say of it, without loading its weights.

    `identity` is for recipes: it changes whenever activations or tokens may change with the files. Files of up to 64 MiB
    are hashed whole. Of a larger weight file the size, the safetensors header and 64 samples of 64 KiB spread evenly over
    it are hashed: every training run changes those, an edit of single values between two samples goes unseen.
    """

    name: str
    revision: str
    path: Path  # the folder, in transformers' format
    model_type: str
    d_model: int
    n_layers: int
    context_length: int  # tokens
    vocab_size: int
    end_of_text: int | None  # token id that separates documents
    parallel_residual: bool  # attention and MLP of a block both read the block's input
    identity: dict[str, object] = field(hash=False)
    has_head: bool = True  # a language-modelling head, which gives next-token predictions


def describe_language_model(name: str, revision: str = "main") -> LanguageModelDescription:
    """Describe `builtin/reference` or a local folder in transformers' format. Needs neither torch nor transformers.

    Raises ConfigurationError where there is no such folder, where it lacks config.json, tokenizer.json or safetensors
    weights, or where the configuration does not say what a language model's has to.
    """
    path = _model_folder(name, revision)
    config = _read_config(name, path)
    text = config.get("text_config", config)  # of a multimodal model, the language part
    end_of_text = text.get("eos_token_id", config.get("eos_token_id"))
    model_type = str(text.get("model_type", config.get("model_type", "unknown")))
    classes = [str(each) for each in config.get("architectures") or []]
    headless = bool(classes) and all(each.endswith("Model") and not each.endswith("LMHeadModel") for each in classes)
    parallel = text.get("use_parallel_residual", text.get("parallel_attn", model_type in _PARALLEL_RESIDUAL_TYPES))
    return LanguageModelDescription(
        name=name,
        revision=revision,
        path=path,
        model_type=model_type,
        d_model=_size(text, path, "hidden_size", "n_embd", "d_model"),
        n_layers=_size(text, path, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        context_length=_size(text, path, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
        vocab_size=_size(text, path, "vocab_size"),
        end_of_text=next(iter(end_of_text), None) if isinstance(end_of_text, list) else end_of_text,
        parallel_residual=bool(parallel),
        identity={"name": name, "revision": revision, "sha256": {file.name: _fingerprint(file) for file in _identifying_files(name, path)}},
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
    if hook in HOOKS or "{layer}" in hook:
        return
    available = ", ".join(HOOKS)
    if hook == "resid_mid":
        parallel = f"{description.name} computes attention and MLP in parallel, so that there is nothing between them"
        why = parallel if description.parallel_residual else "this version does not support it"
        raise ConfigurationError(f"hook 'resid_mid' is not available: {why}; available: {available}, or a module path with {{layer}}")
    raise ConfigurationError(
        f"hook {hook!r} is not known; available: {available}, or a module path with {{layer}}, such as 'model.layers.{{layer}}.mlp'"
    )


def validate_modules(description: LanguageModelDescription, hook: str, layers: Collection[int]) -> None:
    """Raise ConfigurationError where a layer lacks the module of a hook, or where transformers does not know the architecture.

    Builds the model's structure without weights or memory for them; takes the seconds that transformers needs to be imported.
    """
    import torch

    with torch.device("meta"):
        model = load_language_model(description, "random", device="meta")
    for layer in layers:
        model.module(hook, layer)


def load_language_model(
    description: LanguageModelDescription,
    weights: Weights = "trained",
    device: str = "cpu",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    seed: int = 0,
) -> LanguageModel:
    """Load the model in evaluation mode. No code from the folder is run, no pickle is read, no network is used.

    `weights="random"` builds the same architecture untrained, initialised from `seed`: the control against which a
    result on the trained model is read. Raises SaeensError where weights that the architecture needs are not in the files,
    ConfigurationError where transformers does not know the architecture or cannot read the files.
    """
    import torch
    from safetensors import SafetensorError

    torch_dtype: torch.dtype = getattr(torch, dtype)
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

    `resid_pre` and `resid_post` are a block's input and output, `attn_out` and `mlp_out` what its attention and MLP modules
    return. Any other hook is the path of a module with `{layer}` in it, whose output is read. The last layer's `resid_post`
    is the block's own output, before the final norm (transformers' `hidden_states` has it after).
    """

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
        if hook == "resid_pre":
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
        if hook in ("attn_out", "mlp_out"):
            return _child(self._blocks[layer], _ATTENTION_NAMES if hook == "attn_out" else _MLP_NAMES, hook)
        path = hook.replace("{layer}", str(layer))
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            last_part = path.rsplit(".", 1)[-1]
            modules = [name for name, _ in self.model.named_modules() if name]
            similar = [name for name in modules if name.endswith(last_part)] or [name for name in modules if f".{layer}." in name]
            raise ConfigurationError(f"{self.description.name} has no module {path!r}; it has {', '.join(similar[:8])}, ...") from None

    def block(self, layer: int) -> torch.nn.Module:
        """The transformer block of a layer. Raises ConfigurationError where the model's blocks cannot be told from its structure."""
        return self._blocks[layer]

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


def _child(block: torch.nn.Module, names: tuple[str, ...], hook: str) -> torch.nn.Module:
    children = dict(block.named_children())
    for name in names:
        if name in children:
            return children[name]
    raise ConfigurationError(
        f"hook {hook!r} is not available in this model: give the path of one of its block's modules ({', '.join(children)})"
    )


def _model_folder(name: str, revision: str) -> Path:
    if revision != "main":
        raise ConfigurationError(f"revision {revision!r} of {name}: builtin and local models have no revisions; leave it out")
    if name == REFERENCE_MODEL:
        for path in (_PACKAGED_REFERENCE_MODEL, _CHECKED_OUT_REFERENCE_MODEL):
            if path.is_dir():
                return path
        raise SaeensError(
            f"the embedded model is not in {_CHECKED_OUT_REFERENCE_MODEL}: restore it, or train it with `saeens reference-model train`"
        )
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ConfigurationError(
            f"language model {name!r}: there is no such folder. This version supports {REFERENCE_MODEL} and local folders "
            "in transformers' format; models on a hub have to be downloaded first"
        )
    return path


def _read_config(name: str, path: Path) -> dict[str, Any]:
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


def _size(config: Mapping[str, Any], path: Path, *keys: str) -> int:
    for key in keys:
        if isinstance(config.get(key), int):
            return config[key]
    raise ConfigurationError(f"{path / 'config.json'} gives none of {', '.join(keys)}: add the one that the model has")


def _identifying_files(name: str, path: Path) -> list[Path]:
    """The files that decide tokens and activations: configuration, tokenizer, weights."""
    if not (path / "tokenizer.json").is_file():
        raise ConfigurationError(
            f"language model {name!r}: {path} has no tokenizer.json; save its fast tokenizer there with save_pretrained()"
        )
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
    return [path / "config.json", path / "tokenizer.json", *weights]


def _fingerprint(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if size <= _WHOLLY_HASHED_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        header_bytes = int.from_bytes(stream.read(8), "little")
        digest.update(str(size).encode() + stream.read(min(header_bytes, _WHOLLY_HASHED_BYTES)))
        for sample in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return f"sampled-{digest.hexdigest()}"


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
