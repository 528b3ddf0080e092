"""The table `stability`: similarity of features under different seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from saeens_pipeline.assets.registry import Headline, Making, Row, Table, register
from saeens_pipeline.storage.recipes import Artefact
from saeens_pipeline.storage.tables import Column

MATCHED_UP_TO = 2048  # features; the time of the one-to-one matching grows with their cube


def _rows(making: Making) -> Iterator[Row]:
    runs = making.of_seeds
    sizes = {each.address: _stability_of_sizes([run.members(each) for run in runs], making.device) for each in making.subject.dictionaries}
    for of_runs in zip(*(run.methods() for run in runs), strict=True):
        for i, (run, (method, n, dictionary, saes)) in enumerate(zip(runs, of_runs, strict=True)):
            values = {name: value[i] for name, value in sizes[dictionary.address][len(saes) - 1].items()}
            yield run.row(method, n, saes) | {"n_runs": len(runs)} | values


def _stability_of_sizes(runs: Sequence[Sequence[Artefact]], device: str) -> list[dict[str, Sequence[float | None]]]:
    """Return the stability of the first n SAEs of each run, for n = 1 .. J: a list over runs for each column."""
    import torch

    import saeens_models as sm

    nothing: list[float | None] = [None] * len(runs)
    if len(runs) == 1:
        return [dict.fromkeys(("stability", "stability_pairwise", "stability_matched"), nothing)] * len(runs[0])
    dictionaries = [[sm.load_sae(sae.path).W_dec.detach().to(device) for sae in saes] for saes in runs]

    def matched(n: int) -> Sequence[float | None]:
        of_runs = [torch.cat(members[:n]) for members in dictionaries]
        return sm.metrics.stability_matched(of_runs) if len(of_runs[0]) <= MATCHED_UP_TO else nothing

    return [
        {"stability": size.stability, "stability_pairwise": size.pairwise, "stability_matched": matched(n)}
        for n, size in enumerate(sm.metrics.stability_of_prefixes(dictionaries), start=1)
    ]


_HEADLINES = (
    Headline(
        "stability", "stability", ".4f", place=6, leaderboard=6, of_control=True, better="more",
        about="do the same features come back under another seed? Mean over features of the largest cosine to a feature of any other run. "
        "1: every feature comes back",
    ),
)  # fmt: skip


register(
    Table(
        name="stability",
        question="Do the same features come back under another seed?",
        columns=(
            Column("n_runs", "int", "seeds compared; stability grows with it"),
            Column("stability", "float", "mean over features of the largest cosine to any feature of any other seed"),
            Column("stability_pairwise", "float", "the same with each other seed alone, averaged"),
            Column("stability_matched", "float", "mean cosine of the one-to-one matching; null above 2048 features"),
        ),
        rows=_rows,
        dimensions="layer",
        order=40,
        by_default=True,
        headlines=_HEADLINES,
        seed_metrics=("stability", "stability_pairwise", "stability_matched"),
    )
)
