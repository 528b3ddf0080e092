"""Write the reference pages from the code: `python docs/scripts/reference.py FOLDER`.

Fields come from the pydantic models, tables from their registry, commands from the typer app. The environment variables alone are listed
here, since no code holds them all; `check_variables` compares the list with the source text.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from typer.cli import get_docs_for_click

import saeens_models
import saeens_pipeline
import saeens_pipeline.assets.tables
from saeens_models.architectures.config import architectures
from saeens_models.architectures.settings import settings_class
from saeens_pipeline.assets.baselines.registry import listed as baselines
from saeens_pipeline.assets.registry import SUBJECT, listed
from saeens_pipeline.cli import app, main
from saeens_pipeline.settings.experiments import allowed_training_keys
from saeens_pipeline.settings.files import MODELS
from saeens_pipeline.storage.tables import Column

PACKAGES = (saeens_models, saeens_pipeline)
VARIABLES = {  # name: meaning, default
    "SAEENS_DATA": ("folder for everything that runs write", "`data/` in the checkout, or in the current folder without a checkout"),
    "SAEENS_EXPERIMENTS": ("folders with experiment files of your own, separated as in `PATH`", "none"),
    "SAEENS_EXECUTOR": (
        "`in_process` or `multiprocess`: processes of the steps that the UI, the automation and backfills start",
        "`in_process`",
    ),
    "SAEENS_DEVICE": ("`auto` (CUDA where there is a GPU), `cpu`, `mps`, `cuda`, or `cuda:0` to `cuda:15`", "`auto`"),
    "SAEENS_MEMORY_GB": ("memory of SAEs that are trained together, GB", "all there is"),
    "SAEENS_PRECISION": (
        "products of float32 matrices in training: `float32`, `tf32`, `bfloat16`. Weights and sums of products stay in float32. On a CPU "
        "that multiplies bfloat16 (AVX-512 BF16, AMX), `bfloat16` concerns ReLU and JumpReLU SAEs alone",
        "`float32`",
    ),
    "SAEENS_THREADS": ("CPU threads", "PyTorch's choice"),
    "SAEENS_ACTIVATION_CACHE_GB": (
        "disk for training rows of sources with `keep_activations: test`, in GB, below `activation_cache` in SAEENS_DATA",
        "10",
    ),
    "SAEENS_CHECKPOINT_SECONDS": ("seconds between two checkpoints of a training, or `off`; changes no result", "300"),
    "SAEENS_TRACKER": ("`tensorboard`, `wandb`, `mlflow` or `trackio`: mirrors training curves and tables", "none"),
    "SAEENS_LLM_BASE_URL": ("endpoint of the language model that explains features", "none"),
    "SAEENS_LLM_API_KEY": ("key of that endpoint; never stored", "none"),
    "SAEENS_ALERT_WEBHOOK": ("address that failed runs are posted to, such as a Slack webhook; a secret, never stored", "none"),
    "SAEENS_UI_URL": ("address of the UI, for links in alerts; `saeens ui` sets it for its own processes", "none"),
    "SAEENS_UI": ("address of Dagster's webserver, which the sensor new_models asks to reload the code location", "set by `saeens ui`"),
    "DAGSTER_HOME": ("Dagster's own records: runs, events, logs", "`$SAEENS_DATA/dagster`"),
}


def write_reference(folder: Path) -> list[Path]:
    """Write all pages into the folder, and return their paths."""
    pages = {
        "yaml.md": yaml_page(),
        "tables.md": tables_page(),
        "command_line.md": command_line_page(),
        "environment.md": environment_page(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


def yaml_page() -> str:
    """Return the fields of experiment files: of each component, of each architecture, and of training."""
    parts = [
        "# Experiment files",
        "A file declares a source, an experiment, or both, separated by `---`. Each has a `type` and `attributes`; the tables below list "
        "the attributes. [Your own model](../how_to/own_model.md) has an example.",
    ]
    for name, model in MODELS.items():
        parts += [f"## `{name}`", *_models(model)]
    rows = "".join(f"\n| `{each.name}` | {each.about} |" for each in baselines())
    parts += [
        "## Baselines",
        "Entries of `baselines`. [Comparison](../concepts/comparison.md) says what each matches.",
        f"| name | SAE |\n|---|---|{rows}",
    ]
    parts += [
        "## Architectures",
        "The settings of an SAE depend on its architecture. Fields that several architectures share are in each table.",
    ]
    for name in architectures():
        parts += [f"### `{name}`", _field_table(settings_class(name).model_json_schema())]
    training = saeens_models.TrainingConfig
    parts += ["## Training", f"The fields of `saeens_models.{training.__name__}` that an experiment file may set."]
    parts.append(_field_table(training.model_json_schema(), set(allowed_training_keys())))
    return _page(parts)


def tables_page() -> str:
    """Return the columns of every table, with type and meaning."""
    parts = [
        "# Tables",
        "One Parquet file per table and partition. Every row is one measurement. `saeens table EXPERIMENT TABLE` prints a table; "
        "`--format csv` and `--format json` print nothing else.",
        "The tables of an experiment begin with these columns. A value that does not apply is null.",
        _columns(SUBJECT),
    ]
    for table in listed():
        parts += [f"## `{table.name}`", f"{table.question.rstrip('.?')}{'?' if table.question.endswith('?') else '.'}"]
        if table.over_experiments:
            parts.append("This table has only the columns below.")
        if table.by_default:
            parts.append("An experiment that names no `evaluations` fills it.")
        parts.append(_columns(table.all_columns if table.over_experiments else table.all_columns[len(SUBJECT) :]))
    return _page(parts)


def command_line_page() -> str:
    """Return the help of every command."""
    command = typer.main.get_command(app)
    context = typer.Context(command)
    text = get_docs_for_click(obj=command, ctx=context, name="saeens", title="Command line")
    exit_codes = sys.modules[main.__module__].__doc__ or ""
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)  # first lines, cut off; the sections below have all of them
    return text.replace("\n\n**Usage**", f"\n\n{exit_codes.strip()}\n\n**Usage**", 1)


def environment_page() -> str:
    """Return the environment variables."""
    check_variables()
    rows = [(f"`{name}`", meaning, default) for name, (meaning, default) in VARIABLES.items()]
    return _page(["# Environment variables", _table(("variable", "meaning", "default"), rows)])


def check_variables() -> None:
    """Raise ValueError unless the listed variables are those that the source text names."""
    files = [file for package in PACKAGES for folder in package.__path__ for file in Path(folder).rglob("*.py")]
    named = {name for file in files for name in re.findall(r"\bSAEENS_[A-Z_]+[A-Z]\b", file.read_text(encoding="utf-8"))}
    listed = {name for name in VARIABLES if name.startswith("SAEENS_")}
    if named != listed:
        raise ValueError(f"environment variables without a description: {named - listed}; described and unused: {listed - named}")


def _models(model: type[BaseModel]) -> list[str]:
    """The fields of a model, then those of each model that its fields may hold."""
    schema = model.model_json_schema()
    parts = [_field_table(schema)]
    for name, definition in schema.get("$defs", {}).items():
        parts += [f"### {name}", _prose(definition.get("description", "")), _field_table(definition)]
    return parts


def _field_table(schema: Mapping[str, Any], names: set[str] | None = None) -> str:
    required = schema.get("required", ())
    rows = [
        (
            f"`{name}`",
            _type(field),
            "required" if name in required else _default(field),
            _prose(field.get("description", "")),
        )
        for name, field in schema["properties"].items()
        if "const" not in field and (names is None or name in names)
    ]
    return _table(("field", "type", "default", "meaning"), rows)


def _type(field: Mapping[str, Any]) -> str:
    words = {"integer": "int", "number": "float", "string": "text", "boolean": "bool", "null": "none", "object": "mapping"}
    match field:
        case {"$ref": reference}:
            name = reference.rsplit("/", 1)[1]
            text = f"[{name}](#{name.lower()})"
        case {"anyOf": choices} | {"oneOf": choices}:
            text = " or ".join(_type(choice) for choice in choices)
        case {"enum": values}:
            text = ", ".join(f"`{value}`" for value in values if not isinstance(value, bool))
        case {"const": value}:
            text = f"`{value}`"
        case {"type": "array", "prefixItems": items}:
            text = f"list of {len(items)}: {', '.join(dict.fromkeys(map(_type, items)))}"
        case {"type": "array", "items": items}:
            text = f"list of {_type(items)}"
        case {"type": "object", "additionalProperties": {} as values} if values:
            text = f"mapping to {_type(values)}"
        case {"type": name}:
            text = " ".join([words.get(str(name), str(name)), *_limits(field)])
        case _:
            text = "any"
    return text


def _limits(field: Mapping[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "multipleOf": "multiple of"}
    limits = [f"{sign} {field[key]:.6g}" for key, sign in signs.items() if key in field]
    if limits:
        yield ", ".join(limits)


def _default(field: Mapping[str, Any]) -> str:
    default = field.get("default")
    if default is None:
        return "none"
    if default and isinstance(default, dict | list) and "$ref" in json.dumps(field):
        return "defaults of the linked fields"
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"


def _prose(text: str) -> str:
    """The text on one line, with the characters escaped that Markdown would take for markup, except in code."""
    parts = text.replace("``", "`").replace("\n", " ").split("`")
    return "`".join(part if i % 2 else re.sub(r"[*_{}<]", lambda found: f"&#{ord(found[0])};", part) for i, part in enumerate(parts))


def _columns(columns: Iterable[Column]) -> str:
    return _table(("column", "type", "meaning"), [(f"`{each.name}`", each.type, _prose(each.description)) for each in columns])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    for page in write_reference(Path(sys.argv[1])):
        print(page)
