"""SAEs of other tools: what they published comes in, what was trained here goes out, with equal codes, or it is refused.

The formats are those of SAELens, dictionary_learning, sparsify and Gemma Scope, and our own ensembles.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeens_models.architectures import SAE, InputScaleMissingError
from saeens_models.architectures import load_sae as load_own_sae
from saeens_models.architectures.weight_files import without_escapes
from saeens_models.ensembles import ENSEMBLE_FILE, Bagging, Boosting, Ensemble, load_ensemble
from saeens_models.interop import dictionary_learning, gemma_scope, hub, saelens_folder, sparsify
from saeens_models.interop.foreign import Format, refuse_input_scale
from saeens_models.interop.new_folder import new_folder
from saeens_models.interop.rewriting import as_one_sae, with_input_bias

FORMATS = {each.name: each for each in (saelens_folder.FORMAT, sparsify.FORMAT, dictionary_learning.FORMAT, gemma_scope.FORMAT)}
"""The formats of one SAE, by name."""
_NAMES = (ENSEMBLE_FILE, "cfg.json", "config.json", *(name for each in FORMATS.values() for name in each.weights))
EXPORTED = tuple(name for name, each in FORMATS.items() if each.write)
"""Names of the formats that are written."""


def load(where: str | Path, *, input_scale: float | None = None) -> SAE | Bagging | Boosting:
    """Load an SAE or an ensemble from a folder, its file of weights, or ``hub:OWNER/REPO/PATH@REVISION``, on the CPU in float32.

    The files decide the format. Codes are those of the format's own loader: a BatchTopK dictionary of dictionary_learning encodes with
    its threshold, for example. ``metadata`` has what the files say of language model, hook and layer. ``input_scale``: see
    :func:`saeens_models.load_sae`. Of the hub, only files of these formats are downloaded; metadata name the commit under ``source``.

    Raises ``FileNotFoundError`` for a missing path or file, :class:`InputScaleMissingError`, a ``ValueError``, for weights that need an
    ``input_scale`` and have none, and ``ValueError`` for a folder of no format, for what cannot be represented
    exactly (transcoders, skip connections, other activation functions, error terms), and for files that are damaged, hostile or do not
    fit their configuration. Of the hub, also as :func:`saeens_models.interop.hub.download`.
    """
    if str(where).startswith(hub.PREFIX):
        downloaded = hub.download(str(where), _NAMES)
        found = load(downloaded.path, input_scale=input_scale)
        for sae in [found] if isinstance(found, SAE) else found:
            sae.metadata["source"] = downloaded.source
        return found
    path = Path(where)
    if path.is_file():
        for each in FORMATS.values():
            if any(path.match(pattern) for pattern in each.weights):
                return _read(each, path, input_scale)
        if path.name == ENSEMBLE_FILE:
            return load_ensemble(path.parent)
        raise ValueError(f"{path}: not a file of weights of any format: {_formats()}")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; one on the hub is hub:OWNER/REPO, with /PATH and @REVISION")
    if (path / ENSEMBLE_FILE).is_file():
        refuse_input_scale(input_scale, path / ENSEMBLE_FILE)
        return load_ensemble(path)
    for each in FORMATS.values():
        if file := each.file_in(path):
            return _read(each, file, input_scale)
    inside = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and any(each.file_in(folder) for each in FORMATS.values()))
    hint = f"; its folders {', '.join(inside[:5])}{' and others' if len(inside) > 5 else ''} are SAEs: name one" if inside else ""
    raise ValueError(f"{path} is no SAE: {_formats()}{hint}")


def load_sae(path: str | Path, input_scale: float | None = None) -> SAE:
    """Load one SAE, as :func:`load`; a folder of SAELens or of this package as :func:`saeens_models.architectures.load_sae`.

    Raises as those, and ``ValueError`` for an ensemble.
    """
    is_foreign = str(path).startswith(hub.PREFIX) or (
        Path(path).exists() and any(each.file_in(Path(path)) for each in FORMATS.values() if each is not saelens_folder.FORMAT)
    )
    if not is_foreign:
        return load_own_sae(path, input_scale)
    found = load(path, input_scale=input_scale)
    if not isinstance(found, SAE):
        raise ValueError(f"{path} is an ensemble of {len(found)} SAEs: saeens_models.interop.load opens it")
    return found


def _read(format: Format, file: Path, input_scale: float | None) -> SAE | Bagging | Boosting:
    """Read a file. All errors are ``ValueError``: torch and numpy have others for shapes, types and values that they do not expect."""
    try:
        return format.read(file, input_scale)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError) as error:
        raise ValueError(f"{file} is not a valid file of {format.name}: {type(error).__name__}: {without_escapes(error)}") from error


def files_of(where: str | Path) -> list[Path]:
    """Return the files that decide what :func:`load` returns for a local path: weights and configuration. Raises as :func:`load`."""
    path = Path(where)
    if not path.exists():
        load(path)  # raises FileNotFoundError
    weights = path if path.is_file() else next((file for each in FORMATS.values() if (file := each.file_in(path))), None)
    if weights is None:
        found = load(path)  # raises the error that names the formats
        raise ValueError(f"{path} is an ensemble of {len(found) if not isinstance(found, SAE) else 1} SAEs: name the folder of one of them")
    return sorted({weights, *(file for name in _NAMES if name.endswith(".json") for file in weights.parent.glob(name) if file.is_file())})


def export(sae: SAE | Ensemble, format: str, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write an SAE or an ensemble into ``folder`` in the ``format`` of another tool: sae_lens, sparsify or dictionary_learning.

    A bag of standard, JumpReLU or gated SAEs is one plain SAE (:func:`as_one_sae`). SAELens loads every other ensemble after
    ``import saeens_models.interop.sae_lens``; the other formats have one SAE only. ``metadata`` are added to those of the SAE.

    The folder appears whole or not at all.

    Raises ``ValueError``, and writes nothing, for an unknown format, an SAE that the format does not have, and a folder that is not empty.
    """
    write = FORMATS[format].write if format in FORMATS else None
    if write is None:
        raise ValueError(f"format {format!r} is not written; one of {', '.join(EXPORTED)}")
    sae = _with_metadata(sae, metadata or {})
    if isinstance(sae, Ensemble):
        try:
            sae = as_one_sae(sae)
        except ValueError as error:
            if format != saelens_folder.FORMAT.name:
                raise ValueError(f"{format} has one SAE in a folder: {error}") from error
    with new_folder(Path(folder)) as target:
        if isinstance(sae, Ensemble):
            saelens_folder.write_ensemble(sae, target)
        else:
            write(sae, target)


def _with_metadata(sae: SAE | Ensemble, metadata: Mapping[str, Any]) -> SAE | Ensemble:
    """Return ``sae`` with additional metadata; its own stay as they are."""
    if not metadata:
        return sae
    if isinstance(sae, Ensemble):
        return type(sae)([_with_metadata(member, metadata) for member in sae])  # pyright: ignore[reportArgumentType]
    other = copy.copy(sae)
    other.metadata = {**sae.metadata, **metadata}
    return other


def _formats() -> str:
    return "; ".join(f"{each.name} has {each.files}" for each in FORMATS.values()) + f"; an ensemble of ours has {ENSEMBLE_FILE}"


__all__ = ["EXPORTED", "FORMATS", "InputScaleMissingError", "as_one_sae", "export", "files_of", "load", "load_sae", "with_input_bias"]
