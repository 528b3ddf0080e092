"""A tiny source and experiment, and their environment: files, a corpus, a data root, Dagster."""

from __future__ import annotations

import base64
import contextlib
import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import dagster as dg
import polars as pl
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console
from tiny_models import CONTEXT_LENGTH, ListedCorpus

from saeens_pipeline import defs
from saeens_pipeline.assets import sources
from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.staleness import Status
from saeens_pipeline.cli.summary import print_outcome
from saeens_pipeline.orchestration import runs
from saeens_pipeline.orchestration.assets import partition_key
from saeens_pipeline.orchestration.catalogue import Catalogue
from saeens_pipeline.orchestration.instance import register_layers
from saeens_pipeline.orchestration.retries import unwrapped
from saeens_pipeline.orchestration.runs import Selection, experiment_status, make_reports, run_experiment
from saeens_pipeline.storage.names import Address, Partition, locate
from saeens_pipeline.storage.recipes import Artefact, Recipe, Store, read_artefact

SEEDS = (1, 2)
MEMBERS = 3
LAYER = 1
NAME = "tiny"
CORPUS = ListedCorpus(
    train=[
        f"def step_{i}(x_{i * 7}, w):\n    return act(w @ x_{i * 7} + {i * 13 % 11})  # {'abcdefgh'[i % 8] * (i % 5)}" for i in range(20)
    ],
    test=[f"Members {i} and {i + 3} see the same tokens, {i * i} of them; seed {i * 17 % 7} differs." for i in range(12)],
)
BLANK_PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)  # PNG of one pixel


SOURCE: dict[str, Any] = {
    "name": NAME,
    "corpus": "builtin/installed_packages",
    "hook": "resid_post",
    "layers": [LAYER],
    "context_length": CONTEXT_LENGTH,
    "packing": "document",
    "drop": ["first"],
    "train_tokens": 600,
    "test_tokens": 200,
    "dtype": "float16",
}
EXPERIMENT: dict[str, Any] = {
    "name": NAME,
    "source": NAME,
    "sae": {"architecture": "topk", "expansion": 2, "k": 4},
    "training": {"learning_rate": 0.01, "batch_tokens": 64, "normalize_activations": "expected_average_only_in"},
    "ensemble": {"members": MEMBERS, "seeds": list(SEEDS)},
    "baselines": ["expanded", "expanded_l0_matched"],
    "keep_residuals": "last",
}


def source_settings(model: Path | str, **changes: Any) -> dict[str, Any]:
    """An ActivationSource of few rows, with what is to be different; None takes a field away."""
    return _without_none({"language_model": str(model)} | SOURCE | changes)


def experiment_settings(**changes: Any) -> dict[str, Any]:
    """An EnsembleExperiment of three members and two seeds, with what is to be different; None takes a field away."""
    return _without_none(EXPERIMENT | changes)


def experiment_file(*documents: tuple[str, Mapping[str, Any]]) -> str:
    """The text of a `defs.yaml`: pairs of component and attributes."""
    return "---\n".join(
        yaml.safe_dump({"type": f"saeens_pipeline.components.{component}", "attributes": dict(attributes)}, sort_keys=False)
        for component, attributes in documents
    )


