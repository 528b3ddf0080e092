"""Descriptions of language models, read from their files without loading weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import hub
from saeens_pipeline.language_models.fingerprints import fingerprint
from saeens_pipeline.settings.corpora import is_hub_name
from saeens_pipeline.storage.root import PROJECT_ROOT

Weights = Literal["trained", "random"]
REFERENCE_MODEL = "builtin/reference"
TRANSFORMER_LENS = "transformer_lens:"
HOOKS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
READ_AT_INPUT = ("resid_pre", "resid_mid")
"""Hooks at the input of a module; the others are at the output of one."""
HUB_FILES = ("config.json", "tokenizer.json")
HUB_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_PACKAGED_REFERENCE_MODEL = Path(__file__).parent / "reference_model_files"
_CHECKED_OUT_REFERENCE_MODEL = PROJECT_ROOT / "data" / "reference_model"
_WHOLLY_HASHED_BYTES = 64 * 2**20
_SAMPLE_BYTES = 64 * 2**10
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class LanguageModelDescription:
    """Properties of a language model, read from its files without loading weights.

    `identity` is for recipes: it changes when a change of the files may change activations or tokens. For a model on the hub it is the
    commit. For others it has hashes: of whole files up to 64 MiB; of larger weight files, of the size, the safetensors header and 64
    samples of 64 KiB, spread evenly. Every training run changes the samples; an edit of single values between them is not detected.
    """

    name: str
    revision: str
    path: Path  # folder in transformers' format; for a model on the hub, without weights
    model_type: str
    d_model: int
    n_layers: int
    context_length: int | None  # tokens; None if the configuration sets no limit
    vocab_size: int
    end_of_text: int | None  # token id that separates documents
    parallel_residual: bool  # attention and MLP of a block both read the block's input
    identity: dict[str, object] = field(hash=False)
    commit: str | None = None  # of a model on the hub
    tokenizer_file: Path = field(default=Path(), kw_only=True)
    begin_of_text: int | None = field(default=None, kw_only=True)  # token id that `prepend_bos` puts before a window
    without: tuple[str, ...] = field(default=(), kw_only=True)  # hooks that the blocks do not have
    has_head: bool = field(default=True, kw_only=True)  # a language-modelling head, which gives next-token predictions
    gguf_file: Path | None = field(default=None, kw_only=True)  # of a GGUF model, whose `path` is a cache, filled before its first use


def validate_hook(description: LanguageModelDescription, hook: str, layers: Collection[int]) -> None:
    """Raise ConfigurationError for a layer or a named hook that the model does not have, without loading weights.

    `validate_modules` also checks that the module of the hook exists, `LanguageModel.activations` that it is what the hook says.
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
        why = f"{description.name} computes attention and MLP in parallel, so there is no stream between them"
        raise ConfigurationError(f"hook 'resid_mid' is not available: {why}; {others}")
    if hook in lacking:
        raise ConfigurationError(f"hook {hook!r} is not available in {description.name} ({description.model_type}); {others}")
    if hook not in HOOKS:
        raise ConfigurationError(f"hook {hook!r} is not known; {others}, such as 'model.layers.{{layer}}.mlp'")


class ModelFolder(NamedTuple):
    """Folder of a model's files and, for a model on the hub, their commit."""

    path: Path
    commit: str | None = None


def locate_model(name: str, revision: str, files: Sequence[str]) -> ModelFolder:
    """Return the folder of a language model: embedded, local, or in the hub's cache. For a model on the hub, download `files` first.

    Raises ConfigurationError for a name that is none of these and for a revision of an embedded or local model, SaeensError if the
    embedded model is missing or the hub cannot be reached.
    """
    embedded = (_PACKAGED_REFERENCE_MODEL, _CHECKED_OUT_REFERENCE_MODEL)
    for path in embedded if name == REFERENCE_MODEL else (Path(name).expanduser(),):
        if path.is_dir():
            if revision != "main":
                raise ConfigurationError(f"revision {revision!r} of {name}: builtin and local models have no revisions; remove the field")
            return ModelFolder(path)
    if name == REFERENCE_MODEL:
        raise SaeensError(
            f"the embedded model is not in {_CHECKED_OUT_REFERENCE_MODEL}: restore it, or train it with `saeens reference-model train`"
        )
    if not is_hub_name(name) or name.startswith("builtin/"):
        raise ConfigurationError(
            f"language model {name!r}: there is no such folder. It can be {REFERENCE_MODEL}, builtin/smollm2, a folder in transformers' "
            f"format, a .gguf file, the name of a model on the Hugging Face hub, or {TRANSFORMER_LENS}NAME"
        )
    commit = hub.resolve_commit(name, revision, "model")
    return ModelFolder(hub.download(name, commit, files), commit)


