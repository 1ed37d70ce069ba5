"""The numbers of a trained model, against plain loops and by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from e2e.small_run import settings as small_settings
from e2e.small_run import write_inputs
from torch.nn import functional

from curate.data.layout import RunFolder
from curate.data.reading import read_fields
from curate.data.tables import read_examples
from curate.models.load import build_model
from jobs.all_stages import run_stages, stages_for
from jobs.cluster import Cluster, open_pool
from jobs.compare_evaluation import evaluate, summarise
from jobs.compare_examples import choose_examples, evaluation_output
from jobs.settings import parse_settings, task_settings
from jobs.training_work import make_workshop


def _value(found: list[Any], part: str, metric: str) -> float:
    return next(e.value for e in found if (e.part, e.metric) == (part, metric))


def test_a_language_model_is_measured_in_nats_per_token_and_bits_per_byte(tmp_path: Path):
    write_inputs(tmp_path / "inputs")
    values = small_settings(tmp_path / "inputs", tmp_path / "run", index={"held_out": 0.1})
    settings = parse_settings(values)
    with open_pool(Cluster()) as pool:
        run_stages(settings, stages_for(settings, "tokenizer"), pool=pool)
    choose_examples(settings)
    shop = make_workshop(settings)
    model = build_model(settings.model, task_settings(settings), shop.tokenizer, 0)
    found = evaluate(shop, model, 1024)
    nats, tokens, size = _by_hand(settings, shop, model)
    assert _value(found, "held_out", "loss") == pytest.approx(nats / tokens, rel=1e-5)
    bits = nats / math.log(2) / size
    assert _value(found, "held_out", "bits_per_byte") == pytest.approx(bits, rel=1e-5)
    assert _value(found, "worst_domain", "loss") == max(
        e.value for e in found if e.part.startswith("domain: ") and e.metric == "loss"
    )


@torch.no_grad()
def _by_hand(settings: Any, shop: Any, model: Any) -> tuple[float, int, int]:
    """Nats, counted tokens and the bytes they spell, of all held-out texts, one at a time."""
    run = RunFolder(Path(settings.run))
    nats, tokens, size = 0.0, 0, 0
    for part in run.partitions():
        fields = read_fields(run, part, settings.sources[part.source])
        split = read_examples(run, part, ["split"])["split"]
        for text, own in zip(fields["text"], split, strict=True):
            if own != "held_out":
                continue
            ids = shop.tokenizer(text, add_special_tokens=False)["input_ids"]
            first = shop.tokenizer.bos_token_id
            ids = ([] if first is None else [first]) + ids
            ids = ids[:64]
            if len(ids) < 2:
                continue
            row = torch.tensor([ids])
            logits = model(input_ids=row).logits[0, :-1].double()
            nats += float(functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
            tokens += len(ids) - 1
            size += len(shop.tokenizer.decode(ids[1:], skip_special_tokens=True).encode())
    return nats, tokens, size


def _frame(**columns: list[Any]) -> pl.DataFrame:
    return pl.DataFrame(columns, schema_overrides={"label": pl.Int64})


def test_domains_count_by_what_they_hold_out_not_by_what_was_evaluated():
    """Domain a holds out 30 rows of which 1 was evaluated, b 10 of which 2 were."""
    frame = _frame(
        where=["held_out"] * 3, domain=["a", "b", "b"], label=[0, 0, 1], weight=[30.0, 5.0, 5.0],
        mean_loss=[1.0, 2.0, 4.0], correct=[1.0, 0.0, 1.0], counted=[1.0, 1.0, 1.0],
        num_bytes=[0.0, 0.0, 0.0],
    )  # fmt: skip
    found = summarise(frame, is_classification=True)
    assert _value(found, "held_out", "accuracy") == pytest.approx((30 + 5) / 40)
    assert _value(found, "held_out", "loss") == pytest.approx((30 + 10 + 20) / 40)
    assert _value(found, "domain: b", "accuracy") == 0.5
    assert _value(found, "worst_domain", "accuracy") == 0.5
    assert _value(found, "worst_domain", "loss") == 3.0
    assert _value(found, "class: 0", "accuracy") == pytest.approx(30 / 35)
    assert _value(found, "worst_class", "accuracy") == pytest.approx(30 / 35)


def test_a_long_text_counts_with_its_tokens():
    frame = _frame(
        where=["held_out", "held_out"], domain=["a", "a"], label=[None, None], weight=[1.0, 1.0],
        mean_loss=[1.0, 3.0], correct=[0.0, 0.0], counted=[30.0, 10.0], num_bytes=[90.0, 10.0],
    )  # fmt: skip
    found = summarise(frame, is_classification=False)
    assert _value(found, "held_out", "loss") == pytest.approx(60 / 40)
    assert _value(found, "held_out", "bits_per_byte") == pytest.approx(60 / math.log(2) / 100)
    assert {e.metric for e in found} == {"loss", "bits_per_byte"}


def test_classes_of_the_target_stand_before_those_of_noisy_held_out_labels():
    frame = _frame(
        where=["held_out", "target"], domain=["a", "a"], label=[0, 0], weight=[1.0, 1.0],
        mean_loss=[1.0, 0.1], correct=[0.0, 1.0], counted=[1.0, 1.0], num_bytes=[0.0, 0.0],
    )  # fmt: skip
    found = summarise(frame, is_classification=True)
    assert _value(found, "class: 0", "accuracy") == 1.0
    assert _value(found, "target", "accuracy") == 1.0
    assert _value(found, "held_out", "accuracy") == 0.0


def test_one_broken_domain_makes_the_worst_one_no_number():
    frame = _frame(
        where=["held_out"] * 2, domain=["a", "b"], label=[0, 1], weight=[1.0, 1.0],
        mean_loss=[1.0, math.nan], correct=[1.0, 0.0], counted=[1.0, 1.0], num_bytes=[0.0, 0.0],
    )  # fmt: skip
    found = summarise(frame, is_classification=True)
    assert math.isnan(_value(found, "worst_domain", "loss"))
    assert math.isnan(_value(found, "held_out", "loss"))


def test_the_choice_of_examples_does_not_depend_on_partitions(tmp_path: Path):
    chosen: list[set[tuple[Any, ...]]] = []
    write_inputs(tmp_path / "inputs")
    for rows in (20, 90):
        index = {"held_out": 0.4, "partition_rows": rows}
        run = tmp_path / f"run-{rows}"
        settings = parse_settings(small_settings(tmp_path / "inputs", run, index=index))
        capped = replace(settings.compare, held_out_examples=5)
        settings = replace(settings, compare=capped)
        with open_pool(Cluster()) as pool:
            run_stages(settings, stages_for(settings, "index"), pool=pool)
        choose_examples(settings)
        folder = RunFolder(run)
        table = pl.read_parquet(evaluation_output(folder).path)
        assert table.group_by("domain").len()["len"].max() == 5
        keys: set[tuple[Any, ...]] = set()
        for part in folder.partitions():
            own = table.filter(pl.col("partition") == part.name)
            rows_of = read_examples(folder, part, ["source", "file", "row", "split"])
            picked = rows_of[own["position"].to_numpy()]
            assert set(picked["split"]) <= {"held_out"}
            keys |= set(picked.select("source", "file", "row").iter_rows())
        chosen.append(keys)
    assert chosen[0] == chosen[1]
