"""The tokenizer of shards that hold tokens: found, checked, and put where every worker finds it.

`shards.tokenizer/<digest>/` in the run folder holds `tokenizer.json`, and `special.json` with what
only transformers knows of a tokenizer; then workers need neither transformers nor the hub.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from curate.data.columns import resolve_columns
from curate.data.example import Source
from curate.data.files import read_document, remove_folder, replace_folder, write_json
from curate.data.layout import RunFolder
from curate.data.reading import stored_schema
from curate.data.shard_formats.tokenising import SPECIAL, TOKENIZER, check
from curate.data.shard_settings import TOKEN_FORMATS
from curate.errors import ConfigError
from jobs.lengths import tokenizer_place
from jobs.settings import Settings
from jobs.stamps import tokenizer_stamp

VERSION = 1
"""Of the two files."""

_FOLDER = "shards.tokenizer"
_STAMP = "stamp.json"


@dataclass(frozen=True, slots=True)
class ShardTokenizer:
    """What the formats of tokens are written with."""

    folder: Path
    """Where the two files are, or will be once `save_shard_tokenizer` was called."""
    digest: str
    """16 hexadecimal digits of both files."""
    stamp: str | None
    """Of the files that it was made from; None where they lie on the hub."""
    files: Mapping[str, str] | None
    """Name -> text of the two files; None where they are there already."""


def find_shard_tokenizer(run: RunFolder, settings: Settings) -> ShardTokenizer | None:
    """The tokenizer that `shards.format` needs; None where it needs none. Writes nothing.

    It is `shards.packing.tokenizer`, else that of the plan, else that of the model.

    Raises:
        ConfigError: a source has no text; there is no tokenizer; or it lacks what is needed.
        InputError: the tokenizer cannot be loaded, or is to be trained in this run and was not yet.
    """
    asked = [name for name in settings.shards.formats if name in TOKEN_FORMATS]
    if not asked:
        return None
    sources = _resolved(run, settings)
    check(sources, has_template=True)
    place = settings.shards.packing.tokenizer or tokenizer_place(settings)
    if place is None:
        raise ConfigError(
            f"the format {asked[0]} holds tokens, but no tokenizer is set",
            fix="set shards.packing.tokenizer to the trainer's, a folder or a hub id",
        )
    stamp = tokenizer_stamp(place)
    stamp = stamp and f"{VERSION}-{stamp}"
    found = _known(run, stamp) or _loaded(run, settings, place, stamp)
    special = json.loads((found.files or {}).get(SPECIAL) or (found.folder / SPECIAL).read_text())
    check(sources, has_template=special["template"] is not None)
    return found


def save_shard_tokenizer(run: RunFolder, found: ShardTokenizer) -> None:
    """Put the files where `find_shard_tokenizer` said they would be; others go.

    Raises:
        OutputError: the disk refuses the write.
    """
    files = found.files
    if files is None:
        return

    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")

    replace_folder(found.folder, write)
    write_json(run.root / _FOLDER / _STAMP, {"stamp": found.stamp, "digest": found.digest})
    for other in (run.root / _FOLDER).iterdir():
        if other.is_dir() and other != found.folder:
            remove_folder(other)


def _resolved(run: RunFolder, settings: Settings) -> dict[str, Source]:
    """Each source with the columns that its first file has for it."""
    found: dict[str, Source] = {}
    for part in run.partitions():
        if part.source not in found:
            where = f"{part.source}/{part.file}"
            source = settings.sources[part.source]
            found[part.source] = resolve_columns(source, stored_schema(run, part), where=where)
    return found


def _known(run: RunFolder, stamp: str | None) -> ShardTokenizer | None:
    """What was saved before, if it was made from the same files."""
    kept = read_document(run.root / _FOLDER / _STAMP) or {}
    if stamp is None or kept.get("stamp") != stamp:
        return None
    folder = run.root / _FOLDER / str(kept.get("digest"))
    if not all((folder / name).is_file() for name in (TOKENIZER, SPECIAL)):
        return None
    return ShardTokenizer(folder, folder.name, stamp, None)


def _loaded(run: RunFolder, settings: Settings, place: str, stamp: str | None) -> ShardTokenizer:
    from curate.models.tokens import load_tokenizer

    revision = settings.model.revision if place == settings.model.name else None
    files = tokenizer_files(load_tokenizer(place, revision=revision), place)
    text = "".join(f"{len(text)} {text}" for _, text in sorted(files.items()))
    digest = xxhash.xxh3_64_hexdigest(text.encode())
    return ShardTokenizer(run.root / _FOLDER / digest, digest, stamp, files)


def tokenizer_files(tokenizer: Any, place: str) -> dict[str, str]:
    """Name -> text of the two files of a tokenizer of transformers.

    Args:
        tokenizer: with all that was set on it.
        place: where it comes from, for messages.

    Raises:
        ConfigError: it is none of the tokenizers library, or has no end token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"the tokenizer {place} has no tokenizer.json, and cannot be given one:"
            f" {type(tokenizer).__name__} is written in Python",
            fix="set shards.packing.tokenizer to a tokenizer with a tokenizer.json",
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer {place} has no end-of-text token to put behind a document",
            fix="set tokenizer.eos_token and save it again, or set shards.packing.tokenizer",
        )
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    # Both change with the last call of the tokenizer and say nothing about it.
    core["truncation"] = core["padding"] = None
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several named templates
        template = template.get("default")
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    special = {
        "beginning": tokenizer.bos_token_id,
        "end": end,
        "padding": end if padding is None else padding,
        "vocabulary": max(tokenizer.get_vocab().values()) + 1,
        "template": template,
        "tokens": {
            name: str(token)
            for name, token in tokenizer.special_tokens_map.items()
            if not isinstance(token, list)
        },
    }
    return {
        TOKENIZER: json.dumps(core, ensure_ascii=False),
        SPECIAL: json.dumps(special, ensure_ascii=False, indent=1),
    }
