"""Rows of the tables `stability` and `feature_stability`: dictionaries of one layer compared between seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, permutations
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from saeens_models.ensembles import Ensemble
from saeens_models.evaluation import functional_stability
from saeens_models.metrics import (
    MAX_MATCHED_FEATURES,
    Matching,
    chance_levels,
    feature_stability,
    isotropic_rows,
    match_features,
    rows_of_disjoint_documents,
    rows_with_covariance,
    shared_fraction,
    stability_equal_candidates,
    stability_matched,
    stability_of_prefixes,
)
from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.measurements.dictionaries import load_dictionary, pass_over
from saeens_pipeline.assets.readers import open_activations
from saeens_pipeline.assets.registry import Making, Row, columns_frame
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.activations import ActivationStore

MATCHED_UP_TO = 2048
"""Features for `stability_matched`, whose time grows with their cube."""
PAIRED_UP_TO = 32_768
"""Features for `pw_mcc` and what follows from its matching, whose time grows with their square."""
FUNCTIONAL_TOKENS = 10_000
"""Test tokens for `functional_stability`."""
CHANCE_KINDS = ("isotropic", "covariance", "data")
_CHANCE_ROWS, _CHANCE_CHUNKS = 20_000, 64  # of the sample of training activations, at least

_Values = dict[str, list[float | None]]
"""For each column, its value for each run."""


def stability_rows(making: Making) -> Iterator[Row]:
    """Yield the rows of all seeds of a layer.

    Memory: one method's dictionaries of all seeds, twice; one float32 number per feature and member of another seed; 64 MiB of cosines; and
    a sample of training activations, twice as many rows as the dictionaries of all seeds.
    """
    runs = making.of_seeds
    measured: dict[str, list[_Values]] = {}
    if len(runs) == 1:
        making.provenance["not_measured"] = {"all": "stability compares seeds, and there is one"}
    else:
        suite = _Suite(making)
        measured = {str(each.address): suite.sizes(each) for each in making.subject.dictionaries}
        suite.add_chance(sizes for of_dictionary in measured.values() for sizes in of_dictionary)
        making.provenance.update(candidates=suite.n_candidates, functional_tokens=suite.functional_tokens)
        making.provenance["not_measured"] = suite.not_measured
        if fixed := _fixed_members(making.experiment):
            members = f"member {', '.join(map(str, fixed))}"
            suite.not_measured["stability"] = f"not of dictionaries with {members}: the same published SAE under every seed"
    for of_runs in zip(*(run.methods() for run in runs), strict=True):
        for i, (run, (method, n, dictionary, saes)) in enumerate(zip(runs, of_runs, strict=True)):
            sizes = measured.get(str(dictionary.address))
            values = {name: of_run[i] for name, of_run in sizes[len(saes) - 1].items()} if sizes else {}
            if _is_fixed(making.experiment, method, len(saes)):
                values = {name: value for name, value in values.items() if name == "n_features" or "_chance_" in name}
            elif 1 in _fixed_members(making.experiment):
                values.pop("stability_reference", None)
            yield run.row(method, n, saes) | {"n_runs": len(runs)} | values


def feature_stability_rows(making: Making) -> pl.DataFrame:
    """Return a row for each feature of every whole dictionary under each seed."""
    parts = []
    for method, n, dictionary in (("single", 1, making.subject.bagging), *making.subject.whole):
        runs = making.of_seeds
        ensembles = [load_dictionary(run, dictionary)[:1] if method == "single" else load_dictionary(run, dictionary) for run in runs]
        found = feature_stability([each.W_dec.detach() for each in ensembles]) if len(runs) > 1 else [None] * len(runs)
        for run, ensemble, of_run in zip(runs, ensembles, found, strict=True):
            widths = [sae.config.d_sae for sae in ensemble]
            columns: dict[str, Any] = {
                "member": np.repeat(np.arange(1, len(widths) + 1), widths),
                "index": np.concatenate([np.arange(width) for width in widths]),
            }
            if of_run and not _is_fixed(making.experiment, method, len(widths)):
                columns |= {"n_found": of_run.n_found.cpu().numpy(), "best_cosine": of_run.best_cosine.cpu().numpy()}
            row = run.row(method, n, run.members(dictionary)[: len(widths)]) | {"n_runs": len(runs)}
            parts.append(columns_frame("feature_stability", row, columns))
    return pl.concat(parts)


def _fixed_members(experiment: ExperimentSettings) -> list[int]:
    """Return the numbers of the published members that are the same SAE under every seed."""
    return [each.member for each in experiment.ensemble.published if not each.depends_on("seed")]


def _is_fixed(experiment: ExperimentSettings, method: str, n: int) -> bool:
    """Return whether one of a dictionary's n SAEs, or of the members that it is made of, is the same under every seed."""
    fixed = _fixed_members(experiment)
    if method == "boosting":
        return 1 in fixed
    return any(member <= n for member in fixed) if method in ("single", "bagging") else bool(fixed)


