"""Language models that a source follows: local ones that match a pattern, or revisions on the hub. Each is a source of its own.

What the hub answers is kept in a file of the data root, so that experiment files are read without a network.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import gguf_models, hub
from saeens_pipeline.language_models.descriptions import Weights, weight_files
from saeens_pipeline.language_models.records import find_paths, has_wildcard, shown
from saeens_pipeline.settings.messages import in_words
from saeens_pipeline.settings.sources import FOLLOW, EachModel, SourceSettings
from saeens_pipeline.storage import locks
from saeens_pipeline.storage.disk import write_atomically
from saeens_pipeline.storage.names import numeric_order
from saeens_pipeline.storage.root import data_root

FILE = "followed_revisions.json"
"""In the data root: the revisions of followed models, by name on the hub, as the hub gave them last."""
_NOT_IN_NAMES = re.compile(r"[^a-z0-9_]")
_TAIL_BYTES = 64


class Followed(NamedTuple):
    """The sources of the language models of a set, in numeric order, and sentences about models that are not taken yet."""

    sources: list[SourceSettings]
    waiting: list[str]


def followed_sources(settings: SourceSettings) -> Followed:
    """Return a source for each language model that this one follows. Reads folders and the file of revisions, and asks no hub.

    A local model is taken when all its files are there. Raises ConfigurationError for two models with one name, for a name that is not
    possible, and for a damaged file of revisions.
    """
    models, waiting = _local_models(settings) if isinstance(settings.language_model, EachModel) else _revisions(settings)
    named: dict[str, str] = {}
    sources: list[SourceSettings] = []
    for written, own in models:
        suffix = _NOT_IN_NAMES.sub("_", written.lower())
        if not suffix.strip("_"):
            raise ConfigurationError(f"{shown(written)!r} has no letter and no digit for the name of its source: rename it")
        if suffix in named:
            both = f"{shown(named[suffix])} and {shown(written)}"
            raise ConfigurationError(f"{both} both give the name {settings.name}__{suffix}: rename one of them, or leave one out")
        named[suffix] = written
        try:
            sources.append(settings.of_model(suffix, **own))
        except ValidationError as error:
            raise ConfigurationError(f"{shown(written)}: {in_words(dict(error.errors()[0]))}") from None
    return Followed(sorted(sources, key=lambda source: numeric_order(source.name)), waiting)


def _local_models(settings: SourceSettings) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """Return the part of each path from the first wildcard on, with its `language_model`, and sentences about incomplete models."""
    each = settings.language_model
    assert isinstance(each, EachModel)
    parts = Path(each.each).parts
    n_named = len(parts) - next((i for i, part in enumerate(parts) if has_wildcard(part)), len(parts) - 1)
    models: list[tuple[str, dict[str, str]]] = []
    waiting: list[str] = []
    for found in sorted(find_paths(each.each, each.folder)):
        path = Path(os.path.normpath(found))
        if not path.is_dir() and path.suffix.lower() != gguf_models.SUFFIX:
            continue
        if lacking := _lacking(path, settings.weights):
            waiting.append(f"{shown(path)} is not taken yet: {lacking}")
            continue
        named = path if path.is_dir() else path.with_suffix("")
        models.append(("/".join(named.parts[-n_named:]), {"language_model": str(path)}))
    return models, waiting if models or waiting else [f"nothing matches {shown(str(each))} yet"]


def _revisions(settings: SourceSettings) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    name, revisions = str(settings.language_model), settings.revisions
    if revisions == FOLLOW:
        revisions = known_revisions().get(name)
        if revisions is None:
            return [], [f"the hub was not asked for the revisions of {name} yet: `saeens run` and the sensor new_models ask it"]
    return [(each, {"revision": each}) for each in revisions or ()], [] if revisions else [f"{name} has no branch and no tag on the hub"]


def hub_model(settings: SourceSettings) -> str | None:
    """Return the name of the model whose revisions on the hub a source follows; None for other sources."""
    return str(settings.language_model) if settings.revisions == FOLLOW else None


def known_revisions() -> dict[str, list[str]]:
    """Return the revisions of followed models as the hub gave them last. Raises ConfigurationError for a damaged file."""
    file = data_root() / FILE
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(known, dict) and all(isinstance(each, list) and all(isinstance(r, str) for r in each) for each in known.values()):
            return known
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        pass
    raise ConfigurationError(f"{file} is damaged: remove it; the hub is asked again")


def ask_hub(name: str) -> None:
    """Ask the hub for the revisions of a model, and keep them. Raises as `hub.list_revisions`, and SaeensError if they cannot be kept."""
    revisions = sorted(hub.list_revisions(name), key=numeric_order)
    root = data_root()
    try:
        with locks.holding(root, FILE):
            known = known_revisions()
            if known.get(name) != revisions:
                text = json.dumps(known | {name: revisions}, indent=1)
                write_atomically(root / FILE, f"{text}\n", aside=f".{FILE}.{os.getpid()}")
    except OSError as error:
        raise SaeensError(f"{root / FILE} cannot be written ({error.strerror})") from error


def _lacking(path: Path, weights: Weights) -> str:
    """Return what a local model lacks; empty for a complete one. A file that is being written counts as lacking."""
    try:
        return _lacking_in_folder(path, weights) if path.is_dir() else _lacking_in_gguf(path)
    except ConfigurationError as error:
        return str(error).partition(": ")[2]
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "model.safetensors.index.json is incomplete"


def _lacking_in_folder(path: Path, weights: Weights) -> str:
    for name in ("config.json", "tokenizer.json"):
        if not _is_whole(path / name, _ends_as_json):
            return f"{name} is missing or incomplete"
    if weights == "random":
        return ""
    index = path / "model.safetensors.index.json"
    if index.is_file() and not _is_whole(index, _ends_as_json):
        return f"{index.name} is incomplete"
    absent = [file.name for file in weight_files(str(path), path) if not _is_whole(file, _has_all_tensors)]
    return f"{absent[0]} is incomplete" if absent else ""


def _lacking_in_gguf(path: Path) -> str:
    if find_spec("gguf"):  # without it, its absence is reported when the model is described
        gguf_models.read_header(str(path), path)
    return ""


def _is_whole(file: Path, check: Callable[[Path], bool]) -> bool:
    """Return whether a file exists and passes a check, which is repeated when the file has changed."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return False
    return _checked(file, check, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _checked(file: Path, check: Callable[[Path], bool], _size: int, _changed_at: int) -> bool:
    return check(file)


def _ends_as_json(file: Path) -> bool:
    """Return whether a file ends as a JSON object does: reading all of a large tokenizer would take long."""
    with file.open("rb") as stream:
        stream.seek(max(file.stat().st_size - _TAIL_BYTES, 0))
        return stream.read().rstrip().endswith(b"}")


def _has_all_tensors(file: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        n_header = int.from_bytes(stream.read(8), "little")
        if n_header > size:
            return False
        try:
            header = json.loads(stream.read(n_header))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return False
    return size >= 8 + n_header + max(ends, default=0)
