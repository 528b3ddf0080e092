"""One place that names things: from (owner, kind, name) to asset key, group, op name and path.

Address("quickstart", "bagging", "member_1").key                 ["quickstart", "bagging", "member_1"]
....group                                                        "quickstart_saes"
....path(Partition(layer=1, seed=42))                            experiments/quickstart/layer=1/seed=42/bagging/member_1
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, NamedTuple, cast, get_args

Kind = Literal["source", "bagging", "boosting", "baseline", "eval", "report", "leaderboard"]

SOURCES_GROUP = "sources"
LEADERBOARD = "leaderboard"
BROKEN_GROUP = "broken_experiments"  # what could not be read has nodes of its own in the asset graph
RESERVED_GROUPS = (SOURCES_GROUP, LEADERBOARD, BROKEN_GROUP)
CURVE_FILE = "training_curve.parquet"  # in the folder of an SAE
_NAME = re.compile(r"[a-z0-9_]+")
_FOLDER_ABOVE_ARTEFACTS = re.compile(
    "|".join(
        (
            "sources(/NAME(/layer=N)?)?",
            "experiments(/NAME(/layer=N(/seed=N(/(bagging|boosting|baseline))?)?)?)?",
            "tables(/NAME(/NAME(/layer=N(/seed=N)?)?)?)?",
            "reports(/(?!leaderboard(/|$))NAME)?",
            "checkpoints(/NAME(/layer=N)?)?",
        )
    )
    .replace("NAME", _NAME.pattern)
    .replace("=N", r"=\d+")
)


class Partition(NamedTuple):
    """Which layer and which ensemble seed; what an artefact is not partitioned by is None."""

    layer: int | None = None
    seed: int | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items() if value is not None)


def validate_name(name: str) -> str:
    """Names become asset keys, op names and paths. Raises ValueError for anything but lower-case letters, digits and `_`."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"the name {name!r} may hold lower-case letters, digits and _ only, and not be empty")
    return name


@dataclass(frozen=True)
class Address:
    """What one artefact is called, everywhere. `owner` is a source for kind `source`, else an experiment."""

    owner: str
    kind: Kind
    name: str

    def __post_init__(self) -> None:
        validate_name(self.owner)
        validate_name(self.name)

    @property
    def key(self) -> list[str]:
        """Asset key: SOURCE/NAME, EXPERIMENT/report, leaderboard, leaderboard/report, otherwise EXPERIMENT/KIND/NAME."""
        match self.kind:
            case "source" | "report":
                return [self.owner, self.name]
            case "leaderboard":
                return [self.name]
            case _:
                return [self.owner, self.kind, self.name]

    @property
    def op_name(self) -> str:
        return "__".join(self.key)

    @property
    def group(self) -> str:
        """`sources`; EXPERIMENT_saes for members, rounds and residuals; EXPERIMENT for all that is made from them."""
        if self.kind == "source":
            return SOURCES_GROUP
        return f"{self.owner}_saes" if self.name.startswith(("member_", "round_", "residual_")) else self.owner

    @property
    def is_table(self) -> bool:
        """Whether the artefact is one Parquet file."""
        return self.kind in ("eval", "leaderboard")

    def path(self, partition: Partition) -> PurePosixPath:
        """Relative to the data root: a folder, or a file for tables."""
        return self._path([f"{name}={value}" for name, value in partition._asdict().items() if value is not None])

    def glob(self, *dimensions: str) -> str:
        """The pattern of this artefact's paths in all partitions, given the names of what it is partitioned by."""
        return str(self._path([f"{name}=*" for name in dimensions]))

    def _path(self, dimensions: Sequence[str]) -> PurePosixPath:
        match self.kind:
            case "source":
                return PurePosixPath("sources", self.owner, *dimensions, f"{self.name}.zarr")
            case "eval":
                return PurePosixPath("tables", self.owner, self.name, *dimensions, "part.parquet")
            case "report":  # that of a layer, or what compares all layers and the experiments of a sweep
                return PurePosixPath("reports", self.owner, *([] if self.name == "report" else [self.name]), *dimensions)
            case "leaderboard":
                return PurePosixPath("tables", self.name, "part.parquet")
            case _:
                folder = f"{self.name}.zarr" if self.name.startswith("residual_") else self.name
                return PurePosixPath("experiments", self.owner, *dimensions, self.kind, folder)

    def __str__(self) -> str:
        return "/".join(self.key)


LEADERBOARD_ADDRESS = Address(LEADERBOARD, "leaderboard", LEADERBOARD)


def place(address: Address, partition: Partition) -> str:
    """An artefact in words, such as `quickstart/bagging/member_1, layer 1, seed 42`."""
    return ", ".join(filter(None, (str(address), str(partition))))


def locate(path: PurePosixPath) -> tuple[Address, Partition] | None:
    """The artefact that a path relative to the data root belongs to, or None: the inverse of `Address.path`."""
    numbers = {name: int(value) for name, value in re.findall(r"(?:^|/)(layer|seed)=(\d+)(?=/|$)", str(path))}
    partition = Partition(**numbers)
    match [part for part in path.parts if "=" not in part]:
        case ["sources", owner, name]:
            candidate = owner, "source", name.removesuffix(".zarr")
        case ["experiments", owner, kind, name]:
            candidate = owner, kind, name.removesuffix(".zarr")
        case ["tables", "leaderboard", "part.parquet"]:
            candidate = LEADERBOARD, "leaderboard", LEADERBOARD
        case ["tables", owner, name, "part.parquet"]:
            candidate = owner, "eval", name
        case ["reports", owner] if (partition.layer is None) == (owner == LEADERBOARD):
            candidate = owner, "report", "report"
        case ["reports", owner, name]:
            candidate = owner, "report", name
        case _:
            return None
    owner, kind, name = candidate
    if kind not in get_args(Kind) or not (_NAME.fullmatch(owner) and _NAME.fullmatch(name)):
        return None
    address = Address(owner, cast("Kind", kind), name)
    return (address, partition) if address.path(partition) == path else None


def is_above_artefacts(path: PurePosixPath) -> bool:
    """Whether a folder, relative to the data root, is one of those that artefacts are sorted into."""
    return _FOLDER_ABOVE_ARTEFACTS.fullmatch(str(path)) is not None
