"""README.md and the generated reference: sizes, links, and agreement with the code and with the numbers that they cite."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
import yaml

from saeens_models.architectures.config import architectures
from saeens_models.architectures.settings import settings_class
from saeens_pipeline.assets.registry import TABLES
from saeens_pipeline.cli import app
from saeens_pipeline.settings.files import MODELS, ExperimentFile

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_README_BYTES = 8192


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "scripts" / "reference.py"))


@pytest.fixture(scope="module")
def reference(generator: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Text of every generated page, by file name."""
    pages = generator["write_reference"](tmp_path_factory.mktemp("reference"))
    return {page.name: page.read_text(encoding="utf-8") for page in pages}


def _code_block(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return block


def _field_names(schema: dict[str, Any]) -> Iterator[str]:
    for part in (schema, *schema.get("$defs", {}).values()):
        yield from part["properties"]


def test_the_readme_is_smaller_than_its_limit():
    assert len(README.encode()) <= MAX_README_BYTES


def test_links_of_the_readme_point_to_files():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readmes_table_has_the_numbers_of_the_quickstart():
    numbers = pl.read_csv(ROOT / "docs" / "assets" / "quickstart.csv")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if re.match(r"\| \w+ \| \d", line)]
    assert {row[0] for row in rows} == set(numbers["method"])
    for method, n, explained_variance, recovered, bits, l0, n_features, stability, flops in rows:
        of_method = numbers.filter(method=method, n_members=int(n)).sort("seed")
        mean = {column: of_method[column].mean() for column in of_method.columns if column != "method"}
        assert explained_variance == ", ".join(f"{value:.4f}" for value in of_method["explained_variance"])
        assert stability == ", ".join(f"{value:.3f}" for value in of_method["stability"])
        shown = (recovered, bits, l0, n_features, flops)
        assert shown == (
            f"{mean['ce_loss_recovered']:.3f}",
            f"{mean['description_length_bits']:.0f}",
            f"{mean['l0']:.1f}",
            f"{mean['n_features']:.0f}",
            f"{mean['total_flops']:.1e}",
        )


def test_the_readmes_experiment_file_is_valid(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(_code_block("yaml"), encoding="utf-8")
    assert [type(each) for each in ExperimentFile(file).settings()] == list(MODELS.values())


def test_reference_has_every_column_of_every_table(reference: dict[str, str]):
    shared = re.findall(r"^\| `(\w+)` \|", reference["tables.md"].split("\n## ")[0], re.MULTILINE)
    for name, table in TABLES.items():
        (section,) = re.findall(rf"^## `{name}`\n(.*?)(?=^## |\Z)", reference["tables.md"], re.DOTALL | re.MULTILINE)
        described = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
        assert (described if table.over_experiments else shared + described) == [column.name for column in table.all_columns]


def test_reference_has_every_field_with_a_description(reference: dict[str, str]):
    for model in MODELS.values():
        for name in _field_names(model.model_json_schema()):
            assert f"| `{name}` |" in reference["yaml.md"]
    for architecture in architectures():
        (section,) = re.findall(rf"^### `{architecture}`\n(.*?)(?=^##)", reference["yaml.md"], re.DOTALL | re.MULTILINE)
        fields = [name for name in settings_class(architecture).model_fields if name != "architecture"]
        meanings = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*?) \|$", section, re.MULTILINE))
        assert list(meanings) == fields
        assert all(meanings.values())


def test_reference_has_every_command(reference: dict[str, str]):
    def commands(command: Any, name: str) -> Iterator[str]:
        yield name
        for each, child in getattr(command, "commands", {}).items():
            yield from commands(child, f"{name} {each}")

    names = list(commands(typer.main.get_command(app), "saeens"))
    assert len(names) > 10
    for name in names[1:]:
        assert re.search(rf"^#+ `{name}`$", reference["command_line.md"], re.MULTILINE)


def test_an_environment_variable_without_a_description_is_an_error(generator: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    assert "`SAEENS_DATA`" in generator["environment_page"]()
    monkeypatch.delitem(generator["VARIABLES"], "SAEENS_DATA")
    with pytest.raises(ValueError, match="SAEENS_DATA"):
        generator["check_variables"]()


def test_yaml_of_the_pages_can_be_read():
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    blocks = [
        (page, block)
        for page in pages
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    ]
    assert len(blocks) >= 10
    for page, block in blocks:
        lines = block.splitlines()
        alternatives = (
            len({line.partition(":")[0] for line in lines if line[:1].strip()}) == 1
            and len(lines) > 1
            and all(line[:1].strip() for line in lines)
        )
        for text in lines if alternatives else [block]:
            try:
                list(yaml.safe_load_all(text))
            except yaml.YAMLError as error:
                pytest.fail(f"{page}: {error}")
