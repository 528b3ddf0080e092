"""`saeens doctor`: versions, devices, data root, experiment files, and on request the bytes of every artefact."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.text import Text

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import FormatOption, out, print_rows
from saeens_pipeline.errors import SaeensError, counted
from saeens_pipeline.storage.disk import free_bytes
from saeens_pipeline.storage.recipes import Store, all_artefacts
from saeens_pipeline.storage.root import data_root

PACKAGES = ("saeens", "torch", "transformers", "tokenizers", "dagster", "zarr", "polars", "pyarrow", "safetensors", "pydantic")
LOW_DISK_BYTES = 2 * 2**30


@app.command()
def doctor(
    verify: Annotated[bool, typer.Option("--verify", help="Read every artefact and compare its hashes.")] = False,
    format: FormatOption = "table",
) -> None:
    """Check this installation: versions, devices, data root and experiment files."""
    findings = list(diagnose(verify=verify))
    if format == "table":
        for finding in findings:
            mark = ("ok   ", "green") if finding.ok else ("bad  ", "red")
            out.print(Text.assemble(mark, f"{finding.subject:<22} {finding.detail}"), soft_wrap=True)
    else:
        print_rows([each._asdict() for each in findings], Finding._fields, format)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


class Finding(NamedTuple):
    """The result of one check."""

    subject: str
    detail: str
    ok: bool = True


def diagnose(verify: bool = False) -> Iterator[Finding]:
    """Check versions, devices, data root, disk and experiment files; with `verify`, also the hashes of every artefact.

    An artefact with differences is invalidated, and the next run computes it again.
    """
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            yield Finding(package, version(package))
        except PackageNotFoundError:
            yield Finding(package, "not installed: install the project again", ok=False)
    yield from _devices()
    yield from _tracker()
    yield from _root(data_root())
    yield from _experiments()
    if verify:
        yield from _verify(data_root())


def _devices() -> Iterator[Finding]:
    import torch

    from saeens_pipeline.assets.compute import Compute

    yield Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    try:
        compute = Compute.from_environment()
        limits = [f"{compute.memory_gb:g} GB"] * bool(compute.memory_gb) + [f"{compute.threads} threads"] * bool(compute.threads)
        yield Finding(f"device: {compute.device}", ", ".join([compute.resolve(), compute.precision, *limits]))
    except SaeensError as error:
        yield Finding("device", str(error), ok=False)


def _tracker() -> Iterator[Finding]:
    from saeens_pipeline.orchestration.trackers import chosen_tracker

    try:
        if name := chosen_tracker():
            yield Finding("tracker", name)
    except SaeensError as error:
        yield Finding("tracker", str(error), ok=False)


def _root(root: Path) -> Iterator[Finding]:
    store = Store(root)
    try:
        store.require_writable()
    except SaeensError as error:
        yield Finding("data root", str(error), ok=False)
    else:
        free = free_bytes(store.root)
        yield Finding("data root", str(root))
        yield Finding("free disk", f"{free / 2**30:.1f} GiB", ok=free > LOW_DISK_BYTES)
    yield Finding("DAGSTER_HOME", os.environ.get("DAGSTER_HOME") or f"{root / 'dagster'} (default)")


def _experiments() -> Iterator[Finding]:
    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.settings.files import experiment_name

    found = Experiments.load()
    yield Finding("experiments", ", ".join(sorted(found.experiments)) or "none")
    for file, message in found.broken.items():
        yield Finding(experiment_name(file), message, ok=False)


def _verify(root: Path) -> Iterator[Finding]:
    checked, wrong = 0, []
    for each in all_artefacts(root):
        checked += 1
        if isinstance(each, SaeensError):
            wrong.append(str(each))
        elif differences := each.artefact.verify():
            each.artefact.invalidate()
            wrong += [f"{difference}. The next `saeens run` computes it again" for difference in differences]
    for message in wrong:
        yield Finding("artefact", message, ok=False)
    yield Finding("artefacts", f"{checked} read, {counted(len(wrong), 'difference')} from the written bytes", ok=not wrong)
