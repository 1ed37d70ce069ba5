"""`curate show RUN --query`: what helps and hurts a query, as text."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from curate.cli.colour import Paint, plain, show
from curate.cli.reporter import print_json, start_logging
from curate.cli.showing import preview
from curate.cli.text import cells, place_text
from curate.errors import ConfigError, counted, on_one_line

if TYPE_CHECKING:
    from jobs.influence_ask import Answer, Found


def print_answer(
    folder: Path,
    query: str,
    *,
    examples: int,
    domain: str | None,
    as_json: bool,
    others: Mapping[str, object],
) -> None:
    """Ask the run's influence index.

    Raises:
        ConfigError: an option among `others` was given, which says something else.
    """
    for name, value in others.items():
        if value:
            raise ConfigError(
                f"{name} does not go with --query, which lists by influence on the query",
                fix=f"leave {name} out",
            )
    if not examples:
        raise ConfigError("--query lists examples, and none are asked for", fix="raise --examples")
    from jobs.influence_ask import ask

    start_logging(quiet=True, verbose=False)
    answer = ask(folder, query, examples=examples, domain=domain)
    if as_json:
        print_json("show", asdict(answer))
    else:
        show(lambda paint, width: answer_lines(answer, paint=paint, width=width))


def answer_lines(
    answer: "Answer", *, paint: Paint = plain, width: int | None = None
) -> Iterator[str]:
    """The whole page.

    Args:
        answer: what was found.
        paint: colours.
        width: of the terminal; None for lines as long as they are.
    """
    yield f"run {place_text(answer.run)}"
    name = f" {preview(answer.query, width=60)}" if answer.query else ""
    models = counted(len(answer.checkpoints), "checkpoint")
    yield (
        f"query{name}: {counted(answer.num_scored, 'position')} with a loss of {answer.loss:.4g}"
        f" nats; metric {answer.metric} at {models}"
    )
    yield from (f"{paint('note', 'yellow')}: {on_one_line(note)}" for note in answer.notes)
    for title, found in (("helps most", answer.helps), ("hurts most", answer.hurts)):
        yield ""
        yield paint(title, "bold")
        if not found:
            yield "  no training example has a score"
        yield from (_line(one, paint, width) for one in found)


def _line(one: "Found", paint: Paint, width: int | None) -> str:
    room = 40 if width is None else max(16, min(40, width // 3))
    place = preview(f"{one.source}/{one.file}:{one.row}", width=room)
    place += " " * (room - cells(place))
    rest = 80 if width is None else max(16, width - 14 - room)
    score = paint(f"{one.score:<+10.4g}", "green" if one.score > 0 else "red")
    return f"  {score} {paint(place, 'dim')} {preview(one.text, width=rest)}"
