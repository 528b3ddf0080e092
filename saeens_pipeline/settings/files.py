"""Finding and reading of experiment files. Errors name the path, the line and the field."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from saeens_pipeline import defs
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.settings.changes import Change
from saeens_pipeline.settings.corpora import allowed_corpus_keys, corpus_location
from saeens_pipeline.settings.experiments import ExperimentSettings, allowed_sae_keys, allowed_training_keys
from saeens_pipeline.settings.from_file import CHANGES, FILE
from saeens_pipeline.settings.messages import in_words, on_one_line, shown
from saeens_pipeline.settings.sources import SourceSettings

FOLDERS_VARIABLE = "SAEENS_EXPERIMENTS"
_SHIPPED = "shipped/"
_TEMPLATES = "templates"
_PATTERNS = ("*.yaml", "*.yml", "*/defs.yaml", "*/defs.yml")
_FILES_OF_FOLDERS = ("defs.yaml", "defs.yml")
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH, _MAX_DIGITS = 200_000, 20_000, 30, 18  # of a file, a document, a value, a whole number
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}
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
    """Return every experiment file: the shipped ones and templates, then the YAML files of each folder in SAEENS_EXPERIMENTS.

    These are `*.yaml`, `*.yml`, `*/defs.yaml` and `*/defs.yml`.
    """
    shipped = ("*/defs.yaml", f"{_TEMPLATES}/*/defs.yaml")
    files = [file for root in defs.__path__ for pattern in shipped for file in sorted(Path(root).glob(pattern))]
    for folder in own_folders():
        files += sorted(file for pattern in _PATTERNS for file in folder.glob(pattern))
    return list({os.path.realpath(file): file for file in reversed(files)}.values())[::-1]  # a folder may be listed twice


def is_template(settings: Settings) -> bool:
    """Return whether settings are of a shipped template: one that needs a hub, a GPU or a night. The UI shows it once it was run."""
    return settings.file is not None and any(settings.file.is_relative_to(Path(root) / _TEMPLATES) for root in defs.__path__)


def is_shipped(settings: Settings) -> bool:
    """Return whether settings are of a file that comes with the package."""
    return settings.file is not None and any(settings.file.is_relative_to(root) for root in defs.__path__)


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
    folders = {file.parent, file.parent.parent} if file.name in _FILES_OF_FOLDERS else {file.parent}  # as find_files looks
    return None if folders.intersection(each.resolve() for each in own_folders()) else file.parent


def experiment_name(path: Path) -> str:
    """Return the name of an experiment file: of `defs.yaml` its folder's name, of others the file name without suffix."""
    return path.parent.name if path.name in _FILES_OF_FOLDERS else path.stem


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with a limit of depth; dates stay text, and so do octal numbers and numbers to base 60 (`012`, `1:30`)."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {_MAX_DEPTH} levels of nesting", problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        is_text = tag == "tag:yaml.org,2002:timestamp" or (
            tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            and (":" in value or (tag.endswith("int") and value.lstrip("+-")[:1] == "0" and value.lstrip("+-")[1:2].isdecimal()))
        )
        return "tag:yaml.org,2002:str" if kind is yaml.ScalarNode and implicit[0] and is_text else tag


