"""Labels in experiment files: text, and what YAML takes for numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _as_text(value: Any) -> Any:
    """A whole number is what a file's column of numbers is read as; true and false are left to be refused."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) else value


Label = Annotated[str, BeforeValidator(_as_text)]
Labels = Annotated[list[Label], BeforeValidator(_as_list)]
"""One label may stand alone."""
