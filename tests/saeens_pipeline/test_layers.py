"""Layers added at run time: refusals, messages, and their effect on all experiments of the source."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pytest
from tiny_experiment import LAYER, NAME, Laboratory
from typer.testing import CliRunner

from saeens_pipeline import cli
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration.instance import command_line_instance, declare_layers, layers_name, register_layers
from saeens_pipeline.orchestration.layers import add_layers, layers_of_source, recorded_layers


@pytest.fixture
def recorded(empty: Laboratory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Laboratory]:
    """The empty laboratory, with an instance that outlives a command."""
    with dg.DagsterInstance.ephemeral() as instance, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dg.DagsterInstance, "from_config", lambda *_: instance)
        patch.setattr(dg.DagsterInstance, "__exit__", lambda *_: None)  # a command closes its own
        yield empty


def _partitions() -> list[str]:
    with command_line_instance() as instance:
        return list(instance.get_dynamic_partitions(layers_name(NAME)))


def _add(*layers: int, source: str = NAME) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["layers", "add", source, *map(str, layers)], catch_exceptions=False)
    return result.exit_code, " ".join(result.output.split())


def test_adding_layers_prints_the_next_step(recorded: Laboratory):
    code, said = _add(2, 0)
    assert code == 0
    assert "tiny: added layers 0, 2" in said
    assert "`saeens run tiny` computes missing artefacts" in said
    assert _partitions() == [str(LAYER), "0", "2"]
    _, said = _add(2, LAYER)
    assert "already had layers 1, 2" in said
    assert "added" not in said
    recorded.declare(automation=True)
    assert "automatically while `saeens ui` is running" in _add(2)[1]


def test_a_layer_beyond_the_model_is_refused_with_the_existing_ones_and_none_is_added(recorded: Laboratory):
    with pytest.raises(ConfigurationError, match="has no layer 3: it has layers 0 to 2"):
        _add(2, 3)
    assert _partitions() == []


def test_an_unknown_source_is_refused_with_the_known_ones(recorded: Laboratory):
    with pytest.raises(ConfigurationError, match="no source 'quickstart'; there are: tiny"):
        add_layers(recorded.catalogue, "quickstart", [0])


def test_a_source_has_the_layers_of_its_file_and_those_that_were_added(empty: Laboratory):
    source = empty.catalogue.sources[NAME]
    with dg.DagsterInstance.ephemeral() as instance:
        declare_layers(instance, NAME, [LAYER])
        register_layers(instance, NAME, [2, 0])
        assert layers_of_source(source, instance) == ([0, 1, 2], [])
        instance.add_dynamic_partitions(layers_name(NAME), ["12", "last", "-1"])
        assert layers_of_source(source, instance) == ([0, 1, 2], ["12", "last", "-1"])


def test_a_layer_removed_from_the_file_is_removed_from_the_source(empty: Laboratory):
    with dg.DagsterInstance.ephemeral() as instance:
        declare_layers(instance, NAME, [0, 1])
        register_layers(instance, NAME, [2])
        declare_layers(instance, NAME, [LAYER])
        assert layers_of_source(empty.catalogue.sources[NAME], instance).layers == [1, 2]


def test_listing_layers_creates_no_dagster_instance(empty: Laboratory):
    assert recorded_layers(empty.catalogue.sources[NAME]) == ([LAYER], [])
    assert not empty.root.exists()


def test_a_run_includes_added_layers_and_leaves_out_invalid_ones(recorded: Laboratory):
    with command_line_instance() as instance:
        instance.add_dynamic_partitions(layers_name(NAME), ["0", "99"])
    said = recorded.run(select=["activations"])
    assert "left out, since the language model lacks them: layers 99" in said
    assert recorded.artefact("activations", layer=0).files
    assert recorded.artefact("activations", layer=LAYER).files
