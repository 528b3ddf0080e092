"""The table `spurious_correlation`: probes without a spurious attribute's features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from saeens_pipeline.assets.registry import register
from saeens_pipeline.assets.tables.concept_detection import by_number_of_features, probe_table
from saeens_pipeline.storage.recipes import Artefact
from saeens_pipeline.storage.tables import Column


def _summary(table: pl.DataFrame, artefact: Artefact) -> Mapping[str, Any]:
    return {"summary": by_number_of_features(table, "n_ablated", "scr_metric", "task")}


register(
    probe_table(
        "spurious_correlation",
        _summary,
        question="Does removing a few features make a biased probe fair?",
        columns=(
            Column("task", "str", "data set, the attribute that counts, and the spurious one that coincides with it in training"),
            Column("n_ablated", "int", "features that are zeroed; of n members also n times as many; 0 is the biased probe as it is"),
            Column("accuracy_biased", "float", "of the biased probe on balanced test texts"),
            Column("accuracy_clean", "float", "of a probe trained on balanced texts"),
            Column("accuracy_ablated", "float", "of the biased probe with these features zeroed"),
            Column("worst_group_accuracy", "float", "the same in the worst of the four groups of texts"),
            Column("scr", "float", "(ablated - biased) / (clean - biased); 0 where the denominator is below 0.001"),
            Column("scr_metric", "float", "scr in the direction in which the biased probe is less accurate; null in the other"),
        ),
        order=110,
    )
)
