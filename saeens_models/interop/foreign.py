"""Build an SAE from the weights and fields of another tool, checked against each other; the shape of a format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError
from torch import Tensor

from saeens_models.architectures import SAE, sae_class
from saeens_models.architectures.weight_files import check_finite, check_shapes, check_width, in_words
from saeens_models.ensembles import Bagging, Boosting


class Format(NamedTuple):
    """A format of one SAE: how its folders are recognised, read and written."""

    name: str
    files: str
    """Files of a folder, as errors name them."""
    weights: tuple[str, ...]
    """Patterns of the file of weights; a folder with one that matches is of this format."""
    read: "Reader"
    write: "Writer | None"
    """None: the format is read only."""

    def file_in(self, folder: Path) -> Path | None:
        """Return the file of weights in a folder of this format, otherwise None. Raises ``ValueError`` for one of several."""
        for pattern in self.weights:
            found = [file for file in sorted(folder.glob(pattern)) if file.is_file()]
            if len(found) > 1:
                raise ValueError(f"{folder} has {', '.join(file.name for file in found)}: name one of these files")
            if found:
                return found[0]
        return None


class Reader(Protocol):
    """Return the SAE or ensemble whose weights are in a file, float32 on the CPU, with its metadata. Raises ``ValueError``."""

    def __call__(self, file: Path, input_scale: float | None) -> SAE | Bagging | Boosting: ...


class Writer(Protocol):
    """Write an SAE into a folder that exists. Raises ``ValueError`` before anything is written for one that the format does not have."""

    def __call__(self, sae: SAE, folder: Path) -> None: ...


def assemble(
    architecture: str,
    weights: Mapping[str, Tensor],
    *,
    file: Path,
    config: Path | None = None,
    apply_b_dec_to_input: bool,
    stated: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    **fields: object,
) -> SAE:
    """Return an SAE of ``weights``, which have the names and shapes of the architecture here.

    ``stated``: the widths d_in and d_sae of the configuration, None where it has none; they have to be those of W_dec. ``fields``: whole
    numbers of the architecture, such as k. Raises ``ValueError`` with the name of ``file`` or, for what is written there, of ``config``.
    """
    if "W_dec" not in weights or weights["W_dec"].ndim != 2:
        found = list(weights["W_dec"].shape) if "W_dec" in weights else "missing"
        raise ValueError(f"{file}: the decoder is {found}, expected a matrix")
    d_sae, d_in = (check_width(file, name, size) for name, size in zip(("d_sae", "d_in"), weights["W_dec"].shape, strict=True))
    for name, value in (stated or {}).items():
        size = {"d_in": d_in, "d_sae": d_sae}[name]
        if value is not None and value != size:
            raise ValueError(f"{config or file}: it says {name} = {value!r}, and the weights have {size}")
    for name, value in fields.items():
        if type(value) is not int:
            raise ValueError(f"{config or file}: {name} must be a whole number, found {value!r}")
    cls = sae_class(architecture)
    try:
        check_shapes(weights, cls, d_in, d_sae, str(file))
        check_finite(weights, str(file))
        shared = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": apply_b_dec_to_input}
        sae = cls(cls.config_class.model_validate({**shared, **fields}))
    except ValidationError as error:
        raise ValueError(f"{config or file}: {in_words(error)}") from error
    sae.load_state_dict(dict(weights))
    sae.metadata = {name: value for name, value in (metadata or {}).items() if value is not None}
    return sae


def refuse_input_scale(input_scale: float | None, file: Path) -> None:
    """Raise ``ValueError`` for a scale of a format whose SAEs take the activations as they are."""
    if input_scale is not None:
        raise ValueError(f"{file}: SAEs of this format take activations as they are; input_scale is for SAELens folders that scale them")