class ExperimentFile:
    """One experiment file: YAML documents with a type and attributes. Raises ConfigurationError for a file that is not plain YAML.

    `changes`: other values of fields of its documents.
    """

    def __init__(self, path: Path, changes: Sequence[Change] = ()) -> None:
        self.path = path
        self._changes: dict[int, list[Change]] = {}  # by id of the document
        try:
            nodes = yaml.compose_all(_read(path), _Loader)
            self._documents = [(node, _construct(node)) for node in nodes if node is not None]
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            began = f", {error.context}, line {error.context_mark.line + 1}" if error.context and error.context_mark else ""
            problem = error.problem or ""
            if error.context_mark and "expected <block end>, but found '<block mapping start>'" in problem:
                problem = f"this does not fit the mapping that begins on line {error.context_mark.line + 1}"
                began = ": check the indentation, and the space after each colon"
            elif r"character '\t'" in problem:
                problem = "a tab is not allowed before a value or a key: indent with spaces"
            raise ConfigurationError(on_one_line(f"{path}:{mark.line + 1 if mark else 1}: {problem}{began}")) from None
        except _NotTextError as error:
            raise ConfigurationError(f"{path}:{error.line}: {error}") from None
        except OSError as error:
            raise ConfigurationError(f"{path}:1: cannot be read ({error.strerror})") from None
        if not self._documents:
            raise ConfigurationError(f"{path}:1: the file is empty; it needs type: and attributes:")
        self._documents = [(node, self._changed(node, content, changes)) for node, content in self._documents]

    def _changed(self, document: yaml.Node, content: Any, changes: Sequence[Change]) -> Any:
        """Return the content of a document with those changes that concern it."""
        attributes = content.get("attributes") if isinstance(content, dict) else None
        if not isinstance(attributes, dict):
            return content
        own = [each for each in changes if (each.type, each.name) == (content.get("type"), attributes.get("name"))]
        self._changes[id(document)] = own
        for each in own:
            attributes = each.applied(attributes)
        return {**content, "attributes": attributes}

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
        """Return a message with path and line about one field of settings that were read from this file, also of a sweep's experiment."""
        of_type = [each for each in self._documents if MODELS[each[1]["type"]] is type(settings)]
        named = {content["attributes"].get("name"): document for document, content in reversed(of_type)}
        # the settings may be those of one value of a sweep, or of one language model of a set
        name = max((each for each in named if f"{settings.name}__".startswith(f"{each}__")), key=len)
        return self._message(named[name], ("attributes", *([field] if isinstance(field, str) else field)), message)

    def _settings(self, document: yaml.Node, content: Any) -> Settings:
        twice = [
            f"{self.path}:{key.start_mark.line + 1}: {shown(key.value)} is given twice"
            for mapping in _mappings(document)
            for i, (key, _) in enumerate(mapping.value)
            if key.value in [before.value for before, _ in mapping.value[:i]]
        ]
        if twice:
            raise ConfigurationError("\n".join(twice))
        given = content if isinstance(content, dict) else {}
        unknown = [
            self._message(document, (key,), f"unknown key; one of: type, attributes{similar(key, ['type', 'attributes'])}")
            for key in given
            if key not in ("type", "attributes")
        ]
        model = MODELS.get(str(given.get("type")))
        if not isinstance(given.get("attributes"), dict):
            message = self._message(document, (), "a document needs type: and attributes: with fields below it")
            raise ConfigurationError("\n".join([*unknown, message]))
        if model is None:
            found = f"{shown(given['type'])} is unknown" if "type" in given else "missing"
            unknown.append(self._message(document, ("type",), f"{found}; one of: {', '.join(MODELS)}"))
        if unknown or model is None:
            raise ConfigurationError("\n".join(unknown))
        try:
            context = {FILE: self.path.absolute(), CHANGES: self._changes.get(id(document), [])}
            return model.model_validate(given["attributes"], context=context)
        except ValidationError as error:
            raise ConfigurationError("\n".join(self._explain(document, model, given["attributes"], error))) from None

    def _explain(self, document: yaml.Node, model: type[BaseModel], attributes: dict[str, Any], error: ValidationError) -> list[str]:
        """Return a message for each wrong field: unknown keys first, since other fields may be missing because of them."""
        messages: dict[Location, list[str]] = {}
        for location, allowed in _unknown_keys(model, attributes):
            value = _value(attributes, location)
            found = "" if isinstance(value, dict) else f" (found: {shown(value)})"
            messages[location] = [f"unknown key; one of: {', '.join(allowed)}{similar(str(location[-1]), allowed)}{found}"]
        for each in error.errors():
            loc = corpus_location(each["loc"]) if each["loc"][:1] == ("corpus",) else each["loc"]
            location = _location(attributes, loc, is_missing=each["type"] == "missing")
            if location in messages and messages[location][0].startswith("unknown key"):
                continue
            message = in_words(cast("dict[str, Any]", each))
            if each["type"] != "missing" and not isinstance(each["input"], dict):
                message += f" (found: {shown(each['input'])})"
            messages.setdefault(location, []).append(message)
        return [
            self._message(document, ("attributes", *location), " or: ".join(dict.fromkeys(found))) for location, found in messages.items()
        ]

    def _message(self, document: yaml.Node, location: Location, message: str) -> str:
        changes, field = self._changes.get(id(document), []), ".".join(str(part)[:60] for part in location)
        if related := [each for each in changes if each.concerns(location[1:])]:
            inside = ".".join(field.split(".")[1:])
            options = ", ".join(dict.fromkeys(each.option for each in related))
            return on_one_line(f"{options}: {f'{inside}: ' if inside not in ('', related[0].field) else ''}{message}")
        with_changes = f" (with {', '.join(each.option for each in changes)})" if changes else ""
        return f"{self.path}:{_line(document, location)}:{on_one_line(f' {field}: {message}' if field else f' {message}')}{with_changes}"


