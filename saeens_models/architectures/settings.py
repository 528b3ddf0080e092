"""The settings of an SAE in an experiment file: a configuration whose width may be a multiple of ``d_in``, without a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, PositiveFloat, PositiveInt, ValidationInfo, create_model, model_validator
from pydantic_core import PydanticCustomError

from saeens_models.architectures.config import OfArchitecture, SAEConfig, config_class, validate_l0_multiple

_NOT_IN_SETTINGS = ("d_in", "d_sae", "init_seed")
_SETTINGS_CLASSES: dict[str, type[SAESettings]] = {}


def _check_whole_number(value: object, info: ValidationInfo) -> object:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        message = "{field} is a positive whole number, not {value}"
        raise PydanticCustomError("whole_number", message, {"field": info.field_name, "value": repr(value)})
    return value


Width = Annotated[PositiveInt | None, BeforeValidator(_check_whole_number)]


class SAESettings(OfArchitecture, frozen=True):
    """Settings of one SAE before the size of its activations is known: a configuration without ``d_in`` and ``init_seed``.

    Either ``expansion`` or ``d_sae`` sets the width. ``SAESettings(architecture="topk", ...)`` gives an instance of that architecture's
    own class, which has the fields of its configuration class. Unknown architectures, unknown fields, values out of range, and no or two
    widths raise pydantic's ``ValidationError``.
    """

    expansion: Width = None
    """Features per dimension of the activations: ``d_sae = expansion * d_in``."""
    d_sae: Width = None
    """Number of features."""
    apply_b_dec_to_input: bool
    """As in :class:`SAEConfig`."""
    decoder_init_norm: PositiveFloat
    """As in :class:`SAEConfig`."""

    config_class: ClassVar[type[SAEConfig]]
    """Configuration class of the architecture."""

    @classmethod
    def _own_class(cls, architecture: object) -> type[Self]:
        return settings_class(architecture) if cls is SAESettings else cls  # pyright: ignore[reportReturnType]

    def __init__(self, /, **fields: Any) -> None:  # for type checkers: the fields depend on the architecture
        super().__init__(**fields)

    @model_validator(mode="before")
    @classmethod
    def _has_one_width(cls, value: Any) -> Any:
        if cls is not SAESettings and isinstance(value, Mapping) and (value.get("expansion") is None) == (value.get("d_sae") is None):
            raise ValueError("give either expansion (d_sae = expansion * d_in) or d_sae")
        return value

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of the fields that an experiment file may set for this architecture, in order."""
        return tuple(cls.model_fields)

    @property
    def width_field(self) -> Literal["expansion", "d_sae"]:
        """Name of the field that sets the width."""
        return "d_sae" if self.expansion is None else "expansion"

    @property
    def width(self) -> int:
        """The value of :attr:`width_field`."""
        return getattr(self, self.width_field)

    @property
    def l0(self) -> float | int | None:
        """The value of ``config_class.l0_field``: active features per token; None if there is only a sparsity coefficient."""
        return None if self.config_class.l0_field is None else getattr(self, self.config_class.l0_field)

    @classmethod
    def joined(cls, saes: Sequence[SAESettings], *, add_l0: bool = False) -> SAESettings:
        """Return the settings of the first SAE, as wide as all of ``saes`` together; with ``add_l0`` their L0 fields are added up too.

        ``SAESettings.joined([sae] * n)`` is n times as wide as ``sae``.

        Raises ``ValueError`` for no SAEs, for SAEs of which some give ``expansion`` and some ``d_sae``, for one that sets its L0
        through a sparsity coefficient alone, and for a sum that the first SAE's L0 field cannot take.
        """
        if not saes:
            raise ValueError("no SAEs to join")
        first = saes[0]
        if any(sae.width_field != first.width_field for sae in saes):
            raise ValueError("give expansion in every entry, or d_sae in every entry: widths of members are added up and compared")
        sums: dict[str, float] = {first.width_field: sum(sae.width for sae in saes)}
        if add_l0:
            for sae in saes:
                validate_l0_multiple(sae)
            sums[str(first.config_class.l0_field)] = sum(sae.l0 or 0 for sae in saes)
        return type(first).model_validate({**first.to_json(), **sums})

    def config(self, d_in: int, init_seed: int = 0) -> SAEConfig:
        """Return the configuration for activations of size ``d_in``.

        Raises pydantic's ``ValidationError`` for values that do not fit together, such as a k larger than d_sae.
        """
        d_sae = self.width if self.expansion is None else self.width * d_in
        fields = self.model_dump(exclude={"expansion", "d_sae"})
        return self.config_class(**fields, d_in=d_in, d_sae=d_sae, init_seed=init_seed)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values, with defaults written out and without the width field that is not given."""
        return self.model_dump(mode="json", exclude={"d_sae" if self.width_field == "expansion" else "expansion"})


def settings_class(architecture: object) -> type[SAESettings]:
    """Return the settings class of an architecture.

    Raises pydantic's ``ValidationError`` for a missing or unknown name; its message lists the registered ones.
    """
    return _SETTINGS_CLASSES[config_class(architecture).model_fields["architecture"].default]


def add_settings_class(architecture: str, configured_by: type[SAEConfig]) -> None:
    """Create the settings class of an architecture from its configuration class; :func:`register` calls this."""
    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in configured_by.model_fields.items() if name not in _NOT_IN_SETTINGS
    }
    name = configured_by.__name__.removesuffix("Config") + "Settings"
    described = {"use_attribute_docstrings": False}  # the fields have their descriptions; to look for source code takes half a second
    cls = create_model(name, __base__=SAESettings, __module__=configured_by.__module__, __cls_kwargs__=described, **fields)
    cls.config_class = configured_by
    _SETTINGS_CLASSES[architecture] = cls
