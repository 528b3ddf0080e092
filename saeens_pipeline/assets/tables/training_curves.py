"""The table `training_curves`: loss and sparsity of every SAE during training."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from saeens_pipeline.assets.registry import Making, Row, Table, register
from saeens_pipeline.assets.tables.reconstruction import EVALUATION
from saeens_pipeline.storage.names import CURVE_FILE
from saeens_pipeline.storage.tables import Column


def _rows(making: Making) -> Iterator[Row]:
    for method, n, dictionary in making.subject.whole:
        for member, sae in enumerate(making.members(dictionary), start=1):
            if not (sae.path / CURVE_FILE).exists():  # published
                continue
            row = making.row(method, n, [sae]) | {"member": member}
            yield from (row | point for point in pl.read_parquet(sae.path / CURVE_FILE, glob=False).iter_rows(named=True))


register(
    Table(
        name="training_curves",
        question="How did loss and sparsity change in training?",
        columns=(
            Column("member", "int", "member or round, from 1"),
            Column("step", "int", "optimiser step"),
            Column("tokens", "int", "tokens seen"),
            Column("loss", "float", "training objective, mean over the batch"),
            Column("explained_variance", "float", "on the training batch"),
            Column("l0", "float", "features that fire per token of the batch"),
            Column("dead_features", "float", "share of features silent for more than dead_after_tokens"),
            Column("learning_rate", "float", "of this step"),
        ),
        rows=_rows,
        order=120,
        by_default=True,
        complaint=lambda experiment: "" if experiment.saes else "nothing is trained, so there are no training_curves: leave it out",
        shared_pass=EVALUATION,
        sae_part="training_curve",
    )
)
