"""Tokens and activations of a source."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import (
    Declaration,
    ExternalData,
    Input,
    Op,
    Reference,
    RunContext,
    SourceFacts,
    Task,
    Wanted,
    with_file,
)
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.chat_templates import ChatTemplate, read_chat_template
from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.language_models.descriptions import HOOKS, TRANSFORMER_LENS, LanguageModelDescription, validate_hook
from saeens_pipeline.language_models.documents import Corpus, RecordCorpus
from saeens_pipeline.language_models.gguf_loading import dequantise
from saeens_pipeline.language_models.mixtures import MixedCorpus
from saeens_pipeline.language_models.models import describe_language_model, quantisation
from saeens_pipeline.language_models.pinned_packages import PinnedPackages
from saeens_pipeline.language_models.synthetic import FEATURES_FILE, describe_synthetic, write_synthetic_activations
from saeens_pipeline.language_models.tokens import open_tokens, validate_token_settings, write_tokens
from saeens_pipeline.settings.corpora import corpus_name, has_messages
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.files import blamed_on
from saeens_pipeline.settings.sources import SourceSettings
from saeens_pipeline.storage.locks import writing_if_free
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import Artefact, Store

TOKENS_VERSION = 1
ACTIVATIONS_VERSION = 3

NEEDS_HUB = {"saeens/needs": "hub"}
"""Tag of assets whose language model or texts are on the hub."""

_TOKEN_FIELDS = ("context_length", "packing", "windows_per_document", "drop", "train_tokens", "test_tokens")


def activations_of(source: str) -> Reference:
    """Return a reference to the activations of a source."""
    return Reference(Address(source, "source", "activations"), "layer")


def tokens_of(source: str) -> Reference:
    """Return a reference to the tokens of a source."""
    return Reference(Address(source, "source", "tokens"), "none")


def declared_facts(settings: SourceSettings) -> SourceFacts:
    """Return a source's facts from its settings. Raises as `describe_language_model`."""
    description = describe_source(settings)
    d_in = description.d_model if settings.hook in HOOKS else None
    return SourceFacts(lambda: description, settings.hook, settings.drop, d_in, tokens=None, prepend_bos=settings.prepend_bos)


def recorded_facts(store: Store, source: str, layer: int | None) -> SourceFacts:
    """Return a source's facts from the records of its activations and tokens. `describe_model` raises as `language_model_of`."""
    activations = activations_of(source).require(store, Partition(layer))
    tokens = None if is_synthetic(activations) else tokens_of(source).require(store, Partition())
    hook, windows = activations.recipe["settings"]["hook"], tokens.recipe["settings"] if tokens else {}
    d_in = len(activations.provenance["statistics"]["train"]["mean"])
    return SourceFacts(
        partial(language_model_of, activations),
        hook,
        windows.get("drop", []),
        d_in,
        tokens.path if tokens else None,
        prepend_bos=windows.get("prepend_bos", False),
        patching_problem=recorded_patching_problem(activations),
    )


def sae_metadata(store: Store, source: str, partition: Partition) -> dict[str, Any]:
    """Return the metadata of an SAE of these activations: language model, hook, layer, context size and data set, for SAELens and SAEBench.

    SAELens passes `model_name` to loaders and makes file names of it: it is a string. The model's hashes have a key of their own.
    """
    layer = partition.layer
    activations = activations_of(source).require(store, partition).recipe["settings"]
    hook, windows = activations["hook"], activations  # synthetic activations have no tokens
    if "synthetic" not in activations:
        windows = tokens_of(source).require(store, partition).recipe["settings"]
    return {
        "model_name": activations["language_model"]["name"].removeprefix(TRANSFORMER_LENS),
        "language_model": activations["language_model"],
        "hook_name": hook.format(layer=layer) if "{layer}" in hook else f"blocks.{layer}.hook_{hook}",
        "hook_layer": layer,
        "context_size": windows["context_length"],
        "dataset_path": windows["corpus"]["corpus"] if "corpus" in windows else activations["language_model"]["name"],
        "weights": activations["weights"],
    }


def is_synthetic(activations: Artefact) -> bool:
    """Return True for synthetic activations, whose features are known: they have no tokens and no language model."""
    return "synthetic" in activations.recipe["settings"]


def true_features(activations: Artefact) -> Path:
    """Return the safetensors file with the true features of synthetic activations, `W_dec` and `firing_rate`."""
    return activations.path / FEATURES_FILE


def recorded_patching_problem(activations: Artefact) -> str:
    """Return why these activations cannot be replaced in the language model; empty if they can, or if it was not recorded."""
    return activations.provenance.get("patching_problem", "")


