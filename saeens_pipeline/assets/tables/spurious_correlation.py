"""The table `spurious_correlation`: probes without a spurious attribute's features."""

from __future__ import annotations

from saeens_pipeline.assets.registry import Curve, register
from saeens_pipeline.assets.tables.concept_detection import probe_table
from saeens_pipeline.storage.tables import Column

register(
    probe_table(
        "spurious_correlation",
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
        curve=Curve(
            "Removal of spurious correlations",
            "Share of a biased probe's lost accuracy that comes back when n features are zeroed (SCR), mean over tasks. 0: nothing.",
            *("features zeroed", "scr"),
            *("n_ablated", "scr_metric", "task"),
        ),
    )
)
