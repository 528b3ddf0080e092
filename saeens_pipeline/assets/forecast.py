"""Forecast of an experiment's disk, memory, computation and questions to a language model, for `saeens plan`.

All figures are computed from the experiment file and the language model's configuration. FLOPs are dense equivalents, as in the table
`cost`. Seconds are FLOPs divided by the speed that a device reaches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import polars as pl

from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.assets.declarations import Declaration, Op
from saeens_pipeline.assets.memory import training_memory
from saeens_pipeline.assets.registry import fills
from saeens_pipeline.assets.saes import config_of
from saeens_pipeline.assets.sources import measures_loss
from saeens_pipeline.assets.tables.autointerp import expected
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.autointerp.interview import CHARACTERS_PER_TOKEN
from saeens_pipeline.language_models.descriptions import LanguageModelDescription, validate_hook
from saeens_pipeline.language_models.models import block_parameters, describe_language_model
from saeens_pipeline.language_models.patching import LOGIT_BYTES
from saeens_pipeline.language_models.tokens import position_bytes
from saeens_pipeline.settings import ExperimentSettings, SourceSettings
from saeens_pipeline.storage.activation_writer import stored_bytes
from saeens_pipeline.storage.disk import free_bytes
from saeens_pipeline.storage.names import Partition

if TYPE_CHECKING:
    from saeens_models import SAEConfig
    from saeens_pipeline.storage.recipes import Store

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_COPIES_OF_LOGITS = 3  # in a language model that caps logits
_VOCABULARY_NOT_KNOWN = 2**17  # more than 2**16, so that a token id counts as four bytes


class Line(NamedTuple):
    """One figure of a plan. `amount` is None if it is not known."""

    section: str
    item: str
    amount: float | None
    unit: str
    note: str = ""


def forecast(
    source: SourceSettings,
    experiment: ExperimentSettings,
    ops: Sequence[Op],
    *,
    layers: Sequence[int],
    store: Store,
    compute: Compute,
) -> list[Line]:
    """Return the figures of the experiment on these layers, with all artefacts missing. Existing artefacts are not subtracted.

    If the language model's configuration is not available, the lines give the reason and the figures that do not depend on it. Raises
    ConfigurationError for a layer or hook that the model does not have, and for an SAE that cannot be built on it.
    """
    plan = _Plan(source, experiment, ops, layers, *_describe(source))
    if plan.description:
        validate_hook(plan.description, source.hook, layers)
        measures_loss(experiment, plan.description, source.hook)
    lines = [*plan.model(), *plan.disk(), *plan.memory(), *plan.computation(), *plan.autointerp()]
    amounts = {(line.section, line.item): line.amount for line in lines}
    return [*lines, *_fits(amounts, store, compute)]


def as_frame(lines: Sequence[Line]) -> pl.DataFrame:
    """Return the figures as rows of section, item, amount, unit and note."""
    schema = {"section": pl.String, "item": pl.String, "amount": pl.Float64, "unit": pl.String, "note": pl.String}
    return pl.DataFrame(lines, schema, orient="row")


def readable(line: Line) -> str:
    """Return the amount of a figure as text."""
    if line.amount is None:
        return "not known"
    match line.unit:
        case "bytes":
            return _bytes(line.amount)
        case "FLOPs":
            return f"{line.amount:.2g} FLOPs"
        case "money":
            return f"{line.amount:,.2f}"
    return f"{line.amount:,.0f} {line.unit}".rstrip()


def _bytes(amount: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            return f"{amount:,.3g} {unit}" if amount < 1000 else f"{amount:,.0f} {unit}"
        amount /= 1000
    raise AssertionError


def _describe(source: SourceSettings) -> tuple[LanguageModelDescription | None, list[int] | None, str]:
    """Return the language model, the parameters of each block, and the reason if either is not known."""
    try:
        description = describe_language_model(source.language_model, source.revision)
    except SaeensError as error:
        return None, None, str(error)
    try:
        return description, block_parameters(description), ""
    except SaeensError as error:
        return description, None, str(error)


@dataclass
class _Plan:
    source: SourceSettings
    experiment: ExperimentSettings
    ops: Sequence[Op]
    layers: Sequence[int]
    description: LanguageModelDescription | None
    parameters: list[int] | None  # of each block
    problem: str

    @property
    def n_partitions(self) -> int:
        """Return layers times seeds, the number of trainings of each SAE."""
        return len(self.layers) * len(self.experiment.ensemble.seeds)

    @property
    def d_in(self) -> int | None:
        return self.description.d_model if self.description else None

    def pass_flops(self, first: int, last: int) -> float | None:
        """Return the FLOPs of one token in blocks `first` to `last`, exclusive, with attention to half of the context on average."""
        if self.parameters is None or self.description is None:
            return None
        attention = 2 * self.source.context_length * self.description.d_model  # scores and values
        return sum(2 * parameters + attention for parameters in self.parameters[first:last])

    @property
    def measures_loss(self) -> bool:
        """Return True if the next-token loss is measured with reconstructions in the language model."""
        experiment = self.experiment
        if not experiment.ce_loss_tokens or not fills(experiment, "reconstruction"):
            return False
        return self.description is None or measures_loss(experiment, self.description, self.source.hook)

    def loss_flops(self) -> float | None:
        """Return the FLOPs of the next-token loss for all layers and seeds.

        Blocks before the hook run once; later blocks run for every size of every method, for the activations, and for zeros.
        """
        if self.description is None:
            return None
        flops, head = 0.0, 2 * self.description.vocab_size * self.description.d_model
        n_runs = 2 + sum(each.builder == "sae" for op in self.ops for each in op.outputs)  # an ensemble has as many sizes as SAEs
        for layer in self.layers:
            n_before = layer + 1 if self.source.hook == "resid_post" else layer
            before, after = self.pass_flops(0, n_before), self.pass_flops(n_before, self.description.n_layers)
            if before is None or after is None:
                return None
            flops += before + n_runs * (after + head)
        return flops * min(self.experiment.ce_loss_tokens, self.source.test_tokens) * len(self.experiment.ensemble.seeds)

    def trained(self) -> Iterator[tuple[Op, list[Declaration]]]:
        """Give every op that trains SAEs, with the SAEs of one layer and seed that no earlier op trains: round 1 is member 1."""
        known: set[object] = set()
        for op in self.ops:
            new = []
            for each in op.outputs:
                if each.builder != "sae":
                    continue
                given = tuple(str(needed.artefact.address) for needed in each.inputs if needed.decides)
                decisive = (each.code_version, str(each.partition_settings(Partition(0, 0))), given)
                if decisive not in known:
                    known.add(decisive)
                    new.append(each)
            if new:
                yield op, new

    def configs(self) -> dict[str, list[SAEConfig]]:
        """Return the SAEs of one layer and seed, by op."""
        if self.d_in is None:
            return {}
        return {op.name: [config_of(each, self.d_in) for each in new] for op, new in self.trained()}

    def model(self) -> Iterator[Line]:
        source = self.source
        if self.description is None:
            yield Line("model", source.language_model, None, "", f"figures that depend on it are not known: {self.problem}")
            return
        found = self.description
        sizes = f"{found.model_type}, {found.n_layers} layers, context {found.context_length:,}"
        note = "" if "{layer}" not in source.hook else "; the hook is assumed to have as many dimensions as the stream"
        yield Line("model", source.language_model, found.d_model, "dimensions", f"{sizes}, {source.weights} weights{note}")

    def disk(self) -> Iterator[Line]:
        source, settings = self.source, self.experiment
        vocabulary = self.description.vocab_size if self.description else _VOCABULARY_NOT_KNOWN
        rows = {"train": source.train_tokens, "test": source.test_tokens}
        tokens = sum(rows.values()) * position_bytes(vocabulary)
        yield Line("disk", "tokens", tokens, "bytes", "before compression")
        if self.d_in is None:
            for item in ("activations", "residuals", "SAEs", "checkpoints", "all"):
                yield Line("disk", item, None, "bytes")
            return
        activations = stored_bytes(self.d_in, source.dtype, rows) * len(self.layers)
        yield Line(
            "disk", "activations", activations, "bytes", f"{source.dtype}, {len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
        )
        one = stored_bytes(self.d_in, source.dtype, {"train": source.train_tokens}, with_origin=False)
        n_residuals = sum(each.builder == "residual" for op in self.ops for each in op.outputs)
        n_kept = {"all": n_residuals, "last": min(n_residuals, 1), "none": 0}[settings.keep_residuals]
        besides = one if settings.keep_residuals == "last" and n_residuals > 1 else 0
        residuals = n_kept * one * self.n_partitions
        yield Line(
            "disk",
            "residuals",
            residuals,
            "bytes",
            f"keep_residuals: {settings.keep_residuals}; while one is written {_bytes(besides)} more",
        )
        configs = self.configs()
        saes = sum(_weights_bytes(config) for each in configs.values() for config in each) * self.n_partitions
        n_saes = sum(map(len, configs.values())) * self.n_partitions
        yield Line("disk", "SAEs", saes, "bytes", f"{n_saes} of them")
        checkpoints = 2 * max(sum(3 * _weights_bytes(config) for config in each) for each in configs.values())
        yield Line("disk", "checkpoints", checkpoints, "bytes", "at most, during training: a new one and the previous one")
        yield Line("disk", "all", tokens + activations + residuals + besides + saes + checkpoints, "bytes", "at most at one time")

    def memory(self) -> Iterator[Line]:
        batch_tokens = self.experiment.complete_training["batch_tokens"]
        configs = self.configs()
        if not configs:
            for item in ("training, largest SAE", "training, largest group", "evaluation", "language model", "next-token loss"):
                yield Line("memory", item, None, "bytes")
            return
        needs = {
            name: [training_memory(config).weights + batch_tokens * training_memory(config).token for config in each]
            for name, each in configs.items()
        }
        largest = max(needs, key=lambda name: max(needs[name]))
        yield Line("memory", "training, largest SAE", max(needs[largest]), "bytes", f"{largest}; if it does not fit, batches are split")
        together = max(needs, key=lambda name: sum(needs[name]))
        note = f"{together}: {len(needs[together])} together; if they do not fit, groups are smaller"
        yield Line("memory", "training, largest group", sum(needs[together]), "bytes", note)
        weights = sum(_weights_bytes(config) for each in configs.values() for config in each)
        budget = self.experiment.evaluation_memory_gb * 1e9
        yield Line("memory", "evaluation", weights + budget, "bytes", "SAEs of one layer and seed, and evaluation_memory_gb")
        yield from self._memory_of_model(weights)

    def _memory_of_model(self, saes: float) -> Iterator[Line]:
        """Give the memory of computing activations, and of measuring the next-token loss with SAEs of so many bytes."""
        blocks = model = loss = None
        if self.parameters is not None and self.description is not None:
            number, found = _DTYPE_BYTES[self.source.language_model_dtype], self.description
            blocks = sum(self.parameters[: max(self.layers) + 1]) * number
            model = (sum(self.parameters) + found.vocab_size * found.d_model) * number
            logits = max(self.source.context_length * found.vocab_size * number, LOGIT_BYTES)
            loss = saes + model + _COPIES_OF_LOGITS * logits
        note = "blocks up to the deepest layer; other blocks, embeddings and activations are not included"
        yield Line("memory", "language model", blocks, "bytes", note)
        if self.measures_loss:
            note = "SAEs of one layer and seed, the language model, logits of a window; ce_loss_tokens: 0 leaves it out"
            yield Line("memory", "next-token loss", loss, "bytes", note)

    def computation(self) -> Iterator[Line]:
        source = self.source
        rows = source.train_tokens + source.test_tokens
        of_token = self.pass_flops(0, max(self.layers) + 1)
        forward = None if of_token is None else rows * of_token
        note = "one pass for all layers" if forward is not None else self.problem if self.description else ""
        yield Line("computation", "language model", forward, "FLOPs", note)
        if self.d_in is None:
            for item in ("training", "residuals", "evaluation", "next-token loss", "all"):
                yield Line("computation", item, None, "FLOPs")
            return
        training: dict[str, float] = defaultdict(float)
        inference = residuals = 0.0
        n_residuals = sum(each.builder == "residual" for op in self.ops for each in op.outputs)
        for _, declarations in self.trained():
            for each in declarations:
                config = config_of(each, self.d_in)
                kind = each.address.name if each.address.kind == "baseline" else each.address.kind
                tokens = source.train_tokens * each.settings.get("epochs", 1)
                training[kind] += config.train_flops_per_token * tokens * self.n_partitions
                inference += config.inference_flops_per_token
        rounds = [each for op in self.ops for each in op.outputs if each.builder == "sae" and each.address.kind == "boosting"]
        for each in rounds[:n_residuals]:
            residuals += config_of(each, self.d_in).inference_flops_per_token * source.train_tokens * self.n_partitions
        labelled = any(each.documents for each in self.experiment.ensemble.specialised)
        partial = "at most: members that see a part of the corpus count in full" if labelled else ""
        for kind, flops in training.items():
            note = {"bagging": partial, "boosting": "without round 1, which is member 1"}.get(kind, "")
            yield Line("computation", f"training, {kind}", flops, "FLOPs", note)
        yield Line("computation", "residuals", residuals, "FLOPs")
        evaluation = inference * source.test_tokens * self.n_partitions
        yield Line("computation", "evaluation", evaluation, "FLOPs", "encoding and decoding, without coactivation")
        loss = 0.0
        if self.measures_loss:
            loss = self.loss_flops()
            note = f"the language model with every method and size, on {self.experiment.ce_loss_tokens:,} tokens"
            yield Line("computation", "next-token loss", loss, "FLOPs", note)
        some_topk = any(sae.architecture == "topk" for sae in self.experiment.saes)
        notes = ["dense equivalents; kernels for TopK take less"] if some_topk else []
        notes += ["without the language model"] if forward is None else []
        amount = (forward or 0) + sum(training.values()) + residuals + evaluation + (loss or 0)
        yield Line("computation", "all", amount, "FLOPs", "; ".join(notes))

    def autointerp(self) -> Iterator[Line]:
        """Give requests, tokens and price of explaining features, if the experiment does."""
        settings = self.experiment.autointerp
        if not fills(self.experiment, "autointerp") or settings is None:
            return
        estimate = expected(self.experiment, self.n_partitions)
        note = f"to {settings.model}, at most; stored answers are not requested again"
        yield Line("autointerp", "requests", estimate.requests, "", note)
        yield Line("autointerp", "tokens in", estimate.tokens_in, "tokens", f"at {CHARACTERS_PER_TOKEN} characters a token")
        yield Line("autointerp", "tokens out", estimate.tokens_out, "tokens", "without reasoning tokens")
        price = estimate.price(settings)
        yield Line("autointerp", "price", price, "money", "" if price is not None else "autointerp.prices: prices of a million tokens")


def _weights_bytes(config: SAEConfig) -> int:
    """Return the bytes of a saved SAE, without its configuration and curve."""
    import torch

    from saeens_models.architectures import sae_class

    with torch.device("meta"):
        sae = sae_class(config.architecture)(config)
    return sum(weight.nbytes for weight in sae.state_dict().values())


def _fits(amounts: Mapping[tuple[str, str], float | None], store: Store, compute: Compute) -> Iterator[Line]:
    import torch

    free, needed = free_bytes(store.root), amounts["disk", "all"]
    if needed is None:
        verdict = "not known whether that is enough"
    else:
        verdict = "enough" if needed <= free else f"{_bytes(needed - free)} too little"
    yield Line("fits", "free disk", free, "bytes", f"{verdict}, below {store.root}")
    device = compute.resolve()
    if device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(device).total_memory
        yield Line("fits", torch.cuda.get_device_name(device), memory, "bytes", _at_once(amounts, memory))


def _at_once(amounts: Mapping[tuple[str, str], float | None], memory: float) -> str:
    """Return a note on how training fits into the memory of a device."""
    one, together = amounts["memory", "training, largest SAE"], amounts["memory", "training, largest group"]
    if one is None or together is None:
        return "not known what fits"
    if together <= memory:
        training = "every group of SAEs at once"
    else:
        training = "SAEs in smaller groups" if one <= memory else "the largest SAE with split batches, if its weights fit"
    too_large = [item for item in ("language model", "next-token loss") if (amounts.get(("memory", item)) or 0) > memory]
    return "; ".join([training, *(f"too little for the {item}" for item in too_large)])
