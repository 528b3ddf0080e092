"""Labels in experiment files: text, and numbers that stand for text."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _as_text(value: Any) -> Any:
    """Return an integer as text, as columns of numbers are read. Booleans stay, so that validation rejects them."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) else value


Label = Annotated[str, BeforeValidator(_as_text)]
Labels = Annotated[list[Label], BeforeValidator(_as_list)]
"""A list of labels; a single label may be given without a list."""