def read_config(name: str, path: Path) -> dict[str, Any]:
    """Return the content of config.json. Raises ConfigurationError if it is missing or not a JSON object."""
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
    """Return the integer under the first of `keys` that a configuration has. Raises ConfigurationError if it has none of them."""
    found = find_size(config, *keys)
    if found is None:
        raise ConfigurationError(f"{path / 'config.json'} gives none of {', '.join(keys)}: add one of them")
    return found


def find_size(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the integer under the first of `keys` that a configuration has, if there is one."""
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def require_tokenizer(name: str, folder: ModelFolder) -> Path:
    """Return the tokenizer's file. Raises ConfigurationError if there is none."""
    file = folder.path / "tokenizer.json"
    if not file.is_file():
        where = folder.path if folder.commit is None else "a local copy of the model"
        raise ConfigurationError(f"{name!r} has no tokenizer.json: save its fast tokenizer into {where} with save_pretrained()")
    return file


def identity_of(name: str, revision: str, folder: ModelFolder, weights: Weights) -> dict[str, object]:
    """Return the identity for recipes: the commit of a model on the hub, otherwise hashes of the files.

    Raises ConfigurationError for missing weights, unless `weights` are random. Weights that exist are part of the identity in any case.
    """
    if folder.commit is not None:
        if weights == "trained":
            _require_hub_weights(name, folder.commit, folder.path)
        return {"name": name, "revision": folder.commit}
    files = [folder.path / "config.json", require_tokenizer(name, folder)]
    try:
        files += weight_files(name, folder.path)
    except ConfigurationError:
        if weights == "trained":
            raise
    return {"name": name, "revision": revision, "sha256": {file.name: weights_fingerprint(file) for file in files}}


def _require_hub_weights(name: str, commit: str, path: Path) -> None:
    """Raise ConfigurationError if the hub has the weights only as pickles, without downloading them."""
    if any(path.glob("*.safetensors")):
        return
    files = hub.sizes(name, commit, [*HUB_WEIGHTS, *_PICKLES])
    if files and not any(file.endswith(".safetensors") for file in files):
        raise ConfigurationError(
            f"language model {name!r}: the hub has its weights only as {min(files)}, a pickle, which can run code: convert it to "
            "safetensors and give the folder"
        )


def weight_files(name: str, path: Path) -> list[Path]:
    """Return the weight files that transformers loads. Raises ConfigurationError if one is missing."""
    index, names = path / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file() and not (path / "model.safetensors").is_file():  # transformers looks in this order
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    weights = [path / name for name in sorted(names)]
    absent = [file.name for file in weights if not file.is_file()]
    if absent:
        pickled = sorted(file.name for file in path.glob("*.bin"))
        advice = f"it has only {pickled[0]}, a pickle, which can run code: convert it to safetensors" if pickled else "copy them there"
        raise ConfigurationError(f"language model {name!r}: {path} lacks its weights, {', '.join(absent)}; {advice}")
    return weights


def weights_fingerprint(file: Path) -> str:
    """Return the fingerprint of a model's file: SHA-256 of the file or, above 64 MiB, of its header and samples.

    It is cached per process until the size or the modification time of the file changes.
    """
    status = file.stat()
    return _weights_fingerprint(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=10_000)
def _weights_fingerprint(file: Path, _size: int, _changed_at: int) -> str:
    with file.open("rb") as stream:
        header_bytes = min(int.from_bytes(stream.read(8), "little"), _WHOLLY_HASHED_BYTES)
    return fingerprint(file, whole_bytes=_WHOLLY_HASHED_BYTES, sample_bytes=_SAMPLE_BYTES, head=range(8, 8 + header_bytes))