def measures_loss(experiment: ExperimentSettings, model: LanguageModelDescription, patching_problem: str = "") -> bool:
    """Return True if the next-token loss of the language model can be measured with a reconstruction in place of the activations.

    Raises ConfigurationError if it cannot and the experiment file sets `ce_loss_tokens` to more than 0.
    """
    try:
        if not model.has_head:
            raise ConfigurationError(
                f"ce_loss_tokens: {experiment.ce_loss_tokens}, but {model.name} has no language-modelling head, which predicts tokens: "
                "set it to 0, or take the model's files with a head, those of a class that ends in ForCausalLM"
            )
        if patching_problem:
            raise ConfigurationError(
                f"ce_loss_tokens: {experiment.ce_loss_tokens}, but {patching_problem}. Set it to 0, or take another hook"
            )
    except ConfigurationError:
        if experiment.ce_loss_tokens and "ce_loss_tokens" in experiment.model_fields_set:
            raise
        return False
    return True


def language_model_of(made: Artefact) -> LanguageModelDescription:
    """Return the description of the language model of activations or tokens, read from its present files.

    Raises ConfigurationError if the language model no longer exists, SaeensError if its files have changed.
    """
    settings = made.recipe["settings"]
    identity = settings["tokenizer"] if "tokenizer" in settings else settings["language_model"]
    description = describe_language_model(identity["name"], identity["revision"], "random")  # changed weights change the identity
    if description.identity != identity:
        raise SaeensError(f"the files of {description.name} have changed since {made.path} was computed from them: compute it again first")
    return description


def source_ops(settings: SourceSettings) -> list[Op]:
    """Declare the ops of a source: tokens and activations or, of a synthetic source, activations alone."""
    return _synthetic_ops(settings) if settings.synthetic else _text_ops(settings)


