"""Errors a user can meet, and the exit code each of them ends the command line with."""

from collections.abc import Callable, Sequence


class CurateError(Exception):
    """What happened and where, plus the next thing to try.

    Args:
        what: one sentence in the user's words, naming the file, row, key or id concerned.
        fix: one imperative sentence; printed on its own line by the command line.
    """

    exit_code = 1
    tasks: Sequence[str] = ()
    """Names of the tasks that failed, where the error sums up a stage."""
    others: Sequence[str] = ()
    """What went wrong beside it, a sentence each, where the error sums up a stage."""
    is_told = False
    """Whether a JSON document on stdout has it already."""

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(f"{what}\n  fix: {fix}")
        self.what = what
        self.fix = fix

    # Dask carries errors between processes; the default would call __init__ with one argument.
    def __reduce__(self) -> tuple[Callable[..., "CurateError"], tuple[object, ...]]:
        return _rebuild, (type(self), self.what, self.fix)


def _rebuild(kind: type[CurateError], what: str, fix: str) -> CurateError:
    return kind(what, fix=fix)


class ConfigError(CurateError, ValueError):
    """A setting or an option is wrong.

    A ValueError too, so that pydantic adds the YAML path when a `__post_init__` raises it.
    """

    exit_code = 2


class InputError(CurateError):
    """Input data or a model is missing or cannot be read."""

    exit_code = 3


class TooManyBadError(CurateError):
    """Finished, but more rows, files or partitions were set aside than the settings allow."""

    exit_code = 4


class RunFolderError(CurateError):
    """The output folder belongs to something else, or another process is writing to it."""

    exit_code = 5


class OutputError(CurateError):
    """A file could not be written, as on a full disk; any other write would fail the same way."""


class MissingDependencyError(CurateError):
    """A package or a GPU that the settings ask for is not there."""

    exit_code = 6


class DivergedError(CurateError):
    """Training left the finite numbers: the loss or the weights are infinite or no number."""


class TryAgainError(CurateError):
    """Nothing is wrong with the work; it stopped for a reason outside and can be resumed."""

    exit_code = 75


class StoreLostError(OutputError):
    """The object store of the run does not answer; nothing is wrong with the work."""

    exit_code = 75


class Interrupted(BaseException):
    """Ctrl-C or a signal asked to stop; what is finished is kept, a rerun resumes.

    Args:
        exit_code: 130 after Ctrl-C, 143 after SIGTERM, 75 after SIGUSR1.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 file`, `12,000 files`: a number with its noun, or with a phrase given in both forms."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def on_one_line(text: str) -> str:
    """The text with line breaks and control characters escaped, as names in the data may hold."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
