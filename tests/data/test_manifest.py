"""Manifest and layout: what made what, and where things lie."""

from pathlib import Path
from typing import Any

from curate.data.layout import RunFolder
from curate.data.manifest import load_manifest, record_stage
from curate.data.partitions import Output, Partition


def test_a_stage_is_written_down_with_the_digest_of_every_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert load_manifest(run) == {"schema_version": 1, "stages": {}}
    output = Output(tmp_path / "examples" / "part-a.parquet")
    mark = output.write(lambda path: path.write_text("x"), "fp", rows=1)
    missing = Output(tmp_path / "examples" / "part-b.parquet")
    record_stage(run, "index", outputs=[output, missing], seconds=1.5, facts={"seed": 3})
    record_stage(run, "plan", outputs=[], seconds=0)
    stages = load_manifest(run)["stages"]
    assert list(stages) == ["index", "plan"]
    assert stages["index"]["files"] == {"examples/part-a.parquet": mark}
    assert stages["index"]["seed"] == 3
    assert stages["index"]["software"]["pyarrow"]


def test_a_stage_that_had_nothing_to_do_keeps_its_entry(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    output = Output(tmp_path / "examples" / "part-a.parquet")
    output.write(lambda path: path.write_text("x"), "fp", rows=1)
    facts: dict[str, Any] = {"summary": {"rows": 1, "shape": (2, 3), "done": 1, "skipped": 0}}
    record_stage(run, "index", outputs=[output], seconds=1.5, facts=facts)
    first = run.manifest.read_text().replace('"finished": "2', '"finished": "1')
    run.manifest.write_text(first)
    again = {"summary": {"rows": 1, "shape": (2, 3), "done": 0, "skipped": 1}}
    entry = record_stage(run, "index", outputs=[output], seconds=0.1, facts=again)
    assert run.manifest.read_text() == first
    assert (entry["finished"][0], entry["seconds"]) == ("1", 1.5)
    output.write(lambda path: path.write_text("y"), "fp", rows=1)
    record_stage(run, "index", outputs=[output], seconds=0.1, facts=again)
    assert load_manifest(run)["stages"]["index"]["seconds"] == 0.1


def test_every_table_of_a_partition_has_its_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    part = Partition(name="part-a", source="s", file="f", address="f", first_row=0, num_rows=1,
                     stamp="")  # fmt: skip
    places = [run.examples(part), run.lengths(part, "t"), run.quantities(part, "c"),
              run.scores(part, "el2n"), run.planned(part)]  # fmt: skip
    assert [place.path.relative_to(tmp_path).as_posix() for place in places] == [
        "examples/part-a.parquet", "lengths/t/part-a.parquet", "quantities/c/part-a.parquet",
        "scores/el2n/part-a.parquet", "plan/part-a.parquet",
    ]  # fmt: skip
    assert run.partitions() == []
