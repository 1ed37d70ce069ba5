"""Settings guessed from the data: for `curate init`, and for `curate score` on bare data."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from curate.config import to_yaml
from curate.data import files
from curate.data.columns import PROBLEM
from curate.data.file_names import known_format
from curate.errors import ConfigError, CurateError, OutputError, counted
from curate.models.settings import Model
from jobs.own_passes import READS_LABELS
from jobs.starter_look import Look, look_at, seen_classes, suitable_task, with_roles
from jobs.starter_notes import domain_notes, notes_on
from jobs.starter_roles import DOMAIN_NAMES

log = logging.getLogger(__name__)

_CLASSIFIERS = "ForSequenceClassification"
_IMAGE_CLASSIFIERS = "ForImageClassification"
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")


def guess_settings(data: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for `curate score DATA`: where it lies, and the task that the model was made for.

    Args:
        data: file, folder, glob or address.
        flags: `scorer`, `model`, `task` and others, where they were given.

    Raises:
        ConfigError: a scorer is unknown, or needs a model and there is none.
        InputError: the model's folder cannot be read.
    """
    from jobs.chosen import chosen_scorers

    name = source_name(data)
    values: dict[str, Any] = {
        "run": f"runs/{name}",
        "sources": {name: {"path": data}},
        "score": {"scorers": ["rds" if flags.get("target") else "el2n"]},
    }
    scorers: list[str] = flags.get("scorer") or values["score"]["scorers"]
    if flags.get("target") and not flags.get("scorer"):
        values["plan"] = {"score": "rds_rank", "order": "easiest", "within": "all", "keep": 0.1}
    model = flags.get("model")
    chosen = chosen_scorers({name: {} for name in scorers})
    needy = [entry.name for entry in chosen if entry.needs_model]
    if model is None:
        if needy:
            many = len(needy) > 1
            raise ConfigError(
                f"the score{'s' * many} {', '.join(needy)} need{'' if many else 's'} a model",
                fix="add --model with a folder saved by transformers or a hub id",
            )
    else:
        values["task"] = guess_task(model, flags.get("task"))
    reads_labels = "num_classes" in values.get("task", {}) or not READS_LABELS.isdisjoint(scorers)
    label = flags.get("label")
    values["sources"][name] |= _guess_source(data, name, label, reads_labels=reads_labels)
    if values["sources"][name].get("classes") and model is not None:
        values["sources"][name]["classes"] = _in_order_of(model, values["sources"][name]["classes"])
    return values


def _guess_source(data: str, name: str, label: str | None, *, reads_labels: bool) -> dict[str, Any]:
    """Separator, label and classes, as far as the data show them; no look where none matters."""
    if not (reads_labels or known_format(data) == "csv"):
        return {}
    try:
        look = with_roles(look_at(data, name, label=label))
    except CurateError:  # it will be told by who reads the data
        return {}
    source = look.source
    found: dict[str, Any] = {} if source.separator is None else {"separator": source.separator}
    if reads_labels and source.label is not None:
        found |= {"label": source.label}
        found |= {"classes": list(source.classes)} if source.classes else {}
        classes = counted(seen_classes(look) or 0, "class", "classes")
        log.info("%s: taking label: %s (%s)", name, source.label, classes)
        if source.classes and not look.has_all_labels:
            log.info("%s: these are the classes of the first %d rows", name, look.rows.num_rows)
    elif reads_labels and label is None:
        for line in notes_on(look, f"sources.{name}", {}):
            log.info("%s: %s", name, line)
    return found


def _in_order_of(model: str, classes: list[str]) -> list[str]:
    """The classes in the order that a saved model has them in, where it knows their names."""
    from curate.models.saved import model_folder, read_config

    names = read_config(model_folder(Model(name=model))).get("id2label") or {}
    ordered = [str(names[key]) for key in sorted(names, key=int)]
    return ordered if set(classes) <= set(ordered) else classes


