"""`curate report`: gather, draw, and say where the page is."""

from pathlib import Path

from curate.cli.reporter import print_json, start_logging
from curate.cli.text import size_text


def print_report(folder: Path, out: Path | None, *, examples: int, as_json: bool) -> None:
    """Write the page of a run; with `as_json` its figures go to stdout too."""
    from curate.report.document import values
    from jobs.report import write_report

    start_logging(quiet=True, verbose=False)
    page, document = write_report(folder, out, examples=examples)
    size = page.stat().st_size
    if as_json:
        found = {"page": str(page), "size_bytes": size, "document": values(document)}
        print_json("report", found)
        return
    print(f"wrote {page} ({size_text(size)}): open it in a browser")
