"""Experiment files for `saeens new`: the model's sizes are filled in, and every field has a comment."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from saeens_models import TrainingConfig
from saeens_models.architectures import architectures, settings_class
from saeens_pipeline import defs
from saeens_pipeline.assets.catalogue import Experiments
from saeens_pipeline.assets.experiments import validate_saes
from saeens_pipeline.assets.sources import validate_source
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.descriptions import REFERENCE_MODEL, LanguageModelDescription, validate_hook
from saeens_pipeline.language_models.gguf_models import SMOLLM2
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.settings import ExperimentSettings, SourceSettings
from saeens_pipeline.settings.corpora import BUILTIN_CORPORA, BUILTIN_CORPUS, BUILTIN_PROSE, is_hub_name
from saeens_pipeline.settings.experiments import EnsembleSettings
from saeens_pipeline.settings.files import FOLDERS_VARIABLE, MODELS, find_files, own_folders
from saeens_pipeline.settings.messages import in_words
from saeens_pipeline.storage.names import validate_name

HOOK = "resid_post"
MAX_CONTEXT_LENGTH = 2048  # longer windows cost memory and add little
TRAIN_TOKENS, TEST_TOKENS = 1_000_000, 50_000
EXPANSION = 8
_PROPOSED = {REFERENCE_MODEL: BUILTIN_CORPUS, SMOLLM2: BUILTIN_PROSE}
DIMENSIONS_PER_FEATURE = 24  # d_in / k, about that of the quickstart; k is rounded to a power of two


class NewExperiment(NamedTuple):
    """The path of a new experiment file. `is_read`: the file is in a folder from which experiments are read."""

    path: Path
    is_read: bool


def new_experiment(name: str, model: str, layers: Sequence[int], output: Path | None = None, corpus: str | None = None) -> NewExperiment:
    """Write an experiment file for `model`, a value of `language_model`. For a model on the hub, download its configuration, no weights.

    `corpus` is a builtin one, a data set on the hub, or files. Without it, a builtin corpus is proposed for a builtin model, and for other
    models a pattern of files to replace. The file is `output`, or NAME.yaml in the first folder of SAEENS_EXPERIMENTS, or a file in the
    checkout. Nothing is overwritten.
    Raises ConfigurationError for a name in use or not allowed, an unknown model, and layers that the model does not have.
    """
    path = _free_path(Experiments.load(), [name], output)
    description = describe_language_model(str(Path(model).expanduser().absolute()) if Path(model).expanduser().exists() else model)
    validate_hook(description, HOOK, layers)
    text = render(name, description, layers, corpus_of(corpus, description.name))
    _validate(text, description)
    return _write(path, text)


def copy_experiment(name: str, like: str, output: Path | None = None) -> NewExperiment:
    """Copy the file of the experiment `like`, comments included, with its name replaced in the names of its sources and experiments.

    A source of another file stays that source. `output` as for `new_experiment`.
    Raises ConfigurationError for an unknown experiment, and for a name in use or not allowed.
    """
    catalogue = Experiments.load()
    file = catalogue.named(like)[0].file
    assert file is not None, "experiments of the catalogue are read from files"
    text = file.read_text(encoding="utf-8")
    names = [document["attributes"]["name"] for document in yaml.safe_load_all(text)]
    renamed = {each: name + each.removeprefix(like) if each.startswith(like) else f"{name}_{each}" for each in names}
    path = _free_path(catalogue, list(renamed.values()), output)
    pattern = re.compile(rf"^(\s+(?:name|source): *)({'|'.join(map(re.escape, renamed))})(?= *(?:#|$))", re.MULTILINE)
    return _write(path, pattern.sub(lambda found: found[1] + renamed[found[2]], text).replace(f"saeens plan {like}", f"saeens plan {name}"))


def _free_path(catalogue: Experiments, names: Sequence[str], output: Path | None) -> Path:
    """Return the path of a new file. Raises ConfigurationError for a name that is in use or not allowed, and for a file that exists."""
    experiments, sources = {*catalogue.experiments, *catalogue.following}, {*catalogue.sources, *catalogue.followed}
    for name in names:
        try:
            validate_name(name)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        for kind, taken in (("an experiment", experiments), ("a source", sources)):
            if name in taken:
                raise ConfigurationError(f"there already is {kind} called {name!r}: choose another name, or edit its file")
    path = (output or _default_path(names[0])).expanduser().absolute()
    if path.exists():
        raise ConfigurationError(f"{path} exists and is not overwritten: choose another name or --output")
    return path


def _write(path: Path, text: str) -> NewExperiment:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SaeensError(f"{path} cannot be written ({error.strerror}): choose another file with --output") from error
    return NewExperiment(path, path.resolve() in [each.resolve() for each in find_files()])


def parse_layers(given: Sequence[str]) -> list[int]:
    """Return layers from comma-separated numbers. Raises ConfigurationError for anything else."""
    parts = [part.strip() for each in given for part in each.split(",")]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise ConfigurationError(f"--layers: {wrong[0]!r} is not a layer; give whole numbers from 0, such as 2,4,6")
    return [int(part) for part in parts]


def corpus_of(given: str | None, model: str) -> str | dict[str, str]:
    """Return the field `corpus`. Files are absolute: the new file may be in another folder than the shell."""
    if given is None:
        return _PROPOSED.get(model, {"files": "texts/*.jsonl", "text_field": "text"})
    if given in BUILTIN_CORPORA:
        return given
    if given.lstrip().startswith(("{", "[{")):
        raise ConfigurationError("--corpus takes one name, file or pattern: write a mixed corpus into the experiment file afterwards")
    path = Path(given).expanduser()
    if is_hub_name(given) and "/" in given and not path.suffix and not path.exists():
        return {"name": given, "split": "train"}
    return {"files": str(path.absolute())}


def render(name: str, description: LanguageModelDescription, layers: Sequence[int], corpus: str | dict[str, str] = BUILTIN_CORPUS) -> str:
    """Return the text of the file: the model's own sizes, sensible values for the rest, and the meaning of every field."""
    width, context = description.d_model, description.context_length
    source: dict[str, Any] = {
        "name": name,
        "language_model": description.name,
        "corpus": corpus,
        "layers": sorted(layers),
        "context_length": min(context or MAX_CONTEXT_LENGTH, MAX_CONTEXT_LENGTH),
        "packing": "document" if description.end_of_text is None else "concatenate",  # windows across documents need a separator
        "drop": ["first"],
        "train_tokens": TRAIN_TOKENS,
        "test_tokens": TEST_TOKENS,
        "max_norm": 10,
    }
    experiment: dict[str, Any] = {
        "name": name,
        "source": name,
        "sae": {"architecture": "topk", "expansion": EXPANSION, "k": 2 ** round(math.log2(max(1.0, width / DIMENSIONS_PER_FEATURE)))},
        "training": {
            "learning_rate": 1.0e-3,
            "learning_rate_warmup_fraction": 0.05,
            "learning_rate_decay_fraction": 0.2,
            "batch_tokens": 1024,
            "normalize_activations": "expected_average_only_in",
        },
        "ensemble": {"members": 8, "seeds": [42, 43]},
    }
    head = [
        f"# {name}: ensembles of SAEs on {' '.join(description.name.split())}",
        f"# {description.model_type}, {description.n_layers} layers, d_in {width:_}, "
        f"context {f'{context:_}' if context else 'without limit'}, vocabulary {description.vocab_size:_}.",
        f"# Layers of 0 to {description.n_layers - 1}; d_sae = {EXPANSION} * {width} = {EXPANSION * width:_}; "
        f"{(TRAIN_TOKENS + TEST_TOKENS) * width * 2 / 1e9:.2g} GB of disk for the activations of each layer.",
        f"# `saeens run {name}` computes everything; `saeens experiments` reports a wrong file with its line.",
    ]
    nested = {"sae": settings_class("topk"), "training": TrainingConfig, "ensemble": EnsembleSettings}
    fields = (_fields(SourceSettings.model_fields, source), _fields(ExperimentSettings.model_fields, experiment, nested))
    documents = ("\n".join([f"type: {kind}", "attributes:", *lines]) for kind, lines in zip(MODELS, fields, strict=True))
    return "\n".join([*head, "\n---\n".join(documents), ""])


