"""The registry of baselines: settings, conditions and labels of each. No other file names a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from saeens_pipeline.assets.saes import Target, shape_of
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.messages import shown
from saeens_pipeline.storage.names import ENSEMBLES

if TYPE_CHECKING:
    from saeens_models import SAESettings


@dataclass(frozen=True)
class Baseline:
    """One baseline. A module in `baselines` that registers one adds it everywhere: settings, assets, tables, pages, reference."""

    name: str
    """Its name in experiment files, asset keys and the column `method` of tables."""
    label: str
    """Its name on pages."""
    about: str
    """Description on pages."""
    size: str
    """Size in words, with `{n}` for the number of members that it is compared with."""
    target: Callable[[ExperimentSettings, int], Target]
    """Return its SAE, compared with that number of members; see `single_sae`."""
    order: int = 100
    """Sort key in lists."""
    is_sized: bool = False
    """True: one SAE for each of the experiment's `expanded_sizes`. False: one SAE, compared with all members."""
    by_default: bool = False
    """True: experiments without a list of baselines have it, unless `adds_l0` or a published member excludes it."""
    of_lists: bool = True
    """True: defined where `sae` is a list, one per member."""
    of_published: bool = False
    """True: defined where members are published, whose widths and training are not those of `sae`."""
    adds_l0: bool = False
    """True: its L0 is the sum of the members' L0, which their settings have to give: k or `l0_target`."""
    complaint: Callable[[ExperimentSettings], str] = lambda experiment: ""
    """Return any other reason why an experiment cannot have it; empty if it can."""


class BaselineSAE(NamedTuple):
    """An SAE of a baseline: its method in the tables, and its settings."""

    method: str
    n_members: int
    """For methods with several widths, the number of members that it is as wide as; else 1."""
    target: Target


BASELINES: dict[str, Baseline] = {}
"""Baselines by name; `listed` gives them in order."""


def register(baseline: Baseline) -> Baseline:
    """Add a baseline to the registry. Raises ValueError for a name in use."""
    if baseline.name in BASELINES:
        raise ValueError(f"baseline {baseline.name!r} is registered twice")
    BASELINES[baseline.name] = baseline
    return baseline


def listed() -> list[Baseline]:
    """Return the baselines in order."""
    return sorted(BASELINES.values(), key=lambda baseline: (baseline.order, baseline.name))


def methods() -> list[str]:
    """Return the methods in the order in which they are listed: a single SAE, the ensembles, and the baselines."""
    return ["single", *ENSEMBLES, *(baseline.name for baseline in listed())]


def single_sae(title: str, sae: SAESettings, note: str = "", *, init_index: int = 0, **fields: Any) -> Target:
    """Return the target of a baseline: its SAE, and the fields of `Target` that differ from their defaults.

    `title`: first line of the asset's description, at most 60 characters. `note`: sentences after the settings. `init_index`: 1 for member
    1's initial weights, 0 for weights of its own.
    """
    description = f"{title}\n\n{' '.join(filter(None, (f'{shape_of(sae)}.', note)))}"
    return Target("baseline", "", description, init_index=init_index, sae=sae, **fields)


def names_of(experiment: ExperimentSettings) -> list[str]:
    """Return the names of the baselines of an experiment, in the order of its file."""
    if experiment.baselines is not None:
        return experiment.baselines
    if experiment.ensemble.published:
        return []
    has_l0 = all(sae.l0 is not None for sae in experiment.saes)
    return [baseline.name for baseline in listed() if baseline.by_default and (has_l0 or not baseline.adds_l0)]


def baselines_of(experiment: ExperimentSettings) -> Iterator[BaselineSAE]:
    """Yield the SAEs of an experiment's baselines in the order of its file. Baselines with equal targets are the same SAE."""
    size = experiment.ensemble.members
    for name in names_of(experiment):
        baseline = BASELINES[name]
        for n in experiment.expanded_widths if baseline.is_sized else [size]:
            target = baseline.target(experiment, n)
            training = {**target.training, **experiment.baseline_training.get(name, {})}
            target = replace(target, name=name if n == size else f"{name}_{n}", training=training)
            yield BaselineSAE(name, n if baseline.is_sized else 1, target)


def complaint_about(experiment: ExperimentSettings) -> tuple[tuple[str | int, ...], str] | None:
    """Return field and error message of the first wrong baseline of an experiment; None if all are right."""
    names = names_of(experiment)
    for i, name in enumerate(names):
        if name not in BASELINES:
            *first, last = (repr(baseline.name) for baseline in listed())
            return ("baselines", i), f"expected {', '.join(first)} or {last} (found: {shown(name)})"
        if message := _complaint(BASELINES[name], experiment):
            return ("baselines", i), message
    for name in experiment.baseline_training:
        if name not in names:
            return ("baseline_training", name), f"{name} is not among baselines: add it there, or leave this out"
    return None


def _complaint(baseline: Baseline, experiment: ExperimentSettings) -> str:
    from saeens_models.architectures import validate_l0_multiple

    is_list = isinstance(experiment.sae, list)
    if is_list and not baseline.of_lists:
        able = ", ".join(each.name for each in listed() if each.of_lists)
        return f"{baseline.name} is not defined where sae is a list, one per member: leave it out ({able} are), or give one sae"
    if experiment.ensemble.published and not baseline.of_published:
        able = ", ".join(each.name for each in listed() if each.of_published)
        return f"{baseline.name} is not defined with published members, whose widths are in their files: leave it out ({able} are)"
    for number, sae in enumerate(experiment.saes if baseline.adds_l0 else [], start=1):
        try:
            validate_l0_multiple(sae)
        except ValueError as error:
            of_list = f"has the L0 of all members added up; of member {number}, {error}: leave it out"
            return f"{baseline.name} {of_list if is_list else f'has the L0 of all members: {error}'}"
    return baseline.complaint(experiment)
