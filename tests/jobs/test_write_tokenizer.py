"""The tokenizer of shards that hold tokens."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data.planned_run import Row, planned_run
from tiny_models import byte_tokenizer, save_language_model

from curate.data.layout import RunFolder
from curate.data.shard_formats.tokenising import Encoder
from curate.errors import ConfigError, InputError
from jobs.settings import Settings
from jobs.write_tokenizer import ShardTokenizer, find_shard_tokenizer, save_shard_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def settings_of(
    root: Path, column: dict[str, list[Any]] | None = None, **settings: Any
) -> Settings:
    table = pa.table(column or {"text": ["the hat", "x"]})
    settings = {"shards": {"format": ["parquet", "packed"]}, **settings}
    return planned_run(root, {"web": {"a.parquet": table}}, lambda *_: Row("web"), **settings)


def find(settings: Settings) -> ShardTokenizer:
    found = find_shard_tokenizer(RunFolder(Path(settings.run)), settings)
    assert found is not None
    return found


def saved(folder: Path, tokenizer: Any = None) -> str:
    (tokenizer or byte_tokenizer()).save_pretrained(str(folder))
    return str(folder)


def test_formats_of_texts_need_no_tokenizer_and_load_no_library():
    code = """
import sys
from pathlib import Path
from curate.data.layout import RunFolder
from curate.data.shard_formats import FORMATS, open_format
from jobs.settings import parse_settings
from jobs.write_tokenizer import find_shard_tokenizer
settings = parse_settings({"run": "r", "sources": {"web": {"path": "x"}}})
assert find_shard_tokenizer(RunFolder(Path("r")), settings) is None
for name in FORMATS:
    open_format(name)
print({"torch", "transformers", "tokenizers", "jinja2"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_trainers_tokenizer_goes_before_the_plans_and_that_before_the_models(tmp_path: Path):
    model = save_language_model(tmp_path / "model", tokenizer=byte_tokenizer(bos=False))
    plans = saved(tmp_path / "plans", byte_tokenizer(merges=False))
    trainers = saved(tmp_path / "trainers")
    of_model = {"model": {"name": str(model)}}
    of_plan = {**of_model, "plan": {"tokenizer": plans, "keep": 1.0}}
    shards = {"format": "megatron", "packing": {"tokenizer": trainers}}
    ways: list[dict[str, Any]] = [of_model, of_plan, {**of_plan, "shards": shards}]
    begins: list[tuple[int | None, int]] = []
    for nth, way in enumerate(ways):
        settings = settings_of(tmp_path / str(nth), **way)
        found = find(settings)
        save_shard_tokenizer(RunFolder(Path(settings.run)), found)
        special = Encoder(found.folder).special
        begins.append((special.beginning, special.vocabulary))
    size = len(byte_tokenizer())
    few = len(byte_tokenizer(merges=False))
    bos = byte_tokenizer().bos_token_id
    assert begins == [(None, size), (byte_tokenizer(merges=False).bos_token_id, few), (bos, size)]


def test_it_is_saved_once_and_known_again(tmp_path: Path):
    place = saved(tmp_path / "t")
    shards = {"format": "packed", "packing": {"tokenizer": place}}
    settings = settings_of(tmp_path / "one", shards=shards)
    run = RunFolder(Path(settings.run))
    first = find(settings)
    assert not first.folder.exists()
    save_shard_tokenizer(run, first)
    again = find(settings)
    assert again.files is None
    assert (again.digest, again.folder) == (first.digest, first.folder)
    # Which folder it came from is no part of it.
    saved(tmp_path / "copy")
    shards["packing"] = {"tokenizer": str(tmp_path / "copy")}
    assert find(settings_of(tmp_path / "two", shards=shards)).digest == first.digest

    saved(tmp_path / "t", byte_tokenizer(merges=False))
    other = find(settings)
    assert other.digest != first.digest
    save_shard_tokenizer(run, other)
    assert [path.name for path in first.folder.parent.iterdir() if path.is_dir()] == [other.digest]
    assert Encoder(other.folder).special.vocabulary == len(byte_tokenizer(merges=False))


def test_a_chat_template_is_part_of_it(tmp_path: Path):
    chats = {"messages": [[{"role": "user", "content": "x"}]]}
    saved(tmp_path / "with", byte_tokenizer(template=TEMPLATE))
    saved(tmp_path / "without")
    digests: set[str] = set()
    for name in ("with", "without"):
        shards = {"format": "packed", "packing": {"tokenizer": str(tmp_path / name)}}
        digests.add(find(settings_of(tmp_path / f"{name}-text", shards=shards)).digest)
        settings = settings_of(tmp_path / f"{name}-chat", chats, shards=shards)
        if name == "with":
            assert find(settings).digest in digests
        else:
            with pytest.raises(ConfigError, match=r"source web are chats, .* no chat template"):
                find(settings)
    assert len(digests) == 2


def test_a_tokenizer_that_is_trained_in_the_run_comes_from_there(tmp_path: Path):
    model = {"tokenizer": {"train": "bpe", "vocab_size": 300}}
    settings = settings_of(tmp_path, model=model)
    with pytest.raises(InputError, match="has not been trained yet"):
        find(settings)
    saved(RunFolder(Path(settings.run)).tokenizer)
    assert find(settings).files is not None


def test_what_cannot_be_written_as_tokens_is_refused(tmp_path: Path):
    from transformers import ByT5Tokenizer

    with pytest.raises(ConfigError, match="packed holds tokens, but no tokenizer is set"):
        find(settings_of(tmp_path / "none"))
    saved(tmp_path / "endless", byte_tokenizer(eos=False))
    saved(tmp_path / "slow", ByT5Tokenizer())
    for name, what in (("endless", "no end-of-text token"), ("slow", "has no tokenizer.json")):
        shards = {"format": "packed", "packing": {"tokenizer": str(tmp_path / name)}}
        with pytest.raises(ConfigError, match=what):
            find(settings_of(tmp_path / f"run-{name}", shards=shards))
    pixels = {"image": [[[1, 2], [3, 4]]] * 2}
    with pytest.raises(ConfigError, match="source web has image"):
        find(settings_of(tmp_path / "images", pixels))
