"""Caching of activations: one forward pass over the tokens for all layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from saeens_pipeline.language_models.documents import Split
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.tokens import SPLITS, TokenBatch, TokenStore
from saeens_pipeline.storage.activation_writer import ActivationWriter, stored_bytes
from saeens_pipeline.storage.activations import ActivationStatistics, StoredDtype
from saeens_pipeline.storage.disk import require_free_disk

GROUP_TOKENS = 2**14
"""Positions of the windows that are sorted together. The same on every device: the first group decides which norms are massive."""
BATCH_TOKENS = {"cpu": 2**11, "cuda": 2**13}
"""Positions of a batch of windows by device. On a CPU, larger activations do not fit into its caches."""


def cache_activations(
    model: LanguageModel,
    tokens: TokenStore,
    hook: str,
    outputs: Mapping[int, Path],
    dtype: StoredDtype,
    *,
    max_norm: float | None = None,
    without_bytes: Collection[Split] = (),
    batch_tokens: int | None = None,
    group_tokens: int = GROUP_TOKENS,
    report: Callable[[int, int], None] = lambda rows, total_rows: None,
) -> dict[int, dict[str, ActivationStatistics]]:
    """Write the activations of every kept position at `hook` of each layer to `outputs[layer]`; return statistics by layer and split.

    Rows have the order of `tokens`. `max_norm` drops rows, as ActivationWriter says; the median is that of the first group. Of splits
    `without_bytes` only statistics, origin and groups are written: `ActivationsOnDemand` computes their rows again. Both splits
    pass through the model once for all layers, in groups of `group_tokens` positions and batches of `batch_tokens` (default:
    `BATCH_TOKENS`). Groups and batches do not depend on what is resumed, so that the bits of a row do not either. `report` gets the numbers
    of finished and of all rows of one layer. A killed call with the same arguments is resumed: its complete shards are kept, and the model
    continues with the group of windows that holds the first missing row. Memory: one batch in the model and, for each layer, the
    activations of a group and two shards (up to 32 MiB each), for any number of tokens.
    Raises SaeensError if the disk is too small for all layers (before anything is written), and for values that are not finite or too
    large for `dtype`, with the layer and the largest value; ConfigurationError for a hook or layer that the model does not have.
    """
    batch_tokens = batch_tokens or batch_tokens_on(model.model.device)
    rows = {split: tokens.n_rows(split) for split in SPLITS}
    widths = model.widths(hook, list(outputs))
    there = sum(file.stat().st_size for path in outputs.values() for file in path.rglob("*") if file.is_file())
    needed = sum(stored_bytes(width, dtype, rows, without_bytes=without_bytes) for width in widths.values()) - there
    require_free_disk(next(iter(outputs.values())), needed, f"caching {hook} of layers {', '.join(map(str, outputs))}")
    done = 0
    with ExitStack() as stack:
        writers = {
            layer: stack.enter_context(
                ActivationWriter(
                    path,
                    widths[layer],
                    dtype,
                    rows,
                    name=f"{hook} of layer {layer}",
                    max_norm=max_norm,
                    without_bytes=without_bytes,
                    resume=True,
                )
            )
            for layer, path in outputs.items()
        }
        for split in SPLITS:
            first, window = 0, 0  # row and window of the split at which the group starts
            groups: list[tuple[int, int]] = []
            for group in tokens.batches(split, max(1, group_tokens // tokens.context_length)):
                groups.append((window, first))
                document, position = group.document[group.kept], group.position[group.kept]
                resumed = {layer: max(writer.resumed_rows[split] - first, 0) for layer, writer in writers.items()}
                wanted = [layer for layer, n_resumed in resumed.items() if n_resumed < len(document)]
                for layer, activations in kept_activations(model, group, hook, wanted, batch_tokens).items():
                    new = slice(resumed[layer], None)
                    writers[layer].append(split, activations[new], document[new], position[new])
                first, done, window = first + len(document), done + len(document), window + len(group.kept)
                report(done, sum(rows.values()))
            for writer in writers.values() if split in without_bytes else ():
                writer.record_groups(split, np.array(groups, np.int64))
    return {layer: writer.statistics for layer, writer in writers.items()}


def batch_tokens_on(device: torch.device) -> int:
    """Return the positions of a batch of windows on a device."""
    return BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])


def kept_activations(
    model: LanguageModel, windows: TokenBatch, hook: str, layers: Collection[int], batch_tokens: int
) -> dict[int, torch.Tensor]:
    """Return the activations `[n, d]` of the kept positions of windows at `hook` of each layer, in order, on the model's device.

    Windows pass through the model in batches of similar length, of at most `batch_tokens` positions, and end with their last kept position,
    since attention is causal.
    """
    row = windows.kept.flatten().cumsum(0).view(windows.kept.shape) - 1
    n_rows, found = int(windows.kept.sum()), dict[int, torch.Tensor]()
    for numbers, batch in windows.by_length(windows.kept, batch_tokens) if layers else ():
        rows = row[numbers, : batch.kept.shape[1]][batch.kept]
        for layer, activations in model.activations(batch.tokens, hook, layers).items():
            if layer not in found:
                found[layer] = activations.new_empty(n_rows, activations.shape[-1])
            found[layer][rows.to(activations.device)] = activations[batch.kept.to(activations.device)]
    return found
