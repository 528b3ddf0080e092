"""Rows of the table `features`: activity, nearest features and top tokens of each feature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from torch import Tensor

from saeens_models.ensembles import Ensemble
from saeens_models.evaluation import feature_activity
from saeens_models.metrics import FeatureActivity, MemberMatches, matches_in_other_members, nearest_in_other_runs
from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.measurements.dictionaries import load_dictionary
from saeens_pipeline.assets.measurements.token_strings import TokenStrings
from saeens_pipeline.assets.registry import Making, table_frame
from saeens_pipeline.assets.residuals import open_reader
from saeens_pipeline.storage.names import Partition

TOP_TOKENS = 10  # of each feature


def feature_rows(making: Making) -> pl.DataFrame:
    """Return the rows of all features of a layer under all seeds.

    Memory, for any number of test tokens: one method's dictionaries of all seeds, twice; 136 bytes for each feature of one of them,
    12 more for each member of all seeds that it is compared with; and the rows, of about 300 bytes per feature
    and seed, with 20 more for each other member.
    """
    features = _Features(making, TokenStrings(making.store, making.subject.tokens))
    return pl.concat([features.rows(*whole) for whole in making.subject.whole])


class _Method(NamedTuple):
    """A method of the table, and its dictionary."""

    name: str
    n_members: int
    dictionary: Declaration


@dataclass(frozen=True)
class _Features:
    """The computation of the rows of one layer."""

    making: Making
    tokens: TokenStrings

    def rows(self, method: str, n_members: int, dictionary: Declaration) -> pl.DataFrame:
        """Return the features of one method under all seeds."""
        seeds = self.making.subject.experiment.ensemble.seeds
        parts: list[pl.DataFrame] = []
        dictionaries: list[list[Tensor]] = []
        for where in (Partition(self.making.partition.layer, seed) for seed in seeds):
            ensemble = load_dictionary(self.making.context, dictionary, where)
            parts += self._rows_of_seed(where, _Method(method, n_members, dictionary), ensemble)
            dictionaries.append([sae.W_dec.detach() for sae in ensemble])
        rows = pl.concat(parts)
        if len(dictionaries) == 1:
            return rows
        run, member, row, cosine = (
            np.concatenate([column.cpu().numpy() for column in of_runs])
            for of_runs in zip(*nearest_in_other_runs(dictionaries), strict=True)
        )
        return rows.with_columns(
            nearest_other_seed_cosine=cosine.astype(float),
            nearest_other_seed=np.array(seeds)[run],
            nearest_other_seed_member=member + 1,
            nearest_other_seed_index=row,
        )

    def _rows_of_seed(self, partition: Partition, method: _Method, ensemble: Ensemble) -> Iterator[pl.DataFrame]:
        """Give the rows member by member, without the comparison with other seeds."""
        store, dictionary = self.making.store, method.dictionary
        is_ensemble = dictionary.builder == "ensemble"
        saes = self.making.subject.members(store, dictionary, partition) if is_ensemble else [store.require(dictionary.address, partition)]
        matches = matches_in_other_members([sae.W_dec for sae in ensemble]) if len(ensemble) > 1 else [None]
        empty = table_frame("features", [])
        for number, (sae, activity, of_member) in enumerate(
            zip(saes, self._activity(partition, method, ensemble), matches, strict=True), start=1
        ):
            near = None if of_member is None else of_member.nearest()
            columns: dict[str, Any] = {
                "index": range(len(activity.density)),
                "density": activity.density.cpu().numpy(),
                "mean_activation": activity.mean_activation.cpu().numpy(),
                "nearest_member": None if near is None else near.member.cpu().numpy() + 1,
                "nearest_cosine": None if near is None else near.cosine.cpu().numpy(),
                "matches": None if of_member is None else _match_lists(of_member),
                "top_tokens": self.tokens.lists(activity.top_tokens),
            }
            same = self.making.subject.row(store, partition, method.name, method.n_members, [sae.data_version]) | {"member": number}
            rows = pl.DataFrame(columns).with_columns(pl.lit(value).alias(column) for column, value in same.items())
            rows = rows.with_columns(pl.col("mean_activation").fill_nan(None))
            rows = pl.concat([empty, rows], how="diagonal_relaxed")  # what is compared between seeds is null so far
            yield rows.select(empty.columns).cast(empty.schema)  # pyright: ignore[reportArgumentType]  # a schema is what cast takes

    def _activity(self, partition: Partition, method: _Method, ensemble: Ensemble) -> list[FeatureActivity]:
        """Return the activity of every member, from one pass over the test activations."""
        reader, device = open_reader(self.making.store, self.making.subject.activations, partition), ensemble[0].W_dec.device
        of = method.name if len(ensemble) > 1 else method.dictionary.address.name
        label = f"{self.making.subject.experiment.name}/eval/features of {of}, {partition}"
        with progress.task(label, reader.n_rows("test")) as advance:

            def chunks() -> Iterator[Tensor]:
                for chunk in reader.chunks("test"):
                    yield chunk.to(device)
                    advance(len(chunk))

            return feature_activity(ensemble, chunks(), TOP_TOKENS)


def _match_lists(matches: MemberMatches) -> list[str]:
    """Return for each feature a JSON list of [member, index, cosine], with members from 1."""
    others = [j for j, rows in enumerate(matches.row.tolist()) if rows[0] >= 0]
    rows = zip(matches.row[others].T.tolist(), matches.cosine[others].T.tolist(), strict=True)
    return [
        f"[{', '.join(f'[{j + 1}, {index}, {cosine:.4f}]' for j, index, cosine in zip(others, indices, cosines, strict=True))}]"
        for indices, cosines in rows
    ]
