"""The evaluation tables: which columns each has, in what unit, and where their rows lie.

Long form, one row per measurement. All tables begin with the columns that say what was measured; what does not apply is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.storage.names import validate_name

if TYPE_CHECKING:
    import polars as pl

ColumnType = Literal["str", "int", "float"]


@dataclass(frozen=True)
class Column:
    """One column: what it is called, what it holds, and what it means, with its unit."""

    name: str
    type: ColumnType
    description: str


@dataclass(frozen=True)
class Table:
    """One table: its first line says what question it answers."""

    name: str
    question: str
    columns: tuple[Column, ...]


METHODS = ("single", "bagging", "boosting", "expanded", "expanded_l0_matched", "compute_matched", "matching_pursuit")

SUBJECT = (
    Column("experiment", "str", "experiment"),
    Column("layer", "int", "layer of the language model, from 0"),
    Column("seed", "int", "ensemble seed"),
    Column("language_model", "str", "trained, or random: the untrained control"),
    Column("method", "str", f"{', '.join(METHODS)}; for probes also raw, the activations themselves"),
    Column("n_members", "int", "SAEs in the ensemble (the first n); for expanded SAEs the n whose width they match; else 1"),
    Column("sae_data_versions", "str", "data versions of the SAEs measured, in member order"),
)

TABLES = {
    table.name: table
    for table in (
        Table(
            "reconstruction",
            "How well each dictionary rebuilds held-out activations",
            (
                Column("n_features", "int", "features of the whole dictionary"),
                Column("mse", "float", "mean over tokens of the squared error summed over d_in, in the activations' own scale"),
                Column("explained_variance", "float", "mean over dimensions of 1 - squared error / variance"),
                Column("fvu", "float", "total squared error / total variance"),
                Column("l0", "float", "features that fire per token"),
                Column("relative_sparsity", "float", "l0 / n_features"),
                Column("dead_features", "float", "share of features that never fire on the test tokens"),
                Column("constant_dimensions", "int", "dimensions without variance, left out of explained_variance"),
                Column("description_length_bits", "float", "bits per token that send the code, magnitudes to 1/256 of the mean norm"),
                Column("ce_loss_recovered", "float", "share that it recovers of the next-token loss that zeros cost"),
                Column("tokens", "int", "test tokens"),
            ),
        ),
        Table(
            "members",
            "What each member or round does on its own input",
            (
                Column("member", "int", "member or round, from 1"),
                Column("mse", "float", "of what the member was given: squared error summed over d_in, mean over tokens"),
                Column("explained_variance", "float", "of what the member was given"),
                Column("l0", "float", "features that fire per token"),
                Column("dead_features", "float", "share of features that never fire on the test tokens"),
                Column(
                    "mean_max_cosine_to_other_members", "float", "mean over features of the largest cosine to a feature of another member"
                ),
                Column("median_density", "float", "median over features of the share of tokens on which they fire"),
            ),
        ),
        Table(
            "coactivation",
            "Which features fire together, and how many differ",
            (
                Column("connectivity", "float", "share of feature pairs that never fire together"),
                Column("diversity", "int", "features whose largest cosine to any other is below 0.7"),
                Column("tokens", "int", "test tokens"),
            ),
        ),
        Table(
            "stability",
            "Do the same features come back under another seed?",
            (
                Column("n_runs", "int", "seeds compared; stability grows with it"),
                Column("stability", "float", "mean over features of the largest cosine to any feature of any other seed"),
                Column("stability_pairwise", "float", "the same with each other seed alone, averaged"),
                Column("stability_matched", "float", "mean cosine of the one-to-one matching; null above 2048 features"),
            ),
        ),
        Table(
            "marginal_gain",
            "What each further member or round adds, and how many are enough",
            (
                Column(
                    "explained_variance_gain", "float", "explained variance minus that of one member less; of the first member, its own"
                ),
                Column("stability_gain", "float", "stability minus that of one member less; null for the first, and with one seed"),
                Column("new_features", "int", "features of member n whose largest cosine to all of the members before it is below 0.7"),
                Column(
                    "suggested",
                    "int",
                    "smallest number of members after which no further one takes 5% off what is left to 1 of explained variance or of "
                    "stability, means over seeds; the same in all rows of a method",
                ),
            ),
        ),
        Table(
            "cost",
            "What each method cost to train and costs to run",
            (
                Column("train_tokens", "int", "tokens seen in training, summed over members"),
                Column("train_flops", "float", "dense-equivalent floating-point operations of training"),
                Column("train_seconds", "float", "seconds of training; those of a joint op divided by FLOPs among its SAEs"),
                Column("residual_flops", "float", "boosting's passes that apply rounds to make residuals, not in train_flops"),
                Column("residual_seconds", "float", "seconds of those passes, not in train_seconds"),
                Column(
                    "peak_memory_bytes",
                    "int",
                    "of the device, or on a CPU of the whole process with interpreter and libraries; a joint op's is divided by FLOPs "
                    "among its SAEs: what is trained by itself does not compare with what is trained together",
                ),
                Column("inference_flops_per_token", "float", "dense-equivalent operations to encode and decode one token"),
                Column("device", "str", "where it was trained"),
                Column("dtype", "str", "of the weights"),
                Column("boosting_mode", "str", "sequential or concurrent; null for other methods"),
            ),
        ),
        Table(
            "features",
            "What each feature does, and where it comes back",
            (
                Column("member", "int", "member or round, from 1"),
                Column("index", "int", "row of that member's W_dec, from 0"),
                Column("density", "float", "share of the test tokens on which it fires"),
                Column("mean_activation", "float", "mean over the tokens on which it fires; null if it never does"),
                Column("nearest_member", "int", "which other member has the feature of the largest cosine; null for single SAEs"),
                Column("nearest_cosine", "float", "that cosine"),
                Column("matches", "str", "JSON list of [member, index, cosine]: the nearest of each other member; null for single SAEs"),
                Column("nearest_other_seed_cosine", "float", "largest cosine to any feature under any other seed; null with one seed"),
                Column("nearest_other_seed", "int", "which other seed has that feature"),
                Column("nearest_other_seed_member", "int", "which member or round under that seed"),
                Column("nearest_other_seed_index", "int", "which row of that member's W_dec"),
                Column("top_tokens", "str", "JSON list: the ten test tokens on which it is most active, the most active first"),
            ),
        ),
        Table(
            "contexts",
            "Where each feature of the ensembles is most active, and which next tokens it speaks for",
            (
                Column("member", "int", "member or round, from 1"),
                Column("index", "int", "row of that member's W_dec, from 0"),
                Column("max_activation", "float", "largest activation on the test tokens; null if it never fires"),
                Column(
                    "contexts",
                    "str",
                    "JSON list: up to 8 places of the test text where it is most active, each of another window, with 12 tokens to either "
                    "side: document, position and centre of the token in the middle, tokens, activations (null: dropped tokens)",
                ),
                Column("histogram", "str", "JSON list: on how many test tokens its activation is in [i, i + 1) * bin_width, not 0"),
                Column("bin_width", "float", "a power of two; null if it never fires"),
                Column(
                    "promoted_tokens", "str", "JSON list of [token, logit]: largest of W_dec W_U, without the final norm; [] without a head"
                ),
                Column("suppressed_tokens", "str", "the same, the smallest"),
            ),
        ),
        Table(
            "autointerp",
            "What a language model says that features respond to, and how well that tells where they fire",
            (
                Column("member", "int", "member or round, from 1"),
                Column("index", "int", "row of that member's W_dec, from 0"),
                Column("explanation", "str", "from every other context of the table contexts; null where there is none"),
                Column("detection_score", "float", "balanced accuracy of telling, by the explanation, where it fires; 0.5 is chance"),
                Column("true_positive_rate", "float", "share of the other contexts that are said to fit the explanation"),
                Column("false_positive_rate", "float", "share of random windows, on which it does not fire, that are said to fit"),
                Column("control_score", "float", "detection_score on the same texts with another feature's explanation"),
                Column("n_examples", "int", "texts that the scores are over, half of them contexts; null where there are too few"),
                Column("status", "str", "scored, malformed answer, refused, too few contexts, too few silent windows"),
                Column("model", "str", "the language model that was asked"),
            ),
        ),
        Table(
            "concept_detection",
            "How much of a concept is in a few features",
            (
                Column("dataset", "str", "data set that the texts are from"),
                Column("label", "str", "the label that is told from the others"),
                Column("n_probe_features", "int", "features that the probe is given; of n members also n times as many"),
                Column("code_scale", "str", "unscaled: the members' own codes; 1/J: divided by n_members, as in bagging's reconstruction"),
                Column("accuracy", "float", "of a logistic regression on test texts, half of which have the label"),
                Column("n_distinct_features", "int", "of these features, those left when near-duplicates (cosine 0.7) are counted once"),
                Column("accuracy_distinct", "float", "with as many features of which none is a near-duplicate of a better one"),
            ),
        ),
        Table(
            "spurious_correlation",
            "Does removing a few features make a biased probe fair?",
            (
                Column("task", "str", "data set, the attribute that counts, and the spurious one that coincides with it in training"),
                Column("n_ablated", "int", "features that are zeroed; of n members also n times as many; 0 is the biased probe as it is"),
                Column("accuracy_biased", "float", "of the biased probe on balanced test texts"),
                Column("accuracy_clean", "float", "of a probe trained on balanced texts"),
                Column("accuracy_ablated", "float", "of the biased probe when the features are zeroed"),
                Column("worst_group_accuracy", "float", "the same in the group of texts, of the four, in which it is least"),
                Column("scr", "float", "(ablated - biased) / (clean - biased); 0 where the denominator is below 0.001"),
                Column("scr_metric", "float", "scr in the direction, of the two, in which the biased probe is less accurate; else null"),
            ),
        ),
        Table(
            "training_curves",
            "How training went",
            (
                Column("member", "int", "member or round, from 1"),
                Column("step", "int", "optimiser step"),
                Column("tokens", "int", "tokens seen"),
                Column("loss", "float", "training objective, mean over the batch"),
                Column("explained_variance", "float", "on the training batch"),
                Column("l0", "float", "features that fire per token of the batch"),
                Column("dead_features", "float", "share of features silent for more than dead_after_tokens"),
                Column("learning_rate", "float", "of this step"),
            ),
        ),
    )
}

TOTALS = {  # what training took in all: columns of the table cost that are shown as their sum
    "total_flops": ("train_flops", "residual_flops"),
    "total_seconds": ("train_seconds", "residual_seconds"),
}
SEED_METRICS = {  # what the leaderboard gives means, intervals and points of: the table that each is from, and what it is
    "explained_variance": ("reconstruction", "on held-out tokens"),
    "mse": ("reconstruction", "squared error summed over d_in"),
    "fvu": ("reconstruction", "total squared error / total variance"),
    "ce_loss_recovered": ("reconstruction", "share recovered of the next-token loss that zeros cost"),
    "description_length_bits": ("reconstruction", "bits per token that send the code"),
    "l0": ("reconstruction", "features that fire per token"),
    "relative_sparsity": ("reconstruction", "l0 / n_features"),
    "dead_features": ("reconstruction", "share of features that never fire on the test tokens"),
    "connectivity": ("coactivation", "share of feature pairs that never fire together"),
    "diversity": ("coactivation", "features whose largest cosine to any other is below 0.7"),
    "stability": ("stability", "mean over features of the largest cosine to any feature of any other seed"),
    "stability_pairwise": ("stability", "the same with each other seed alone, averaged"),
    "stability_matched": ("stability", "mean cosine of the one-to-one matching"),
}


def _over_seeds(name: str, description: str) -> tuple[Column, ...]:
    return (
        Column(name, "float", f"{description}, mean over seeds"),
        Column(f"{name}_low", "float", "lower end of its 95% interval (Student's t over seeds); null with one seed"),
        Column(f"{name}_high", "float", "upper end of the same"),
        Column(f"{name}_by_seed", "str", "the points, comma-separated, in the order of seeds"),
    )


LEADERBOARD = Table(
    "leaderboard",
    "Which method is best, over all experiments",
    (
        Column("rank", "int", "place among the rows of one source and layer"),
        Column("experiment", "str", "experiment"),
        Column("source", "str", "where its activations come from"),
        Column("language_model", "str", "trained, or random: the untrained control"),
        Column("layer", "int", "layer of the language model, from 0"),
        Column("method", "str", ", ".join(METHODS)),
        Column("n_members", "int", "SAEs in the ensemble; for expanded SAEs the n whose width they match; else 1"),
        Column("n_seeds", "int", "ensemble seeds that the means are over"),
        Column("seeds", "str", "which, comma-separated"),
        Column("n_features", "int", "features of the whole dictionary"),
        *(column for name, (_, description) in SEED_METRICS.items() for column in _over_seeds(name, description)),
        Column("train_tokens", "int", "tokens seen in training, summed over members, mean over seeds"),
        Column("train_flops", "float", "dense-equivalent operations of training, mean over seeds"),
        Column("train_seconds", "float", "seconds of training, mean over seeds"),
        Column("residual_flops", "float", "boosting's passes that make residuals, not in train_flops, mean over seeds"),
        Column("residual_seconds", "float", "seconds of those passes, not in train_seconds, mean over seeds"),
        Column("control", "str", "the same experiment on the untrained language model; null where there is none"),
        Column("control_explained_variance", "float", "the control's, of the same layer and method; null where it was not run"),
        Column("control_stability", "float", "the control's, likewise"),
        Column("sae_data_versions", "str", "data versions of the SAEs in member order, comma-separated; seeds are separated by ;"),
    ),
)

PARETO = Table(
    "pareto",
    "What each method gives for its L0 and for its bits, over the values of a sweep",
    (
        Column("sweep", "str", "the experiment that has the sweep"),
        Column("field", "str", "what is varied: a field of sae"),
        Column("value", "float", "its value"),
        Column("experiment", "str", "the experiment with that value"),
        Column("layer", "int", "layer of the language model, from 0"),
        Column("language_model", "str", "trained, or random: the untrained control"),
        Column("method", "str", ", ".join(METHODS)),
        Column("n_members", "int", "SAEs in the whole ensemble; for expanded SAEs the n whose width they match; else 1"),
        Column("n_features", "int", "features of the whole dictionary"),
        Column("n_seeds", "int", "ensemble seeds that the means are over"),
        Column("seeds", "str", "which, comma-separated"),
        Column("l0", "float", "features that fire per token, mean over seeds"),
        Column("l0_by_seed", "str", "the points, comma-separated, in the order of seeds"),
        Column("description_length_bits", "float", "bits per token that send the code, mean over seeds; null where they were not measured"),
        Column("description_length_bits_by_seed", "str", "the points"),
        Column("explained_variance", "float", "on held-out tokens, mean over seeds"),
        Column("explained_variance_by_seed", "str", "the points"),
        Column(
            "total_flops", "float", "dense-equivalent operations of training and residuals, mean over seeds; null without the table cost"
        ),
        Column("on_l0_front", "int", "1: no other row of the layer has at most its l0 and more explained variance, or less and as much"),
        Column("on_bits_front", "int", "the same for description_length_bits"),
        Column("sae_data_versions", "str", "data versions of the SAEs in member order, comma-separated; seeds are separated by ;"),
    ),
)
_OVER_SEEDS = {table.name: table for table in (LEADERBOARD, PARETO)}


def columns_of(table: str) -> tuple[Column, ...]:
    """All columns of a table, those that say what was measured first."""
    return _OVER_SEEDS[table].columns if table in _OVER_SEEDS else SUBJECT + TABLES[table].columns


def frame(table: str, rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows as a data frame with exactly the table's columns. Raises ValueError for a column that the table does not have."""
    import polars as pl

    types = {"str": pl.String, "int": pl.Int64, "float": pl.Float64}
    columns = columns_of(table)
    rows = list(rows)
    unknown = {name for row in rows for name in row} - {column.name for column in columns}
    if unknown:
        raise ValueError(f"table {table} has no column {', '.join(sorted(unknown))}")
    return pl.DataFrame(
        [{column.name: row.get(column.name) for column in columns} for row in rows],
        schema={column.name: types[column.type] for column in columns},
        orient="row",
    )