def guess_task(model: str, kind: str | None) -> dict[str, Any]:
    """The task that a saved model was made for, from the architecture in its `config.json`.

    Args:
        model: folder or hub id.
        kind: of the task, where the user says it.

    Raises:
        ConfigError: the architecture does not say.
        InputError: the model cannot be read.
    """
    from curate.models.saved import model_folder, read_config

    config = read_config(model_folder(Model(name=model)))
    model_type = config.get("model_type")
    architecture = (config.get("architectures") or [model_type or "model without a type"])[0]
    if kind is None and architecture.endswith(_LANGUAGE_MODELS):
        kind = "causal-lm"
    if kind is None and architecture.endswith(_CLASSIFIERS):
        kind = "text-classification"
    if kind is None and (architecture.endswith(_IMAGE_CLASSIFIERS) or model_type == "cnn"):
        kind = "image-classification"
    if kind is None and model_type == "mlp":
        kind = "tabular-classification"
    if kind is None:
        raise ConfigError(
            f"{model} is a {architecture}, which does not say what task it is for",
            fix="add --task causal-lm, preference, or text-, image- or tabular-classification",
        )
    if kind == "image-classification":
        return {"kind": kind, **_image_facts(model, config)}
    if kind == "tabular-classification" and model_type == "mlp":
        return {"kind": kind, "num_classes": config.get("num_classes")}
    if kind != "text-classification":
        return {"kind": kind}
    # transformers leaves the classes out of the file where there are two, its default.
    classes = len(config.get("id2label") or ()) or 2
    return {"kind": kind, "num_classes": classes}


