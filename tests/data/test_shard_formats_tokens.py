"""The formats of tokens: what their documents are, and how they are packed, indexed and read."""

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import byte_tokenizer

from curate.data.example import Source
from curate.data.reading import field_frame
from curate.data.shard_formats import tokenising
from curate.data.shard_formats.megatron import MEGATRON, dtype_code
from curate.data.shard_formats.packed import PACKED
from curate.data.shard_formats.sink import Context, Format
from curate.data.shard_formats.tokenising import SPECIAL, Encoder, check
from curate.data.shard_layout import Component, Shard
from curate.data.shard_settings import Packing, Shards
from curate.errors import ConfigError, CurateError
from curate.models.settings import CausalLM
from curate.models.tasks.causal_lm import CausalLMTask
from jobs.write_tokenizer import tokenizer_files

CHATML = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "{{ '<s>' + message['role'] + '\n' + message['content'] | trim + '</s>' + '\n' }}"
    "{% if message.tool %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
MARKED = (
    "{%- set ns = namespace(last='') %}\n    {% for message in messages %}\n"
    "  {%- set ns.last = message.role %}{{ message.role | tojson }} {{ date_string }}\n"
    "  {% if message.role == 'assistant' %}{% generation %}\n"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}"
    "{{ message.content | tojson }}{% endif %}{% endfor %}{{ ns.last }}"
)
TEXTS = ["the thing in a hat", "", "naïve ☃ \U0001f600 <s>in", "the in " * 15_000, "x", "a </s>"]
TURNS = [
    [{"role": "user", "content": " Höw? "}, {"role": "assistant", "content": "the <hat>"}],
    [
        {"role": "system", "content": "&"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "the"},
        {"role": "user", "content": "in"},
        {"role": "assistant", "content": ""},
    ],
]


TEXT = Source(path="x", text="text")
CHAT = Source(path="x", messages="messages")


def save(folder: Path, tokenizer: Any, **changed: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in tokenizer_files(tokenizer, "somewhere").items():
        (folder / name).write_text(text, encoding="utf-8")
    special = json.loads((folder / SPECIAL).read_text()) | changed
    (folder / SPECIAL).write_text(json.dumps(special))
    return str(folder)


def table_of(
    *, source: str | Sequence[str] = "web", domain: str | Sequence[str] = "web", **columns: Any
) -> pa.Table:
    size = len(next(iter(columns.values())))
    return pa.table(
        {
            **columns,
            "curate_source": [source] * size if isinstance(source, str) else source,
            "curate_file": ["a.parquet"] * size,
            "curate_row": list(range(size)),
            "curate_weight": pa.array([1.0] * size, pa.float32()),
            "curate_domain": [domain] * size if isinstance(domain, str) else domain,
        }
    )


def context(folder: str, source: Source | dict[str, Source], length: int = 64) -> Context:
    settings = Shards(format=("packed", "megatron"), packing=Packing(length=length))
    return Context(settings, source if isinstance(source, dict) else {"web": source}, folder)


def documents(found: Any) -> list[list[int]]:
    return [found.ids[a:b].tolist() for a, b in pairwise(found.starts.tolist())]


# -- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    ("source", "columns"),
    [
        (TEXT, {"text": TEXTS}),
        (Source(path="x", prompt="q", response="a"), {"q": TEXTS, "a": TEXTS[::-1]}),
    ],
)
def test_documents_are_what_the_language_model_task_reads(
    tmp_path: Path, source: Source, columns: dict[str, Any], bos: bool
):
    """The task is made of transformers, and its documents have no end token."""
    tokenizer = byte_tokenizer(bos=bos)
    table = table_of(**columns)
    task = CausalLMTask(CausalLM(max_tokens=10**6), tokenizer)
    read = task.encode(field_frame(table, source)).arrays
    found = Encoder(Path(save(tmp_path, tokenizer))).encode(table, {"web": source}, marks=True)
    end = tokenizer.eos_token_id
    for row, (a, b) in enumerate(pairwise(read["starts"].tolist())):
        start, stop = found.starts[row : row + 2]
        ids = read["tokens"][a:b].tolist()
        assert found.ids[start:stop].tolist() == (ids if ids[-1:] == [end] else [*ids, end])
        assert found.counted[start : start + b - a].tolist() == read["counted"][a:b].tolist()
        assert found.counted[stop - 1] or stop - start == 1
    assert len(found.starts) == len(TEXTS) + 1


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_chats_are_what_transformers_makes_of_them(tmp_path: Path, template: str):
    tokenizer = byte_tokenizer(template=template)
    encoder = Encoder(Path(save(tmp_path, tokenizer)))
    table = table_of(messages=TURNS)
    found = encoder.encode(table, {"web": Source(path="x")}, marks=True)
    task = CausalLMTask(CausalLM(max_tokens=10**6), tokenizer)
    read = task.encode(field_frame(table, CHAT)).arrays
    for row, ids in enumerate(documents(found)):
        a, b = read["starts"][row : row + 2]
        whole = read["tokens"][a:b].tolist()
        # The first template ends a chat itself; a line break behind does not open it again.
        closed = template == CHATML
        assert ids == (whole if closed else [*whole, tokenizer.eos_token_id])
        counted = found.counted[found.starts[row] : found.starts[row + 1]].tolist()
        assert counted == read["counted"][a:b].tolist() + ([] if closed else [True])
        assert 0 < sum(counted) < len(counted) - 5


