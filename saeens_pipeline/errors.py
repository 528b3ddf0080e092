"""Errors that a user can fix. The message names the mistake, its place, and the remedy; the command line prints no traceback."""


class SaeensError(Exception):
    """A problem outside the code: a missing file, a full disk, a damaged artefact. Exit code 1."""

    exit_code = 1


class ConfigurationError(SaeensError):
    """An invalid request: a wrong experiment file, an unknown name, a layer that does not exist. Exit code 2."""

    exit_code = 2