def _image_facts(model: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved image classifier says of the images that it reads."""
    from curate.models.saved import model_folder

    channels = config.get("num_channels") or config.get("channels") or 3
    found: dict[str, Any] = {
        "num_classes": config.get("num_classes") or len(config.get("id2label") or ()) or 2,
        "channels": channels,
    }
    if isinstance(config.get("image_size"), int):
        found["size"] = config["image_size"]
    for name in ("mean", "std"):
        folder = model_folder(Model(name=model))
        values = (files.read_json(folder / "preprocessor_config.json") or {}).get(f"image_{name}")
        if isinstance(values, list) and len(values) == channels:
            found[name] = values
    return found


def source_name(data: str) -> str:
    """A name for data at this path: `runs/news.parquet` is `news`, `a/*.jsonl` is `a`."""
    parts = [part for part in PurePosixPath(data.partition("://")[2] or data).parts
             if not re.search(r"[*?\[]", part) and part not in ("/", ".", "..")]  # fmt: skip
    last = parts[-1].split(".")[0] if parts else ""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-") or "data"


def write_starter(data: Sequence[str], target: Path, *, wanted: str | None = None) -> list[str]:
    """Write a commented configuration for `data`; returns what to tell the user.

    Args:
        data: files, folders, globs or addresses, as the user wrote them; a source each.
        target: the file to write.
        wanted: examples of what is wanted; the plan then chooses by likeness with them.

    Raises:
        OutputError: `target` exists.
        InputError: the data cannot be read.
        ConfigError: it does not fit into one run.
    """
    if target.exists():
        raise OutputError(f"{target} exists", fix="choose another file with --out")
    looks = [with_roles(look_at(path, name)) for path, name in zip(data, _names(data), strict=True)]
    look = None if wanted is None else with_roles(look_at(wanted, "target"))
    task = _task_of(looks, data, has_target=wanted is not None)
    text = starter_text(data, looks, wanted=wanted, wanted_look=look)
    looks += [] if look is None else [look]
    files.replace(target, lambda path: path.write_text(text, encoding="utf-8"))
    found = [file for look in looks for file in look.files]
    kinds = ", ".join(dict.fromkeys(file.format for file in found))
    lines = [f"{target} written for {counted(len(found), 'file')} of format {kinds}"]
    places = [*(f"sources.{name}" for name in _names(data)), "target"]
    for where, look in zip(places, looks, strict=False):
        lines += [*notes_on(look, where, task), *domain_notes(look)]
    return [*lines, f"next: curate run {target} --dry-run"]


def starter_text(
    data: Sequence[str],
    looks: Sequence[Look],
    *,
    wanted: str | None = None,
    wanted_look: Look | None = None,
) -> str:
    """The configuration as YAML with comments.

    Args:
        data: as the user wrote it.
        looks: at each of the data.
        wanted: examples of what is wanted, as the user wrote them, and a look at them.
    """
    names = _names(data)
    task = _task_of(looks, data, has_target=wanted is not None)
    sources = [
        _source_text(name, path, look, is_classified="num_classes" in task)
        for name, path, look in zip(names, data, looks, strict=True)
    ]
    target = ""
    ending = _MODELS[task["kind"]] + _REST.replace("SCORE", _score_of(task["kind"]))
    if wanted is not None and wanted_look is not None:
        text = _source_text("target", wanted, wanted_look, is_classified="num_classes" in task)
        text = text.replace(_SOURCE_NOTES["domain"], _TARGET_NOTE).replace(_SOURCE_NOTES["id"], "")
        target = "\n" + "".join(line.removeprefix("  ") for line in text.splitlines(keepends=True))
        kind = "ngrams" if set(wanted_look.source.content_columns) & _TEXTS else "values"
        ending = _WANTED.replace("KIND", kind)
    parts = [
        _HEAD,
        to_yaml({"run": f"runs/{'-'.join(names[:3])}", "seed": 0}),
        "\nsources:\n",
        *sources,
        "" if len(data) > 1 else _ANOTHER,
        target,
        "\n",
        to_yaml({"task": task}),
        ending,
        _LAST,
    ]
    return "".join(parts)


def _score_of(task: str) -> str:
    return "loss" if task == "causal-lm" else "el2n"


def _names(data: Sequence[str]) -> list[str]:
    """A name for each source, no two alike."""
    found: list[str] = []
    for path in data:
        name = source_name(path)
        like = [other for other in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", other)]
        found.append(f"{name}-{len(like) + 1}" if like else name)
    return found


def _source_text(name: str, data: str, look: Look, *, is_classified: bool) -> str:
    """One source, with what there is to know of its columns."""
    fields = [field for field in look.rows.schema if field.name != PROBLEM]
    columns = ", ".join(f"{field.name} ({field.type})" for field in fields)
    size_mb = sum(file.size_bytes for file in look.files) / 1e6
    source = look.source
    chosen: dict[str, Any] = {} if source.separator is None else {"separator": source.separator}
    chosen |= {
        key: value[0] if len(value) == 1 else list(value)
        for key, value in source.content_columns.items()
    }
    if not source.content_columns:
        chosen["text"] = "COLUMN"
    if is_classified and source.label is not None:
        chosen["label"] = source.label
        if source.classes:
            chosen["classes"] = list(source.classes)
    domain = source.domain
    if not is_classified and domain is None and source.label in DOMAIN_NAMES:
        domain = source.label
    roles = {"domain": domain, "id": source.id}
    chosen |= {role: column for role, column in roles.items() if column is not None}
    comment = f"# {counted(len(look.files), 'file')}, {size_mb:,.1f} MB; columns: {columns}"
    notes = "".join(note for role, note in _SOURCE_NOTES.items() if role not in chosen)
    return (
        f"  {_key(name)}:\n    {_one_line(comment)}\n"
        + _indented(to_yaml({"path": data, **chosen}), 4)
        + notes
    )


def _task_of(looks: Sequence[Look], data: Sequence[str], *, has_target: bool) -> dict[str, Any]:
    task = _common_task([suitable_task(look, seen_classes(look)) for look in looks], data)
    is_table = task["kind"] == "tabular-classification"
    if has_target and is_table and any(look.source.label is None for look in looks):
        return {"kind": "causal-lm", "max_tokens": 512}  # likeness needs no labels; nor does this
    return task


def _common_task(tasks: Sequence[dict[str, Any]], data: Sequence[str]) -> dict[str, Any]:
    """One task for all sources.

    Raises:
        ConfigError: some hold texts and others something else.
    """
    kinds = {task["kind"] for task in tasks}
    if kinds == {"causal-lm", "text-classification"}:
        return next(task for task in tasks if task["kind"] == "causal-lm")
    if len(kinds) > 1:
        first, other = next((i, j) for i, t in enumerate(tasks) for j, u in enumerate(tasks)
                            if t["kind"] != u["kind"])  # fmt: skip
        raise ConfigError(
            f"{data[first]} looks like data for {tasks[first]['kind']}, {data[other]} for"
            f" {tasks[other]['kind']}",
            fix="make a run of each",
        )
    most = max(tasks, key=lambda task: task.get("num_classes", 0))
    return dict(most)


def _key(name: str) -> str:
    """A name that YAML reads as text: of `2024.csv` it would make a number."""
    return to_yaml({name: 0}).rpartition(":")[0]


def _indented(text: str, width: int) -> str:
    return "".join(f"{' ' * width}{line}\n" for line in text.splitlines())


def _one_line(text: str) -> str:
    return " ".join(text.split())


_HEAD = """\
# Settings of a run of curate; every key that is not here has its default.
# See what would happen: curate run THIS_FILE --dry-run -v
# All keys, for editors: curate schema > curate.schema.json, then in the line below
# yaml-language-server: $schema=curate.schema.json

"""

_SOURCE_NOTES = {
    "domain": "    # domain: COLUMN         # what a mixture weighs; without it, the source\n",
    "id": "    # id: COLUMN             # your own name of a row; rides along\n",
}

_TARGET_NOTE = "    # domain: COLUMN         # kinds of what is wanted, which choose in turn\n"

_ANOTHER = "  # another: {path: more/*.jsonl}\n"

_TRAIN = """\
checkpoints:
  train: {epochs: 1, seeds: [0], lr: LR}
"""

_SCRATCH = """\
model:
  # A small one, made here from scratch. Better: a model of yours, `name: FOLDER_OR_HUB_ID`.
  config: {model_type: llama, hidden_size: 128, intermediate_size: 384, num_hidden_layers: 4,
           num_attention_heads: 4, num_key_value_heads: 4, tie_word_embeddings: true}
  tokenizer: {train: bpe, vocab_size: 8192}
"""

_MODELS = {
    "causal-lm": "\n" + _SCRATCH + _TRAIN.replace("LR", "1.0e-3"),
    "preference": "\nmodel:\n"
    "  # The model whose answers are judged; it is also what the trained ones are compared with.\n"
    "  name: FOLDER_OR_HUB_ID\n" + _TRAIN.replace("LR", "1.0e-6"),
    "text-classification": "\n" + _SCRATCH + _TRAIN.replace("LR", "1.0e-3"),
    "image-classification": "\nmodel:\n"
    "  # A small one. Better: `name: FOLDER_OR_HUB_ID` of a ResNet or ViT, with its task.size.\n"
    "  config: {model_type: cnn, widths: [16, 32], hidden: [64]}\n"
    "checkpoints:\n"
    "  # An image costs a token for each 8 by 8 pixels.\n"
    "  train: {epochs: 3, seeds: [0], lr: 1.0e-3, batch_tokens: 1024}\n",
    "tabular-classification": "\nmodel:\n  config: {model_type: mlp, hidden: [64]}\n"
    + _TRAIN.replace("LR", "1.0e-3"),
}

_TEXTS = {"text", "prompt", "response", "messages", "chosen", "rejected"}

_WANTED = """
embed:
  # Without a model. Better for texts: `{model: FOLDER_OR_HUB_ID}`, the model that is to be trained
  # (`pooling: position_weighted`) or a sentence encoder.
  likeness: {kind: KIND}

score:
  scorers: [rds, random]              # likeness with the target; `curate methods` lists others

plan:
  score: rds_rank                     # the order in which the rows of the target choose
  order: easiest                      # low places first
  keep: 0.1                           # or {examples: 10_000}, {tokens: 2e9}, {token_share: 0.5}
  within: all                         # or domain: the same share of each
  # draw: k_centre                    # far apart from each other, among the first in order

"""

_REST = """
score:
  scorers: [SCORE, length, random]    # `curate methods` lists them

# mix: {mixer: unimax}                # domains as equal as the data allows

plan:
  score: SCORE
  keep: 0.5                           # or {examples: 10_000}, {tokens: 2e9}, {token_share: 0.5}
  order: hardest                      # hardest, easiest, middle
  draw: sample                        # sample, top, k_centre, facility_location
  within: domain                      # domain, label, source, all

"""

_LAST = """\
shards: {size_mb: 128}
cluster: {kind: inline}               # or {kind: local, workers: 4}, {kind: address, address: ...}
"""
