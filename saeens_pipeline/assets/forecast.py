"""Forecast of an experiment's disk, memory, computation and questions to a language model, for `saeens plan`.

All figures are computed from the experiment file and the language model's configuration. FLOPs are dense equivalents, as in the table
`cost`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import polars as pl

from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.assets.declarations import Declaration, Op
from saeens_pipeline.assets.memory import training_memory
from saeens_pipeline.assets.registry import evaluations_of, fills
from saeens_pipeline.assets.saes import config_of
from saeens_pipeline.assets.sources import describe_source, measures_loss, require_hook
from saeens_pipeline.errors import SaeensError, counted
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.hub import UnreachableError
from saeens_pipeline.language_models.patching import LEAST_TOKENS, LOGIT_BYTES
from saeens_pipeline.language_models.shipped_models import describe_shipped_model
from saeens_pipeline.language_models.tokens import position_bytes
from saeens_pipeline.settings import ExperimentSettings, SourceSettings
from saeens_pipeline.settings.files import blamed_on
from saeens_pipeline.storage.activation_writer import stored_bytes
from saeens_pipeline.storage.disk import free_bytes
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.rolling_cache import activation_cache_bytes

if TYPE_CHECKING:
    from saeens_models import SAEConfig
    from saeens_pipeline.storage.recipes import Store

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_COPIES_OF_LOGITS = 3  # in a language model that caps logits
_VOCABULARY_NOT_KNOWN = 2**17  # more than 2**16, so that a token id counts as four bytes
_SHIPPED = "the hub cannot be reached: sizes are from the configuration that comes with saeens"
_UNITS = {"activations": "bytes", "disk": "bytes", "memory": "bytes", "computation": "FLOPs"}
_NOT_KNOWN = {  # without the language model's configuration
    "disk": ("activations", "residuals", "SAEs", "checkpoints", "all"),
    "memory": ("training, largest SAE", "training, largest group", "evaluation", "language model", "next-token loss"),
    "computation": ("language model", "training", "residuals", "evaluation", "next-token loss", "all"),
}


class Line(NamedTuple):
    """One figure of a plan. `amount` is None if it is not known."""

    section: str
    item: str
    amount: float | None
    unit: str
    note: str = ""


class Machine(NamedTuple):
    """Devices for which time is estimated."""

    tflops: float
    """Sustained 10^12 dense-equivalent FLOPs per second of one device."""
    devices: int = 1
    price: float | None = None
    """Of a device for an hour."""


def forecast(
    source: SourceSettings,
    experiment: ExperimentSettings,
    ops: Sequence[Op],
    *,
    layers: Sequence[int],
    store: Store,
    compute: Compute,
    machine: Machine | None = None,
) -> list[Line]:
    """Return the figures of the experiment on these layers, with all artefacts missing. Existing artefacts are not subtracted.

    If the language model's configuration is not available, the lines give the reason and the figures that do not depend on it. Raises
    ConfigurationError for a layer or hook that the model does not have, and for an SAE that cannot be built on it.
    """
    description, parameters, problem = _describe(source)
    vocabulary = description.vocab_size if description else _VOCABULARY_NOT_KNOWN
    tokens = 0 if source.synthetic else (source.train_tokens + source.test_tokens) * position_bytes(vocabulary)
    plan = None
    if description:
        require_hook(source, description, layers)
        loss = measures_loss(experiment, description) and experiment.ce_loss_tokens > 0 and fills(experiment, "reconstruction")
        plan = _Plan(source, experiment, ops, layers, description, parameters, problem, loss)
        context = f"{description.context_length:,}" if description.context_length else "without limit"
        sizes = f"{description.model_type}, {description.n_layers} layers, context {context}"
        note = "" if "{layer}" not in source.hook else "; the hook is assumed to have as many dimensions as the stream"
        note += "" if description.identity else f"; {_SHIPPED}"
        lines = [Line("model", str(source.language_model), description.d_model, "dimensions", f"{sizes}, {source.weights} weights{note}")]
        figures = {
            "activations": [] if source.synthetic else [*plan.activations()],
            "disk": [*plan.disk(tokens)],
            "memory": [*plan.memory()],
            "computation": [*plan.computation()],
        }
    else:
        lines = [Line("model", str(source.language_model), None, "", f"figures that depend on it are not known: {problem}")]
        figures = {section: [(item, math.nan, "") for item in items] for section, items in _NOT_KNOWN.items()}
    figures["disk"].insert(0, ("tokens", tokens, "before compression"))
    for section, of_section in figures.items():
        lines += [Line(section, item, None if math.isnan(n) else n, _UNITS[section], note) for item, n, note in of_section]
    n_partitions = len(layers) * len(experiment.ensemble.seeds)
    amounts = {(line.section, line.item): line.amount for line in lines}
    lines += [Line(table.name, *line) for table in evaluations_of(experiment) for line in table.forecast(experiment, n_partitions)]
    if plan and machine:
        lines += plan.time(machine, {item: amount for (section, item), amount in amounts.items() if section == "computation"})
    lines += _fits(amounts, store, compute)
    if plan and not source.synthetic:
        lines += _with_less_disk(plan, tokens, free_bytes(store.root))
    return lines


def as_frame(lines: Sequence[Line]) -> pl.DataFrame:
    """Return the figures as rows of section, item, amount, unit and note."""
    return pl.DataFrame(lines, dict.fromkeys(Line._fields, pl.String) | {"amount": pl.Float64}, orient="row")


def readable(line: Line) -> str:
    """Return the amount of a line of the forecast as text, with a unit."""
    if line.amount is None:
        return "not known"
    match line.unit:
        case "bytes":
            return _bytes(line.amount)
        case "FLOPs":
            return f"{line.amount:.2g} FLOPs"
        case "hours":
            return f"{line.amount:,.3g} h"
        case "money":
            return f"{line.amount:,.2f}"
    return f"{line.amount:,.0f} {line.unit}".rstrip()


def _bytes(amount: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:,.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} TB" if amount < 1000 else f"{amount:,.0f} TB"


def _describe(source: SourceSettings) -> tuple[LanguageModelDescription | None, Sequence[float], str]:
    """Return the language model, the parameters of each block, and the reason if either is not known; unknown parameters are NaN.

    Where the hub cannot be reached, the configuration comes with the package, if it is one of a shipped experiment.
    """
    from saeens_pipeline.language_models.loading import block_parameters

    description = None
    try:
        if source.synthetic:
            return describe_source(source), [], ""
        try:
            description = describe_source(source)
        except UnreachableError:
            description = describe_shipped_model(str(source.language_model), source.revision)
            if description is None:
                raise
        return description, block_parameters(description), ""
    except SaeensError as error:
        return description, [math.nan] * (description.n_layers if description else 0), str(error)


class _SAE(NamedTuple):
    op: str
    declaration: Declaration
    config: SAEConfig


_Figures = Iterator[tuple[str, float, str]]
"""Item, amount and note; an amount that is not known is NaN."""


@dataclass
class _Plan:
    source: SourceSettings
    experiment: ExperimentSettings
    ops: Sequence[Op]
    layers: Sequence[int]
    description: LanguageModelDescription
    parameters: Sequence[float]  # of each block; NaN if not known
    problem: str
    measures_loss: bool

    def __post_init__(self) -> None:
        self.n_partitions = len(self.layers) * len(self.experiment.ensemble.seeds)  # the number of trainings of each SAE
        outputs = [(op.name, each) for op in self.ops for each in op.outputs]
        self.n_residuals = sum(each.builder == "residual" for _, each in outputs)
        self.n_published = sum(each.builder == "published_sae" for _, each in outputs)
        with blamed_on(self.experiment, "sae"):
            self.declared = [_SAE(op, each, config_of(each, self.description.d_model)) for op, each in outputs if each.builder == "sae"]
        trained: dict[object, _SAE] = {}
        for each in self.declared:
            given = tuple(str(needed.artefact.address) for needed in each.declaration.inputs if needed.decides)
            decisive = (each.declaration.code_version, str(each.declaration.partition_settings(Partition(0, 0))), given)
            trained.setdefault(decisive, each)
        self.trained = list(trained.values())  # of one layer and seed, without those that an earlier op trains: round 1 is member 1
        self.weights = {each.declaration.address: _weights_bytes(each.config) for each in self.trained}

    @property
    def _without_published(self) -> str:
        return (
            f", without {self.n_published * self.n_partitions} published ones, whose sizes are in their files" if self.n_published else ""
        )

    def by_op(self, amounts: Iterable[float]) -> dict[str, list[float]]:
        """Return amounts of the trained SAEs by op."""
        of_ops: dict[str, list[float]] = defaultdict(list)
        for each, amount in zip(self.trained, amounts, strict=True):
            of_ops[each.op].append(amount)
        return of_ops

    def pass_flops(self, first: int, last: int) -> float:
        """Return the FLOPs of one token in blocks `first` to `last`, exclusive, with attention to half of the context on average."""
        attention = 2 * self.source.context_length * self.description.d_model  # scores and values
        return sum(2 * parameters + attention for parameters in self.parameters[first:last])

    def loss_flops(self) -> float:
        """Return the FLOPs of the next-token loss for all layers and seeds.

        Blocks before the hook run once; later blocks run for every size of every method, for the activations, and for zeros.
        """
        flops, head = 0.0, 2 * self.description.vocab_size * self.description.d_model
        n_runs = 2 + len(self.declared) + self.n_published  # an ensemble has as many sizes as SAEs
        for layer in self.layers:
            n_before = layer + 1 if self.source.hook == "resid_post" else layer
            flops += self.pass_flops(0, n_before) + n_runs * (self.pass_flops(n_before, self.description.n_layers) + head)
        return flops * min(self.experiment.ce_loss_tokens, self.source.test_tokens) * len(self.experiment.ensemble.seeds)

    def disk(self, tokens: float) -> _Figures:
        source, d_in, keep = self.source, self.description.d_model, self.experiment.keep_residuals
        activations = self.activation_bytes(source.keep_activations)
        yield "activations", activations, f"{source.dtype}, {counted(len(self.layers), 'layer')}"
        one = stored_bytes(d_in, source.dtype, {"train": source.train_tokens}, with_origin=False)
        residuals = {"all": self.n_residuals, "last": min(self.n_residuals, 1), "none": 0}[keep] * one * self.n_partitions
        besides = one if keep == "last" and self.n_residuals > 1 else 0
        yield "residuals", residuals, f"keep_residuals: {keep}; while one is written {_bytes(besides)} more"
        saes = sum(self.weights.values()) * self.n_partitions
        yield "SAEs", saes, f"{len(self.trained) * self.n_partitions} of them{self._without_published}"
        checkpoints = 2 * 3 * max(map(sum, self.by_op(self.weights.values()).values()), default=0)
        yield "checkpoints", checkpoints, "at most, during training: a new one and the previous one"
        yield "all", tokens + activations + residuals + besides + saes + checkpoints, "at most at one time"

    def activation_bytes(self, keep: str) -> float:
        """Return the disk for the activations of all layers: test rows or all rows, and the cache of training rows on demand."""
        source, d_in = self.source, self.description.d_model
        rows = {"train": source.train_tokens, "test": source.test_tokens}
        if keep == "all":
            return stored_bytes(d_in, source.dtype, rows) * len(self.layers)
        kept = stored_bytes(d_in, source.dtype, rows, without_bytes=["train"]) * len(self.layers)
        return kept + min(self._training_bytes * len(self.layers), activation_cache_bytes())

    @property
    def _training_bytes(self) -> float:
        """The stored training rows of one layer."""
        return stored_bytes(self.description.d_model, self.source.dtype, {"train": self.source.train_tokens}, with_origin=False)

    def passes_on_demand(self) -> int:
        """Return how often the training rows of a layer are read from its activations, over all seeds, and not from a residual's bytes.

        SAEs that are trained together share a pass.
        """
        epochs = {
            op: max(each.declaration.settings.get("epochs", 1) for each in self.trained if each.op == op)
            for op in {each.op for each in self.trained}
        }
        on_residuals = {each.op for each in self.trained if each.declaration.inputs[0].artefact.address.kind != "source"}
        trainings = sum(n for op, n in epochs.items() if op not in on_residuals)
        keep = self.experiment.keep_residuals
        residuals = self.n_residuals + len(on_residuals) if keep == "none" else min(self.n_residuals, 1)
        return (trainings + residuals) * len(self.experiment.ensemble.seeds)

    def activations(self) -> _Figures:
        """What either value of `keep_activations` costs: disk, and passes of the language model."""
        once, again = self.pass_over_all(), self.flops_on_demand()
        cached = min(1.0, activation_cache_bytes() / self._training_bytes)
        yield "keep_activations: all", self.activation_bytes("all"), f"a forward pass, {once:.2g} FLOPs"
        passes = f"a forward pass, and {self.passes_on_demand()} over the training rows of each layer, {once + again:.2g} FLOPs"
        yield "keep_activations: test", self.activation_bytes("test"), f"{passes}; the cache holds {cached:.0%} of a layer"

    def pass_over_all(self) -> float:
        """Return the FLOPs of the forward pass over all tokens, for all layers."""
        return (self.source.train_tokens + self.source.test_tokens) * self.pass_flops(0, max(self.layers) + 1)

    def flops_on_demand(self) -> float:
        """Return the FLOPs of the passes over training rows that are computed when they are read, where the cache does not have them."""
        cached = min(1.0, activation_cache_bytes() / self._training_bytes)
        passes = self.passes_on_demand() * (1 - cached) + cached
        return self.source.train_tokens * passes * sum(self.pass_flops(0, layer + 1) for layer in self.layers)

    def with_little_disk(self) -> _Plan:
        """Return the plan of the same experiment without the bytes of training rows and residuals."""
        source = self.source.model_copy(update={"keep_activations": "test"})
        return replace(self, source=source, experiment=self.experiment.model_copy(update={"keep_residuals": "none"}))

    def memory(self) -> _Figures:
        batch_tokens, training = self.experiment.complete_training["batch_tokens"], [training_memory(each.config) for each in self.trained]
        needs = self.by_op(each.weights + batch_tokens * each.token for each in training)
        if needs:
            largest = max(needs, key=lambda name: max(needs[name]))
            yield "training, largest SAE", max(needs[largest]), f"{largest}; if it does not fit, batches are split"
            together = max(needs, key=lambda name: sum(needs[name]))
            note = f"{together}: {len(needs[together])} together; if they do not fit, groups are smaller"
            yield "training, largest group", sum(needs[together]), note
        saes, number = sum(self.weights.values()), _DTYPE_BYTES[self.source.language_model_dtype]
        budget = self.experiment.evaluation_memory_gb * 1e9
        note = f"at most: SAEs of one layer and seed{self._without_published}, and the limit evaluation_memory_gb"
        yield "evaluation", saes + budget, note
        blocks = sum(self.parameters[: max(self.layers) + 1]) * number
        yield "language model", blocks, "blocks up to the deepest layer; other blocks, embeddings and activations are not included"
        if self.measures_loss:
            vocabulary = self.description.vocab_size
            model = (sum(self.parameters) + vocabulary * self.description.d_model) * number
            logits = max(max(self.source.context_length, LEAST_TOKENS) * vocabulary * number, LOGIT_BYTES)
            note = "SAEs of one layer and seed, the language model, logits of a batch; ce_loss_tokens: 0 leaves it out"
            yield "next-token loss", saes + model + _COPIES_OF_LOGITS * logits, note

    def computation(self) -> _Figures:
        source = self.source
        forward = self.pass_over_all()
        is_known = not math.isnan(forward)
        yield "language model", forward, "one pass for all layers" if is_known else self.problem
        if on_demand := self.flops_on_demand() if source.keep_activations == "test" else 0.0:
            yield "activations on demand", on_demand, f"keep_activations: test, {self.passes_on_demand()} passes over the training rows"
        training: dict[str, float] = defaultdict(float)
        for _, each, config in self.trained:
            kind = each.address.name if each.address.kind == "baseline" else each.address.kind
            tokens = source.train_tokens * each.settings.get("epochs", 1)
            training[kind] += config.train_flops_per_token * tokens * self.n_partitions
        labelled = any(each.documents for each in self.experiment.ensemble.specialised)
        partial = "at most: members that see a part of the corpus count in full" if labelled else ""
        for kind, flops in training.items():
            note = {"bagging": partial, "boosting": "without round 1, which is member 1"}.get(kind, "")
            yield f"training, {kind}", flops, note
        rounds = [each for each in self.declared if each.declaration.address.kind == "boosting"][: self.n_residuals]
        residuals = sum((each.config.inference_flops_per_token * source.train_tokens * self.n_partitions for each in rounds), 0.0)
        yield "residuals", residuals, ""
        inference = sum((each.config.inference_flops_per_token for each in self.trained), 0.0)
        evaluation = inference * source.test_tokens * self.n_partitions
        yield (
            "evaluation",
            evaluation if self.trained else math.nan,
            f"encoding and decoding, without coactivation{self._without_published}",
        )
        loss = self.loss_flops() if self.measures_loss else 0.0
        if self.measures_loss:
            yield "next-token loss", loss, f"the language model with every method and size, on {self.experiment.ce_loss_tokens:,} tokens"
        some_topk = any(sae.architecture == "topk" for sae in self.experiment.saes)
        notes = ["dense equivalents; kernels for TopK take less"] if some_topk else []
        notes += [] if is_known else ["without the language model"]
        everything = (forward + on_demand if is_known else 0) + sum(training.values()) + residuals + evaluation + (loss if is_known else 0)
        yield "all", everything, "; ".join(notes)

    def reads(self) -> tuple[float, float]:
        """Return the bytes of training rows that are read from a store, and written into it, for all layers and seeds."""
        kept = self.experiment.keep_residuals != "none"
        of_source = self.passes_on_demand() / len(self.experiment.ensemble.seeds)  # for each layer and seed
        on_residuals = len({each.op for each in self.trained if each.declaration.inputs[0].artefact.address.kind != "source"})
        of_residuals = on_residuals + self.n_residuals - 1 if kept and self.n_residuals else 0
        from_store = (of_source if self.source.keep_activations == "all" else 0) + of_residuals
        activations = self.activation_bytes(self.source.keep_activations)
        written = activations + self._training_bytes * self.n_residuals * self.n_partitions * kept
        return from_store * self._training_bytes * self.n_partitions, written

    def time(self, machine: Machine, flops: Mapping[str, float | None]) -> Iterator[Line]:
        """Yield hours on a machine, with its transfers and price. One device works on a layer and seed at a time, as runs do."""
        per_hour = machine.tflops * 1e12 * 3600
        forward, everything = flops["language model"], flops["all"]
        if forward is None or everything is None:
            yield Line("time", "all", None, "hours", self.problem)
            return
        at_once = min(machine.devices, self.n_partitions)
        turns = math.ceil(self.n_partitions / machine.devices)
        first, rest = forward / per_hour, turns * (everything - forward) / self.n_partitions / per_hour
        sustained = f"{machine.tflops:g} TFLOP/s of each device, without waiting for disks"
        yield Line("time", "language model", first, "hours", "on one device: one forward pass for all layers")
        yield Line(
            "time", "training, evaluation", rest, "hours", f"{counted(self.n_partitions, 'layer and seed run')}, {at_once} at a time"
        )
        yield Line("time", "all", first + rest, "hours", sustained)
        read, written = self.reads()
        pace = read / self.n_partitions * turns / (rest * 3600) if rest else 0.0
        yield Line("time", "read from stores", read, "bytes", f"{_bytes(pace)}/s for each device, or it waits")
        yield Line("time", "written", written, "bytes", "activations and residuals")
        if machine.price is not None:
            used = first + (everything - forward) / per_hour
            yield Line("time", "price", used * machine.price, "money", f"{used:,.3g} device hours that are used, {machine.price:g} each")


def _weights_bytes(config: SAEConfig) -> int:
    """Return the bytes of a saved SAE, without its configuration and curve."""
    import torch

    from saeens_models.architectures import sae_class

    with torch.device("meta"):
        sae = sae_class(config.architecture)(config)
    return sum(weight.nbytes for weight in sae.state_dict().values())


def _fits(amounts: Mapping[tuple[str, str], float | None], store: Store, compute: Compute) -> Iterator[Line]:
    free, needed = free_bytes(store.root), amounts["disk", "all"]
    if needed is None:
        verdict = "not known whether that is enough"
    else:
        verdict = "enough" if needed <= free else f"{_bytes(needed - free)} too little"
    yield Line("fits", "free disk", free, "bytes", f"{verdict}, below {store.root}")
    if gpu := compute.gpu():
        name, memory = gpu
        yield Line("fits", name, memory, "bytes", _at_once(amounts, memory))


def _with_less_disk(plan: _Plan, tokens: float, free: float) -> Iterator[Line]:
    """Yield a proposal for a disk that is too small: the need of the experiment without the bytes that can be computed again."""
    declared, little = ({item: n for item, n, _ in each.disk(tokens)}["all"] for each in (plan, plan.with_little_disk()))
    if free < declared and little < declared:
        verdict = "enough" if little <= free else f"{_bytes(little - free)} too little"
        how = "keep_activations: test, mixing: contiguous, keep_residuals: none"
        yield Line(
            "fits", "with less disk", little, "bytes", f"{verdict}: {how}, for {plan.with_little_disk().flops_on_demand():.2g} FLOPs more"
        )


def _at_once(amounts: Mapping[tuple[str, str], float | None], memory: float) -> str:
    """Return a note on how training fits into the memory of a device."""
    one, together = (amounts.get(("memory", f"training, largest {of}"), 0.0) for of in ("SAE", "group"))
    if one is None or together is None:
        return "unknown, because sizes are unknown"
    if together <= memory:
        training = "every group of SAEs at once"
    else:
        training = "SAEs in smaller groups" if one <= memory else "the largest SAE with split batches, if its weights fit"
    too_large = [item for item in ("language model", "next-token loss") if (amounts.get(("memory", item)) or 0) > memory]
    return "; ".join([training, *(f"too little for the {item}" for item in too_large)])