def _text_ops(settings: SourceSettings) -> list[Op]:
    """Declare the two ops of a source of text. Identities of language model and corpus are read when a recipe is computed."""
    n_rows = settings.train_tokens + settings.test_tokens
    tags = {"source": settings.name} | (NEEDS_HUB if settings.needs_hub else {})
    language_model, corpus_read = _external(settings)
    tokens = Declaration(
        **vars(tokens_of(settings.name)),
        builder="tokens",
        version=TOKENS_VERSION,
        settings=settings.model_dump(include={"corpus", "language_model", "revision"}) | _token_settings(settings),
        partition_settings=lambda partition: {
            "corpus": open_corpus(settings.corpus).identity,
            "tokenizer": describe_source(settings).identity,
            **_identity_of_chats(settings),
        },
        inputs=(),
        external={"language_model": language_model._replace(settings=("tokenizer",)), "corpus": corpus_read},
        source=settings.name,
        kinds=frozenset({"zarr"}),
        tags=tags,
        description=f"Token ids of {corpus_name(settings.corpus)} in windows of {settings.context_length}\n\n"
        "Held-out documents give the test split.",
    )
    activations = Declaration(
        **vars(activations_of(settings.name)),
        builder="activations",
        version=ACTIVATIONS_VERSION,
        settings=_settings_of_activations(settings),
        partition_settings=lambda partition: {"layer": partition.layer, "language_model": describe_source(settings).identity},
        inputs=(Input("tokens", tokens),),
        external={"language_model": language_model},
        source=settings.name,
        kinds=frozenset({"zarr", "pytorch"}),
        tags=tags,
        description=f"{settings.hook} of {settings.language_model} by layer, {settings.weights} weights\n\n"
        f"One row per kept token, in {settings.dtype}; one forward pass serves all layers that are requested together.",
    )

    def make_tokens(context: RunContext, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        description = describe_source(settings)
        _check_hook(settings, description)  # before hours of work on tokens
        provenance, writing = context.provenance(task.declaration), context.store.write_folder
        with writing(*task.where, task.recipe, provenance) as folder, progress.task(str(tokens.address), n_rows) as advance:
            corpus = open_corpus(settings.corpus, *_chat_template(settings))
            statistics = write_tokens(
                folder,
                corpus,
                description,
                **_token_settings(settings),
                report=progress.differences(advance),
            )
            provenance["statistics"] = asdict(statistics)
            provenance.update(_found_in(corpus))

    def make_activations(context: RunContext, tasks: Sequence[Task]) -> None:
        from saeens_pipeline.language_models.caching import cache_activations
        from saeens_pipeline.language_models.loading import load_language_model
        from saeens_pipeline.language_models.patching import patching_problem

        store, writing = context.store, {"versioned_content": settings.keep_activations == "all", "resumable": True}
        description = describe_source(settings)
        model = load_language_model(description, settings.weights, context.compute.resolve(), settings.language_model_dtype)
        token_store = open_tokens(tokens.require(store, Partition()).path)
        with contextlib.ExitStack() as stack:
            tasks = [*tasks, *_other_requested_layers(context, tasks[0], range(description.n_layers), stack)]
            layers = {layer: (task, context.provenance(task.declaration)) for task in tasks if (layer := task.partition.layer) is not None}
            label = f"{activations.address}, layer {', '.join(map(str, layers))}"
            folders = {
                layer: stack.enter_context(store.write_folder(*task.where, task.recipe, provenance, **writing))
                for layer, (task, provenance) in layers.items()
            }
            with context.compute.measure() as measured, progress.task(label, n_rows) as advance:
                statistics = cache_activations(
                    model,
                    token_store,
                    settings.hook,
                    folders,
                    settings.dtype,
                    max_norm=settings.max_norm,
                    without_bytes=["train"] if settings.keep_activations == "test" else [],
                    report=progress.differences(advance),
                )
            for layer, (_, provenance) in layers.items():
                problem = patching_problem(model, settings.hook, [layer]) if description.has_head else ""
                provenance.update({"patching_problem": problem} if problem else {})
                provenance.update(vars(measured), layers_in_one_pass=len(layers))
                provenance["statistics"] = {split: each.to_json() for split, each in statistics[layer].items()}

    def _other_requested_layers(context: RunContext, first: Task, there_are: Collection[int], stack: contextlib.ExitStack) -> list[Task]:
        """Return the tasks of other requested layers that are missing and not in another process: one forward pass serves all layers.

        Their health is checked in their own runs, where they are cache hits.
        """
        store = context.store
        others = [Partition(layer) for layer in context.requested_layers() if layer != first.partition.layer and layer in there_are]
        tasks = [Task(activations, partition, activations.recipe(store, partition)) for partition in others]
        missing = [task for task in tasks if not context.hit(task)]
        free = [task for task in missing if stack.enter_context(writing_if_free(store.root, *task.where))]
        return [task for task in free if not context.hit(task)]  # another process may have computed them before the lock

    def check_tokens(*_: Any) -> None:
        _require_text(settings)

    def check_activations(_: Store, wanted: Wanted, *_facts: Any) -> None:
        from saeens_pipeline.language_models.loading import validate_modules

        layers = [partition.layer for _, partition in wanted if partition.layer is not None]
        validate_modules(_loadable(settings, validate_source(settings, layers)), settings.hook, layers, settings.weights)

    of_tokens = Op(tokens.address.op_name, (tokens,), make_tokens, preflight=check_tokens)
    of_activations = Op(activations.address.op_name, (activations,), make_activations, on_device=True, preflight=check_activations)
    return with_file([of_tokens, of_activations], settings)


def _external(settings: SourceSettings) -> tuple[ExternalData, ExternalData]:
    """Return the language model and the corpus of a source, as activations and tokens are computed from them."""
    name = settings.language_model if settings.revision == "main" else f"{settings.language_model} at {settings.revision}"
    observed = "Observed, not computed: a hash of the files or, on the hub, the commit in its cache."
    return (
        ExternalData(f"Language model {name}\n\n{observed}", ("language_model",)),
        ExternalData(f"Corpus {corpus_name(settings.corpus)}\n\n{observed}", ("corpus", "chat_template")),
    )


def _synthetic_ops(settings: SourceSettings) -> list[Op]:
    """Declare the op of synthetic activations, which has no inputs."""
    activations = Declaration(
        **vars(activations_of(settings.name)),
        builder="activations",
        version=ACTIVATIONS_VERSION,
        settings=settings.model_dump(include={"weights", "dtype", "context_length", "train_tokens", "test_tokens", "synthetic"})
        | {"revision": "main", "hook": "synthetic"}
        | ({} if settings.max_norm is None else {"max_norm": settings.max_norm}),
        partition_settings=lambda partition: {"layer": partition.layer, "language_model": describe_source(settings).identity},
        inputs=(),
        source=settings.name,
        kinds=frozenset({"zarr"}),
        tags={"source": settings.name},
        description=f"Synthetic activations with known features\n\nIn {settings.dtype}, with the true features in {FEATURES_FILE}.",
    )

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        provenance, n_rows = context.provenance(task.declaration), settings.train_tokens + settings.test_tokens
        with context.store.write_folder(*task.where, task.recipe, provenance, resumable=True) as folder:
            with context.compute.measure() as measured, progress.task(str(activations.address), n_rows, "rows") as advance:
                statistics = write_synthetic_activations(folder, settings, progress.differences(advance))
            provenance.update(vars(measured), statistics={split: each.to_json() for split, each in statistics.items()})

    def check(_: Store, wanted: Wanted, *_facts: Any) -> None:
        validate_source(settings, [partition.layer for _, partition in wanted if partition.layer is not None])

    return with_file([Op(activations.address.op_name, (activations,), make, preflight=check)], settings)


def describe_source(settings: SourceSettings) -> LanguageModelDescription:
    """Describe the language model of a source. Raises as `describe_language_model`."""
    if settings.synthetic:
        return describe_synthetic(settings.synthetic)
    return describe_language_model(str(settings.language_model), settings.revision, settings.weights)


def validate_source(settings: SourceSettings, layers: Sequence[int]) -> LanguageModelDescription:
    """Check that the language model exists, has these layers and this hook, and takes the source's tokens; return its description.

    Raises ConfigurationError or SaeensError, before any work.
    """
    with blamed_on(settings, "language_model"):
        description = describe_source(settings)
    require_hook(settings, description, layers)
    if not settings.synthetic:
        _require_windows(settings, description)
    return description


def require_hook(settings: SourceSettings, description: LanguageModelDescription, layers: Sequence[int]) -> None:
    """Raise ConfigurationError, with the line of the experiment file, for a layer or a named hook that the model does not have."""
    missing = [layer for layer in layers if not 0 <= layer < description.n_layers]
    with blamed_on(settings, "layers" if missing else "hook", is_from_file=set(missing) <= set(settings.layers)):
        validate_hook(description, settings.hook, layers)


def _require_text(settings: SourceSettings) -> None:
    """Raise an error, before any work, for a language model or a corpus that cannot be read, and for invalid settings of windows."""
    with blamed_on(settings, "language_model"):
        description = describe_source(settings)
    _require_windows(settings, description)
    _require_corpus(settings)
    _loadable(settings, description)


def _require_windows(settings: SourceSettings, description: LanguageModelDescription) -> None:
    """Raise ConfigurationError, with the line of the experiment file, for settings of windows that the language model does not allow."""
    try:
        validate_token_settings(description, **_token_settings(settings))
    except ConfigurationError as error:
        field, _, what = str(error).partition(": ")
        if field not in type(settings).model_fields:
            raise
        with blamed_on(settings, field):
            raise ConfigurationError(what) from None


def _loadable(settings: SourceSettings, description: LanguageModelDescription) -> LanguageModelDescription:
    """Dequantise a GGUF file at its first use. Raises as `dequantise`, with the line of the experiment file."""
    with blamed_on(settings, "language_model"):
        dequantise(description)
    return description


def _require_corpus(settings: SourceSettings) -> None:
    """Raise an error if the corpus cannot be read: for a data set of the hub, if the hub can be reached."""
    template = _chat_template(settings)
    with blamed_on(settings, "corpus"):
        corpus = open_corpus(settings.corpus, *template)
        if not isinstance(corpus, MixedCorpus):
            corpus.require_readable()
            return
    for i, part in enumerate(corpus.parts):
        with blamed_on(settings, ("corpus", i)):
            part.corpus.require_readable()


def _found_in(corpus: Corpus | MixedCorpus) -> dict[str, Any]:
    """Return what reading a corpus has shown, for the record of tokens."""
    if isinstance(corpus, MixedCorpus):
        return {"composition": corpus.composition()}
    if isinstance(corpus, PinnedPackages):
        return {"corpus": corpus.summary()}
    return {"records_without_text": dict(corpus.skipped)} if isinstance(corpus, RecordCorpus) and corpus.skipped else {}


def _identity_of_chats(settings: SourceSettings) -> dict[str, Any]:
    """Return the part of a recipe for conversations: the hash of the chat template; empty for a corpus without them."""
    return {"chat_template": dict(template.identity) for template in _chat_template(settings)}  # noqa: B035  # one or none


def _chat_template(settings: SourceSettings) -> list[ChatTemplate]:
    """Return the chat template if the corpus has conversations, or nothing. Raises as `read_chat_template`, with the line of the file."""
    with blamed_on(settings, "corpus"):
        return [read_chat_template(describe_source(settings))] if has_messages(settings.corpus) else []


def _token_settings(settings: SourceSettings) -> dict[str, Any]:
    """Return the settings of windows of tokens. `prepend_bos` is left out if false, so that older recipes stay valid."""
    return settings.model_dump(include=set(_TOKEN_FIELDS)) | ({"prepend_bos": True} if settings.prepend_bos else {})


def _settings_of_activations(settings: SourceSettings) -> dict[str, Any]:
    """Return the settings of a recipe. Later fields are left out at their defaults, so that older recipes stay valid."""
    later = settings.model_dump(include={"language_model_dtype", "max_norm"}, exclude_defaults=True)
    return settings.model_dump(include={"language_model", "revision", "hook", "weights", "dtype"}) | later


def _check_hook(settings: SourceSettings, description: LanguageModelDescription) -> None:
    """Load the language model and check its hook, except for quantised weights, which may need a GPU."""
    from saeens_pipeline.language_models.loading import load_language_model

    if settings.weights == "random" or not quantisation(description):
        model = load_language_model(description, settings.weights, dtype=settings.language_model_dtype)
        model.check(settings.hook, settings.layers)
