"""One place that names things: from (owner, kind, name) to asset key, group, op name and path.

Address("quickstart", "bagging", "member_1").key                 ["quickstart", "bagging", "member_1"]
....group                                                        "quickstart_saes"
....path(Partition(layer=1, seed=42))                            experiments/quickstart/layer=1/seed=42/bagging/member_1
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

Kind = Literal["source", "bagging", "boosting", "baseline", "eval", "report"]

SOURCES_GROUP = "sources"
RESERVED_GROUPS = (SOURCES_GROUP, "leaderboard")
_NAME = re.compile(r"[a-z0-9_]+")


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
        """Asset key: SOURCE/NAME, EXPERIMENT/report, otherwise EXPERIMENT/KIND/NAME."""
        return [self.owner, self.name] if self.kind in ("source", "report") else [self.owner, self.kind, self.name]

    @property
    def op_name(self) -> str:
        return "__".join(self.key)

    @property
    def group(self) -> str:
        """`sources`; EXPERIMENT_saes for members, rounds and residuals; EXPERIMENT for all that is made from them."""
        if self.kind == "source":
            return SOURCES_GROUP
        return f"{self.owner}_saes" if self.name.startswith(("member_", "round_", "residual_")) else self.owner

    def path(self, partition: Partition) -> PurePosixPath:
        """Relative to the data root: a folder, or a file for tables."""
        dimensions = [f"{name}={value}" for name, value in partition._asdict().items() if value is not None]
        match self.kind:
            case "source":
                return PurePosixPath("sources", self.owner, *dimensions, f"{self.name}.zarr")
            case "eval":
                return PurePosixPath("tables", self.owner, self.name, *dimensions, "part.parquet")
            case "report":
                return PurePosixPath("reports", self.owner, *dimensions)
            case _:
                folder = f"{self.name}.zarr" if self.name.startswith("residual_") else self.name
                return PurePosixPath("experiments", self.owner, *dimensions, self.kind, folder)

    def __str__(self) -> str:
        return "/".join(self.key)
