"""Finding and reading of experiment files. Errors name the path, the line and the field."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from saeens_pipeline import defs
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.settings.corpora import CORPORA
from saeens_pipeline.settings.experiments import ExperimentSettings, allowed_sae_keys, allowed_training_keys
from saeens_pipeline.settings.from_file import FILE
from saeens_pipeline.settings.sources import SourceSettings

FOLDERS_VARIABLE = "SAEENS_EXPERIMENTS"
_SHIPPED = "shipped/"
Settings = SourceSettings | ExperimentSettings
MODELS: dict[str, type[Settings]] = {
    "saeens_pipeline.components.ActivationSource": SourceSettings,
    "saeens_pipeline.components.EnsembleExperiment": ExperimentSettings,
}
"""The `type` of a document and the model of its attributes."""
Location = Sequence[int | str]


def own_folders() -> list[Path]:
    """Return the folders in SAEENS_EXPERIMENTS, separated as in PATH. Raises ConfigurationError for a folder that does not exist."""
    folders = [Path(each).expanduser().absolute() for each in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if each.strip()]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigurationError(f"{FOLDERS_VARIABLE}: there is no folder {folder}: create it, or change {FOLDERS_VARIABLE}")
    return folders


def find_files() -> list[Path]:
    """Return every experiment file: the shipped `*/defs.yaml`, then `*.yaml` and `*/defs.yaml` of each folder in SAEENS_EXPERIMENTS."""
    files = [file for root in defs.__path__ for file in sorted(Path(root).glob("*/defs.yaml"))]
    files += [file for folder in own_folders() for file in sorted([*folder.glob("*.yaml"), *folder.glob("*/defs.yaml")])]
    return list({file.resolve(): file for file in reversed(files)}.values())[::-1]  # a folder may be listed twice


def recorded_file(path: Path | None) -> str:
    """Return the name of an experiment file in records: its path, or `shipped/...` for a file of the package; empty for None."""
    if path is None:
        return ""
    for root in map(Path, defs.__path__):
        if path.is_relative_to(root):
            return f"{_SHIPPED}{path.relative_to(root).as_posix()}"
    return str(path.resolve())


def unread_folder(recorded: str) -> Path | None:
    """Return the folder of a recorded experiment file if no experiments are read from it now, otherwise None."""
    if not recorded or recorded.startswith(_SHIPPED):
        return None
    file = Path(recorded)
    folders = {file.parent, file.parent.parent} if file.name == "defs.yaml" else {file.parent}  # as find_files looks
    return None if folders.intersection(each.resolve() for each in own_folders()) else file.parent


def experiment_name(path: Path) -> str:
    """Return the name of an experiment file: of `defs.yaml` its folder's name, of others the file name without suffix."""
    return path.parent.name if path.name == "defs.yaml" else path.stem