@dataclass(frozen=True)
class Laboratory:
    """Experiment files in `folder`, artefacts below `root`, a language model in `model`."""

    model: Path
    folder: Path
    root: Path

    def activate(self, monkeypatch: pytest.MonkeyPatch, *, keep_events: bool = False) -> None:
        """Make the package see this laboratory's files, root and corpus, and nothing else.

        Without `keep_events` three things are left out that take most of a tiny run: Dagster's events stay in memory, pictures are
        blank, and no other process compiles kernels meanwhile.
        """
        monkeypatch.setenv("SAEENS_DATA", str(self.root))
        monkeypatch.setenv("DAGSTER_HOME", "")
        monkeypatch.delenv("SAEENS_EXPERIMENTS", raising=False)
        monkeypatch.setattr(defs, "__path__", [str(self.folder)])
        monkeypatch.setattr(sources, "open_corpus", lambda name: CORPUS)
        if not keep_events:
            monkeypatch.setattr(dg.DagsterInstance, "from_config", lambda *_: dg.DagsterInstance.ephemeral())
            monkeypatch.setattr(runs, "compiled_meanwhile", lambda *_: contextlib.nullcontext())
            monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda canvas, file, **_: file.write(BLANK_PICTURE))
        for module in [name for name in sys.modules if name.startswith(f"{defs.__name__}.")]:
            monkeypatch.delitem(sys.modules, module)  # or a folder of the same name elsewhere would be taken for it

    def write(self, text: str, name: str = NAME) -> Path:
        """Write `folder/NAME/defs.yaml`."""
        file = self.folder / name / "defs.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def declare(self, source: Mapping[str, Any] | None = None, **experiment: Any) -> Path:
        """Write the tiny source and experiment, with what is to be different."""
        settings = source_settings(self.model, **(source or {}))
        return self.write(experiment_file(("ActivationSource", settings), ("EnsembleExperiment", experiment_settings(**experiment))))

    @property
    def store(self) -> Store:
        return Store(self.root)

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue.load()

    def declarations(self) -> dict[str, Declaration]:
        """By asset key, parts joined by `/`."""
        catalogue = self.catalogue
        return {str(d.address): d for op in catalogue.ops(catalogue.experiment(NAME)) for d in op.outputs}

    def artefact(self, key: str, seed: int | None = None, layer: int | None = LAYER) -> Artefact:
        """Return the artefact at `bagging/member_1`, or for a source at `activations`."""
        kind, _, name = key.rpartition("/")
        address = Address(NAME, kind or "source", name)  # pyright: ignore[reportArgumentType]
        return self.store.require(address, Partition(layer, seed))

    def run(self, layers: Sequence[int] = (), seeds: Sequence[int] = (), select: Sequence[str] = ()) -> str:
        """`saeens run tiny`; gives what it prints."""
        printed = io.StringIO()
        run_and_print(NAME, layers, seeds, select, console=Console(file=printed, width=200))
        return printed.getvalue()

    def materialise(
        self, keys: Sequence[str], partition: Partition, tags: Mapping[str, str] | None = None
    ) -> dict[str, dg.AssetMaterialization]:
        """Materialise assets as the UI does, also those that exist; return the events by asset key."""
        catalogue, declarations = self.catalogue, self.declarations()
        job = catalogue.definitions().resolve_implicit_global_asset_job_def()
        with dg.DagsterInstance.ephemeral() as instance, unwrapped():
            register_layers(instance, NAME, catalogue.sources[NAME].layers)
            result = job.execute_in_process(
                instance=instance,
                partition_key=partition_key(declarations[keys[0]], partition),
                asset_selection=[dg.AssetKey(key.split("/")) for key in keys],
                tags=tags,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        made = [event.step_materialization_data.materialization for event in result.get_asset_materialization_events()]
        return {each.asset_key.to_user_string(): each for each in made}


def run_and_print(
    name: str, layers: Sequence[int] = (), seeds: Sequence[int] = (), select: Sequence[str] = (), *, console: Console
) -> None:
    """Run an experiment and print its summary, as `saeens run` does."""
    print_outcome(run_experiment(Catalogue.load(), name, Selection(layers, seeds, select), console=console), console)


def write_rows(store: Store, part: Path, rows: pl.DataFrame, like: Path | None = None) -> None:
    """Write other rows into a part of a table, with the recipe of the part that is there, or of `like`."""
    found, record = locate(PurePosixPath(part.relative_to(store.root).as_posix())), read_artefact(like or part)
    assert found is not None
    store.write_table(*found, Recipe(**record.recipe), record.provenance, rows)


def remake_reports(laboratory: Laboratory, name: str = NAME) -> None:
    """Make the reports of an experiment from the tables on disk, whether they are fresh or not."""
    shutil.rmtree(laboratory.root / "reports" / name, ignore_errors=True)
    make_reports(Catalogue.load(), name, [])


def status_of(name: str = NAME) -> list[Status]:
    """Return the state of every artefact of an experiment."""
    return experiment_status(Catalogue.load(), name)


def _without_none(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