def parse_setting(given: str) -> tuple[tuple[str, ...], Any]:
    """Return the field and the value of `FIELD=VALUE`, a YAML scalar or list. Raises ConfigurationError for anything else."""
    field, equals, text = given.partition("=")
    location = tuple(part.strip() for part in field.split("."))
    if not equals or not all(location):
        raise ConfigurationError(f"--set {given}: write FIELD=VALUE, such as sae.k=8 or ensemble.seeds=[42, 43]")
    try:
        node = yaml.compose(text, _Loader)
        value = None if node is None else _construct(node)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it has characters that are not allowed"
        raise ConfigurationError(on_one_line(f"--set {field}: {shown(text)} is no YAML value: {problem}")) from None
    if isinstance(value, dict):
        inner = next(iter(value), "FIELD")
        raise ConfigurationError(f"--set {field}: {shown(text)} is a mapping: give each field, such as --set {field}.{inner}=VALUE")
    return location, value


@contextmanager
def blamed_on(settings: Settings, field: str | Location, *, is_from_file: bool = True) -> Iterator[None]:
    """Add path, line and field to a ConfigurationError of this block: facts outside the file can make a field of it wrong.

    With `is_from_file` False the wrong value is not from the file.
    """
    try:
        yield
    except ConfigurationError as error:
        if settings.file is None or not is_from_file:
            raise
        raise ConfigurationError(ExperimentFile(settings.file, settings.changes).complaint(settings, field, str(error))) from None


class _NotTextError(Exception):
    """A file cannot be read as YAML text; `line` is the place."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _read(path: Path) -> str:
    """Return the text of a file. Raises OSError, and _NotTextError for one that is too large, not UTF-8 or has control characters."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait
        raise _NotTextError(1, "this is not a file")
    if status.st_size > _MAX_BYTES:
        raise _NotTextError(1, f"the file has {status.st_size:,} bytes, and an experiment file has at most {_MAX_BYTES:,}")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _NotTextError(line, f"byte {error.start} is not UTF-8: save the file as UTF-8") from None
    wrong = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if wrong:
        raise _NotTextError(text.count("\n", 0, wrong.start()) + 1, f"the control character {wrong.group()!a} is not allowed in YAML")
    return text


def _construct(node: yaml.Node) -> Any:
    """Return the content of a document. Raises MarkedYAMLError for what is not plain YAML, for loops, and for too many values."""
    _count_values(node, {})
    for each in _nodes(node):
        if each.tag not in _PLAIN_TAGS:
            problem = f"the tag {each.tag.removeprefix('tag:yaml.org,2002:')!r} is not plain YAML: remove it"
            raise yaml.MarkedYAMLError(problem=on_one_line(problem), problem_mark=each.start_mark)
        if isinstance(each, yaml.MappingNode):
            for key, _ in each.value:
                if key.tag != "tag:yaml.org,2002:str" or not isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(problem="a key has to be a plain word", problem_mark=key.start_mark)
        elif isinstance(each, yaml.ScalarNode):
            if each.tag.endswith(":int") and len(each.value.replace("_", "")) > _MAX_DIGITS:
                problem = f"the number {shown(each.value)} has more than {_MAX_DIGITS} digits"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=each.start_mark)
            _construct_one(each)
    return _construct_one(node)