class _Suite:
    """The measurements of all dictionaries of a layer; reference and chance levels are shared by methods of equal width."""

    def __init__(self, making: Making) -> None:
        self.making, self.runs = making, making.of_seeds
        self.functional_tokens = 0
        self.not_measured: dict[str, str] = {}
        """Reasons by column."""
        bags = self._load(making.subject.bagging)
        self.n_candidates = bags[0][0].config.d_sae
        self._of_bagging = self._prefixes(bags)
        self._references = dict(zip(bags[0].offsets[1:], (size.reference for size in self._of_bagging), strict=True))

    def sizes(self, dictionary: Declaration) -> list[_Values]:
        """Return the measurements of the first n SAEs of each run, for n = 1 .. J."""
        runs = self._load(dictionary)
        matchings = self._matchings(runs)
        functional = self._functional(runs, matchings, dictionary)
        sizes: list[_Values] = []
        is_bagging = dictionary.address == self.making.subject.bagging.address
        for n, size in enumerate(self._of_bagging if is_bagging else self._prefixes(runs), start=1):
            W_decs = [run[:n].W_dec.detach() for run in runs]
            widths = [len(W_dec) for W_dec in W_decs]
            directed = {(a, b): size.pairs[a][b] for a, b in permutations(range(len(runs)), 2)}
            values: _Values = {
                "n_features": [*widths],
                "stability": [*size.stability],
                "stability_pairwise": [*size.pairwise],
                "stability_pairwise_left_out": self._without_each(directed),
                "stability_reference": [*self._references.get(widths[0], [None] * len(runs))],
            }
            if len(runs[0]) > 1:
                values["stability_of_member"] = [*size.of_last_member]
            if len(set(widths)) == 1 and widths[0] <= min(MATCHED_UP_TO, MAX_MATCHED_FEATURES):
                values["stability_matched"] = [*stability_matched(W_decs)]
            if min(widths) >= self.n_candidates:
                values["stability_equal_candidates"] = [*stability_equal_candidates(W_decs, self.n_candidates)]
            of_pairs = {pair: of_sizes[n - 1] for pair, of_sizes in matchings.items() if n <= len(of_sizes)}
            if of_pairs:
                coefficients = {pair: each.mean_cosine for pair, each in of_pairs.items()}
                values["pw_mcc"], values["pw_mcc_left_out"] = self._over_pairs({**coefficients}), self._without_each(coefficients)
                values["pw_mcc_bound"] = self._over_pairs({pair: each.bound for pair, each in of_pairs.items()})
                values["functional_stability"] = self._over_pairs({pair: of_sizes[n - 1] for pair, of_sizes in functional.items()})
                if all("W_enc" in sae.shared_weights for run in runs for sae in run):
                    W_encs = [torch.cat([sae.W_enc.detach() for sae in run[:n]], 1) for run in runs]
                    shared = {(a, b): shared_fraction(each, W_encs[a], W_encs[b]) for (a, b), each in of_pairs.items()}
                    values["shared_fraction"] = self._over_pairs({**shared})
            sizes.append(values)
        return sizes

    def add_chance(self, measured: Iterable[_Values]) -> None:
        """Add the chance levels of dictionaries as wide as those of the measurements, of which `n_features` has the widths."""
        measured = list(measured)
        sample = self._training_rows(max(int(width or 0) for values in measured for width in values["n_features"]))
        levels: dict[tuple[int, ...], dict[str, float]] = {}
        for values in measured:
            widths = tuple(int(width or 0) for width in values["n_features"])
            if widths not in levels:
                levels[widths] = self._chance_of(widths, *sample)
            values.update((name, [value] * len(self.runs)) for name, value in levels[widths].items())

    def _load(self, dictionary: Declaration) -> list[Ensemble]:
        return [load_dictionary(run, dictionary) for run in self.runs]

    def _prefixes(self, runs: Sequence[Ensemble]) -> Any:
        return stability_of_prefixes([[sae.W_dec.detach() for sae in run] for run in runs])

    def _without_each(self, of_pairs: Mapping[tuple[int, int], float]) -> list[float | None]:
        """Return, for each run, the mean over the pairs that it is not in; None without such a pair."""
        return [fmean(left) if (left := [value for pair, value in of_pairs.items() if run not in pair]) else None
                for run in range(len(self.runs))]  # fmt: skip

    def _over_pairs(self, of_pairs: Mapping[tuple[int, int], float | None]) -> list[float | None]:
        """Return, for each run, the mean over the pairs that it is in; None without a value."""
        return [fmean(found) if (found := [value for pair, value in of_pairs.items() if run in pair and value is not None]) else None
                for run in range(len(self.runs))]  # fmt: skip

    def _matchings(self, runs: Sequence[Ensemble]) -> dict[tuple[int, int], list[Matching]]:
        """Return for each pair of runs the matchings of their first n members, up to the n whose dictionary is too large."""
        sizes = [n for n in range(1, len(runs[0]) + 1) if max(run.offsets[n] for run in runs) <= PAIRED_UP_TO]
        if len(sizes) < len(runs[0]):
            self.not_measured["pw_mcc, shared_fraction, functional_stability"] = f"of more than {PAIRED_UP_TO:,} features"
        if not sizes:
            return {}
        return {
            (a, b): [match_features(runs[a][:n].W_dec.detach(), runs[b][:n].W_dec.detach()) for n in sizes]
            for a, b in combinations(range(len(runs)), 2)
        }

    def _functional(
        self, runs: Sequence[Ensemble], matchings: Mapping[tuple[int, int], Sequence[Matching]], dictionary: Declaration
    ) -> dict[tuple[int, int], list[float | None]]:
        if not matchings:
            return {}
        reader = ActivationStore(self.making.require(self.making.subject.activations).path)
        every = -(-reader.n_rows("test") // FUNCTIONAL_TOKENS)  # rows evenly spread over all documents
        counted = 0

        def rows(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
            nonlocal counted
            for chunk in chunks:
                counted += len(chunk[::every])
                yield chunk[::every]

        with pass_over(self.making, reader, f"/stability of {dictionary.address.name}") as chunks:
            found = functional_stability(runs, rows(chunks), matchings)
        self.functional_tokens = counted
        return found

    def _chance_of(self, widths: tuple[int, ...], x: Tensor, documents: Tensor) -> dict[str, float]:
        """Return the chance levels of dictionaries of these widths, one per run, by column; from training activations."""
        found: dict[str, float] = {}
        for kind in CHANCE_KINDS:
            try:
                levels = chance_levels(self._drawn(kind, widths, x, documents), match_up_to=PAIRED_UP_TO)
            except ValueError as error:
                self.not_measured[f"chance_{kind} of {widths[0]} features"] = str(error)
                continue
            values = {"stability": levels.stability, "pw_mcc": levels.pw_mcc, "shared_fraction": levels.shared_fraction}
            found |= {f"{name}_chance_{kind}": value for name, value in values.items() if not math.isnan(value)}
        return found

    def _drawn(self, kind: str, widths: Sequence[int], x: Tensor, documents: Tensor) -> Callable[[], list[Tensor]]:
        """Return a function that draws dictionaries of these widths, the same ones in every computation."""
        generator, device = torch.Generator().manual_seed(len(widths) * 1_000_003 + widths[0]), self.making.device
        if kind == "data":
            widest = max(widths)

            def pick() -> list[Tensor]:
                runs = rows_of_disjoint_documents(documents, len(widths), widest, generator)
                return [x[rows[:width]].to(device) for rows, width in zip(runs, widths, strict=True)]

            return pick
        one = partial(isotropic_rows, d_in=x.shape[1]) if kind == "isotropic" else partial(rows_with_covariance, covariance=torch.cov(x.T))
        return lambda: [one(width, generator=generator).to(device) for width in widths]

    def _training_rows(self, widest: int) -> tuple[Tensor, Tensor]:
        """Return a sample of training activations, centred on the mean of all, float32 `[n, d_in]`, and their documents.

        The sample is large enough for dictionaries of `widest` features in every run.
        """
        making = self.making
        reader = open_activations(making.store, making.subject.activations, making.partition, making.device)
        n_rows = max(_CHANCE_ROWS, 2 * len(self.runs) * widest)
        n_chunks = min(reader.n_chunks("train"), max(_CHANCE_CHUNKS, -(-n_rows // reader.chunk_rows)))
        generator = np.random.default_rng(0)
        chunks = np.sort(generator.permutation(reader.n_chunks("train"))[:n_chunks]).tolist()
        rows, documents = [], []
        for index in chunks:
            chunk = reader.read_chunk("train", index)
            taken = np.sort(generator.permutation(len(chunk))[: -(-n_rows // n_chunks)])
            rows.append(chunk[torch.from_numpy(taken)].float())
            documents.append(reader.document_chunk("train", index)[taken])
        mean = torch.from_numpy(reader.statistics("train").mean).float()
        return torch.cat(rows) - mean, torch.from_numpy(np.concatenate(documents)).long()
