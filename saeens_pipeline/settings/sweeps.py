"""Sweeps: one experiment for each value of one field of `sae`."""

from __future__ import annotations

import math
from typing import Any

from saeens_pipeline.settings.messages import shown


def validate_sweep(sweep: object) -> object:
    """Return a sweep unchanged. Raises ValueError unless it is one field with a list of different finite numbers."""
    if not isinstance(sweep, dict) or len(sweep) != 1:
        raise ValueError("name exactly one field of sae, with its values, such as {k: [4, 8, 16, 32]}")
    field, values = swept(sweep)
    if not isinstance(values, list) or not values:
        raise ValueError(f"{field} needs a list of values, such as {{{field}: [4, 8, 16, 32]}}")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            hint = ": YAML reads 1e-5 as text, and 1.0e-5 as a number" if isinstance(value, str) else ""
            raise ValueError(f"{field}: {shown(value)} is not a number{hint}")
        if value in values[:i]:
            raise ValueError(f"{field}: {shown(value)} is given twice")
    return sweep


def swept(sweep: dict[str, list[Any]]) -> tuple[str, list[Any]]:
    """Return the field of a sweep and its values."""
    ((field, values),) = sweep.items()
    return field, values


def name_of_value(name: str, field: str, value: float) -> str:
    """Return the name of the experiment for one value: NAME__k_4, NAME__l1_0p75, NAME__l0_1em05."""
    written = str(int(value)) if value == int(value) else repr(value)
    return f"{name}__{field.removesuffix('_coefficient')}_{written.replace('.', 'p').replace('-', 'm')}"
