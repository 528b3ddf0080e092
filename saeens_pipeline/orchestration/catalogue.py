"""All experiments as Dagster definitions. Broken experiment files are assets too, so that the asset graph shows their error messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import dagster as dg

from saeens_pipeline.assets.declarations import Op
from saeens_pipeline.assets.sources import NEEDS_HUB
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.gguf_models import lacks_package
from saeens_pipeline.orchestration.assets import build_asset
from saeens_pipeline.orchestration.automation import automate
from saeens_pipeline.orchestration.disk_checks import build_disk_checks
from saeens_pipeline.orchestration.external_data import external_assets
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.orchestration.resources import ComputeResource, StoreResource, TrackerResource
from saeens_pipeline.orchestration.retries import executor_from_environment
from saeens_pipeline.settings.files import experiment_name, is_shipped, is_template
from saeens_pipeline.storage.names import BROKEN_GROUP
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root


class Catalogue(Ops):
    """Every source and experiment, their ops, and their Dagster definitions."""

    def shown(self) -> Catalogue:
        """Return what the UI shows: all but templates, and what lacks a package here, of which nothing is on disk; with their sources."""
        store = Store(data_root())
        lacking = {name for name, each in self.sources.items() if is_shipped(each) and lacks_package(str(each.language_model))}
        unready = {name for name, each in self.experiments.items() if is_template(each) or (is_shipped(each) and each.source in lacking)}
        hidden = {name for name in unready if not store.has_any_of(name)}
        experiments = {name: each for name, each in self.experiments.items() if name not in hidden}
        used = {each.source for each in experiments.values()}
        unready = {name for name, each in self.sources.items() if is_template(each) or name in lacking}
        sources = {name: each for name, each in self.sources.items() if name in used or name not in unready or store.has_any_of(name)}
        return replace(self, sources=sources, experiments=experiments)

    def definitions(self, *, disk_checks: bool = True) -> dg.Definitions:
        """Return everything for Dagster: assets, automation, schedules, and resources.

        `disk_checks=False` leaves out the checks `bytes` and `recipe`, which Dagster would otherwise run with every materialisation.
        """
        ops = self.all_ops()
        given = dg.Definitions(
            assets=[*_broken_assets(self.broken), *external_assets(ops)],
            asset_checks=build_disk_checks(self) if disk_checks else [],
            resources={
                "store": StoreResource(),
                "compute": ComputeResource.definition(),
                "tracker": TrackerResource.from_environment(),
            },
            executor=executor_from_environment(),
        )
        return dg.Definitions.merge(automate(map(self._built, ops), self), given)

    def _built(self, op: Op) -> dg.AssetsDefinition:
        """Return the asset of an op. Artefacts of an experiment have the tag of what their source needs, as the source has."""
        asset, source = build_asset(op), self.sources.get(op.outputs[0].source)
        return asset.map_asset_specs(lambda spec: spec.merge_attributes(tags=NEEDS_HUB)) if source and source.needs_hub else asset


def _broken_assets(broken: Mapping[Path, str]) -> list[dg.AssetsDefinition]:
    """Return an asset for each broken file, in a group of their own. The error message is its description and its error.

    It has the name of the file, with characters replaced that asset keys do not allow; files of one name are numbered.
    """
    taken: dict[str, int] = {}
    assets: list[dg.AssetsDefinition] = []
    for path, message in broken.items():
        name = re.sub(r"[^a-z0-9_]", "_", experiment_name(path).lower())
        taken[name] = taken.get(name, 0) + 1
        assets.append(_broken_asset(name if taken[name] == 1 else f"{name}__{taken[name]}", path, message))
    return assets


def _broken_asset(name: str, path: Path, message: str) -> dg.AssetsDefinition:
    @dg.asset(
        name=name,
        key_prefix=BROKEN_GROUP,
        group_name=BROKEN_GROUP,
        description=f"Left out: its file is wrong\n\n```\n{message}\n```\n\nCorrect the file and reload the code location.",
        metadata={"file": dg.MetadataValue.path(str(path))},
    )
    def broken() -> None:
        raise ConfigurationError(f"{message}\nCorrect the file and reload the code location")

    return broken
