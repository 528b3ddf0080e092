"""Errors that a user can fix, and text for messages.

An error's message names the mistake, its place, and the remedy; the command line prints no traceback.
"""

import re

# Sequences that a terminal executes: CSI, such as colours; OSC and the like, up to their end; two characters; then single characters.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c|$)"
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class SaeensError(Exception):
    """A problem outside the code: a missing file, a full disk, a damaged artefact. Exit code 1."""

    exit_code = 1


class ConfigurationError(SaeensError):
    """An invalid request: a wrong experiment file, an unknown name, a layer that does not exist. Exit code 2."""

    exit_code = 2


def counted(n: int, what: str) -> str:
    """Return a number of things: `1 artefact`, `2 artefacts`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def without_escapes(text: str) -> str:
    """Return text from outside without the escape sequences and control characters that a terminal would execute; lines and tabs stay."""
    return _ESCAPES.sub("", text)


def printable(text: str) -> str:
    r"""Return text from outside for a terminal: without escape sequences, and bytes of paths that are not UTF-8 as `\udcff`."""
    return without_escapes(text).encode("utf-8", "backslashreplace").decode()
