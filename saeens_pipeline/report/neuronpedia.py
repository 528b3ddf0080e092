"""Dashboards for Neuronpedia: the output of SAEDashboard's runner, from the tables `features` and `contexts`.

The folder has `batch-N.json`, `skipped_indexes.json` and `run_settings.json`. `sae_dashboard.neuronpedia.neuronpedia_export` converts it to
Neuronpedia's bulk import.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from saeens_pipeline.assets.sources import tokens_of
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.names import ENSEMBLES, Partition
from saeens_pipeline.storage.recipes import Store, Stored
from saeens_pipeline.storage.tables import has_table, read_table

BATCH_FEATURES = 128  # of a file, as SAEDashboard has by default
ALIGNED_DIMENSIONS = 3
_TABLES = ("features", "contexts")
_NOT_MEASURED = (
    *(f"correlated_{what}_{how}" for what in ("neurons", "features") for how in ("indices", "l1", "pearson")),
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)
"""Fields of a feature that stay empty: the tables have no correlations and no histogram of logits."""


def write_neuronpedia(store: Store, found: Stored, source: str, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the dashboards of an ensemble, a member or a round into `folder`, whole or not at all.

    `source`: the source of its experiment. `metadata`: those of its SAEs. Features of an ensemble are counted through its members. Features
    that never fire on the test tokens are listed as skipped. Raises ConfigurationError for other SAEs, for missing tables and for tables of
    other SAEs, and ValueError for a folder that is not empty.
    """
    from saeens_models.interop.new_folder import new_folder

    rows = _rows(store, found)
    place = {
        "model_id": str(metadata["model_name"]).rpartition("/")[2],
        "layer": found.partition.layer,
        "sae_set": f"{found.address.owner}-{found.address.kind}-seed{found.partition.seed}",
        "sae_id_suffix": None if found.artefact.recipe["builder"] == "ensemble" else found.address.name,
    }
    tokens = tokens_of(source).require(store, Partition())
    texts = {
        "n_prompts_total": tokens.provenance["statistics"]["test"]["windows"],
        "n_tokens_in_prompt": metadata["context_size"],
        "dataset": metadata["dataset_path"],
    }
    alive = [row for row in rows.iter_rows(named=True) if row["max_activation"] is not None]
    features = [_feature(row, texts) for row in alive]
    skipped = sorted(set(range(len(rows))) - {row["feature_index"] for row in alive})
    settings = {
        **place,
        **texts,
        "hook_name": metadata["hook_name"],
        "saeens_asset": str(found.address),
        "saeens_data_version": found.artefact.data_version,
    }

    with new_folder(folder) as target:
        for number, start in enumerate(range(0, len(features), BATCH_FEATURES)):
            _write(target / f"batch-{number}.json", {**place, "features": features[start : start + BATCH_FEATURES]})
        of_skipped = {"model_id": place["model_id"], "layer": str(place["layer"]), "sae_set": place["sae_set"], "log_sparsity": None}
        _write(target / "skipped_indexes.json", {**of_skipped, "skipped_indexes": skipped})
        _write(target / "run_settings.json", settings)


def _rows(store: Store, found: Stored) -> pl.DataFrame:
    """Return a row for each feature: the columns of both tables, its number in the dictionary, and its row of the decoder."""
    import saeens_models as sm

    address, (layer, seed) = found.address, found.partition
    if address.kind not in ENSEMBLES:
        raise ConfigurationError(f"{address} has no rows in the tables {' and '.join(_TABLES)}: they have members, rounds and ensembles")
    tables = []
    for name in _TABLES:
        if not has_table(store.root, address.owner, name, layer):
            raise ConfigurationError(
                f"{address.owner} has no table {name} of layer {layer}: add {' and '.join(_TABLES)} to `evaluations`, then "
                f"`saeens run {address.owner}`"
            )
        tables.append(read_table(store.root, address.owner, name, layer).filter(seed=seed, method=address.kind))
    keys = ["member", "index", "sae_data_versions"]
    features, contexts = (table.select([*keys, *(c for c in table.columns if c in _COLUMNS)]) for table in tables)
    rows = features.join(contexts, on=keys, how="inner").sort("member", "index")
    is_whole = found.artefact.recipe["builder"] == "ensemble"
    saes = [*sm.load_ensemble(found.artefact.path)] if is_whole else [sm.load_sae(found.artefact.path)]
    versions = [*found.artefact.recipe["inputs"].values()] if is_whole else [found.artefact.data_version]
    rows = rows.filter(pl.col("sae_data_versions").is_in(versions)) if is_whole else rows.filter(sae_data_versions=versions[0])
    if len(rows) != sum(sae.config.d_sae for sae in saes):
        raise ConfigurationError(f"the tables are not of {found.place}, {found.artefact.data_version}: `saeens run {address.owner}` first")
    decoders = [row for sae in saes for row in sae.W_dec.detach().tolist()]
    return rows.with_row_index("feature_index").with_columns(decoder=pl.Series(decoders, dtype=pl.List(pl.Float64)))


_COLUMNS = ("density", "max_activation", "contexts", "histogram", "bin_width", "promoted_tokens", "suppressed_tokens")


def _feature(row: Mapping[str, Any], texts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a feature in the format of `NeuronpediaDashboardFeature`."""
    decoder, counts = row["decoder"], json.loads(row["histogram"])
    largest = sorted(range(len(decoder)), key=lambda i: -decoder[i])[:ALIGNED_DIMENSIONS]
    norm = sum(map(abs, decoder)) or 1.0
    bars = [((i + 0.5) * row["bin_width"], count) for i, count in enumerate(counts)]
    promoted, suppressed = json.loads(row["promoted_tokens"]), json.loads(row["suppressed_tokens"])
    return {
        "feature_index": row["feature_index"],
        "neuron_alignment_indices": largest,
        "neuron_alignment_values": [round(decoder[i], 5) for i in largest],
        "neuron_alignment_l1": [round(decoder[i] / norm, 5) for i in largest],
        "pos_str": [token for token, _ in promoted],
        "pos_values": [logit for _, logit in promoted],
        "neg_str": [token for token, _ in suppressed],
        "neg_values": [logit for _, logit in suppressed],
        "frac_nonzero": row["density"],
        "freq_hist_data_bar_values": [value for value, _ in bars],
        "freq_hist_data_bar_heights": [count for _, count in bars],
        "activations": list(_activations(row)),
        **texts,
        **{name: [] for name in _NOT_MEASURED},
    }


def _activations(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the contexts in the format of `NeuronpediaDashboardActivation`; dropped tokens have no activation and get 0."""
    for context in json.loads(row["contexts"]):
        yield {
            "bin_min": -1,
            "bin_max": row["max_activation"],
            "bin_contains": -1,
            "tokens": context["tokens"],
            "values": [value or 0.0 for value in context["activations"]],
            "qualifying_token_index": context["centre"],
        }


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
