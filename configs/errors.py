"""Errors that a user can cause and mend; the command line prints their message and no traceback."""


class TelarError(Exception):
    """Base of errors shown to the user as one message. `exit_code` is the command's exit status."""

    exit_code = 1


class ConfigError(TelarError, ValueError):
    """A configuration field, an override or a command-line argument is wrong (exit code 2)."""

    exit_code = 2


class StorageError(TelarError):
    """Storage cannot be read or written as asked (exit code 1)."""


class DataError(TelarError):
    """A corpus, shard or manifest is missing, empty or not what its digest says (exit code 1)."""


class CapacityError(TelarError):
    """The cluster cannot hold what was asked for (exit code 1)."""


class RunStopped(TelarError):
    """The run was stopped on request before it finished (exit code 3)."""

    exit_code = 3


class UnreachableError(TelarError):
    """No cluster answers at the address in use (exit code 4)."""

    exit_code = 4
