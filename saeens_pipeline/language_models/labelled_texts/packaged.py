"""Labelled texts of the package sae-probes, which `make probes` installs. Its files are read; the package is not imported."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import metadata
from pathlib import Path

import polars as pl

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.labelled_texts.drawing import Labelled
from saeens_pipeline.settings.labelled_data_sets import SAE_PROBES, SAE_PROBES_CORRELATIONS, TextCount

READER_VERSION = 1  # increased with every change of the drawn texts
COUNT = TextCount(400, 200)
"""Texts of a probe by default. Most data sets of the package have 2,000 to 5,000 texts."""

_PACKAGE, _SUFFIX = "sae-probes", ".csv.zst"
_FOLDER = "cleaned_data"


def packaged_files(name: str) -> list[Path]:
    """Return the files of a data set `sae_probes/NAME`: one, or one for each of two attributes.

    Raises ConfigurationError if the package is not installed, or does not have the data set.
    """
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ConfigurationError(f"{name}: needs the package {_PACKAGE}: install it with `make probes`") from None
    there = {file.name.removesuffix(_SUFFIX): Path(str(file.locate())) for file in files if file.parent.name == _FOLDER}
    task = SAE_PROBES_CORRELATIONS.get(name)
    wanted = [task.target, task.spurious] if task else [name.removeprefix(SAE_PROBES)]
    for each in wanted:
        if each not in there:
            similar = get_close_matches(each, there, n=6, cutoff=0.4) or sorted(there)[:6]
            raise ConfigurationError(
                f"{name}: {_PACKAGE} has no data set {each!r}; of its {len(there)}, similar names are {', '.join(similar)}"
            )
    return [there[each] for each in wanted]


def packaged_texts(name: str) -> Labelled:
    """Return the texts of a data set: of two attributes, the texts that both files have, without those that a file labels in two ways.

    Raises as `packaged_files`.
    """
    read = [_read(file) for file in packaged_files(name)]
    frames = [each.drop_nulls() for each in read]
    n_incomplete = sum(map(len, read)) - sum(map(len, frames))
    if name not in SAE_PROBES_CORRELATIONS:
        return Labelled(name, frames[0], n_incomplete=n_incomplete)
    target, spurious = (each.unique().filter(pl.len().over("text") == 1) for each in frames)
    task = SAE_PROBES_CORRELATIONS[name]
    both = target.join(spurious.rename({"label": "other"}), on="text")
    return Labelled(name, both, pairs={name: (task.target_values, task.spurious_values)}, n_incomplete=n_incomplete)


def _read(file: Path) -> pl.DataFrame:
    columns = pl.col("prompt").alias("text"), pl.col("target").alias("label")
    return pl.read_csv(file, infer_schema=False).select(columns)
