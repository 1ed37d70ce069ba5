"""`curate domains`: clusters in place of the index's domains, for all that reads them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from evaluate.compared_digits import compare, digits_settings, write_digits

from curate.data.choice import read_choice
from curate.data.example import KEY
from curate.data.layout import RunFolder
from curate.data.partitions import Output
from curate.data.tables import read_examples, scan_examples
from curate.errors import ConfigError, InputError
from curate.vectors.domains import NO_VECTOR, Domains, find_clusters
from jobs.all_stages import affected, run_stages, stages_for, state_of
from jobs.cluster import Cluster, InlineExecutor, Pool, open_pool
from jobs.domains import domains_run, plan_domains
from jobs.embedding import embed_run
from jobs.index import index_run
from jobs.mix import mix_run, plan_mix
from jobs.opening import open_run
from jobs.plan import plan_plan
from jobs.settings import Settings, parse_settings
from jobs.verify import finished

POOL = Pool(InlineExecutor(), 1)

TOPICS = {
    "sea": "harbour anchor sailor wave tide vessel captain deck",
    "bread": "flour oven yeast dough crust baker loaf knead",
    "stars": "orbit comet telescope galaxy planet nebula eclipse lunar",
}
SIZES = {"sea": 60, "bread": 40, "stars": 20}


def corpus() -> pl.DataFrame:
    """Texts of three topics in common words, with their topic, and two without any word."""
    rng = np.random.default_rng(0)
    topics = [topic for topic, size in SIZES.items() for _ in range(size)]
    texts = [
        " ".join([*rng.choice(TOPICS[topic].split(), 6), *rng.choice(["the", "of", "and"], 4)])
        for topic in topics
    ]
    frame = pl.DataFrame({"text": texts, "topic": topics}).sample(fraction=1, shuffle=True, seed=1)
    wordless = pl.DataFrame({"text": ["!!! ???", "... ---"], "topic": ["none", "none"]})
    return pl.concat([frame[:50], wordless, frame[50:]])


def made(root: Path, **changes: Any) -> Settings:
    """A run in two sources of several partitions, indexed and embedded."""
    root.mkdir(parents=True, exist_ok=True)
    frame = corpus()
    frame[:80].write_parquet(root / "a.parquet")
    frame[80:].write_parquet(root / "b.parquet")
    values: dict[str, Any] = {
        "run": str(root / "run"),
        "sources": {name: {"path": str(root / f"{name}.parquet"), "text": "text"} for name in "ab"},
        "index": {"held_out": 0.1, "partition_rows": 25},
        "embed": {"grams": {"kind": "ngrams", "dim": 256, "ngrams": [1, 1]}},
        "domains": {"clusters": 3},
        "mix": {"mixer": "unimax"},
        "plan": {"keep": 0.5},
        **changes,
    }
    with open_run(parse_settings(values)) as settings:
        index_run(settings, pool=POOL)
        embed_run(settings, pool=POOL)
        return settings


def folder(settings: Settings) -> RunFolder:
    return RunFolder(Path(settings.run))


def domains(settings: Settings) -> list[str]:
    run = folder(settings)
    return [d for p in run.partitions() for d in read_examples(run, p, ["domain"])["domain"]]


def bytes_of(settings: Settings) -> dict[str, bytes]:
    root = Path(settings.run) / "domains"
    return {p.name: p.read_bytes() for p in root.iterdir() if p.is_file()}


def test_topics_become_domains_named_by_their_words(tmp_path: Path):
    settings = made(tmp_path)
    summary = domains_run(settings, pool=POOL)
    topics = corpus()["topic"].to_list()
    found = domains(settings)
    pairs = set(zip(topics, found, strict=True))
    assert len(pairs) == 4
    assert ("none", NO_VECTOR) in pairs
    names = dict(pairs)
    for topic, words in TOPICS.items():
        assert set(names[topic].split("-")) < set(words.split())
    counts = [(entry["domain"], entry["rows"]) for entry in summary["domains"]]
    assert counts == [(names[topic], size) for topic, size in SIZES.items()]
    assert (summary["rows"], summary["without_vector"]) == (122, 2)


def test_the_file_of_clusters_says_sizes_words_examples_and_inertia(tmp_path: Path):
    settings = made(tmp_path)
    domains_run(settings, pool=POOL)
    run = folder(settings)
    values = json.loads(run.clusters.path.read_text())
    assert values["without_vector"] == {"domain": NO_VECTOR, "rows": 2}
    assert (values["representation"], values["seed"], values["rows"]) == ("grams", 0, 122)
    index = pl.concat([read_examples(run, part) for part in run.partitions()])
    vectors = np.concatenate([np.load(run.vectors(p, "grams").path) for p in run.partitions()])
    centroids = np.load(run.root / "domains" / "centroids.npy")
    domain = index["domain"].to_numpy()
    for entry, centroid in zip(values["clusters"], centroids, strict=True):
        own = domain == entry["domain"]
        squares = ((vectors[own] - centroid) ** 2).sum(axis=1)
        assert entry["rows"] == own.sum()
        assert entry["inertia"] == pytest.approx(squares.mean(), rel=1e-4)
        assert len(entry["words"]) > 3
        nearest = entry["examples"][0]
        training = index.filter(own & (index["split"] == "train").to_numpy())
        train_squares = squares[(index.filter(own)["split"] == "train").to_numpy()]
        key = training.select(KEY).row(int(train_squares.argmin()), named=True)
        assert {name: nearest[name] for name in KEY} == key
        assert nearest["text"].split()[0] in " ".join(TOPICS.values()) + " the of and"


def test_mix_plan_and_shards_are_those_of_the_clusters(tmp_path: Path):
    settings = made(tmp_path)
    with open_run(settings) as opened:
        summaries = run_stages(opened, stages_for(opened, "write"), pool=POOL)
    names = {entry["domain"] for entry in summaries["domains"]["domains"]}
    mixed = {entry["domain"]: entry["weight"] for entry in summaries["mix"]["domains"]}
    assert set(mixed) == names | {NO_VECTOR}
    weights = [mixed[name] for name in sorted(names)]
    assert max(weights) - min(weights) < 0.05  # unimax: as equal as their sizes allow
    summary = json.loads((folder(settings).plan / "summary.json").read_text())
    assert set(summary["domains"]) == names | {NO_VECTOR}
    part = folder(settings).partitions()[0]
    assert set(read_choice(folder(settings), part, tokenizer=None).names) <= names | {NO_VECTOR}
    card = (folder(settings).shards / "README.md").read_text()
    assert all(name in card for name in names)
    written = json.loads((folder(settings).shards / "manifest.json").read_text())
    assert {shard["domain"] for shard in written["shards"]} <= names | {NO_VECTOR}
    again = run_stages(opened, stages_for(opened, "write"), pool=POOL)
    assert again["domains"]["done"] == again["plan"]["done"] == 0


def test_all_that_reads_domains_is_due_when_they_change(tmp_path: Path):
    settings = made(tmp_path)
    run_stages(settings, stages_for(settings, "write"), pool=POOL)
    changed = replace(settings, domains=Domains(clusters=2))
    assert plan_domains(changed).why == ("settings or vectors have changed",)
    domains_run(changed, pool=POOL)
    for stage in stages_for(changed, "write"):
        state = state_of(stage, changed)
        is_due = stage.name in ("mix", "plan", "write")
        assert (state.done < state.total) == is_due, stage.name
    assert mix_run(changed, pool=POOL)["domains"] != []
    assert len(set(domains(changed))) == 3
    assert affected(["domains.clusters"]) == [
        "domains", "score", "mix", "plan", "write", "compare", "evaluate-attribution"
    ]  # fmt: skip


def test_without_the_setting_the_index_own_domains_are_back(tmp_path: Path):
    settings = made(tmp_path)
    with open_run(settings) as opened:
        run_stages(opened, stages_for(opened, "plan"), pool=POOL)
    assert plan_plan(settings).done == len(folder(settings).partitions())
    plain = replace(settings, domains=None)
    assert plan_mix(plain).done == 0  # known before the run is opened
    with open_run(plain):
        assert set(domains(plain)) == {"a", "b"}
        assert set(scan_examples(folder(plain)).collect()["domain"]) == {"a", "b"}
        assert {entry["domain"] for entry in mix_run(plain, pool=POOL)["domains"]} == {"a", "b"}
        assert plan_plan(plain).done == 0
    with open_run(settings):
        again = domains_run(settings, pool=POOL)
    assert (again["done"], again["skipped"]) == (0, len(folder(settings).partitions()))
    assert NO_VECTOR in domains(settings)


def test_held_out_rows_decide_nothing(tmp_path: Path):
    settings = made(tmp_path, index={"held_out": 0.4, "partition_rows": 25})
    domains_run(settings, pool=POOL)
    run = folder(settings)
    vectors = np.concatenate([np.load(run.vectors(p, "grams").path) for p in run.partitions()])
    split = np.concatenate([read_examples(run, p)["split"] for p in run.partitions()])
    training = vectors[(split == "train") & ~np.isnan(vectors).any(axis=1)]
    centroids = np.load(run.root / "domains" / "centroids.npy")
    assert len(training) < 100
    np.testing.assert_array_equal(find_clusters(training, Domains(clusters=3), seed=0), centroids)
    assert len(domains(settings)) == 122


def test_lazy_and_eager_readers_agree(tmp_path: Path):
    settings = made(tmp_path)
    domains_run(settings, pool=POOL)
    run = folder(settings)
    eager = pl.concat([read_examples(run, part) for part in run.partitions()])
    assert scan_examples(run).collect().equals(eager)
    assert eager["domain"].to_list() == domains(settings)
    part = run.partitions()[0]
    assert read_examples(run, part, ["domain", "row"]).columns == ["domain", "row"]


def test_domains_of_other_data_are_refused(tmp_path: Path):
    settings = made(tmp_path)
    domains_run(settings, pool=POOL)
    corpus()[:90].write_parquet(tmp_path / "a.parquet")
    index_run(settings, pool=POOL)
    with pytest.raises(InputError, match="was made for other data") as error:
        domains(settings)
    assert "curate domains" in error.value.fix
    with pytest.raises(InputError, match="missing or was made for other"):
        scan_examples(folder(settings)).collect()
    embed_run(settings, pool=POOL)
    domains_run(settings, pool=POOL)
    assert len(domains(settings)) == 90 + 42


@pytest.mark.parametrize("writes", [0, 1, 2, 4, 8])
def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
):
    undisturbed = made(tmp_path / "whole")
    domains_run(undisturbed, pool=POOL)
    settings = made(tmp_path / "killed")
    write, count = Output.write, 0

    def dying(self: Output, *given: Any, **facts: Any) -> dict[str, Any]:
        nonlocal count
        if self.path.parent.name == "domains":
            if count == writes:
                raise KeyboardInterrupt
            count += 1
        return write(self, *given, **facts)

    monkeypatch.setattr(Output, "write", dying)
    if count < 9:
        with pytest.raises(KeyboardInterrupt):
            domains_run(settings, pool=POOL)
    monkeypatch.setattr(Output, "write", write)
    state = plan_domains(settings)
    assert state.done == max(0, writes - 1)  # two files make the clusters
    assert state.total == 8  # the clusters, six partitions, what is said of them all
    assert state.why
    summary = domains_run(settings, pool=POOL)
    assert summary["skipped"] == max(0, writes - 2)
    assert bytes_of(settings) == bytes_of(undisturbed)
    state = plan_domains(settings)
    assert (state.done, state.why) == (8, ())


@pytest.mark.slow
def test_dask_workers_write_the_same_bytes(tmp_path: Path):
    inline = made(tmp_path / "inline")
    domains_run(inline, pool=POOL)
    spread = made(tmp_path / "dask")
    with open_pool(Cluster(kind="local", workers=2)) as pool:
        domains_run(spread, pool=pool)
    assert bytes_of(spread) == bytes_of(inline)


def test_a_flipped_byte_is_found(tmp_path: Path):
    settings = made(tmp_path)
    domains_run(settings, pool=POOL)
    run = folder(settings)
    output = run.domains(run.partitions()[0])
    assert output in finished(run.root)
    content = bytearray(output.path.read_bytes())
    content[len(content) // 2] ^= 1
    output.path.write_bytes(content)
    with pytest.raises(InputError, match="its bytes are not those that were written"):
        domains(settings)


def test_rows_of_numbers_get_numbered_names(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(c, 0.1, (30, 3)) for c in (-5, 5)]).astype(np.float32)
    pl.DataFrame({"x": rows.tolist(), "y": [0, 1] * 30}).write_parquet(tmp_path / "n.parquet")
    source = {"path": str(tmp_path / "n.parquet"), "features": "x", "label": "y"}
    settings = parse_settings(
        {
            "run": str(tmp_path / "run"),
            "sources": {"numbers": source},
            "task": {"kind": "tabular-classification", "num_classes": 2},
            "domains": {"clusters": 2},
        }
    )
    index_run(settings, pool=POOL)
    embed_run(settings, pool=POOL)
    domains_run(settings, pool=POOL)
    found = domains(settings)
    assert len(set(found[:30])) == len(set(found[30:])) == 1
    assert set(found) == {"cluster-1", "cluster-2"}


def test_arms_are_drawn_and_judged_by_the_clusters(tmp_path: Path):
    pool = write_digits(tmp_path, rows=300, flipped=0.0)
    settings = digits_settings(
        tmp_path / "run", *pool, score={}, domains={"clusters": 3}, mix={"mixer": "unimax"},
        plan={"keep": 0.5, "within": "all"},
        compare={"seeds": [0, 1, 2], "steps": 5, "plot": "none",
                 "arms": ["plan", "random", "natural"]},
    )  # fmt: skip
    compare(settings)
    table = pl.read_parquet(Path(settings.run) / "compare" / "table.parquet")
    judged = {part for part in table["part"] if part.startswith("domain: ")}
    assert judged == {"domain: cluster-1", "domain: cluster-2", "domain: cluster-3"}


def test_what_cannot_be_clustered_is_said(tmp_path: Path):
    settings = made(tmp_path)
    with pytest.raises(ConfigError, match="200 clusters were asked for, but there are 1"):
        domains_run(replace(settings, domains=Domains(clusters=200)), pool=POOL)
    with pytest.raises(ConfigError, match="do not ask for clustered domains"):
        domains_run(replace(settings, domains=None), pool=POOL)
    with pytest.raises(ConfigError, match="no representation 'other'"):
        domains_run(replace(settings, domains=Domains(vectors="other")), pool=POOL)
    with pytest.raises(InputError, match="has no clustered domains yet"):
        mix_run(settings, pool=POOL)
    fresh = parse_settings(
        {"run": str(tmp_path / "new"), "sources": {"a": {"path": str(tmp_path / "a.parquet")}},
         "domains": {"clusters": 3}}
    )  # fmt: skip
    assert plan_domains(fresh).why == ("the index has not been made yet",)
    index_run(fresh, pool=POOL)
    assert "vectors are missing" in plan_domains(fresh).why[0]
