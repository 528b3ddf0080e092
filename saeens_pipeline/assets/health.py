"""Health checks after every materialisation and cache hit.

An *error* stops everything that depends on the artefact: numbers that are not finite, wrong shapes, activations that are constant or
overflowed. A *warning* stops nothing: quality below the experiment's `checks`. Both follow from the artefact's record and a few chunks, so
that a check costs milliseconds; only `compare_bytes` reads everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

import polars as pl

from saeens_pipeline.assets.declarations import Declaration, Reference
from saeens_pipeline.assets.massive_activations import is_held_by_few
from saeens_pipeline.assets.registry import TABLES, Table
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.settings.experiments import CheckSettings
from saeens_pipeline.storage.names import Address, Partition, place
from saeens_pipeline.storage.recipes import Artefact, DamagedArtefactError, Store
from saeens_pipeline.storage.tables import read_part

if TYPE_CHECKING:
    from saeens_pipeline.storage.activations import ActivationStore

MAX_AT_LIMIT = 1e-5  # share of numbers at the end of their dtype
MIN_ROUND_GAIN = 0.01  # explained variance of the input of a boosting round


class UnsoundArtefactError(SaeensError):
    """An artefact that is intact but must not be used: numbers that are not finite, wrong shapes, constant activations."""


@dataclass
class Health:
    """The result of a health check: errors and warnings as sentences, and the measured numbers."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    measured: dict[str, int | float] = field(default_factory=dict)

    def require(self, ok: bool, message: str) -> None:
        """Add `message` to the errors unless `ok`."""
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
    health, where = Health(), place(declaration.address, partition)
    try:
        if declaration.address.is_table:
            _require_sound_table(health, where, artefact, TABLES[declaration.address.name])
        else:
            _SOUNDNESS[artefact.recipe["builder"]](health, where, artefact)
        _expect_quality(health, (declaration.address, partition), artefact, settings or CheckSettings())
    except (KeyError, ValueError, SaeensError) as error:
        health.errors.append(f"{where} cannot be read ({error}): remove {artefact.path} and compute it again")
    return health


def warnings_of(declaration: Reference, partition: Partition, artefact: Artefact, settings: CheckSettings) -> list[str]:
    """Return only the warnings of `examine`, from the record: weights and activations are not read."""
    health = Health()
    _expect_quality(health, (declaration.address, partition), artefact, settings)
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
    return [f"{place(declaration.address, partition)}: {each}. The next run computes it again" for each in differences]


def _models():
    """Return saeens_models, which declarations must not load."""
    import saeens_models.metrics.soundness

    return saeens_models


def _require_sound_tokens(health: Health, where: str, artefact: Artefact) -> None:
    for split, statistics in artefact.provenance["statistics"].items():
        rows, wanted = statistics["rows"], artefact.recipe["settings"][f"{split}_tokens"]
        health.measured[f"{split} rows"] = rows
        if skipped := artefact.provenance.get("records_without_text", {}).get(split):
            health.measured[f"{split} records without text"] = skipped
        message = f"{where} has {rows:,} {split} rows, and `{split}_tokens` is {wanted:,}: compute it again, or lower that field"
        health.require(rows == wanted, message)


def _require_sound_activations(health: Health, name: str, artefact: Artefact) -> None:
    from saeens_pipeline.storage.activations import ActivationStatistics, ActivationStore

    store = ActivationStore(artefact.path)
    for split, recorded in artefact.provenance["statistics"].items():
        statistics, where = ActivationStatistics.from_json(recorded), f"{name}, {split} split,"
        shape, expected = (store.n_rows(split), store.d_in), (statistics.rows, len(statistics.mean))
        health.measured |= {f"{split} rows": statistics.rows, f"mean norm ({split})": statistics.mean_norm}
        health.measured[f"rows dropped for their norm ({split})"] = statistics.dropped
        if statistics.top_share is not None:
            health.measured[f"share of the variance in 0.1 % of the rows ({split})"] = statistics.top_share
        health.require(shape == expected, f"{where} is of shape {list(shape)} and was written as {list(expected)}: compute it again")
        finite = all(map(isfinite, (statistics.mean_norm, float(statistics.mean.sum()), float(statistics.variance.sum()))))
        health.require(finite, f"{where} has means or variances that are not finite: the language model overflows; set dtype: bfloat16")
        constant = _models().metrics.soundness.constant_dimensions(statistics.mean, statistics.variance)
        health.measured[f"constant dimensions ({split})"] = constant
        health.require(
            constant < store.d_in,
            f"{where} is constant: all {store.d_in} dimensions are the same in every row. "
            f"Check `hook: {artefact.recipe['settings']['hook']}` and the files of the language model",
        )
        if shape == expected and store.has_bytes(split):
            _require_sound_chunks(health, store, split, where)


