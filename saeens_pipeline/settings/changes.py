"""Fields of experiment files with other values for one command: `saeens run --set sae.k=8`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.settings.messages import shown


class Change(NamedTuple):
    """Another value of one field of a document, which is found by its `type` and the `name` in its attributes."""

    type: str
    name: str
    location: tuple[str, ...]
    """The field below `attributes`; entries of a list by their number, from 0."""
    value: Any

    @property
    def field(self) -> str:
        """The field as the command line names it: `sae.k`."""
        return ".".join(self.location)

    @property
    def option(self) -> str:
        """The option without its value, for messages."""
        return f"--set {self.field}"

    def concerns(self, location: Sequence[int | str]) -> bool:
        """Return whether a field is the changed one, is in it, or contains it."""
        return all(str(one) == other for one, other in zip(location, self.location, strict=False))

    def applied(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return the attributes with the other value. Raises ConfigurationError if there is no such place."""
        return self._replaced(attributes, 0)

    def _replaced(self, value: Any, depth: int) -> Any:
        """Return `value`, the field at this depth, with the other value in it. What contains it is copied: YAML's aliases share values."""
        if depth == len(self.location):
            return self.value
        key = self.location[depth]
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            i = int(key)
            return [*value[:i], self._replaced(value[i], depth + 1), *value[i + 1 :]]
        if value is not None and not isinstance(value, dict):
            outer = ".".join(self.location[:depth])
            entries = f"; its entries are {outer}.0 to {outer}.{len(value) - 1}" if isinstance(value, list) and value else ""
            raise ConfigurationError(f"{self.option}: {outer} is {shown(value)} in the experiment file, without fields{entries}")
        return {**(value or {}), key: self._replaced((value or {}).get(key), depth + 1)}
