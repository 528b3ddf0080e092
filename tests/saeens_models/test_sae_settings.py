"""Settings of SAEs in experiment files: the classes of the architectures, widths, joining, JSON."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, SerializeAsAny, ValidationError

import saeens_models as sm
from saeens_models.architectures import architectures, settings_class
from saeens_models.architectures.topk import TopKConfig

TOPK = {"architecture": "topk", "expansion": 2, "k": 4}
OWN_FIELDS = {
    "batch_topk": {"k", "threshold_rate", "aux_loss_coefficient", "k_aux", "matryoshka"},
    "gated": {"l1_coefficient", "l0_target"},
    "jumprelu": {"l0_coefficient", "l0_target", "init_threshold", "bandwidth"},
    "matching_pursuit": {"max_iterations", "residual_threshold", "stop_on_duplicate_support"},
    "standard": {"l1_coefficient", "l0_target"},
    "topk": {"k", "aux_loss_coefficient", "k_aux", "matryoshka"},
}


def settings(**fields) -> sm.SAESettings:
    return sm.SAESettings.model_validate(fields)


def errors_of(**fields) -> list[tuple[tuple[int | str, ...], str]]:
    with pytest.raises(ValidationError) as caught:
        settings(**fields)
    with pytest.raises(ValidationError) as caught_by_constructor:
        sm.SAESettings(**fields)
    found = [(error["loc"], error["msg"]) for error in caught.value.errors()]
    assert found == [(error["loc"], error["msg"]) for error in caught_by_constructor.value.errors()]
    return found


@pytest.mark.parametrize("architecture", sorted(OWN_FIELDS))
def test_each_architecture_has_one_settings_class_with_the_fields_of_its_configuration(architecture):
    cls = settings_class(architecture)
    assert settings_class(architecture) is cls
    assert set(cls.field_names()) == OWN_FIELDS[architecture] | {
        "architecture",
        "expansion",
        "d_sae",
        "apply_b_dec_to_input",
        "decoder_init_norm",
    }
    assert cls.config_class.model_fields["architecture"].default == architecture


def test_architecture_chooses_the_settings_class():
    for made in (settings(**TOPK), sm.SAESettings(**TOPK)):
        assert type(made) is settings_class("topk")
        assert made.config_class is TopKConfig
        assert made == settings(**TOPK)
        assert hash(made) == hash(settings(**TOPK))
    assert made != settings(**TOPK | {"k": 5})
    with pytest.raises(ValidationError, match="frozen"):
        made.expansion = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_settings_can_be_a_field_of_another_model():
    class Experiment(BaseModel):
        sae: SerializeAsAny[sm.SAESettings]

    experiment = Experiment.model_validate({"sae": TOPK})
    assert experiment.sae == settings(**TOPK)
    assert experiment.model_dump(exclude_unset=True) == {"sae": TOPK}
    assert Experiment.model_validate(experiment.model_dump()) == experiment
    assert Experiment.model_validate(experiment) == experiment


def test_defaults_follow_the_architecture():
    assert settings(**TOPK).decoder_init_norm == 1.0
    assert settings(architecture="standard", expansion=2).decoder_init_norm == 0.1
    assert settings(architecture="standard", expansion=2).apply_b_dec_to_input


@pytest.mark.parametrize("width", ["expansion", "d_sae"])
@pytest.mark.parametrize("value", [True, 2.0, "2", 0, -3, 0.5, [2]])
def test_a_width_is_a_positive_whole_number(width, value):
    assert errors_of(architecture="topk", k=4, **{width: value}) == [((width,), f"{width} is a positive whole number, not {value!r}")]


@pytest.mark.parametrize("widths", [{}, {"expansion": 2, "d_sae": 64}, {"expansion": None}])
def test_exactly_one_width_is_given(widths):
    ((loc, message),) = errors_of(architecture="topk", k=4, **widths)
    assert (loc, message) == ((), "Value error, give either expansion (d_sae = expansion * d_in) or d_sae")


@pytest.mark.parametrize(
    ("fields", "loc", "message"),
    [
        ({"k": 0}, ("k",), "greater than 0"),
        ({"d_in": 16}, ("d_in",), "not permitted"),
        ({"init_seed": 1}, ("init_seed",), "not permitted"),
        ({"aux_loss_coefficient": float("nan")}, ("aux_loss_coefficient",), "finite"),
        (
            {"architecture": "top_k"},
            ("architecture",),
            f"'top_k' is unknown; one of: {', '.join(architectures())}",
        ),
        ({"architecture": None}, ("architecture",), f"is missing; one of: {', '.join(architectures())}"),
        ({"architecture": "standard"}, ("k",), "not permitted"),
    ],
)
def test_wrong_settings_name_the_field_and_the_allowed_values(fields, loc, message):
    ((found, text),) = errors_of(**TOPK | fields)
    assert found == loc
    assert message in text


def test_every_wrong_field_is_named():
    assert [loc for loc, _ in errors_of(architecture="topk", expansion=0, kk=3)] == [("expansion",), ("k",), ("kk",)]


def test_a_configuration_has_the_width_and_the_seed():
    fields = {"architecture": "topk", "k": 4, "apply_b_dec_to_input": False}
    expected = sm.SAEConfig(**fields, d_in=16, d_sae=48, init_seed=7)
    assert settings(**fields, expansion=3).config(16, init_seed=7) == expected
    assert settings(**fields, d_sae=48).config(16, init_seed=7) == expected
    assert settings(**fields, d_sae=48).config(16) == expected.model_copy(update={"init_seed": 0})
    with pytest.raises(ValidationError, match="k = 4 is larger than d_sae = 2"):
        settings(**fields, d_sae=2).config(16)


def test_width_and_l0_have_names_and_values():
    sae = settings(**TOPK)
    assert (sae.width_field, sae.width, sae.l0) == ("expansion", 2, 4)
    sae = settings(architecture="matching_pursuit", d_sae=64, max_iterations=5)
    assert (sae.width_field, sae.width, sae.l0) == ("d_sae", 64, 5)
    assert settings(architecture="standard", expansion=2).l0 is None


def test_joined_settings_are_the_first_with_the_sum_of_the_widths():
    saes = [
        settings(**TOPK | {"expansion": expansion, "k": k, "k_aux": k_aux}) for expansion, k, k_aux in ((2, 4, 9), (4, 3, 8), (3, 6, 7))
    ]
    assert sm.SAESettings.joined(saes) == settings(**TOPK | {"expansion": 9, "k_aux": 9})
    assert sm.SAESettings.joined(saes, add_l0=True) == settings(**TOPK | {"expansion": 9, "k": 13, "k_aux": 9})
    assert sm.SAESettings.joined(saes[1:2], add_l0=True) == saes[1]
    assert sm.SAESettings.joined([settings(architecture="batch_topk", d_sae=50, k=2.5)] * 3, add_l0=True) == settings(
        architecture="batch_topk", d_sae=150, k=7.5
    )


def test_joined_settings_may_differ_in_architecture():
    pursuit = settings(architecture="matching_pursuit", expansion=1, max_iterations=5)
    assert sm.SAESettings.joined([settings(**TOPK), pursuit], add_l0=True) == settings(**TOPK | {"expansion": 3, "k": 9})
    standard = settings(architecture="standard", expansion=5)
    assert sm.SAESettings.joined([standard, settings(**TOPK)]) == settings(architecture="standard", expansion=7)


def test_settings_that_cannot_be_joined_are_refused():
    with pytest.raises(ValueError, match="no SAEs"):
        sm.SAESettings.joined([])
    with pytest.raises(ValueError, match="expansion in every entry, or d_sae in every entry"):
        sm.SAESettings.joined([settings(**TOPK), settings(architecture="topk", d_sae=8, k=4)])
    with pytest.raises(ValueError, match="'standard' sets its L0 through a sparsity coefficient"):
        sm.SAESettings.joined([settings(**TOPK), settings(architecture="standard", expansion=2)], add_l0=True)
    with pytest.raises(ValidationError, match="valid integer"):
        sm.SAESettings.joined([settings(**TOPK), settings(architecture="batch_topk", expansion=2, k=2.5)], add_l0=True)


def test_json_holds_every_field_and_one_width():
    expected = {
        "architecture": "batch_topk",
        "d_sae": 64,
        "apply_b_dec_to_input": True,
        "decoder_init_norm": 1.0,
        "k": 4.0,
        "threshold_rate": 0.01,
        "aux_loss_coefficient": 1.0,
        "k_aux": None,
    }
    sae = settings(architecture="batch_topk", k=4, d_sae=64)
    assert sae.to_json() == expected
    assert isinstance(sae.to_json()["k"], float)
    assert sm.SAESettings(**json.loads(json.dumps(sae.to_json()))) == sae
    assert settings(**TOPK).to_json() == {**TOPK, "apply_b_dec_to_input": True, "decoder_init_norm": 1.0} | {
        "aux_loss_coefficient": 1.0,
        "k_aux": None,
    }
