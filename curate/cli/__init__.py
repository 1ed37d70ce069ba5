"""The command line: `curate --help`. Results go to stdout, everything else to stderr."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import cast

from curate.errors import CurateError, Interrupted, on_one_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN_PIPE = 141
_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
_KEEP_NOTHING = {"doctor", "methods", "schema", "show", "status", "verify"}
"""Commands that look and tell."""
_WORDS = {130: "interrupted", 143: "stopped by SIGTERM", 75: "stopped by SIGUSR1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, which the console script hands to the shell."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    # Read when the libraries are imported: their threads and bars would disturb ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has gone; what python flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except CurateError as error:
        return _fail(error.what, error.fix, error.exit_code)
    except (Interrupted, KeyboardInterrupt) as error:
        code = error.exit_code if isinstance(error, Interrupted) else 130
        return _fail(_WORDS[code], _go_on(arguments), code)
    except Exception as error:
        if _is_disk_full(error):
            where = getattr(error, "filename", None) or "a file"
            fix = "free some space, then run the same command again; what is finished is kept"
            return _fail(f"{where} could not be written: the disk is full ({error})", fix, 1)
        if isinstance(error, ImportError) and (foreign := _foreign()):
            return _fail(*foreign, 6)
        traceback.print_exc()
        return _fail("this is a bug in curate, or in a method of your own", "report it with the"
                     " lines above, the command and the output of `curate doctor`", 1)  # fmt: skip
    return code


def _run(arguments: Sequence[str] | None) -> int:
    import typer

    from curate.cli.app import app

    # The base of click's errors, wherever this version of typer keeps click.
    wrong_usage = cast(type[Exception], typer.BadParameter.__mro__[2])
    # Not through `app()`: it would end a broken pipe and Ctrl-C with exit codes of its own.
    command = typer.main.get_command(app)
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        with command.make_context("curate", given) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except wrong_usage as error:
        usage = cast(typer.BadParameter, error)
        usage.show()
        return usage.exit_code
    return 0


def _go_on(arguments: Sequence[str] | None) -> str:
    """What helps after an interruption."""
    given = sys.argv[1:] if arguments is None else arguments
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


def _fail(what: str, fix: str, code: int) -> int:
    if mirror := sys.modules.get("curate.data.mirror"):  # of runs in a store people know those
        what, fix = (mirror.with_addresses(text) for text in (what, fix))
    print(f"error: {on_one_line(what)}\n  fix: {on_one_line(fix)}", file=sys.stderr)
    return code


def _is_disk_full(error: BaseException) -> bool:
    """Whether some library ran out of disk; not all of them say so by an OSError."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return os.strerror(errno.ENOSPC).lower() in str(error).lower()
