"""Names of artefacts: asset key, group, op name and path of an (owner, kind, name).

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

Kind = Literal["source", "bagging", "boosting", "baseline", "consensus", "eval", "report", "leaderboard"]
ENSEMBLES: tuple[Kind, ...] = ("bagging", "boosting")
OWNER_FOLDERS = ("sources", "experiments", "tables", "reports")
"""Folders of the data root that have a folder for each source or experiment."""
SAES = ("sae", "published_sae")
"""Builders of SAEs: trained, and loaded."""

SOURCES_GROUP = "sources"
LEADERBOARD = "leaderboard"
BROKEN_GROUP = "broken_experiments"  # asset nodes of unreadable experiment files
RESERVED_GROUPS = (SOURCES_GROUP, LEADERBOARD, BROKEN_GROUP)
CURVE_FILE = "training_curve.parquet"  # in the folder of an SAE
CLUSTERS_FILE = "clusters.parquet"  # in the folder of a consensus
INDEX_FILE, PICTURES_FOLDER = "index.html", "pictures"  # in the folder of a report
MAX_NAME = 63  # characters; Dagster takes no longer values of tags
_NAME = re.compile(r"[a-z0-9_]+")
_FOLDER_ABOVE_ARTEFACTS = re.compile(
    "|".join(
        (
            "sources(/NAME(/layer=N)?)?",
            "experiments(/NAME(/layer=N(/seed=N(/(bagging|boosting|baseline|consensus))?)?)?)?",
            "tables(/NAME(/NAME(/layer=N(/seed=N)?)?)?)?",
            "reports(/(?!leaderboard(/|$))NAME)?",
            "checkpoints(/NAME(/layer=N)?)?",
        )
    )
    .replace("NAME", _NAME.pattern)
    .replace("=N", r"=\d+")
)


class Partition(NamedTuple):
    """Layer and ensemble seed of an artefact; None for a dimension that it is not partitioned by."""

    layer: int | None = None
    seed: int | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items() if value is not None)


def validate_name(name: str) -> str:
    """Return a name unchanged. Raises ValueError unless it can be part of asset keys, op names and paths."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]} ..."
        raise ValueError(f"the name {shown!r} may hold lower-case letters, digits and _ only, and not be empty")
    if len(name) > MAX_NAME:
        raise ValueError(f"the name {name[:MAX_NAME]!r}... has {len(name)} characters, and at most {MAX_NAME} are possible")
    return name


def numeric_order(name: str) -> list[str | int]:
    """Return a sort key with which `step_10` comes after `step_2`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


@dataclass(frozen=True)
class Address:
    """Identity of an artefact without its partition. `owner` is a source for kind `source`, otherwise an experiment."""

    owner: str
    kind: Kind
    name: str

    def __post_init__(self) -> None:
        validate_name(self.owner)
        validate_name(self.name)

    @property
    def key(self) -> list[str]:
        """The asset key: SOURCE/NAME, EXPERIMENT/report or /consensus, leaderboard, leaderboard/report, otherwise EXPERIMENT/KIND/NAME."""
        match self.kind:
            case "source" | "report" | "consensus":
                return [self.owner, self.name]
            case "leaderboard":
                return [self.name]
            case _:
                return [self.owner, self.kind, self.name]

    @property
    def op_name(self) -> str:
        """The asset key, joined by `__`."""
        return "__".join(self.key)

    @property
    def group(self) -> str:
        """The group in the asset graph: `sources`; EXPERIMENT_saes for members, rounds and residuals; otherwise EXPERIMENT."""
        if self.kind == "source":
            return SOURCES_GROUP
        return f"{self.owner}_saes" if self.name.startswith(("member_", "round_", "residual_")) else self.owner

    @property
    def is_table(self) -> bool:
        """True if the artefact is one Parquet file."""
        return self.kind in ("eval", "leaderboard")

    def path(self, partition: Partition) -> PurePosixPath:
        """Return the path relative to the data root: of a folder, or of a file for tables."""
        return self._path([f"{name}={value}" for name, value in partition._asdict().items() if value is not None])

    def glob(self, *dimensions: str) -> str:
        """Return a glob pattern that matches the paths of all partitions. `dimensions` names the partition dimensions, such as layer."""
        return str(self._path([f"{name}=*" for name in dimensions]))

    def _path(self, dimensions: Sequence[str]) -> PurePosixPath:
        match self.kind:
            case "source":
                return PurePosixPath("sources", self.owner, *dimensions, f"{self.name}.zarr")
            case "eval":
                return PurePosixPath("tables", self.owner, self.name, *dimensions, "part.parquet")
            case "report":  # of one layer, or the comparison of all layers and of the experiments of a sweep
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
    """Return an artefact in words, such as `quickstart/bagging/member_1, layer 1, seed 42`."""
    return ", ".join(filter(None, (str(address), str(partition))))


def locate(path: PurePosixPath) -> tuple[Address, Partition] | None:
    """Return the address and partition of a path relative to the data root, or None: the inverse of `Address.path`."""
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
    if kind not in get_args(Kind) or not all(_NAME.fullmatch(each) and len(each) <= MAX_NAME for each in (owner, name)):
        return None
    address = Address(owner, cast("Kind", kind), name)
    return (address, partition) if address.path(partition) == path else None


def is_above_artefacts(path: PurePosixPath) -> bool:
    """Return whether a folder, relative to the data root, is a parent folder of artefacts."""
    return _FOLDER_ABOVE_ARTEFACTS.fullmatch(str(path)) is not None
