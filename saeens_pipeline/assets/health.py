"""Health checks after every materialisation and cache hit.

An *error* stops everything that depends on the artefact: numbers that are not finite, wrong shapes, activations that are constant or
overflowed. A *warning* stops nothing: quality below the experiment's `checks`. Both follow from the artefact's record and a few chunks, so
that a check costs milliseconds; only `compare_bytes` reads everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

import polars as pl

from saeens_pipeline.assets.declarations import Declaration, Reference
from saeens_pipeline.assets.registry import TABLES
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.settings.experiments import CheckSettings
from saeens_pipeline.storage.names import Partition, place
from saeens_pipeline.storage.recipes import Artefact, DamagedArtefactError, Store
from saeens_pipeline.storage.tables import read_part

if TYPE_CHECKING:
    from saeens_pipeline.storage.activations import ActivationStore

MAX_AT_LIMIT = 1e-5  # share of numbers at the end of their dtype
MIN_ROUND_GAIN = 0.01  # explained variance of what a boosting round was given


class UnsoundArtefactError(SaeensError):
    """An artefact that is intact but must not be used: numbers that are not finite, wrong shapes, constant activations."""


@dataclass
class Health:
    """The result of a health check: errors and warnings as sentences, and the measured numbers."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    measured: dict[str, int | float] = field(default_factory=dict)

    def require(self, ok: bool, message: str) -> None:
        """Add an error unless `ok`."""
        if not ok:
            self.errors.append(message)

    def expect(self, ok: bool, message: str) -> None:
        """Add a warning unless `ok`."""
        if not ok:
            self.warnings.append(message)


def is_checked(declaration: Declaration) -> bool:
    """Return True for artefacts with a health check. Ensembles only refer to SAEs; the writer of residuals refuses unsound numbers."""
    return declaration.address.is_table or declaration.builder in _SOUNDNESS


def examine(declaration: Reference, partition: Partition, artefact: Artefact, settings: CheckSettings | None = None) -> Health:
    """Check the health of an artefact with the thresholds of its experiment."""
    health, subject = Health(), _Examined.of(declaration, partition, artefact)
    require_sound = _require_sound_table if declaration.address.is_table else _SOUNDNESS[artefact.recipe["builder"]]
    try:
        require_sound(health, subject)
        _expect_quality(health, subject, settings or CheckSettings())
    except (KeyError, ValueError, SaeensError) as error:
        health.errors.append(f"{subject.place} cannot be read ({error}): remove {artefact.path} and make it again")
    return health


def warnings_of(declaration: Reference, partition: Partition, artefact: Artefact, settings: CheckSettings) -> list[str]:
    """Return only the warnings of `examine`, from the record: weights and activations are not read."""
    health = Health()
    _expect_quality(health, _Examined.of(declaration, partition, artefact), settings)
    return health.warnings


def compare_bytes(store: Store, declaration: Reference, partition: Partition) -> list[str]:
    """Read a whole artefact, compare it with its record, and return every difference. An artefact with differences is invalidated."""
    try:
        artefact = store.find(declaration.address, partition)
    except DamagedArtefactError as error:
        return [str(error)]
    differences = artefact.verify() if artefact else []
    if artefact and differences:
        artefact.invalidate()
    return [f"{place(declaration.address, partition)}: {each}. The next run makes it again" for each in differences]


@dataclass(frozen=True)
class _Examined:
    """An artefact under examination: its place for messages, the last part of its key, and the artefact."""

    place: str
    name: str
    is_table: bool
    artefact: Artefact

    @classmethod
    def of(cls, reference: Reference, partition: Partition, artefact: Artefact) -> _Examined:
        return cls(place(reference.address, partition), reference.address.name, reference.address.is_table, artefact)

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.artefact.recipe["settings"]

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.artefact.provenance


def _require_sound_tokens(health: Health, subject: _Examined) -> None:
    for split, statistics in subject.provenance["statistics"].items():
        rows, wanted = statistics["rows"], subject.settings[f"{split}_tokens"]
        health.measured[f"{split} rows"] = rows
        health.require(
            rows == wanted,
            f"{subject.place} has {rows:,} {split} rows, and `{split}_tokens` is {wanted:,}: make it again, or lower that field",
        )


def _require_sound_activations(health: Health, subject: _Examined) -> None:
    from saeens_models.metrics.soundness import constant_dimensions
    from saeens_pipeline.storage.activations import ActivationStatistics, ActivationStore

    store = ActivationStore(subject.artefact.path)
    for split, recorded in subject.provenance["statistics"].items():
        statistics, where = ActivationStatistics.from_json(recorded), f"{subject.place}, {split} split,"
        shape, expected = (store.n_rows(split), store.d_in), (statistics.rows, len(statistics.mean))
        health.measured |= {f"{split} rows": statistics.rows, f"mean norm ({split})": statistics.mean_norm}
        health.require(shape == expected, f"{where} is of shape {list(shape)} and was written as {list(expected)}: make it again")
        numbers = (statistics.mean_norm, float(statistics.mean.sum()), float(statistics.variance.sum()))
        finite = all(map(isfinite, numbers))
        health.require(finite, f"{where} has means or variances that are not finite: the language model overflows; set dtype: bfloat16")
        constant = constant_dimensions(statistics.mean, statistics.variance)
        health.measured[f"constant dimensions ({split})"] = constant
        health.require(
            constant < store.d_in,
            f"{where} is constant: all {store.d_in} dimensions are the same in every row. "
            f"Check `hook: {subject.settings['hook']}` and the files of the language model",
        )
        if shape == expected:
            _require_sound_chunks(health, store, split, where)


