"""What a stage came to, in one line each; the full summaries are in `--json`."""

from collections.abc import Callable, Mapping
from typing import Any

from curate.cli.colour import Paint, plain
from curate.cli.text import number_text, place_text, size_text
from curate.errors import counted, on_one_line


def summary_lines(result: Mapping[str, Any], *, paint: Paint = plain) -> list[str]:
    """One line per stage that ran, then the run folder."""
    lines = [
        f"{paint(stage.ljust(10), 'cyan')} {on_one_line(_LINES.get(stage, _any)(summary))}"
        for stage, summary in result["stages"].items()
        if summary
    ]
    return [*lines, f"{paint('run'.ljust(10), 'cyan')} {place_text(result['run'])}"]


def _index(summary: Mapping[str, Any]) -> str:
    bad = summary["bad"]
    aside = ", ".join(f"{count:,} {reason}" for reason, count in bad.items()) or "nothing"
    return (
        f"{counted(summary['rows'], 'example')} ({summary['held_out']:,} held out) in"
        f" {counted(summary['num_domains'], 'domain')}, {counted(summary['files'], 'file')};"
        f" set aside: {aside}"
    )


def _tokenizer(summary: Mapping[str, Any]) -> str:
    return f"vocabulary of {summary['vocab_size']:,}"


def _train(summary: Mapping[str, Any]) -> str:
    losses = summary["held_out_loss"] or summary["loss"]
    shown = ", ".join(f"{loss:.3f}" for loss in losses.values() if loss is not None)
    kind = "held-out loss" if summary["held_out_loss"] else "loss"
    seeds, checkpoints = counted(summary["seeds"], "seed"), len(summary["checkpoints"])
    return f"{seeds}, {counted(checkpoints, 'checkpoint')}, {kind} {shown}"


def _embed(summary: Mapping[str, Any]) -> str:
    shown: list[str] = []
    for name, entry in summary["representations"].items():
        without = f", {entry['without']:,} without" if entry["without"] else ""
        cut = f", {entry['cut']:,} cut" if entry["cut"] else ""
        shown.append(f"{name}: {counted(entry['rows'], 'vector')} of {entry['dim']}{without}{cut}")
    if summary["target"] is not None:
        shown.append(counted(summary["target"], "target example"))
    return "; ".join(shown)


def _domains(summary: Mapping[str, Any]) -> str:
    found = summary["domains"]
    without = summary["without_vector"]
    more = f", {without:,} without a vector" if without else ""
    sizes = [entry["rows"] for entry in found]
    return f"{counted(len(found), 'cluster')} of {min(sizes):,} to {max(sizes):,} rows{more}"


def _score(summary: Mapping[str, Any]) -> str:
    shown: list[str] = []
    for scorer, columns in summary["scorers"].items():
        means = {name: f["mean"] for name, f in columns.items() if f["mean"] is not None}
        for column, mean in list(means.items())[:1]:
            name = scorer if column == scorer else f"{scorer}.{column}"
            shown.append(f"{name} {mean:.4g}")
    reused = counted(summary["reused"], "pass", "passes")
    extra = f"; {reused} reused" if summary["reused"] else ""
    said = "".join(f"; {sentence}" for sentence in summary.get("says", ()))
    means = f", means: {', '.join(shown)}" if shown else ""
    return f"{counted(summary['rows'], 'example')}{means}{extra}{said}"


def _lengths(summary: Mapping[str, Any]) -> str:
    return f"{summary['tokens']:,} in {counted(summary['rows'], 'example')}; {summary['tokenizer']}"


def _mix(summary: Mapping[str, Any]) -> str:
    if summary["mixer"] is None:
        return "as it falls"
    weights = [entry["weight"] for entry in summary["domains"]]
    low, high = min(weights), max(weights)
    return (
        f"{summary['mixer']} over {number_text(summary['budget_tokens'])} tokens:"
        f" {counted(len(weights), 'domain')} between {100 * low:.1f} and {100 * high:.1f} %"
    )


def _plan(summary: Mapping[str, Any]) -> str:
    kept, there = summary["kept"], summary["training"]
    line = f"keeps {kept['rows']:,} of {counted(there['rows'], 'example')}"
    if summary["tokenizer"] is not None:
        unit = "characters" if summary["tokenizer"] == "characters" else "tokens"
        line += f", {kept['tokens']:,} of {there['tokens']:,} {unit}"
        line += f" ({100 * (kept['token_share'] or 0):.1f} %)"
    copies = kept["copies"] - kept["rows"]
    line += f", {counted(copies, 'copy', 'copies')} more" if copies else ""
    dropped = summary["dropped"]["rows"]
    line += f"; {dropped:,} were dropped first" if dropped else ""
    return line + "".join(
        f"; of {place_text(name)} {found['kept']['examples']:,} of {found['examples']:,}"
        f" ({100 * found['kept']['share']:.1f} %) stand in what is kept,"
        f" {counted(found['left_out']['rows'], 'example')} with it left out"
        for name, found in summary.get("leakage", {"sets": {}})["sets"].items()
    )


def _write(summary: Mapping[str, Any]) -> str:
    return (
        f"{counted(summary['rows'], 'row')} in {counted(summary['shards'], 'shard')},"
        f" {size_text(summary['bytes'])}, in {place_text(summary['folder'])}"
    )


def _any(summary: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {number_text(value) if isinstance(value, int | float) else value}"
        for key, value in summary.items()
        if isinstance(value, int | float | str)
    )


_LINES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "index": _index,
    "tokenizer": _tokenizer,
    "train": _train,
    "embed": _embed,
    "domains": _domains,
    "score": _score,
    "lengths": _lengths,
    "mix": _mix,
    "plan": _plan,
    "write": _write,
}
