"""Errors that a user can mend. Their message says what is wrong, where, and what to do; the command line prints it alone."""


class SaeensError(Exception):
    """Something outside the code stands in the way: a missing file, a full disk, a broken artefact. Exit code 1."""

    exit_code = 1


class ConfigurationError(SaeensError):
    """What the user asked for cannot be: a wrong experiment file, an unknown name, a layer that does not exist. Exit code 2."""

    exit_code = 2