def test_a_chat_that_ends_with_a_question_does_not_teach_to_end(tmp_path: Path):
    encoder = Encoder(Path(save(tmp_path, byte_tokenizer(template=MARKED))))
    table = table_of(messages=[TURNS[0], TURNS[1][:-1], TURNS[1][:1]])
    found = encoder.encode(table, {"web": CHAT}, marks=True)
    assert found.counted[found.starts[1:] - 1].tolist() == [True, False, False]
    assert not found.counted[found.starts[2] :].any()


def test_a_template_that_rewrites_what_was_said_is_refused_where_it_matters(tmp_path: Path):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    encoder = Encoder(Path(save(tmp_path, byte_tokenizer(template=template))))
    with pytest.raises(CurateError, match=r"row 0: .* rewrites earlier messages when message 1"):
        encoder.encode(table_of(messages=TURNS), {"web": CHAT}, marks=True)
    whole = encoder.encode(table_of(messages=TURNS), {"web": CHAT}, marks=False)
    assert whole.counted.sum() == len(whole.ids) - 2


def test_rows_of_several_sources_keep_their_order(tmp_path: Path):
    encoder = Encoder(Path(save(tmp_path, byte_tokenizer())))
    table = table_of(
        source=["b", "a", "b", "a", "a"],
        text=[None, "the", None, "in", "hat"],
        content=["x", None, "yy", None, None],
    )
    # Which column is whose is not said: the other source's is empty.
    found = encoder.encode(table, {"a": Source(path="x"), "b": Source(path="y")}, marks=True)
    alone = encoder.encode(
        table_of(text=["x", "the", "yy", "in", "hat"]), {"web": TEXT}, marks=True
    )
    assert documents(found) == documents(alone)
    np.testing.assert_array_equal(found.counted, alone.counted)


def test_texts_are_tokenized_in_stretches_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokenising, "_CHUNK_CHARS", 100)
    encoder = Encoder(Path(save(tmp_path, byte_tokenizer())))
    texts = ["x" * n for n in (0, 70, 70, 30, 300, 0, 100, 5)]
    found = encoder.encode(table_of(text=texts), {"web": TEXT}, marks=True)
    assert np.diff(found.starts).tolist() == [len(text) + 2 for text in texts]


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path):
    encoder = Encoder(Path(save(tmp_path, byte_tokenizer(template=CHATML))))
    table = table_of(messages=[*TURNS, [{"role": "tool", "content": "x"}]])
    with pytest.raises(CurateError, match=r"web, a\.parquet, row 2: .*no role tool"):
        encoder.encode(table, {"web": CHAT}, marks=True)


@pytest.mark.parametrize(
    "escape",
    ["{{ ''.__class__.__mro__ }}", "{% set n = namespace() %}{% set n.__class__ = 1 %}"],
)
def test_a_template_cannot_reach_into_python(tmp_path: Path, escape: str):
    encoder = Encoder(Path(save(tmp_path, byte_tokenizer(template=escape))))
    with pytest.raises(CurateError):
        encoder.encode(table_of(messages=TURNS), {"web": CHAT}, marks=True)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (Source(path="x", image="image"), "has image"),
        (Source(path="x", features="f"), "has features"),
        (Source(path="x", chosen="a", rejected="b"), "pairs of answers"),
        (CHAT, "no chat template"),
    ],
)
def test_what_has_no_tokens_is_refused(source: Source, what: str):
    with pytest.raises(ConfigError, match=what):
        check({"fine": TEXT, "other": source}, has_template=False)


