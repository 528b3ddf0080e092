"""Language models with replaced activations at a hook, and their next-token loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from saeens_models.metrics import LossBatch, NextTokenLoss, next_token_loss
from saeens_pipeline.language_models.descriptions import READ_AT_INPUT, not_replaceable, validate_patch
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.tokens import TokenBatch, TokenStore

LOGIT_BYTES = 2**24
"""Bytes of the logits of a batch of windows, so that they fit into the caches of a CPU."""


@contextmanager
def patched(model: LanguageModel, hook: str, layer: int, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Replace the activations at `hook` of `layer` by `replace(activations)`, `[b, L, d]`, in every forward pass inside this context.

    Raises ConfigurationError for a module that does not exist, and as `validate_patch`.
    """
    validate_patch(model.description, hook)
    if hook == "resid_mid" and not model.stream_passes_modules:
        with _patched_between(model, layer, replace):
            yield
        return

    def at_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)

    module = model.module(hook, layer)
    if hook in READ_AT_INPUT:
        handle = module.register_forward_pre_hook(_replacing_input(replace), with_kwargs=True)
    else:
        handle = module.register_forward_hook(at_output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _patched_between(model: LanguageModel, layer: int, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Patch the stream between attention and MLP, which no module returns: as the input of the MLP and as the other term of its sum."""
    stream: list[torch.Tensor] = []  # the activations and their replacement
    added: list[torch.Tensor] = []

    def replace_and_remember(activations: torch.Tensor) -> torch.Tensor:
        stream[:] = [activations, replace(activations)]
        return stream[1]

    def remember(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        added[:] = [output[0] if isinstance(output, tuple) else output]

    def add_again(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        if not torch.equal(value, stream[0] + added[0]):
            raise not_replaceable(model.description)
        value = stream[1] + added[0]
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handles = [
        model.module("resid_mid", layer).register_forward_pre_hook(_replacing_input(replace_and_remember), with_kwargs=True),
        model.module("mlp_out", layer).register_forward_hook(remember),
        model.module("resid_post", layer).register_forward_hook(add_again),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replacing_input(replace: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return a forward pre-hook that applies `replace` to the input of a module."""

    def at_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": replace(kwargs["hidden_states"])}

    return at_input


class PatchedWindows:
    """Windows of text in a language model. Blocks before the hook run once, later ones once per replacement.

    `activations` `[b, L, d]` are those at `hook` of `layer`. Memory: the activations, and the outputs of the blocks before the hook,
    `[b, L, d_model]` each.
    """

    def __init__(self, model: LanguageModel, windows: TokenBatch, hook: str, layer: int) -> None:
        self._model, self._hook, self._layer = model, hook, layer
        device = model.model.device
        self._tokens, self._kept = windows.tokens.to(device), windows.kept.to(device)
        self._is_text = windows.is_text.to(device)
        self._outputs: dict[nn.Module, Any] = {}
        with ExitStack() as hooks:
            for block in model.blocks_before(hook, layer):
                handle = block.register_forward_hook(lambda block, _, output: self._outputs.update({block: output}))
                hooks.callback(handle.remove)
            self.activations = model.activations(self._tokens, hook, [layer])[layer]

    @property
    def rows(self) -> torch.Tensor:
        """Activations of the kept positions, float32 `[n, d]`, in the order of activation rows."""
        return self.activations[self._kept].float()

    def logits(self, replacement: torch.Tensor) -> torch.Tensor:
        """Return the logits `[b, L, vocabulary]` with `replacement` `[b, L, d]` instead of the activations."""
        with torch.no_grad(), _returning(self._outputs), patched(self._model, self._hook, self._layer, lambda _: replacement):
            return self._model.model(input_ids=self._tokens, use_cache=False).logits

    def loss(self, rows: torch.Tensor) -> NextTokenLoss:
        """Return the next-token loss over all text with `rows` `[n, d]` at the kept positions and unchanged activations elsewhere."""
        replacement = self.activations.clone()
        replacement[self._kept] = rows.to(replacement)
        return next_token_loss(self.logits(replacement), self._tokens, self._is_text)


def loss_batches(model: LanguageModel, tokens: TokenStore, hook: str, layer: int, n_rows: int) -> Iterator[LossBatch]:
    """Yield evenly spread windows of the test split with about `n_rows` activation rows in total, or all windows if there are fewer.

    Memory: the logits of a batch of windows, 16 MiB or those of one window, and the model's copies of them.
    """
    window_bytes = tokens.context_length * model.description.vocab_size * 4
    for batch in tokens.sample("test", n_rows, batch_windows=max(1, LOGIT_BYTES // window_bytes)):
        windows = PatchedWindows(model, batch, hook, layer)
        yield LossBatch(windows.rows, windows.loss)


@contextmanager
def _returning(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Make these modules return the given outputs, without computation, inside this context."""
    for module, output in outputs.items():
        module.forward = lambda *_, output=output, **__: output
    try:
        yield
    finally:
        for module in outputs:
            del module.forward  # uncovers the method of the class
