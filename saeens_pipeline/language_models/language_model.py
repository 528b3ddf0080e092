"""Loaded language models and the hooks of their activations."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.descriptions import HOOKS, READ_AT_INPUT, LanguageModelDescription, validate_hook
from saeens_pipeline.language_models.hook_checks import check_causal, check_hook, checked_in_float32, random_windows

if TYPE_CHECKING:  # its import takes seconds
    from transformers import PreTrainedModel

_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_PARTS = {
    "attn_out": (("attention", "self_attn", "attn", "self_attention"), ("post_attention_layernorm",)),
    "mlp_out": (_MLP_NAMES, ("post_feedforward_layernorm",)),
    "resid_mid": (("ln_2", "post_attention_layernorm", "ffn_norm", "norm_2"), ("pre_feedforward_layernorm", *_MLP_NAMES)),
}
"""Names of the modules at hooks inside a block, and those in models that normalise before they add to the stream."""


class LanguageModel:
    """A causal language model of transformers with hooks for activations.

    `resid_pre` and `resid_post` are the input and output of a block. `attn_out` and `mlp_out` are the terms that attention and MLP add to
    the residual stream, after the norms that follow them in some models (Gemma 2). `resid_mid` is the stream between the two. Any other
    hook is the path of a module, with `{layer}` for the layer, and reads its output. The last layer's `resid_post` is the output of its
    block before the final norm (transformers' `hidden_states` is after it).
    """

    stream_passes_modules = False
    """True if the stream between attention and MLP passes through a module of its own."""

    def __init__(self, description: LanguageModelDescription, model: PreTrainedModel) -> None:
        self.description = description
        self.model = model
        self._checked: set[tuple[str, int]] = set()

    def activations(self, tokens: torch.Tensor, hook: str, layers: Collection[int]) -> dict[int, torch.Tensor]:
        """Return the activations `[b, L, d]` of token ids `[b, L]` at `hook` of each layer, from one forward pass.

        The pass stops after the deepest of the layers. Attention is causal, so padding at the end of a window does not change earlier
        positions. The first call for a hook and layer checks that on a few random tokens, and that the terms of the residual stream add up.
        Raises ConfigurationError as `validate_hook` and `check_hook`, for a module that does not exist and for one without a vector per
        token; SaeensError for a module that takes no part in the forward pass, or runs more than once.
        """
        validate_hook(self.description, hook, layers)
        unchecked = sorted({layer for layer in layers if (hook, layer) not in self._checked})
        if unchecked:
            checked_in_float32(self.model, lambda: check_hook(self.description, hook, unchecked, self._read))
        found = self._read(tokens, {(hook, layer) for layer in layers}, stop=True)
        self._checked.update((hook, layer) for layer in layers)
        return {layer: found[hook, layer] for layer in layers}

    def check(self, hook: str, layers: Collection[int]) -> None:
        """Raise as `activations`, after a pass over a few random tokens."""
        self.activations(random_windows(self.description), hook, layers)

    def require_causal(self) -> None:
        """Raise ConfigurationError for a model whose blocks attend to later tokens, or that cannot be run on token ids alone."""
        try:
            layers = range(self.description.n_layers)
            check = partial(check_causal, self.description, "resid_post", layers, self._read, strict=False)
            self._checked.update(("resid_post", layer) for layer in checked_in_float32(self.model, check))
        except (SaeensError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # code of the model
            raise ConfigurationError(
                f"{self.description.name} ({self.description.model_type}) cannot be run on token ids alone "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            ) from error

    def _read(
        self, tokens: torch.Tensor, wanted: Collection[tuple[str, int]], *, strict: bool = True, stop: bool = False
    ) -> dict[tuple[str, int], torch.Tensor]:
        """Return activations by hook and layer, from one forward pass. What cannot be read is an error or, unless `strict`, left out.

        stop: end the pass once all are captured, so that a module that runs again later is not noticed.
        """
        captured: dict[tuple[str, int], torch.Tensor] = {}
        problems: dict[tuple[str, int], SaeensError] = {}
        n_hooked = 0

        def capture(place: tuple[str, int], activations: Any) -> None:
            if place in problems:
                return
            if place in captured:
                if not torch.equal(captured[place], activations):  # TransformerLens runs ln1 on equal inputs for queries, keys and values
                    del captured[place]
                    problems[place] = SaeensError(f"hook {place[0]!r}, layer {place[1]}: its module runs more than once in a forward pass")
            elif not isinstance(activations, torch.Tensor) or activations.shape[:-1] != tokens.shape or not activations.is_floating_point():
                problems[place] = ConfigurationError(
                    f"hook {place[0]!r}, layer {place[1]}, does not give one vector per token: choose another module"
                )
            else:
                captured[place] = activations.clone()  # later modules may write in place
            if stop and len(captured) + len(problems) == n_hooked:
                raise _AllCaptured

        with ExitStack() as hooks, torch.no_grad():
            for place in set(wanted):
                try:
                    hooks.enter_context(self.hooked(*place, partial(capture, place)))
                    n_hooked += 1
                except ConfigurationError:
                    if strict:
                        raise
            with suppress(_AllCaptured):
                self.model(input_ids=tokens.to(self.model.device), use_cache=False)
        if strict:
            for problem in problems.values():
                raise problem
            never_run = sorted(set(wanted) - set(captured))
            if never_run:
                hook, layers = never_run[0][0], [layer for _, layer in never_run]
                raise SaeensError(f"hook {hook!r} was not reached in layers {layers}: its module takes no part in the forward pass")
        return captured

    def widths(self, hook: str, layers: Collection[int]) -> dict[int, int]:
        """Return the size of an activation vector at `hook`, by layer: d_model, except for some module paths."""
        return {layer: found.shape[-1] for layer, found in self.activations(torch.zeros(1, 2, dtype=torch.long), hook, layers).items()}

    def hooked(self, hook: str, layer: int, change: Callable[[Any], Any]) -> RemovableHandle:
        """Register a hook that calls `change` with the activations at `hook` in every forward pass; return the handle that removes it.

        The result of `change` replaces the activations. They stay as they are if it is None.
        """

        def at_input(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = change(args[0] if args else kwargs.get("hidden_states"))
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

        def at_output(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            new = change(output[0] if isinstance(output, tuple) else output)
            return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

        module = self.module(hook, layer)
        if hook in READ_AT_INPUT:
            return module.register_forward_pre_hook(at_input, with_kwargs=True)
        return module.register_forward_hook(at_output)

    def module(self, hook: str, layer: int) -> torch.nn.Module:
        """Return the module with `hook` at its input or output. Raises ConfigurationError for a module that does not exist."""
        if hook in ("resid_pre", "resid_post"):
            return self._blocks[layer]
        if hook in HOOKS:
            children = dict(self._blocks[layer].named_children())
            norms_after = "post_feedforward_layernorm" in children  # Gemma 2 and 3, OLMo 2
            for name in _PARTS[hook][norms_after]:
                if name in children:
                    return children[name]
            there = ", ".join(children)
            raise ConfigurationError(f"hook {hook!r} is not available in this model: give the path of one of its block's modules ({there})")
        path = hook.replace("{layer}", str(layer))
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            last_part = path.rsplit(".", 1)[-1]
            modules = [name for name, _ in self.model.named_modules() if name]
            similar = [name for name in modules if name.endswith(last_part)] or [name for name in modules if f".{layer}." in name]
            raise ConfigurationError(f"{self.description.name} has no module {path!r}; it has {', '.join(similar[:8])}, ...") from None

    def unembedding(self) -> torch.Tensor | None:
        """Return the unembedding weights `[vocabulary, d_model]`; None for a model without a language-modelling head."""
        head = self.model.get_output_embeddings() if self.description.has_head else None
        return None if head is None else cast("torch.Tensor", head.weight).detach()

    def blocks_before(self, hook: str, layer: int) -> list[torch.nn.Module]:
        """Return the blocks whose outputs do not depend on the activations at a hook; none if the blocks cannot be identified."""
        try:
            blocks = list(self._blocks)
        except ConfigurationError:
            return []
        if "{layer}" not in hook:
            return blocks[: layer + 1] if hook == "resid_post" else blocks[:layer]
        module = self.module(hook, layer)
        holding = [i for i, block in enumerate(blocks) if any(module is each for each in block.modules())]
        return blocks[: holding[0]] if holding else []

    @property
    def _blocks(self) -> torch.nn.ModuleList:
        """The transformer blocks: the only outermost module list with one entry per layer."""
        lists = {
            name: m for name, m in self.model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == self.description.n_layers
        }
        outermost = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
        if len(outermost) != 1:
            raise ConfigurationError(
                f"the blocks of {self.description.name} ({self.description.model_type}) cannot be identified: "
                "give the hook as a module path with {layer}"
            )
        return outermost[0]


class _AllCaptured(Exception):
    """Ends a forward pass once all requested activations are captured."""