# -- packed ---------------------------------------------------------------------------------------


def write(format_: Format, paths: Sequence[Path], tables: Sequence[pa.Table], given: Context):
    sink = format_.open(paths, tables[0].schema, given)
    for table in tables:
        sink.write(table)
    return sink.close()


def unpacked(rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The documents of packed sequences, by what their columns say."""
    found: list[list[int]] = []
    for row in rows:
        at = 0
        lengths = list(row["seq_lengths"])
        if row["num_tokens"] < len(row["input_ids"]):
            assert lengths.pop() == len(row["input_ids"]) - row["num_tokens"]
        goes_on = len(lengths) > row["num_documents"]
        for nth, length in enumerate(lengths):
            piece = row["input_ids"][at : at + length]
            if goes_on and nth == 0:
                found[-1] += piece
            else:
                found.append(list(piece))
            at += length
        assert at == row["num_tokens"]
    return found


@pytest.mark.parametrize("length", [2, 3, 16, 64, 1 << 17])
def test_packed_sequences_hold_all_documents_in_order(tmp_path: Path, length: int):
    import datasets

    generator = np.random.default_rng(length)
    # Lengths that are one sequence, several, and border on one.
    sizes = [0, 1, length - 2, length - 2, 2 * length - 2, *generator.integers(0, 40, 30)]
    texts = ["x" * int(size) for size in sizes]
    source = TEXT
    folder = save(tmp_path / "t", byte_tokenizer())
    tables = [table_of(text=texts[a:b]) for a, b in pairwise([0, 1, 4, 20, len(texts)])]
    path = tmp_path / "train.parquet"
    facts = write(PACKED, [path], tables, context(folder, source, length))

    rows: Any = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    expected = [
        ids
        for table in tables
        for ids in documents(Encoder(Path(folder)).encode(table, {"web": source}, marks=True))
    ]
    assert unpacked(rows.to_list()) == expected
    assert rows.features["input_ids"].length == length
    tokens = sum(map(len, expected))
    assert facts == {
        "sequences": len(rows),
        "tokens": tokens,
        "padding": len(rows) * length - tokens,
        "weighted": 0,
    }
    assert facts["padding"] < length
    assert PACKED.count_rows([path]) == len(texts)
    for row in rows:
        assert sum(row["seq_lengths"]) == length
        counts = [label != -100 for label in row["labels"]]
        assert not any(counts[row["num_tokens"] :])
        assert all(
            a == b for a, b, c in zip(row["labels"], row["input_ids"], counts, strict=True) if c
        )


def test_a_sequence_of_several_domains_names_none(tmp_path: Path):
    folder = save(tmp_path / "t", byte_tokenizer())
    table = table_of(text=["xx"] * 6, domain=["a", "a", "b", "b", "b", "b"])  # 4 tokens each
    path = tmp_path / "train.parquet"
    for length, expected in ((8, ["a", "b", "b"]), (9, [None, "b", "b"])):
        write(PACKED, [path], [table], context(folder, TEXT, length))
        assert pq.read_table(path)["curate_domain"].to_pylist() == expected


def test_weights_that_tokens_cannot_carry_are_counted(tmp_path: Path):
    folder = save(tmp_path / "t", byte_tokenizer())
    table = table_of(text=["x"] * 3)
    weights = pa.array([1.0, 0.5, 2.0], pa.float32())
    table = table.set_column(
        table.schema.get_field_index("curate_weight"), "curate_weight", weights
    )
    given = context(folder, TEXT)
    assert write(PACKED, [tmp_path / "a"], [table], given)["weighted"] == 2
    assert write(MEGATRON, [tmp_path / "b", tmp_path / "c"], [table], given)["weighted"] == 2


def test_training_on_packed_sequences_never_sees_the_padding(tmp_path: Path):
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

    tokenizer = byte_tokenizer()
    folder = save(tmp_path / "t", tokenizer)
    path = tmp_path / "train.parquet"
    table = table_of(q=["the hat"] * 9, a=["in a hat " * 3] * 9)
    given = context(folder, Source(path="x", prompt="q", response="a"), 32)
    facts = write(PACKED, [path], [table], given)
    assert facts["padding"] > 0
    rows: Any = datasets.Dataset(pq.read_table(path))

    def changed(row: dict[str, Any]) -> dict[str, Any]:
        used = row["num_tokens"]
        row["input_ids"] = row["input_ids"][:used] + [7] * (len(row["input_ids"]) - used)
        return row

    other: Any = datasets.Dataset.from_list([changed(dict(row)) for row in rows])
    assert other["input_ids"][-1] != rows["input_ids"][-1]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    ends: list[dict[str, torch.Tensor]] = []
    for data in (rows, other):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=4,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
            logging_steps=1, seed=0, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 6
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0]
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# -- megatron -------------------------------------------------------------------------------------


def shard(domain: str, number: int = 0, phase: int = 0) -> Shard:
    folder = f"phase-{phase}/{domain}" if phase else domain
    return Shard(Component(phase, domain), folder, number, 2, (3,))


def receipts(root: Path, shards: Sequence[tuple[Shard, list[str]]], folder: str):
    """Megatron files of some texts, and what is known of them."""
    found: list[dict[str, Any]] = []
    for each, texts in shards:
        files = MEGATRON.files(each)
        (root / files[0]).parent.mkdir(parents=True, exist_ok=True)
        given = context(folder, TEXT)
        facts = write(MEGATRON, [root / file for file in files], [table_of(text=texts)], given)
        phase, domain = each.component.phase, each.component.domain
        found.append({"file": files[0], "phase": phase, "domain": domain, "facts": facts})
    return found


THEIRS = """
import importlib.util, json, os, sys, types, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import numpy as np, torch
# The start of the package loads all its layers; the readers need none.
core = types.ModuleType("megatron.core")
(place,) = importlib.util.find_spec("megatron").submodule_search_locations
core.__path__ = [str(Path(place) / "core")]
sys.modules["megatron.core"] = core
import megatron.core.parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list

asked = json.loads(sys.argv[1])
found = {}
for vocabulary, prefix in asked["files"]:
    data = IndexedDataset(prefix)
    rows = [data[i] for i in range(len(data))]
    dtype = DType.optimal_dtype(vocabulary)
    assert data.index.dtype == dtype, (data.index.dtype, dtype)
    builder = IndexedDatasetBuilder(prefix + "-theirs.bin", dtype=dtype)
    for row in rows:
        builder.add_document(torch.from_numpy(row.astype(np.int64)), [len(row)])
    builder.finalize(prefix + "-theirs.idx")
    found[prefix] = [row.tolist() for row in rows], data.document_indices.tolist()

os.chdir(asked["shards"])
end = asked["end"]
tokenizer = types.SimpleNamespace(
    eod=end, eos=end, bos=end, pad=None, vocab_size=300, unique_identifiers={"name": "bytes"}
)
config = GPTDatasetConfig(
    random_seed=1, sequence_length=64, split="1,0,0", tokenizer=tokenizer,
    blend=get_blend_from_list(open("megatron/blend.txt").read().split()),
    reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=True,
)
train = BlendedMegatronDatasetBuilder(GPTDataset, [400, 0, 0], lambda: True, config).build()[0]
rows = torch.stack([row["tokens"] for row in train])
drawn = [int((rows == token).sum()) for token in asked["tokens"]]
print(json.dumps({"rows": found, "blend": config.blend, "drawn": drawn}))
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Megatron-core makes of some files: in a process of its own, as it changes torch."""
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    root = tmp_path_factory.mktemp("megatron")
    tokenizer = byte_tokenizer()
    narrow = save(root / "narrow", tokenizer, vocabulary=65_499)
    wide = save(root / "wide", tokenizer, vocabulary=65_500)
    files = receipts(root, [(shard("web"), TEXTS), (shard("web", 1), TEXTS[:1])], narrow)
    files += receipts(root, [(shard("b-ü"), TEXTS[::-1])], wide)
    prefixes = [str(root / entry["file"]).removesuffix(".bin") for entry in files]

    blended = [(shard("web"), ["a" * 100] * 100), (shard("web", 1), ["a" * 50] * 400)]
    blended.append((shard("code"), ["b" * 98] * 100))
    drawn = receipts(root / "drawn", blended, narrow)
    for file, text in MEGATRON.documents(drawn).items():
        (root / "drawn" / file).write_text(text)
    asked = {
        "files": list(zip([65_499, 65_499, 65_500], prefixes, strict=True)),
        "shards": str(root / "drawn"),
        "end": tokenizer.eos_token_id,
        "tokens": tokenizer("ab")["input_ids"],
    }
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "tokenizer": narrow, "prefixes": prefixes, "receipts": drawn}


def test_megatron_reads_the_files_and_writes_the_same_ones(theirs: dict[str, Any]):
    encoder = Encoder(Path(theirs["tokenizer"]))
    for prefix, texts in zip(theirs["prefixes"], (TEXTS, TEXTS[:1], TEXTS[::-1]), strict=True):
        rows, indices = theirs["rows"][prefix]
        assert rows == documents(encoder.encode(table_of(text=texts), {"web": TEXT}, marks=False))
        assert indices == list(range(len(texts) + 1))
        for end in ("bin", "idx"):
            written = Path(f"{prefix}-theirs.{end}").read_bytes()
            assert written == Path(f"{prefix}.{end}").read_bytes()


def test_megatron_draws_the_files_by_their_tokens(theirs: dict[str, Any]):
    """Its own loader, on the flat list, started in the shards folder."""
    names, weights = theirs["blend"]
    assert sorted(names) == names
    tokens = {entry["file"]: entry["facts"]["tokens"] for entry in theirs["receipts"]}
    assert {f"{name}.bin": weight for name, weight in zip(names, weights, strict=True)} == tokens
    # Texts of 10,000 and 20,000 tokens against 9,800.
    first, second = theirs["drawn"]
    assert first / (first + second) == pytest.approx(30_000 / 39_800, abs=0.01)


def test_the_index_is_laid_out_as_documented(tmp_path: Path):
    folder = save(tmp_path / "t", byte_tokenizer())
    (entry,) = receipts(tmp_path, [(shard("web"), ["x", "", "the"])], folder)
    index = (tmp_path / entry["file"]).with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    assert struct.unpack_from("<QBQQ", index, 9) == (1, 8, 3, 4)
    assert struct.unpack_from("<3i3q4q", index, 34) == (3, 2, 3, 0, 6, 10, 0, 1, 2, 3)
    assert len(index) == 34 + 12 + 24 + 32
    assert (tmp_path / entry["file"]).stat().st_size == 16
    assert entry["facts"] == {"tokens": 8, "weighted": 0}
    assert [dtype_code(n) for n in (10, 65_499, 65_500, 200_000)] == [8, 8, 4, 4]


def test_each_phase_has_a_blend_of_its_own(tmp_path: Path):
    folder = save(tmp_path / "t", byte_tokenizer())
    shards = [(shard("web", 0, 1), ["x"]), (shard("a", 0, 2), ["xxx"]), (shard("web", 1, 2), ["x"])]
    assert MEGATRON.documents(receipts(tmp_path, shards, folder)) == {
        "megatron/phase-1/blend.txt": "3 megatron/phase-1/web/train-00000-of-00002\n",
        "megatron/phase-2/blend.txt": "5 megatron/phase-2/a/train-00000-of-00002\n"
        "3 megatron/phase-2/web/train-00001-of-00002\n",
    }


@pytest.mark.parametrize(
    "damage", ["a token less", "another length", "another place", "no index", "other magic"]
)
def test_megatron_files_that_do_not_fit_are_not_counted(tmp_path: Path, damage: str):
    folder = save(tmp_path / "t", byte_tokenizer())
    receipts(tmp_path, [(shard("web"), ["x", "yy", "the"])], folder)
    paths = [tmp_path / file for file in MEGATRON.files(shard("web"))]
    assert MEGATRON.count_rows(paths) == 3
    ids, index = (path.read_bytes() for path in paths)
    if damage == "a token less":
        paths[0].write_bytes(ids[:-2])
    elif damage == "another length":
        paths[1].write_bytes(index[:34] + b"\2" + index[35:])
    elif damage == "another place":
        paths[1].write_bytes(index[:54] + b"\1" + index[55:])
    else:
        paths[1].write_bytes(index[:20] if damage == "no index" else b"X" + index[1:])
    with pytest.raises(OSError, match="index"):
        MEGATRON.count_rows(paths)


def test_the_patterns_know_the_files_of_the_formats_and_no_others():
    import re

    for format_ in (PACKED, MEGATRON):
        for each in (shard("web"), shard("b.c_d-e", 1, 3)):
            for file in format_.files(each):
                assert re.fullmatch(format_.pattern, file)
    for file in ("megatron/blend.txt", "megatron/phase-2/blend.txt"):
        assert re.fullmatch(MEGATRON.pattern, file)
    assert not re.fullmatch(MEGATRON.pattern, "megatron/web/notes.txt")
    assert not re.fullmatch(PACKED.pattern, "data/web/train-00000-of-00001.parquet")
