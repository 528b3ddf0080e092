"""Messages about values of an experiment file, from pydantic's errors. Positions in files are added by `files.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SHOWN = 80  # characters of a value
_SHOWN_MESSAGE = 1500  # characters of a message
_PLAIN_FLOAT = re.compile(r"[+-]?[0-9._]+e[+-]?[0-9]+", re.IGNORECASE)  # text for YAML 1.1 unless it has a point and a signed exponent

_MESSAGES = {
    "missing": "required",
    "extra_forbidden": "unknown key",
    "string_type": "expected a text: put it in quotes",
    "string_unicode": "a text of half a surrogate pair is not allowed",
    "string_too_short": "expected a text of at least {min_length} characters",
    "string_too_long": "expected a text of at most {max_length} characters",
    "int_type": "expected a whole number (an integer)",
    "int_parsing": "expected a whole number (an integer)",
    "int_parsing_size": "expected a whole number of fewer digits",
    "int_from_float": "expected a whole number (an integer)",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping with fields",
    "model_type": "expected a mapping with fields",
    "model_attributes_type": "expected a mapping with fields",
    "mapping_type": "expected a mapping with fields",
    "is_instance_of": "expected a mapping with fields",
    "too_short": "expected entries, at least {min_length}",
    "too_long": "expected fewer entries, at most {max_length}",
    "greater_than": "has to be greater than {gt}",
    "greater_than_equal": "has to be greater than or equal to {ge}",
    "less_than": "has to be less than {lt}",
    "less_than_equal": "has to be less than or equal to {le}",
    "multiple_of": "has to be a multiple of {multiple_of}",
    "literal_error": "expected {expected}",
    "none_required": "expected no value",
    "union_tag_invalid": "expected one of {expected_tags}",
    "union_tag_not_found": "expected a text or a mapping with fields",
    "default_factory_not_called": "its default cannot be derived before other fields are correct",
    "recursion_loop": "a value contains itself",
    "string_pattern_mismatch": "expected a text that matches {pattern}",
    "invalid_key": "a key has to be a plain word",
}
_OWN = ("value_error", "assertion_error", "inconsistent", "unknown_architecture", "whole_number")  # of our validators, with our words


def in_words(error: Mapping[str, Any]) -> str:
    """Return the message of one of pydantic's errors, without the location."""
    kind = error["type"]
    if kind in _MESSAGES:
        message = _MESSAGES[kind].format(**error.get("ctx", {}))
    elif kind in _OWN:
        message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    else:
        message = "this value is not allowed here"
    found = error.get("input")
    if isinstance(found, str) and len(found) > _SHOWN:
        message = message.replace(repr(found), shown(found))
    if kind in ("int_parsing", "int_type", "float_parsing") and isinstance(found, str) and _PLAIN_FLOAT.fullmatch(found):
        message += _number_hint(found)
    return message


def _number_hint(found: str) -> str:
    """Return how to write a number such as 1e6, which YAML 1.1 reads as text."""
    try:
        number = float(found)
    except ValueError:
        return ""
    if number.is_integer() and abs(number) < 1e18:
        return f": write {int(number):_}"
    return ""


def shown(value: object) -> str:
    """Return a value as text of one line, cut after 80 characters."""
    if isinstance(value, (list, tuple)) and len(value) > _SHOWN:
        value = value[:_SHOWN]
    elif isinstance(value, str):
        value = value[: 2 * _SHOWN]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # for example, an integer of more digits than Python converts
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def on_one_line(message: str) -> str:
    """Return a message with control characters escaped, cut after 1500 characters."""
    cut = message if len(message) <= _SHOWN_MESSAGE else f"{message[:_SHOWN_MESSAGE]} ..."
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in cut)
