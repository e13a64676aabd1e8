"""What goes wrong for reasons the user can act on; the command line prints these as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work, found before anything is compiled.

    Args:
      field: Dotted name of the setting, as on the command line (`mesh.fsdp`).
      value: What was given.
      wanted: What would be right.

    >>> str(ConfigError("steps", 0, "expected at least 1"))
    'steps: got 0, expected at least 1'
    """

    def __init__(self, field: str, value: Any, wanted: str):
        """Builds the message from field, value and remedy."""
        super().__init__(f"{field}: got {value!r}, {wanted}")

    @classmethod
    def inside(cls, section: str, error: Exception) -> "ConfigError":
        """Puts the section in front of a message that names field, value and remedy itself."""
        wrapped = cls.__new__(cls)
        ValueError.__init__(wrapped, f"{section}: {error}")
        return wrapped


class NotReadyError(ConfigError):
    """Other processes that are not there yet, or not gone: the same command may succeed later."""


@contextmanager
def within(section: str) -> Iterator[None]:
    """Puts a section in front of what is said inside about a value.

    Raises:
      ConfigError: For every ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError.inside(section, error) from error


class ArgumentError(ValueError):
    """Command-line arguments that cannot be read."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or used for this run."""


class TrainingError(RuntimeError):
    """A run that cannot go on, for example after too many non-finite steps."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, handled like Ctrl-C; the command line ends with 0 or 143 instead of 130.

    The text is the name of the signal.
    """