def _fields(
    fields: Mapping[str, FieldInfo], values: Mapping[str, Any], nested: Mapping[str, type[BaseModel]] | None = None, indent: str = "  "
) -> Iterator[str]:
    """Yield a line of YAML for each field, with its meaning. A field without a value is a comment with its default."""
    for name, field in fields.items():
        about = "; ".join(filter(None, [(field.description or "").rstrip("."), _alternatives(name, field.annotation)]))
        about = about.replace("``", "`")  # descriptions are reStructuredText
        meaning = f" # {' '.join(about.split())}" if about else ""
        value = values.get(name)
        if isinstance(value, dict) and nested:
            yield f"{indent}{name}:{meaning}"
            shown = {each: f for each, f in nested[name].model_fields.items() if each in value or name == "ensemble"}
            yield from _fields(shown, value, indent=f"{indent}  ")
        elif name in values:
            yield f"{indent}{name}: {_yaml(value)}{meaning}"
        else:
            yield f"{indent}# {name}: {_yaml(field.get_default(call_default_factory=True))}{meaning}"


def _alternatives(name: str, annotation: Any) -> str:
    # the annotation of `architecture` has its own name only: each architecture has its own fields
    allowed = architectures() if name == "architecture" else get_args(annotation) if get_origin(annotation) is Literal else ()
    return f"one of {', '.join(map(str, allowed))}" if allowed else ""


def _yaml(value: Any) -> str:
    """Return a value as YAML on one line; whole numbers from 10,000 on with underscores."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, int) and value >= 10_000:
        return f"{value:_}"
    if value in ("on", "off"):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True).removesuffix("...\n").strip()


def _validate(text: str, description: LanguageModelDescription) -> None:
    """Raise ConfigurationError unless the file can be read and run as it is."""
    source, experiment = (document["attributes"] for document in yaml.safe_load_all(text))
    try:
        settings = SourceSettings.model_validate(source)
        validate_saes(ExperimentSettings.model_validate(experiment), description.d_model)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {in_words(dict(each))}" for each in error.errors())
        raise ConfigurationError(reasons) from None
    validate_source(settings, settings.layers)


def _default_path(name: str) -> Path:
    for folder in own_folders():
        return folder / f"{name}.yaml"
    checkout = Path(next(iter(defs.__path__)))
    if not (checkout.parents[1] / "pyproject.toml").exists():
        raise ConfigurationError(f"this is not a checkout: give --output, or set {FOLDERS_VARIABLE} to a folder for experiment files")
    return checkout / name / "defs.yaml"