def has_table(root: Path, experiment: str, table: str, layer: int | None = None) -> bool:
    """Whether there is any partition of a table, or of one layer of it."""
    return bool(_parts(root, experiment, table, layer))


def layers_with_tables(root: Path, experiment: str) -> list[int]:
    """Layers of which there is a folder of any table."""
    names = {path.name.removeprefix("layer=") for path in (root / "tables" / experiment).glob("*/layer=*")}
    return sorted(int(name) for name in names if name.isdecimal())


def read_table(root: Path, experiment: str, table: str, layer: int | None = None) -> pl.DataFrame:
    """All partitions of one table of one experiment, or those of one layer.

    Raises SaeensError where there are none, ConfigurationError for an unknown table.
    """
    import polars as pl

    if table not in TABLES:
        raise ConfigurationError(f"there is no table {table!r}; there are: {', '.join(TABLES)}")
    parts = _parts(root, experiment, table, layer)
    if not parts:
        raise SaeensError(f"{experiment} has no table {table} below {root} yet: `saeens run {experiment}` makes it")
    return pl.concat([_read_part(part) for part in parts]).sort("layer", "seed", "method", "n_members", maintain_order=True)


def with_totals(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with the `TOTALS` whose parts are among the columns. What no residual was made for has none to add."""
    import polars as pl

    there = {total: parts for total, parts in TOTALS.items() if set(parts) <= set(rows.columns)}
    return rows.with_columns(**{total: pl.col(made) + pl.col(residual).fill_null(0) for total, (made, residual) in there.items()})


def _parts(root: Path, experiment: str, table: str, layer: int | None) -> list[Path]:
    folder = root / "tables" / validate_name(experiment) / table
    return sorted(folder.glob("**/part.parquet" if layer is None else f"layer={layer}/**/part.parquet"))


def _read_part(part: Path) -> pl.DataFrame:
    import polars as pl

    try:
        return pl.read_parquet(part, hive_partitioning=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise SaeensError(f"{part} cannot be read ({error}): remove it and run again to make it anew") from error