def _require_sound_chunks(health: Health, store: ActivationStore, split: str, where: str) -> None:
    from saeens_models.metrics.soundness import count_values

    last = store.n_chunks(split) - 1
    counts = [count_values(store.read_chunk(split, index)) for index in {0, last // 2, last}]
    values, non_finite, at_limit = (sum(each) for each in zip(*counts, strict=True))
    health.measured[f"sampled values at the limit of {store.dtype} ({split})"] = at_limit
    health.require(non_finite == 0, f"{where} has {non_finite:,} of {values:,} sampled values that are not finite: make it again")
    health.require(
        at_limit <= MAX_AT_LIMIT * values,
        f"{where} has {at_limit:,} of {values:,} sampled values at the limit of {store.dtype}, where they were cut off: "
        "set dtype: bfloat16, or float32",
    )


def _require_sound_sae(health: Health, subject: _Examined) -> None:
    import saeens_models as sm

    config = sm.load_sae(subject.artefact.path).config  # raises ValueError for wrong shapes, and for weights that are not finite
    health.measured |= {"d_in": config.d_in, "features": config.d_sae}
    last = subject.provenance["last_step"]
    for name in ("loss", "explained_variance", "l0"):
        health.require(isfinite(last[name]), f"{subject.place}: {name} of the last step is {last[name]}: lower training.learning_rate")


def _require_sound_table(health: Health, subject: _Examined) -> None:
    table = read_part(subject.artefact.path)
    registered = TABLES[subject.name]
    expected = [column.name for column in registered.all_columns]
    health.measured["rows"] = len(table)
    health.require(table.columns == expected, f"{subject.place} has the columns {table.columns}, not {expected}: make it again")
    health.require(len(table) > 0 or registered.may_be_empty, f"{subject.place} is empty: make it again")
    for name in (name for name, dtype in table.schema.items() if dtype.is_float()):
        wrong = table.filter(~pl.col(name).is_finite())
        first = next(wrong.iter_rows(named=True), {})
        health.require(
            wrong.is_empty(),
            f"{subject.place}: {name} is {first.get(name)} in {len(wrong)} of {len(table)} rows, first for method {first.get('method')}, "
            f"n_members {first.get('n_members')}: check the SAEs of that row",
        )


_SOUNDNESS: Mapping[str, Callable[[Health, _Examined], None]] = {
    "tokens": _require_sound_tokens,
    "activations": _require_sound_activations,
    "sae": _require_sound_sae,
}


def _expect_quality(health: Health, subject: _Examined, settings: CheckSettings) -> None:
    if subject.artefact.recipe["builder"] == "sae":
        _expect_good_sae(health, subject, settings)
    elif subject.is_table and not health.errors:
        table = read_part(subject.artefact.path)
        for warning in TABLES[subject.name].warnings(table, settings):
            health.warnings.append(f"{subject.place}: {warning}")


def _expect_good_sae(health: Health, subject: _Examined, settings: CheckSettings) -> None:
    last = subject.provenance["last_step"]
    variance, l0, dead = last["explained_variance"], last["l0"], last["dead_features"]
    health.measured |= {"explained variance (last batch)": variance, "L0 [features per token]": l0, "dead features": dead}
    health.expect(
        dead <= settings.max_dead_features,
        f"{subject.place}: {dead:.0%} of its features are dead, more than {settings.max_dead_features:.0%}: "
        "train on more tokens, or set a smaller expansion or a larger aux_loss_coefficient",
    )
    dead_after, n_tokens = subject.settings["training"]["dead_after_tokens"], subject.provenance["train_tokens"]
    health.expect(
        dead_after is None or dead_after < n_tokens,
        f"{subject.place}: no feature can be called dead or be revived: training.dead_after_tokens is {dead_after}, and it trained on "
        f"{n_tokens} tokens. Lower it, or leave it out for a tenth of the tokens",
    )
    target = subject.settings["sae"].get("k", settings.target_l0)
    if target:
        health.expect(
            abs(l0 - target) <= settings.l0_tolerance * target,
            f"{subject.place}: {l0:.4g} features fire per token, and the target is {target:g} "
            f"(+-{settings.l0_tolerance:.0%}): {_how_to_reach(target, l0, subject.settings['sae'])}",
        )
    later_round = subject.name.startswith("round_") and subject.name != "round_1"
    if later_round:
        health.expect(
            variance >= MIN_ROUND_GAIN,
            f"{subject.place} explains {variance:.2%} of the residual of the earlier rounds, too little to reduce it: "
            "use fewer members or a lower learning rate",
        )
    elif settings.min_explained_variance is not None:
        health.expect(
            variance >= settings.min_explained_variance,
            f"{subject.place}: explained variance {variance:.3f} on the last training batch is below {settings.min_explained_variance:g}",
        )


def _how_to_reach(target: float, l0: float, sae: Mapping[str, Any]) -> str:
    coefficient = next((name for name in ("l1_coefficient", "l0_coefficient") if name in sae), None)
    if coefficient:
        return f"{'lower' if l0 < target else 'raise'} sae.{coefficient}"
    return "fewer pre-activations than k are positive; is the learning rate too high?"