class ExperimentFile:
    """One experiment file: YAML documents with a type and attributes. Raises ConfigurationError for a file that is not plain YAML."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            nodes = yaml.compose_all(path.read_text(encoding="utf-8"), yaml.SafeLoader)
            self._documents = [(node, _construct(node)) for node in nodes if node is not None]
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            began = f", {error.context}, line {error.context_mark.line + 1}" if error.context and error.context_mark else ""
            raise ConfigurationError(f"{path}:{mark.line + 1 if mark else 1}: {error.problem}{began}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigurationError(f"{path}: {error}") from None
        except RecursionError:
            raise ConfigurationError(f"{path}: a value contains itself: write it out instead of using & and *") from None
        if not self._documents:
            raise ConfigurationError(f"{path}: the file is empty; it needs type: and attributes:")

    def settings(self) -> list[Settings]:
        """Return the settings of all documents. Raises ConfigurationError with one line for each invalid field of each document."""
        read: list[Settings] = []
        wrong: list[str] = []
        for document, content in self._documents:
            try:
                read.append(self._settings(document, content))
            except ConfigurationError as error:
                wrong.append(str(error))
        if wrong:
            raise ConfigurationError("\n".join(wrong))
        return read

    def complaint(self, settings: Settings, field: str | Location, message: str) -> str:
        """Return a message with path and line about one field of settings that were read from this file."""
        for document, content in self._documents:
            if content["attributes"].get("name") == settings.name and MODELS[content["type"]] is type(settings):
                return self._message(document, ("attributes", *([field] if isinstance(field, str) else field)), message)
        raise KeyError(settings.name)

    def _settings(self, document: yaml.Node, content: Any) -> Settings:
        for mapping in _mappings(document):
            keys = [key.value for key, _ in mapping.value]
            for i, (key, _) in enumerate(mapping.value):
                if key.value in keys[:i]:
                    raise ConfigurationError(f"{self.path}:{key.start_mark.line + 1}: {key.value} is given twice")
        if not isinstance(content, dict) or not isinstance(content.get("attributes"), dict):
            raise ConfigurationError(self._message(document, (), "a document needs type: and attributes: with fields below it"))
        model = MODELS.get(str(content.get("type")))
        if model is None:
            found = f"{content['type']!r} is unknown" if "type" in content else "missing"
            raise ConfigurationError(self._message(document, ("type",), f"{found}; one of: {', '.join(MODELS)}"))
        for key in content.keys() - {"type", "attributes"}:
            raise ConfigurationError(self._message(document, (key,), "unknown key; one of: type, attributes"))
        try:
            return model.model_validate(content["attributes"], context={FILE: self.path.absolute()})
        except ValidationError as error:
            lines = [self._explain(document, model, content["attributes"], dict(each)) for each in error.errors()]
            raise ConfigurationError("\n".join(lines)) from None

    def _explain(self, document: yaml.Node, model: type[BaseModel], attributes: dict[str, Any], error: dict[str, Any]) -> str:
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = f"unknown key; one of: {', '.join(_allowed_keys(model, attributes, error['loc'][:-1]))}"
        if error["type"] != "missing" and not isinstance(error["input"], dict):
            message += f" (found: {error['input']!r})"
        location = ("corpus", *error["loc"][2:]) if error["loc"][:1] == ("corpus",) else error["loc"]  # without pydantic's tag of its kind
        return self._message(document, ("attributes", *location), message)

    def _message(self, document: yaml.Node, location: Location, message: str) -> str:
        field = f" {'.'.join(map(str, location))}:" if location else ""
        return f"{self.path}:{_line(document, location)}:{field} {message}"


def _construct(node: yaml.Node) -> Any:
    """Return the content of a document. Raises yaml.YAMLError for tags and keys that are not plain YAML, RecursionError for loops."""
    for mapping in _mappings(node):
        for key, _ in mapping.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a key has to be a plain word", problem_mark=key.start_mark)
    return yaml.SafeLoader("").construct_document(node)


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    """Yield the mappings of a document, outer ones first. Raises RecursionError for loops."""
    if isinstance(node, yaml.MappingNode):
        yield node
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            yield from _mappings(child[1] if isinstance(node, yaml.MappingNode) else child)


def _line(node: yaml.Node, location: Location) -> int:
    """Return the line of a field, from 1; of a missing field, the line of its innermost existing parent."""
    line = node.start_mark.line
    for part in location:
        fields: dict[Any, tuple[yaml.Node, yaml.Node]] = {}  # the node of the key, or of the entry, and that of the value
        if isinstance(node, yaml.MappingNode):
            fields = {key.value: (key, value) for key, value in node.value}
        elif isinstance(node, yaml.SequenceNode):
            fields = {i: (value, value) for i, value in enumerate(node.value)}
        if part not in fields:
            break
        line, node = fields[part][0].start_mark.line, fields[part][1]
    return line + 1


def _allowed_keys(model: type[BaseModel], attributes: dict[str, Any], location: Location) -> list[str]:
    """Return the allowed keys at a location in the attributes."""
    match list(location):
        case ["sae"]:
            return allowed_sae_keys(attributes["sae"])
        case ["sae", int(number)]:
            return allowed_sae_keys(attributes["sae"][number])
        case ["training"] | ["baseline_training", _]:
            return allowed_training_keys()
        case ["corpus", kind]:
            return list(CORPORA[str(kind)].model_fields)
    for part in location:
        if isinstance(part, str):  # a number is an entry of a list
            annotation = model.model_fields[part].annotation
            model = next(each for each in (annotation, *get_args(annotation)) if isinstance(each, type) and issubclass(each, BaseModel))
    return list(model.model_fields)
