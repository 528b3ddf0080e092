"""Rows of the table `features`: activity, nearest features and top tokens of each feature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from saeens_models.ensembles import Ensemble
from saeens_models.evaluation import feature_activity
from saeens_models.metrics import MemberMatches, matches_in_other_members, nearest_in_other_runs
from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.measurements.dictionaries import load_dictionary, pass_over
from saeens_pipeline.assets.measurements.token_strings import TokenStrings
from saeens_pipeline.assets.readers import open_reader
from saeens_pipeline.assets.registry import Making, columns_frame

TOP_TOKENS = 10  # of each feature


def feature_rows(making: Making) -> pl.DataFrame:
    """Return the rows of all features of a layer under all seeds.

    Memory, for any number of test tokens: one method's dictionaries of all seeds, twice; 136 bytes for each feature of one of them,
    12 more for each member of all seeds that it is compared with; and the rows, of about 300 bytes per feature
    and seed, with 20 more for each other member.
    """
    tokens = TokenStrings(making)
    return pl.concat([_rows(making, tokens, whole) for whole in making.subject.whole])


def _rows(making: Making, tokens: TokenStrings, whole: tuple[str, int, Declaration]) -> pl.DataFrame:
    """Return the rows of all features of one dictionary, given as (method, n_members, declaration), for all seeds."""
    parts: list[pl.DataFrame] = []
    dictionaries: list[list[Tensor]] = []
    for of_seed in making.of_seeds:
        ensemble = load_dictionary(of_seed, whole[2])
        parts += _rows_of_seed(of_seed, tokens, whole, ensemble)
        dictionaries.append([sae.W_dec.detach() for sae in ensemble])
    rows = pl.concat(parts)
    if len(dictionaries) == 1:
        return rows
    run, member, row, cosine = (
        np.concatenate([column.cpu().numpy() for column in of_runs]) for of_runs in zip(*nearest_in_other_runs(dictionaries), strict=True)
    )
    return rows.with_columns(
        nearest_other_seed_cosine=cosine.astype(float),
        nearest_other_seed=np.array(making.experiment.ensemble.seeds)[run],
        nearest_other_seed_member=member + 1,
        nearest_other_seed_index=row,
    )


def _rows_of_seed(making: Making, tokens: TokenStrings, whole: tuple[str, int, Declaration], ensemble: Ensemble) -> Iterator[pl.DataFrame]:
    """Yield the rows member by member, without the comparison with other seeds."""
    method, n_members, dictionary = whole
    matches = matches_in_other_members([sae.W_dec for sae in ensemble]) if len(ensemble) > 1 else [None]
    reader = open_reader(making.store, making.subject.activations, making.partition)
    with pass_over(making, reader, f"/features of {method if len(ensemble) > 1 else dictionary.address.name}") as chunks:
        activities = feature_activity(ensemble, chunks, TOP_TOKENS)
    for number, (sae, activity, of_member) in enumerate(zip(making.members(dictionary), activities, matches, strict=True), start=1):
        near = None if of_member is None else of_member.nearest()
        columns: dict[str, Any] = {
            "index": range(len(activity.density)),
            "density": activity.density.cpu().numpy(),
            "mean_activation": pl.Series(activity.mean_activation.cpu().numpy()).fill_nan(None),
            "nearest_member": None if near is None else near.member.cpu().numpy() + 1,
            "nearest_cosine": None if near is None else near.cosine.cpu().numpy(),
            "matches": None if of_member is None else _match_lists(of_member),
            "top_tokens": tokens.lists(activity.top_tokens),
        }
        yield columns_frame("features", making.row(method, n_members, [sae]) | {"member": number}, columns)


def _match_lists(matches: MemberMatches) -> list[str]:
    """Return for each feature a JSON list of [member, index, cosine], with members from 1."""
    others = [j for j, rows in enumerate(matches.row.tolist()) if rows[0] >= 0]
    rows = zip(matches.row[others].T.tolist(), matches.cosine[others].T.tolist(), strict=True)
    return [
        f"[{', '.join(f'[{j + 1}, {index}, {cosine:.4f}]' for j, index, cosine in zip(others, indices, cosines, strict=True))}]"
        for indices, cosines in rows
    ]