def _construct_one(node: yaml.Node) -> Any:
    try:
        return yaml.SafeLoader("").construct_document(node)
    except (ValueError, KeyError, OverflowError, TypeError, AttributeError):  # such as `!!bool maybe` and `!!int x`
        tag, value = node.tag.removeprefix("tag:yaml.org,2002:"), shown(node.value) if isinstance(node, yaml.ScalarNode) else "this value"
        raise yaml.MarkedYAMLError(problem=f"{value} cannot be read as {tag}", problem_mark=node.start_mark) from None


def _count_values(node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Return the number of values of a node with its aliases written out."""
    if id(node) in counted:
        known = counted[id(node)]
        if known is None:
            problem = "a value contains itself: write it out instead of using & and *"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return known
    counted[id(node)] = None
    total = 1
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for each in child if isinstance(child, tuple) else (child,):
                total += _count_values(each, counted)
                if total > _MAX_VALUES:
                    problem = f"more than {_MAX_VALUES:,} values, with aliases written out"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    counted[id(node)] = total
    return total


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    """Yield the nodes of a document, each once, outer ones first, without keys."""
    waiting, seen = [node], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            if isinstance(node, yaml.CollectionNode):
                waiting += [child[1] if isinstance(child, tuple) else child for child in reversed(node.value)]


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    """Yield the mappings of a document, each once, outer ones first."""
    return (each for each in _nodes(node) if isinstance(each, yaml.MappingNode))


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


def similar(key: str, allowed: Sequence[str]) -> str:
    """Return a question for the allowed key that was probably meant, or nothing."""
    close = difflib.get_close_matches(key[:60], allowed, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _value(attributes: Any, location: Location) -> Any:
    for part in location:
        attributes = attributes[part]
    return attributes


def _location(attributes: Any, location: Location, *, is_missing: bool) -> tuple[int | str, ...]:
    """Return the location of an error in the attributes, without the names of types that pydantic adds."""
    found: list[int | str] = []
    for i, part in enumerate(location):
        if isinstance(attributes, dict) and part in attributes:
            attributes = attributes[part]
        elif isinstance(attributes, list) and part in range(len(attributes)):
            attributes = attributes[cast("int", part)]
        elif not (is_missing and i == len(location) - 1) and not (part == "architecture" and isinstance(attributes, dict)):
            continue
        found.append(part)
    return tuple(found)


def _unknown_keys(model: type[BaseModel], attributes: dict[str, Any]) -> Iterator[tuple[Location, list[str]]]:
    """Yield the location of every key that is not allowed, with the allowed ones."""

    def look(value: Any, allowed: list[str], *location: int | str) -> Iterator[tuple[Location, list[str]]]:
        if isinstance(value, dict):
            for key in value:
                if key not in allowed:
                    yield (*location, key), allowed

    def mappings(found: Any) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
        entries = [((i,), each) for i, each in enumerate(found)] if isinstance(found, list) else [((), found)]
        return [(place, each) for place, each in entries if isinstance(each, dict)]

    def walk(model: type[BaseModel], value: Any, *location: int | str) -> Iterator[tuple[Location, list[str]]]:
        if isinstance(value, list):
            for i, each in enumerate(value):
                yield from walk(model, each, *location, i)
        if not isinstance(value, dict):
            return
        yield from look(value, list(model.model_fields), *location)
        for name, field in model.model_fields.items():
            found = value.get(name)
            if name == "corpus":
                for place, corpus in mappings(found):
                    yield from look(corpus, allowed_corpus_keys(corpus, is_entry=bool(place)), *location, name, *place)
            elif name == "sae":
                for place, sae in mappings(found):
                    yield from look(sae, allowed_sae_keys(sae), *location, name, *place)
            elif name == "training":
                yield from look(found, allowed_training_keys(), *location, name)
            elif name == "baseline_training":
                for baseline, training in found.items() if isinstance(found, dict) else ():
                    yield from look(training, allowed_training_keys(), *location, name, baseline)
            elif nested := _nested_model(field.annotation):
                yield from walk(nested, found, *location, name)

    return walk(model, attributes)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `Model | None` or `list[Model]`; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _nested_model(each))), None)
