"""The command line: `curate --help`. Results go to stdout, everything else to stderr."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from types import FrameType
from typing import cast

from curate.errors import CurateError, Interrupted, on_one_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN_PIPE = 141
_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
_KEEP_NOTHING = {"diff", "doctor", "init", "methods", "report", "schema", "show", "status",
                 "verify"}  # fmt: skip
"""Commands that look and tell, or write a single file."""
_WORDS = {130: "interrupted", 143: "stopped by SIGTERM", 75: "stopped by SIGUSR1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, which the console script hands to the shell."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    # Read when the libraries are imported: their threads and bars would disturb ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            code = _run(given)
            sys.stdout.flush()
        except (Exception, Interrupted, KeyboardInterrupt) as error:
            code = _failed(error, given)
    except BrokenPipeError:
        # The reader, such as `head`, has gone; what python flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return code


def _failed(error: BaseException, given: Sequence[str]) -> int:
    """Tell what went wrong; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error, CurateError):
        code = error.exit_code
        return _fail(error.what, error.fix, code, given=() if error.is_told else given)
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        code = error.exit_code if isinstance(error, Interrupted) else 130
        return _fail(_WORDS[code], _go_on(given), code, given=given)
    if _is_disk_full(error):
        where = getattr(error, "filename", None) or "a file"
        fix = "free some space, then run the same command again; what is finished is kept"
        what = f"{where} could not be written: the disk is full ({error})"
        return _fail(what, fix, 1, given=given)
    if isinstance(error, ImportError) and (foreign := _foreign()):
        return _fail(*foreign, 6, given=given)
    traceback.print_exception(error)
    what = "this is a bug in curate, or in a method of your own"
    fix = "report it with the lines above, the command and the output of `curate doctor`"
    return _fail(what, fix, 1, given=given)


def _run(given: list[str]) -> int:
    import typer

    from curate.cli.app import app

    # The base of click's errors, wherever this version of typer keeps click.
    wrong_usage = cast(type[Exception], typer.BadParameter.__mro__[2])
    # Not through `app()`: it would end a broken pipe and Ctrl-C with exit codes of its own.
    command = typer.main.get_command(app)
    try:
        with command.make_context("curate", given) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except wrong_usage as error:
        usage = cast(typer.BadParameter, error)
        usage.show()
        _print_error(usage.format_message(), "see what --help lists", usage.exit_code, given)
        return usage.exit_code
    return 0


def _go_on(given: Sequence[str]) -> str:
    """What helps after an interruption."""
    if _KEEP_NOTHING.intersection(given[:1]):
        return "run the same command again; it begins anew, as it keeps nothing"
    return "run the same command again to go on; what was finished is kept"


def _foreign() -> tuple[str, str] | None:
    """What to say where a package of ours is hidden by another one of the same name."""
    from curate.cli.imports import foreign_packages

    for name, place in foreign_packages().items():
        fix = "run curate in an environment of its own; `curate doctor` says more"
        return f"`import {name}` finds {place}, which is not part of curate", fix
    return None


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(_SIGNALS[signal.Signals(number)])


def _fail(what: str, fix: str, code: int, *, given: Sequence[str]) -> int:
    if mirror := sys.modules.get("curate.data.mirror"):  # of runs in a store people know those
        what, fix = (mirror.with_addresses(text) for text in (what, fix))
    print(f"error: {on_one_line(what)}\n  fix: {on_one_line(fix)}", file=sys.stderr)
    _print_error(what, fix, code, given)
    return code


def _print_error(what: str, fix: str, code: int, given: Sequence[str]) -> None:
    """On stdout too, where a program reads results or events there."""
    as_event = "--events=-" in given or ("--events", "-") in pairwise(given)
    if "--json" in given or as_event:
        from curate.cli.reporter import print_error

        command = next((word for word in given if not word.startswith("-")), "")
        told = {"what": what, "fix": fix, "exit_code": code}
        with suppress(UnicodeError):  # it stands on stderr, escaped
            print_error(command, told, as_event=as_event)


def _is_disk_full(error: BaseException) -> bool:
    """Whether some library ran out of disk; not all of them say so by an OSError."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return os.strerror(errno.ENOSPC).lower() in str(error).lower()
