"""Synthetic activations in place of those of a language model: their description, and the writing of their rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.settings.sources import SYNTHETIC, SourceSettings, SyntheticSettings

if TYPE_CHECKING:
    from saeens_pipeline.storage.activations import ActivationStatistics

FEATURES_FILE = "features.safetensors"
_BATCH_DOCUMENTS = 32


def describe_synthetic(synthetic: SyntheticSettings) -> LanguageModelDescription:
    """Return a description with the width of the activations: one layer, no tokens, no language-modelling head."""
    return LanguageModelDescription(
        name=SYNTHETIC,
        revision="main",
        path=Path(),
        model_type="synthetic",
        d_model=synthetic.d_in,
        n_layers=1,
        context_length=None,
        vocab_size=1,
        end_of_text=None,
        parallel_residual=False,
        identity={"name": SYNTHETIC, "revision": "main"},
        has_head=False,
    )


def write_synthetic_activations(
    folder: Path, settings: SourceSettings, report: Callable[[int, int], None] = lambda rows, total_rows: None
) -> dict[str, ActivationStatistics]:
    """Write the rows of a synthetic source and its true features; return statistics by split.

    A document is a block of `context_length` rows with random numbers of its own. A killed call with the same settings is resumed after its
    complete shards. Memory: 32 documents. Raises as `cache_activations`.
    """
    import torch
    from safetensors.torch import save_file

    from saeens_models.synthetic import SyntheticActivations
    from saeens_pipeline.storage.activation_writer import ActivationWriter

    assert settings.synthetic is not None
    synthetic, length = SyntheticActivations(**settings.synthetic.model_dump()), settings.context_length
    n_rows, done = {"train": settings.train_tokens, "test": settings.test_tokens}, 0
    width, max_norm = synthetic.d_in, settings.max_norm
    with ActivationWriter(folder, width, settings.dtype, n_rows, name=settings.name, max_norm=max_norm, resume=True) as writer:
        for i, (split, n_of_split) in enumerate(n_rows.items()):
            for first in range(0, n_of_split, _BATCH_DOCUMENTS * length):
                index = torch.arange(first, min(first + _BATCH_DOCUMENTS * length, n_of_split), dtype=torch.int32)
                new = slice(max(writer.resumed_rows[split] - first, 0), None)
                if len(index[new]):
                    documents = range(first // length, int(index[-1]) // length + 1)
                    rows = torch.cat([synthetic.rows(length, i, each, dense=settings.weights == "random") for each in documents])
                    writer.append(split, rows[: len(index)][new], index[new] // length, index[new] % length)
                done += len(index)
                report(done, sum(n_rows.values()))
    save_file({"W_dec": synthetic.features, "firing_rate": torch.from_numpy(synthetic.firing_rate)}, folder / FEATURES_FILE)
    return writer.statistics
