"""Caching of activations: one forward pass over the tokens for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.tokens import SPLITS, TokenStore
from saeens_pipeline.storage.activation_writer import ActivationWriter, stored_bytes
from saeens_pipeline.storage.activations import ActivationStatistics, StoredDtype
from saeens_pipeline.storage.disk import require_free_disk


def cache_activations(
    model: LanguageModel,
    tokens: TokenStore,
    hook: str,
    outputs: Mapping[int, Path],
    dtype: StoredDtype,
    *,
    max_norm: float | None = None,
    batch_windows: int = 32,
    report: Callable[[int, int], None] = lambda rows, total_rows: None,
) -> dict[int, dict[str, ActivationStatistics]]:
    """Write the activations of every kept position at `hook` of each layer to `outputs[layer]`; return statistics by layer and split.

    Rows have the order of `tokens`. `max_norm` drops rows, as ActivationWriter says; the median is that of the first batch. Both splits
    pass through the model once for all layers. `report` gets the numbers of finished and of all rows of one layer. A killed call with the
    same arguments is resumed: its complete shards are kept, and the model continues with the batch of windows that holds the first missing
    row. Memory: one batch of `batch_windows` windows in the model and, for each layer, two shards (up to 32 MiB each), for any number of
    tokens.
    Raises SaeensError if the disk is too small for all layers (before anything is written), and for values that are not finite or too
    large for `dtype`, with the layer and the largest value; ConfigurationError for a hook or layer that the model does not have.
    """
    rows = {split: tokens.n_rows(split) for split in SPLITS}
    widths = model.widths(hook, list(outputs))
    there = sum(file.stat().st_size for path in outputs.values() for file in path.rglob("*") if file.is_file())
    needed = sum(stored_bytes(width, dtype, rows) for width in widths.values()) - there
    require_free_disk(next(iter(outputs.values())), needed, f"caching {hook} of layers {', '.join(map(str, outputs))}")
    done = 0
    with ExitStack() as stack:
        writers = {
            layer: stack.enter_context(
                ActivationWriter(path, widths[layer], dtype, rows, name=f"{hook} of layer {layer}", max_norm=max_norm, resume=True)
            )
            for layer, path in outputs.items()
        }
        for split in SPLITS:
            first = 0  # row of the split at which the batch starts
            for batch in tokens.batches(split, batch_windows):
                document, position = batch.document[batch.kept], batch.position[batch.kept]
                resumed = {layer: max(writer.resumed_rows[split] - first, 0) for layer, writer in writers.items()}
                wanted = [layer for layer, n_resumed in resumed.items() if n_resumed < len(document)]
                activations = model.activations(batch.tokens, hook, wanted) if wanted else {}
                for layer, of_layer in activations.items():
                    new = slice(resumed[layer], None)
                    writers[layer].append(split, of_layer[batch.kept.to(of_layer.device)][new], document[new], position[new])
                first, done = first + len(document), done + len(document)
                report(done, sum(rows.values()))
    return {layer: writer.statistics for layer, writer in writers.items()}