def _require_sound_chunks(health: Health, store: ActivationStore, split: str, where: str) -> None:
    last = store.n_chunks(split) - 1
    counts = [_models().metrics.soundness.count_values(store.read_chunk(split, index)) for index in {0, last // 2, last}]
    values, non_finite, at_limit = (sum(each) for each in zip(*counts, strict=True))
    health.measured[f"sampled values at the limit of {store.dtype} ({split})"] = at_limit
    health.require(non_finite == 0, f"{where} has {non_finite:,} of {values:,} sampled values that are not finite: compute it again")
    health.require(
        at_limit <= MAX_AT_LIMIT * values,
        f"{where} has {at_limit:,} of {values:,} sampled values at the limit of {store.dtype}, where they were cut off: "
        "set dtype: bfloat16, or float32",
    )


def _require_sound_sae(health: Health, where: str, artefact: Artefact) -> None:
    _require_sound_weights(health, where, artefact)
    last = artefact.provenance["last_step"]
    for name in ("loss", "explained_variance", "l0"):
        health.require(isfinite(last[name]), f"{where}: {name} of the last step is {last[name]}: lower training.learning_rate")


def _require_sound_weights(health: Health, where: str, artefact: Artefact) -> None:
    config = _models().load_sae(artefact.path).config  # raises ValueError for wrong shapes, and for weights that are not finite
    health.measured |= {"d_in": config.d_in, "features": config.d_sae}


def _require_sound_table(health: Health, where: str, artefact: Artefact, registered: Table) -> None:
    table = read_part(artefact.path)
    expected = [column.name for column in registered.all_columns]
    health.measured["rows"] = len(table)
    health.require(table.columns == expected, f"{where} has the columns {table.columns}, not {expected}: compute it again")
    health.require(len(table) > 0 or registered.may_be_empty, f"{where} is empty: compute it again")
    for name in (name for name, dtype in table.schema.items() if dtype.is_float()):
        wrong = table.filter(~pl.col(name).is_finite())
        first = next(wrong.iter_rows(named=True), {})
        health.require(
            wrong.is_empty(),
            f"{where}: {name} is {first.get(name)} in {len(wrong)} of {len(table)} rows, first for method {first.get('method')}, "
            f"n_members {first.get('n_members')}: check the SAEs of that row",
        )


_SOUNDNESS: Mapping[str, Callable[[Health, str, Artefact], None]] = {
    "tokens": _require_sound_tokens,
    "activations": _require_sound_activations,
    "sae": _require_sound_sae,
    "published_sae": _require_sound_weights,
}


def _expect_quality(health: Health, at: tuple[Address, Partition], artefact: Artefact, settings: CheckSettings) -> None:
    address, partition = at
    where = place(address, partition)
    if artefact.recipe["builder"] == "sae":
        later_round = address.name.startswith("round_") and address.name != "round_1"
        held_out = _held_out(Store(artefact.root(address, partition)), address.owner, partition, artefact)
        _expect_good_sae(health, where, artefact, held_out, settings, later_round=later_round)
    elif artefact.recipe["builder"] == "published_sae":
        differences = artefact.provenance["differences"] if address.kind == "bagging" else []  # round 1 is a member, too
        health.warnings += [f"{where}, {artefact.provenance['published']}: {each}" for each in differences]
    elif artefact.recipe["builder"] == "activations":
        _expect_spread_variance(health, where, artefact)
    elif address.is_table and not health.errors:
        health.warnings += [f"{where}: {each}" for each in TABLES[address.name].warnings(read_part(artefact.path), settings)]


def _expect_spread_variance(health: Health, where: str, artefact: Artefact) -> None:
    """Warn if a few rows (massive activations) decide every explained variance."""
    from saeens_pipeline.storage.activations import ActivationStatistics

    for split, recorded in artefact.provenance["statistics"].items():
        statistics = ActivationStatistics.from_json(recorded)
        share = statistics.top_share or 0.0
        if is_held_by_few(share) and not health.errors:
            places = "; ".join(
                f"document {document:.0f}, position {position:.0f}, norm {norm:,.0f}" for _, norm, document, position in statistics.top_rows
            )
            limit = artefact.recipe["settings"].get("max_norm")
            setting = "max_norm: 10" if limit is None else f"max_norm below {limit:g}"
            health.warnings.append(
                f"{where}, {split} split: 0.1 % of the rows (at least one) hold {share:.0%} of the variance, and explained variance is "
                f"mostly about them (mean norm {statistics.mean_norm:,.0f}; largest: {places}): "
                f"set {setting} in the source, to drop such rows"
            )


def _held_out(store: Store, experiment: str, partition: Partition, sae: Artefact) -> Mapping[str, Any] | None:
    """Return the row of an SAE in the tables `members` or `reconstruction`, of held-out tokens; None before they are computed."""
    for table in ("members", "reconstruction"):
        part = store.path(Address(experiment, "eval", table), partition)
        with contextlib.suppress(SaeensError):  # a damaged table is reported by its own check
            for row in read_part(part).filter(sae_data_versions=sae.data_version).iter_rows(named=True) if part.exists() else ():
                return row
    return None


def _expect_good_sae(
    health: Health, where: str, artefact: Artefact, held_out: Mapping[str, Any] | None, settings: CheckSettings, *, later_round: bool
) -> None:
    sae, least = artefact.recipe["settings"]["sae"], settings.min_explained_variance
    figures, measured_on = (held_out, "held-out tokens") if held_out else (artefact.provenance["last_step"], "the last training batch")
    variance, l0, dead = figures["explained_variance"], figures["l0"], figures["dead_features"]
    health.measured |= {f"explained variance ({measured_on})": variance, "L0 [features per token]": l0, "dead features": dead}
    health.expect(
        dead <= settings.max_dead_features,
        f"{where}: {dead:.0%} of its features are dead, more than {settings.max_dead_features:.0%} ({measured_on}): "
        "train on more tokens, or set a smaller expansion or a larger aux_loss_coefficient",
    )
    dead_after, n_tokens = artefact.recipe["settings"]["training"]["dead_after_tokens"], artefact.provenance["train_tokens"]
    health.expect(
        dead_after is None or dead_after < n_tokens,
        f"{where}: no feature can be called dead or be revived: training.dead_after_tokens is {dead_after}, and it trained on "
        f"{n_tokens} tokens. Lower it, or leave it out for a tenth of the tokens",
    )
    target = sae.get("k") or settings.target_l0 or sae.get("l0_target")
    if target:
        coefficient = next((name for name in ("l1_coefficient", "l0_coefficient") if name in sae), None)
        how = "fewer pre-activations than k are positive; is the learning rate too high?"
        if "l0_target" in sae:
            how = "train on more tokens" + (", or raise sae.l0_coefficient" if coefficient == "l0_coefficient" else "")
        elif coefficient:
            how = f"{'lower' if l0 < target else 'raise'} sae.{coefficient}"
        tolerance = settings.l0_tolerance
        message = f"{where}: {l0:.4g} features fire per token, and the target is {target:g} (+-{tolerance:.0%}): {how}"
        health.expect(abs(l0 - target) <= tolerance * target, message)
    if later_round:
        health.expect(
            variance >= MIN_ROUND_GAIN,
            f"{where} explains {variance:.2%} of the residual of the earlier rounds, too little to reduce it: "
            "use fewer members or a lower learning rate",
        )
    elif least is not None:
        message = f"{where}: explained variance {variance:.3f} on {measured_on} is below {least:g}"
        health.expect(variance >= least, message)
