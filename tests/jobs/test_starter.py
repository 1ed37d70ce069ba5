"""A starter configuration fits the data it was made for, and runs."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image

from curate.config import read_yaml
from curate.errors import ConfigError, InputError, OutputError
from jobs.all_stages import run_stages, stages_for
from jobs.cluster import InlineExecutor, Pool
from jobs.score_check import check_scores
from jobs.settings import parse_settings, task_settings
from jobs.starter import guess_settings, guess_task, source_name, write_starter
from jobs.starter_look import look_at


def starter(data: Path | str | list[Path], tmp_path: Path) -> tuple[dict[str, Any], str]:
    """The values and the text of the starter for `data`; it must be complete settings."""
    tmp_path.mkdir(exist_ok=True)
    target = tmp_path / "starter.yaml"
    write_starter([str(entry) for entry in data] if isinstance(data, list) else [str(data)], target)
    text = target.read_text()
    values = read_yaml(text, where="starter")
    task_settings(parse_settings(values))
    return values, text


def test_texts_with_classes_become_a_classification(tmp_path: Path):
    frame = pl.DataFrame({"text": ["a", "b", "c"], "label": [0, 2, 1], "topic": ["x", "y", "x"]})
    frame.write_parquet(tmp_path / "news.parquet")
    values, text = starter(tmp_path / "news.parquet", tmp_path)
    assert values["sources"]["news"] == {
        "path": str(tmp_path / "news.parquet"), "text": "text", "label": "label", "domain": "topic",
    }  # fmt: skip
    assert values["task"]["kind"] == "text-classification"
    assert values["task"]["num_classes"] == 3
    assert "columns: text (large_string), label (int64), topic (large_string)" in text


def test_plain_texts_become_a_language_model(tmp_path: Path):
    lines = [json.dumps({"body": f"text {i}"}) for i in range(5)]
    (tmp_path / "posts.jsonl").write_text("\n".join(lines))
    values, _ = starter(tmp_path / "posts.jsonl", tmp_path)
    assert values["sources"]["posts"]["text"] == "body"
    assert values["task"]["kind"] == "causal-lm"


def test_prompts_and_responses_are_recognised(tmp_path: Path):
    pl.DataFrame({"instruction": ["a"], "output": ["b"]}).write_parquet(tmp_path / "i.parquet")
    values, _ = starter(tmp_path / "i.parquet", tmp_path)
    assert values["sources"]["i"]["prompt"] == "instruction"
    assert values["sources"]["i"]["response"] == "output"


def test_a_single_text_column_of_any_name_is_taken(tmp_path: Path):
    pl.DataFrame({"verse": ["a"], "year": [1]}).write_csv(tmp_path / "poems.csv")
    values, _ = starter(tmp_path / "poems.csv", tmp_path)
    assert values["sources"]["poems"]["text"] == "verse"


def test_number_columns_become_features(tmp_path: Path):
    columns = {f"pixel_{i}": [0.5, 1.0] for i in range(8)}
    pl.DataFrame({**columns, "label": [0, 1]}).write_parquet(tmp_path / "t.parquet")
    values, _ = starter(tmp_path / "t.parquet", tmp_path)
    assert values["sources"]["t"]["features"] == "pixel_*"
    assert values["task"] == {"kind": "tabular-classification", "num_classes": 2}


def test_a_column_of_lists_of_numbers_called_features_is_taken(tmp_path: Path):
    rows = {"features": [[0.5, 1.0], [2.0, 3.0]], "label": [0, 1]}
    pl.DataFrame(rows).write_parquet(tmp_path / "t.parquet")
    values, _ = starter(tmp_path / "t.parquet", tmp_path)
    assert values["sources"]["t"]["features"] == "features"
    assert values["sources"]["t"]["label"] == "label"
    assert values["task"] == {"kind": "tabular-classification", "num_classes": 2}


def test_what_is_not_clear_is_left_to_the_user(tmp_path: Path):
    pl.DataFrame({"left": ["a"], "right": ["b"]}).write_parquet(tmp_path / "two.parquet")
    lines = write_starter([str(tmp_path / "two.parquet")], tmp_path / "two.yaml")
    assert any("still to do: name the content column" in line for line in lines)
    assert "text: COLUMN" in (tmp_path / "two.yaml").read_text()


def test_labels_that_are_texts_become_classes(tmp_path: Path):
    frame = pl.DataFrame({"text": ["a", "b", "c", "d"], "label": ["spam", "ham", "spam", "ham"]})
    frame.write_parquet(tmp_path / "mail.parquet")
    values, _ = starter(tmp_path / "mail.parquet", tmp_path)
    assert values["sources"]["mail"]["label"] == "label"
    assert values["sources"]["mail"]["classes"] == ["ham", "spam"]
    assert values["task"]["kind"] == "text-classification"
    assert values["task"]["num_classes"] == 2
    lines = write_starter([str(tmp_path / "mail.parquet")], tmp_path / "again.yaml")
    assert lines[1:-1] == ["taking label: label (2 classes)"]


def test_many_classes_are_taken_from_the_whole_of_sorted_data(tmp_path: Path):
    """The first rows that are looked at hold a few of the classes only."""
    names = sorted(f"intent {n}" for n in range(150))
    rows = {"text": [f"text {n}" for n in range(6000)], "intent": sorted(names * 40)}
    for suffix in ("csv", "parquet", "jsonl"):
        getattr(pl.DataFrame(rows), {"jsonl": "write_ndjson"}.get(suffix, f"write_{suffix}"))(
            tmp_path / f"{suffix}.{suffix}"
        )
        values, _ = starter(tmp_path / f"{suffix}.{suffix}", tmp_path / suffix)
        assert values["sources"][suffix]["classes"] == names
        assert values["task"]["num_classes"] == 150


def test_a_large_file_says_that_its_classes_are_those_of_the_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jobs.starter_labels._MOST_BYTES", {})
    rows = {"text": ["a"] * 3000, "label": ["x", "y"] * 1500}
    pl.DataFrame(rows).write_parquet(tmp_path / "mail.parquet")
    said = told(tmp_path / "mail.parquet")
    assert "look at the classes: they are those of the first 2,000 rows of mail.parquet" in said


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (["x"] * 40, "it has one value only in 40 rows"),
        ([f"c{n}" for n in range(10)], "it has 10 different values in 10 rows, too few rows"),
        ([f"c{n % 1500}" for n in range(3000)], "1,500 different values in 3,000 rows, and of cl"),
        ([f"c{n}" for n in range(5000)], "it has 5,000 different values in 5,000 rows"),
        (["", " "] * 20, "it has no values"),
        ([0.5, 1.0] * 20, "it holds double, neither whole numbers nor names"),
        ([-1, 1] * 20, "its numbers are not all from 0 to 999"),
        ([7] * 20, "it has one value only"),
    ],
)
def test_a_label_column_that_is_not_taken_is_told(tmp_path: Path, labels: list[Any], why: str):
    frame = pl.DataFrame({"text": [f"t {n}" for n in range(len(labels))], "label": labels})
    frame.write_csv(tmp_path / "mail.csv")
    (said,) = told(tmp_path / "mail.csv")
    assert said.startswith("still to do: label is not taken as a label: ")
    assert why in said
    assert "to classify all the same, set sources.mail.label" in said


def told(data: Path) -> list[str]:
    """What a starter for `data` says beside its first and last line."""
    target = data.with_suffix(".yaml")
    lines = write_starter([str(data)], target)
    task_settings(parse_settings(read_yaml(target.read_text(), where="starter")))
    return lines[1:-1]


def test_rows_without_a_label_are_counted_and_are_no_class(tmp_path: Path):
    labels = ["x", "y", "", "  ", None] * 20
    frame = pl.DataFrame({"text": [f"t {n}" for n in range(100)], "label": labels})
    frame.write_parquet(tmp_path / "mail.parquet")
    values, _ = starter(tmp_path / "mail.parquet", tmp_path)
    assert values["sources"]["mail"]["classes"] == ["x", "y"]
    assert told(tmp_path / "mail.parquet")[1] == (
        "still to do: 60 of 100 rows have no label and will be set aside: leave them out, or set"
        " index.max_bad_rows to 0.6"
    )


def test_columns_between_semicolons_are_told_apart(tmp_path: Path):
    lines = ["text;label", *(f"text {n}, and more;{'ab'[n % 2]}" for n in range(40))]
    (tmp_path / "mail.csv").write_text("\n".join(lines))
    values, _ = starter(tmp_path / "mail.csv", tmp_path)
    source = values["sources"]["mail"]
    assert (source["separator"], source["text"], source["classes"]) == (";", "text", ["a", "b"])
    assert told(tmp_path / "mail.csv")[0] == "taking separator: ';'"
    (tmp_path / "one.csv").write_text("text; as it came\nfirst\nsecond\n")
    values, _ = starter(tmp_path / "one.csv", tmp_path / "one")
    assert values["sources"]["one"]["text"] == "text; as it came"


def test_a_file_that_is_not_utf8_is_to_be_saved_as_such(tmp_path: Path):
    lines = ["text,label", *(f"caf{'é' * (n % 2)} {n},{'ab'[n // 2 % 2]}" for n in range(40))]
    (tmp_path / "mail.csv").write_bytes("\n".join(lines).encode("latin-1"))
    said = "still to do: save the file as UTF-8 (20 rows of the first 40 rows of mail.csv are not)"
    assert said in told(tmp_path / "mail.csv")


def test_the_kind_of_an_instruction_is_its_domain(tmp_path: Path):
    """Of a plain text a column of that name is the label."""
    rows = {"instruction": ["a"] * 8, "response": ["b"] * 8, "category": ["x", "y"] * 4}
    pl.DataFrame(rows).write_parquet(tmp_path / "i.parquet")
    values, _ = starter(tmp_path / "i.parquet", tmp_path)
    assert values["sources"]["i"]["domain"] == "category"
    assert values["task"]["kind"] == "causal-lm"
    pl.DataFrame(rows).rename({"response": "text"}).write_parquet(tmp_path / "t.parquet")
    values, _ = starter(tmp_path / "t.parquet", tmp_path / "t")
    assert values["sources"]["t"]["label"] == "category"
    assert "domain" not in values["sources"]["t"]


@pytest.mark.parametrize(
    ("column", "why"),
    [
        ([f"https://a/{n}" for n in range(40)], "it has 40 different values in 40 rows"),
        ([["en", "de"]] * 40, "it holds list<item: string>, neither text nor numbers"),
        ([None] * 40, "it has no values"),
    ],
)
def test_a_column_whose_values_hardly_repeat_is_no_domain(
    tmp_path: Path, column: list[Any], why: str
):
    """It would make a domain of each row, or stop the index."""
    rows = [{"text": f"t {n}", "source": value} for n, value in enumerate(column)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values, _ = starter(tmp_path / "d.jsonl", tmp_path / "c")
    assert "domain" not in values["sources"]["d"]
    assert told(tmp_path / "d.jsonl") == [f"source is not taken as the domain: {why}"]
    both = [{**row, "topic": "ab"[n % 2]} for n, row in enumerate(rows)]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, both)))
    values, _ = starter(tmp_path / "e.jsonl", tmp_path / "c2")
    assert values["sources"]["e"]["domain"] == "topic"
    assert told(tmp_path / "e.jsonl") == []


def test_a_number_to_foretell_is_no_feature(tmp_path: Path):
    columns = {"a": [0.5, 1.0, 2.0], "b": [1.0, 2.0, 3.0], "target": [1.5, 2.5, 0.5]}
    pl.DataFrame(columns).write_csv(tmp_path / "houses.csv")
    values, _ = starter(tmp_path / "houses.csv", tmp_path / "c")
    assert values["sources"]["houses"]["features"] == ["a", "b"]
    assert values["task"] == {"kind": "tabular-classification", "num_classes": 2}
    (said,) = told(tmp_path / "houses.csv")
    assert "target is not taken as a label: it holds double" in said
    bare = pl.DataFrame(columns).drop("target")
    bare.write_csv(tmp_path / "bare.csv")
    (said,) = told(tmp_path / "bare.csv")
    assert said == (
        "still to do: set sources.bare.label to the column of the class, and task.num_classes"
    )
    likened = tmp_path / "likened.yaml"
    write_starter([str(tmp_path / "bare.csv")], likened, wanted=str(tmp_path / "bare.csv"))
    assert read_yaml(likened.read_text(), where="likened")["task"]["kind"] == "causal-lm"


def test_the_row_numbers_of_pandas_are_no_feature(tmp_path: Path):
    """Of data in order of their class they would tell it."""
    columns = {"x": [0.5, 1.0] * 20, "y": [1.0, 2.0] * 20, "label": [0] * 20 + [1] * 20}
    for name in ("__index_level_0__", "Unnamed: 0"):
        pl.DataFrame({name: range(40), **columns}).write_parquet(tmp_path / "t.parquet")
        values, _ = starter(tmp_path / "t.parquet", tmp_path)
        assert values["sources"]["t"]["features"] == ["x", "y"]
        (tmp_path / "starter.yaml").unlink()
    lines = [",x,y,label", *(f"{n},{n / 2},{n / 3},{n // 20}" for n in range(40))]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    values, _ = starter(tmp_path / "c.csv", tmp_path)
    assert values["sources"]["c"]["features"] == ["x", "y"]
    pl.DataFrame(columns).rename({"x": "column_0"}).write_csv(tmp_path / "d.csv")
    values, _ = starter(tmp_path / "d.csv", tmp_path / "d")
    assert values["sources"]["d"]["features"] == ["column_0", "y"]


@pytest.mark.parametrize("name", ["2024", "no", "null", "1e5", "0x1f", "-"])
def test_a_source_may_be_called_as_a_number_is_written(tmp_path: Path, name: str):
    (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    values, _ = starter(tmp_path / f"{name}.jsonl", tmp_path / "c")
    assert list(values["sources"]) == [source_name(f"{name}.jsonl")]


def test_texts_that_are_all_different_are_no_classes(tmp_path: Path):
    frame = pl.DataFrame({"text": ["a", "b", "c", "d"], "label": ["p", "q", "r", "s"]})
    frame.write_parquet(tmp_path / "mail.parquet")
    values, _ = starter(tmp_path / "mail.parquet", tmp_path)
    assert values["sources"]["mail"].keys() == {"path", "text"}
    assert values["task"]["kind"] == "causal-lm"


def test_named_classes_of_numbers_are_the_label_and_not_the_text(tmp_path: Path):
    columns = {"id": [7, 8, 9, 10], "width": [0.1, 0.2, 0.3, 0.4], "class": ["x", "y", "x", "y"]}
    pl.DataFrame(columns).write_parquet(tmp_path / "iris.parquet")
    values, _ = starter(tmp_path / "iris.parquet", tmp_path)
    source = values["sources"]["iris"]
    assert (source["features"], source["label"], source["id"]) == ("width", "class", "id")
    assert source["classes"] == ["x", "y"]
    assert values["task"] == {"kind": "tabular-classification", "num_classes": 2}


@pytest.mark.parametrize("labels", [[-1, 0, 1], [5, 90_000, 3], [0.5, 0.25, 1.0]])
def test_a_label_column_that_names_no_class_is_left_out(tmp_path: Path, labels: list[float]):
    frame = pl.DataFrame({"text": ["a", "b", "c"], "label": labels, "id": ["u", "v", "w"]})
    frame.write_parquet(tmp_path / "notes.parquet")
    values, _ = starter(tmp_path / "notes.parquet", tmp_path)
    assert values["sources"]["notes"].keys() == {"path", "text", "id"}
    assert values["task"]["kind"] == "causal-lm"


def test_an_id_that_repeats_is_no_id(tmp_path: Path):
    pl.DataFrame({"text": ["a", "b"], "id": [1, 1]}).write_parquet(tmp_path / "t.parquet")
    values, text = starter(tmp_path / "t.parquet", tmp_path)
    assert "id" not in values["sources"]["t"]
    assert "# id: COLUMN" in text


def test_several_data_become_a_source_each(tmp_path: Path):
    for folder, labels in (("a", [0, 1, 0]), ("b", [0, 4, 0])):
        (tmp_path / folder).mkdir()
        frame = pl.DataFrame({"text": ["a", "b", "c"], "label": labels})
        frame.write_parquet(tmp_path / folder / "part.parquet")
    both = [tmp_path / "a" / "part.parquet", tmp_path / "b" / "part.parquet"]
    values, _ = starter(both, tmp_path)
    assert {name: source["path"] for name, source in values["sources"].items()} == {
        "part": str(both[0]), "part-2": str(both[1]),
    }  # fmt: skip
    assert values["run"] == "runs/part-part-2"
    assert values["task"]["num_classes"] == 5
    (tmp_path / "c.jsonl").write_text('{"text": "plain"}\n')
    target = tmp_path / "mixed.yaml"
    lines = write_starter([*map(str, both), str(tmp_path / "c.jsonl")], target)
    assert lines[0] == f"{target} written for 3 files of format parquet, jsonl"
    mixed = read_yaml(target.read_text(), where="mixed")
    assert mixed["task"]["kind"] == "causal-lm"
    assert "label" not in mixed["sources"]["part"]
    pl.DataFrame({"x": [1.0, 2.0], "label": [0, 1]}).write_parquet(tmp_path / "n.parquet")
    with pytest.raises(ConfigError, match=r"for causal-lm.*for tabular-classification"):
        write_starter([str(tmp_path / "c.jsonl"), str(tmp_path / "n.parquet")], tmp_path / "no")


def test_only_the_start_of_a_long_compressed_file_is_read(tmp_path: Path):
    line = json.dumps({"text": "x" * 1000}) + "\n"
    with gzip.open(tmp_path / "long.jsonl.gz", "wt") as file:
        file.write(line * 5000)
        file.write('{"text": 5}\n')
    look = look_at(str(tmp_path / "long.jsonl.gz"), "long")
    assert 900 < look.rows.num_rows < 1100
    assert look.source.text == "text"


def test_a_file_that_is_there_stays(tmp_path: Path):
    target = tmp_path / "curate.yaml"
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        write_starter(["anything"], target)
    assert target.read_text() == "mine"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("data/news.parquet", "news"),
        ("data/news/*.jsonl.gz", "news"),
        ("s3://bucket/folder/part-*.parquet", "folder"),
        ("hf://datasets/owner/my.name", "my"),
        ("/", "data"),
        ("a b&c.csv", "a-b-c"),
    ],
)
def test_a_source_is_named_after_its_data(data: str, name: str):
    assert source_name(data) == name


def model_folder(tmp_path: Path, **config: Any) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, {"kind": "causal-lm"}),
        ({"architectures": ["GPT2LMHeadModel"]}, {"kind": "causal-lm"}),
        (
            {"architectures": ["BertForSequenceClassification"]},
            {"kind": "text-classification", "num_classes": 2},
        ),
        (
            {"architectures": ["BertForSequenceClassification"],
             "id2label": {"0": "a", "1": "b", "2": "c"}},
            {"kind": "text-classification", "num_classes": 3},
        ),
        (
            {"model_type": "mlp", "num_features": 4, "num_classes": 10},
            {"kind": "tabular-classification", "num_classes": 10},
        ),
    ],
)  # fmt: skip
def test_the_task_is_what_the_model_was_made_for(tmp_path: Path, config: Any, task: Any):
    assert guess_task(model_folder(tmp_path, **config), None) == task


def test_a_model_that_does_not_say_its_task_needs_one(tmp_path: Path):
    folder = model_folder(tmp_path, architectures=["BertModel"])
    with pytest.raises(ConfigError, match="is a BertModel, which does not say"):
        guess_task(folder, None)
    assert guess_task(folder, "causal-lm") == {"kind": "causal-lm"}


def test_bare_data_gives_settings_named_after_it(tmp_path: Path):
    folder = model_folder(tmp_path, architectures=["LlamaForCausalLM"])
    assert guess_settings("data/news.parquet", {"model": folder}) == {
        "run": "runs/news",
        "sources": {"news": {"path": "data/news.parquet"}},
        "score": {"scorers": ["el2n"]},
        "task": {"kind": "causal-lm"},
    }
    with pytest.raises(InputError, match="no model folder"):
        guess_settings("d.parquet", {"model": str(tmp_path / "absent" / "x" / "y")})


def test_bare_data_and_a_target_are_planned_by_rds():
    flags = {"target": "wanted.parquet"}
    guessed = guess_settings("data/news.parquet", flags)
    assert guessed["score"] == {"scorers": ["rds"]}
    assert guessed["plan"] == {
        "score": "rds_rank", "order": "easiest", "within": "all", "keep": 0.1,
    }  # fmt: skip
    named = guess_settings("data/news.parquet", {**flags, "scorer": ["dsir"]})
    assert "plan" not in named


def test_images_become_an_image_classification(tmp_path: Path):
    for name, mode in (("cat", "L"), ("dog", "L")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new(mode, (90, 70)).save(tmp_path / "pets" / name / "1.png")
    values, text = starter(tmp_path / "pets", tmp_path)
    assert values["sources"]["pets"]["image"] == "image"
    assert values["task"] == {
        "kind": "image-classification", "num_classes": 2, "channels": 1, "size": 64,
    }  # fmt: skip
    assert values["model"]["config"]["model_type"] == "cnn"
    assert "format" not in text


def test_small_images_of_one_size_are_left_as_they_are(tmp_path: Path):
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    frame = pl.DataFrame({"img": [content.getvalue()] * 2, "label": [0, 4]})
    frame.write_parquet(tmp_path / "small.parquet")
    values, _ = starter(tmp_path / "small.parquet", tmp_path)
    assert values["task"] == {"kind": "image-classification", "num_classes": 5, "channels": 3}


def test_an_image_model_says_what_images_it_reads(tmp_path: Path):
    config = {"architectures": ["ViTForImageClassification"], "image_size": 32, "num_channels": 3,
              "id2label": {"0": "a", "1": "b", "2": "c"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    assert guess_task(str(tmp_path), None) == {
        "kind": "image-classification", "num_classes": 3, "channels": 3, "size": 32,
        "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5],
    }  # fmt: skip


def test_a_target_is_chosen_by_likeness_and_the_run_needs_no_model(tmp_path: Path):
    pl.DataFrame({"body": [f"text {n} of many" for n in range(40)]}).write_parquet(
        tmp_path / "pool.parquet"
    )
    pl.DataFrame({"question": ["text 3?", "text 9?"], "topic": ["a", "b"]}).write_parquet(
        tmp_path / "wanted.parquet"
    )
    file = tmp_path / "c.yaml"
    write_starter([str(tmp_path / "pool.parquet")], file, wanted=str(tmp_path / "wanted.parquet"))
    values = read_yaml(file.read_text(), where="c.yaml")
    assert values["target"]["text"] == "question"
    assert values["target"]["domain"] == "topic"
    assert values["score"]["scorers"] == ["rds", "random"]
    assert values["plan"]["score"] == "rds_rank"
    assert values["plan"]["order"] == "easiest"
    assert values["embed"] == {"likeness": {"kind": "ngrams"}}
    settings = parse_settings({**values, "run": str(tmp_path / "run")})
    check_scores(settings)
    summaries = run_stages(settings, stages_for(settings, "run"), pool=Pool(InlineExecutor(), 1))
    assert summaries["plan"]["kept"]["rows"] == summaries["write"]["rows"] > 0
