"""Language models with replaced activations at a hook, and their next-token loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from saeens_models.metrics import MOST_BLOCKS, LossBatch, NextTokenLoss, blocks_of, next_token_loss
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.hook_checks import checked_in_float32, random_windows, relative_error, tolerance
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.tokens import TokenBatch, TokenStore

LOGIT_BYTES, LEAST_TOKENS = 2**24, 2**9
"""Bytes of the logits of a batch of windows, so that they fit into the caches of a CPU, and positions that a batch has in any case."""
_BATCHES_READ = 16


@contextmanager
def patched(model: LanguageModel, hook: str, layer: int, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Replace the activations at `hook` of `layer` by `replace(activations)`, `[b, L, d]`, in every forward pass inside this context.

    Raises ConfigurationError for a module that does not exist, and in the forward pass for a stream between attention and MLP to which the
    output of the MLP is not simply added.
    """
    changes = {hook: replace}
    if hook == "resid_mid" and not model.stream_passes_modules:
        changes = _changes_around(model.description, replace)
    with ExitStack() as hooks:
        for changed, change in changes.items():
            hooks.enter_context(model.hooked(changed, layer, change))
        yield


def _changes_around(description: LanguageModelDescription, replace: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Callable]:
    """Patch the stream between attention and MLP, which no module returns: as the input of the MLP and as the other term of its sum."""
    stream: list[torch.Tensor] = []  # the activations and their replacement
    added: list[torch.Tensor] = []

    def replace_and_remember(activations: torch.Tensor) -> torch.Tensor:
        stream[:] = [activations.clone(), replace(activations).clone()]  # later modules may write in place, here and below
        return stream[1]

    def remember(output: torch.Tensor) -> None:
        added[:] = [output.clone()]

    def add_again(output: torch.Tensor) -> torch.Tensor:
        if not relative_error(output, stream[0] + added[0]) <= tolerance(output):
            raise ConfigurationError(
                f"hook 'resid_mid' of {description.name} ({description.model_type}) can be read, but nothing can be put in its place: "
                "the output of its MLP is not simply added to this stream"
            )
        return stream[1] + added[0]

    return {"resid_mid": replace_and_remember, "mlp_out": remember, "resid_post": add_again}


class PatchedWindows:
    """Windows of text in a language model. Blocks before the hook run once, later ones once per replacement.

    `activations` `[b, L, d]` are those at `hook` of `layer`. Memory: the activations, and the outputs of the blocks before the hook,
    `[b, L, d_model]` each. `n_documents`: number of documents of the split, for losses with sums by
    document; 0 for losses without.
    """

    def __init__(self, model: LanguageModel, windows: TokenBatch, hook: str, layer: int, n_documents: int = 0) -> None:
        self._model, self._hook, self._layer = model, hook, layer
        device = model.model.device
        self._tokens, self._kept = windows.tokens.to(device), windows.kept.to(device)
        self._is_text = windows.is_text.to(device)
        self._n_blocks = min(n_documents, MOST_BLOCKS)
        self._block = blocks_of(windows.document.to(device).clamp(min=0), n_documents) if n_documents else None
        self._outputs: dict[nn.Module, Any] = {}
        with ExitStack() as hooks:
            for block in model.blocks_before(hook, layer):
                hooks.enter_context(block.register_forward_hook(lambda block, _, output: self._outputs.update({block: _copy(output)})))
            self.activations = model.activations(self._tokens, hook, [layer])[layer]

    @property
    def rows(self) -> torch.Tensor:
        """Activations of the kept positions, float32 `[n, d]`, in the order of activation rows."""
        return self.activations[self._kept].float()

    def logits(self, replacement: torch.Tensor) -> torch.Tensor:
        """Return the logits `[b, L, vocabulary]` with `replacement` `[b, L, d]` instead of the activations."""
        with torch.no_grad(), _returning(self._outputs), patched(self._model, self._hook, self._layer, lambda _: replacement.clone()):
            return self._model.model(input_ids=self._tokens, use_cache=False).logits

    def loss(self, rows: torch.Tensor) -> NextTokenLoss:
        """Return the next-token loss over all text with `rows` `[n, d]` at the kept positions and unchanged activations elsewhere."""
        replacement = self.activations.clone()
        replacement[self._kept] = rows.to(replacement)
        return next_token_loss(self.logits(replacement), self._tokens, self._is_text, self._block, self._n_blocks)


def loss_batches(
    model: LanguageModel, tokens: TokenStore, hook: str, layer: int, n_rows: int, *, by_document: bool = False
) -> Iterator[LossBatch]:
    """Yield evenly spread windows of the test split with about `n_rows` activation rows in total, or all windows if there are fewer.

    `by_document`: losses have sums by document, or by block of documents (`blocks_of`).

    Windows pass in batches of similar length. Memory: the logits of a batch, 16 MiB or those of 512 positions or of one window, and the
    model's copies of them.
    """
    most_tokens = max(LEAST_TOKENS, LOGIT_BYTES // (model.description.vocab_size * 4))
    for read in tokens.sample("test", n_rows, max(1, _BATCHES_READ * most_tokens // tokens.context_length)):
        for _, batch in read.by_length(read.is_text, most_tokens):
            windows = PatchedWindows(model, batch, hook, layer, tokens.statistics.test.documents if by_document else 0)
            yield LossBatch(windows.rows, windows.loss)


def patching_problem(model: LanguageModel, hook: str, layers: Collection[int]) -> str:
    """Return why the next-token loss cannot be measured with replaced activations at `hook`; empty if it can at every layer.

    On a few random tokens, with padding, the activations that were there have to give the logits of the model without a patch.
    """
    description = model.description
    if not description.has_head:
        return f"{description.name} has no language-modelling head, which predicts tokens"
    tokens = random_windows(description)
    everywhere = torch.ones(tokens.shape, dtype=torch.bool)
    windows = TokenBatch(tokens, everywhere, torch.zeros(tokens.shape, dtype=torch.int32), torch.zeros(tokens.shape, dtype=torch.int32))
    where = f"hook {hook!r} of {description.name} ({description.model_type})"

    def check() -> str:
        with torch.no_grad():
            expected = model.model(input_ids=tokens.to(model.model.device), use_cache=False).logits
        for layer in layers:
            found = PatchedWindows(model, windows, hook, layer)
            error = relative_error(found.logits(found.activations), expected)
            if error > tolerance(expected):
                return f"{where}, layer {layer}: the activations that were there, put back, change the logits (relative error {error:.2g})"
        return ""

    try:
        return checked_in_float32(model.model, check)
    except ConfigurationError as error:
        return str(error)
    except Exception as error:  # code of the model, on a path that its authors may not have foreseen
        return f"{where}: the model fails with replaced activations ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _copy(output: Any) -> Any:
    """Return a module's output with copies of its tensors, since later modules may write in place."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    return type(output)(map(_copy, output)) if type(output) in (tuple, list) else output


@contextmanager
def _returning(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Replace the computation of these modules by copies of the given outputs within this context."""
    for module, output in outputs.items():
        module.forward = lambda *_, output=output, **__: _copy(output)
    try:
        yield
    finally:
        for module in outputs:
            del module.forward  # uncovers the method of the class
