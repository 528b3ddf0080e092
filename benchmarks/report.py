"""Results as JSON and as Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import Environment
from benchmarks.runner import EV_TOLERANCE, Row

JSON_FILE = "results.json"
MARKDOWN_FILE = "results.md"
_EXPLANATION = f"""\
Times are medians over rounds; both sides run in turns in each round. The ratio is the median of the paired ratios, with the smallest and
the largest in brackets. Above 1 this project is faster. Rounds in which other processes took more than a twentieth of the processors' time
are left out if enough remain. Memory is the largest growth of resident memory in a run: weights and optimiser count, data do not. EV is the
explained variance on held-out data after the same tokens from the same initial weights. Where both sides compute the same, it has to agree
within {EV_TOLERANCE}, unless another tolerance is said."""


@dataclass
class Section:
    """One benchmark's results."""

    title: str
    about: str
    """The compared operations and their data."""
    rows: list[Row]
    left_out: list[str] = field(default_factory=list)
    """Peers that could not be measured, each with the reason."""
    notes: list[str] = field(default_factory=list)
    """Findings over several rows, and comparisons that are not fair."""


class Report:
    """Sections by the benchmark's name. With a folder, each is written when it is added; sections of earlier runs are kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        file = folder / JSON_FILE if folder else None
        self._sections: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
        self._new: list[str] = []

    def add(self, name: str, section: Section, environment: Environment, quick: bool) -> None:
        """Add a section; it replaces one of the same name."""
        self._new.append(name)
        self._sections[name] = {**_as_json(section), "quick": quick, "environment": asdict(environment)}
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / JSON_FILE).write_text(json.dumps(self._sections, indent=2) + "\n", encoding="utf-8")
            (self._folder / MARKDOWN_FILE).write_text(_markdown(self._sections), encoding="utf-8")

    def markdown(self) -> str:
        """Return the added sections, without those of earlier runs."""
        return _markdown({name: self._sections[name] for name in self._new})


def _as_json(section: Section) -> dict[str, Any]:
    def row_as_json(row: Row) -> dict[str, Any]:
        sides = {name: side and side._asdict() for name, side in (("ours", row.ours), ("theirs", row.theirs))}
        agreement = row.agreement and {**row.agreement._asdict(), "holds": row.agreement.holds}
        return {**vars(row), **sides, "agreement": agreement}

    return {**vars(section), "rows": [row_as_json(row) for row in section.rows]}


def _markdown(sections: dict[str, dict[str, Any]]) -> str:
    parts = ["# Benchmark results", _EXPLANATION]
    for section in sections.values():
        parts += [f"## {section['title']}", section["about"], _environment(section["environment"], section["quick"])]
        parts.append(_table(section["rows"]))
        parts += _list("Settings:", _settings(section["rows"]))
        agreements = [(row["against"], row["agreement"]) for row in section["rows"] if row["agreement"]]
        parts += _list("Other mathematics:", [(name, agreement["difference_in_mathematics"]) for name, agreement in agreements])
        parts += _list("Notes:", [("", note) for note in section["notes"]] + [("Left out", text) for text in section["left_out"]])
    return "\n\n".join(parts) + "\n"


def _settings(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return settings by the peer's name, and by the case where the peer's settings differ between cases."""
    texts: dict[str, set[str]] = {}
    for row in rows:
        texts.setdefault(row["against"], set()).add(row["settings"])
    return [(name if len(texts[name := row["against"]]) == 1 else f"{row['case'].split(',')[0]}: {name}", row["settings"]) for row in rows]


def _list(heading: str, items: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return a Markdown list of the items that have a text, each once."""
    lines = [f"* {name}: {text}" if name else f"* {text}" for name, text in dict.fromkeys(items) if text]
    return ["\n".join([heading, "", *lines])] if lines else []


def _environment(environment: dict[str, Any], quick: bool) -> str:
    threads = ", ".join(f"{library} {count}" for library, count in environment["threads"].items())
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    mode = "**Quick run: few repetitions on small shapes.** " if quick else ""
    of_machine = f"{environment['processor']}, {environment['system']}"
    return (
        f"{mode}{environment['date']}, commit {environment['commit']}, {of_machine}, Python {environment['python']}. "
        f"Threads: {threads}. Allocator: {environment['allocator']}. Load average: {environment['load_average']}. {versions}."
    )


def _table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "case": [row["case"] for row in rows],
        "against": [row["against"] for row in rows],
        "ours": [_seconds(row["ours"], row["tokens"]) for row in rows],
        "theirs": [_seconds(row["theirs"], row["tokens"]) for row in rows],
        "theirs / ours": [_ratio(row) for row in rows],
        "rounds": [str(row["rounds"]) for row in rows],
        "of them under other load": [str(row["disturbed_rounds"] or "") for row in rows],
        "peak, ours": [_gigabytes(row["ours"]) for row in rows],
        "peak, theirs": [_gigabytes(row["theirs"]) for row in rows],
        "disk, ours": [_gigabytes(row["ours"], "disk_bytes") for row in rows],
        "disk, theirs": [_gigabytes(row["theirs"], "disk_bytes") for row in rows],
        "EV, ours": [_explained_variance(row, "ours") for row in rows],
        "EV, theirs": [_explained_variance(row, "theirs") for row in rows],
        "equal": [_equality(row["agreement"]) for row in rows],
    }
    if not rows:
        return "Nothing was measured."
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    return "\n".join(lines)


def _seconds(side: dict[str, Any] | None, tokens: int | None) -> str:
    if side is None:
        return ""
    rate = f" ({tokens / side['seconds']:,.0f} tokens/s)" if tokens else ""
    seconds = side["seconds"]
    return f"{f'{seconds:.3g}' if seconds < 1000 else f'{seconds:,.0f}'} s{rate}"


def _ratio(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return ""
    low, high = row["ratio_range"]
    return f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})"


def _gigabytes(side: dict[str, Any] | None, field: str = "peak_bytes") -> str:
    found = None if side is None else side.get(field)  # results of earlier runs lack later fields
    return "" if found is None else f"{found / 1e9:.2f} GB"


def _explained_variance(row: dict[str, Any], side: str) -> str:
    return "" if row["agreement"] is None else f"{row['agreement'][side]:.4f}"


def _equality(agreement: dict[str, Any] | None) -> str:
    if agreement is None:
        return ""
    return {True: "yes", False: "**NO**", None: "other mathematics"}[agreement["holds"]]
