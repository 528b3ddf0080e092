"""From tokens to stored activations: one forward pass for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from saeens_pipeline.language_models.tokens import SPLITS
from saeens_pipeline.storage.activations import ActivationStatistics, ActivationWriter, StoredDtype, require_free_disk, stored_bytes

if TYPE_CHECKING:
    from saeens_pipeline.language_models.models import LanguageModel
    from saeens_pipeline.language_models.tokens import TokenStore


def cache_activations(
    model: LanguageModel,
    tokens: TokenStore,
    hook: str,
    outputs: Mapping[int, Path],
    dtype: StoredDtype,
    *,
    batch_windows: int = 32,
    report: Callable[[int, int], None] = lambda rows, total_rows: None,
) -> dict[int, dict[str, ActivationStatistics]]:
    """Write the activations of every kept position at `hook` of each layer to `outputs[layer]`; returns statistics by layer and split.

    Rows have the order of `tokens`. Both splits go through the model once, whatever the number of layers. `report` is given the
    rows done and to be done, per layer. Memory, whatever the token count: one batch of `batch_windows` windows in the model and,
    for each layer, two shards (up to 32 MiB each).
    Raises SaeensError where the disk is too small for all layers together (before anything is written) and for values that are
    not finite or too large for `dtype`, with the layer and the largest value; ConfigurationError for a hook or layer the model lacks.
    """
    rows = {split: tokens.n_rows(split) for split in SPLITS}
    widths = model.widths(hook, list(outputs))
    needed = sum(stored_bytes(width, dtype, rows) for width in widths.values())
    require_free_disk(next(iter(outputs.values())), needed, f"caching {hook} of layers {', '.join(map(str, outputs))}")
    done = 0
    with ExitStack() as stack:
        writers = {
            layer: stack.enter_context(ActivationWriter(path, widths[layer], dtype, rows, name=f"{hook} of layer {layer}"))
            for layer, path in outputs.items()
        }
        for split in SPLITS:
            for batch in tokens.batches(split, batch_windows):
                document, position = batch.document[batch.kept], batch.position[batch.kept]
                for layer, activations in model.activations(batch.tokens, hook, list(outputs)).items():
                    writers[layer].append(split, activations[batch.kept.to(activations.device)], document, position)
                done += len(document)
                report(done, sum(rows.values()))
    return {layer: writer.statistics for layer, writer in writers.items()}
