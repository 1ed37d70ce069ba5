"""What a card says of the columns of the shards, and of the weights in them."""

from curate.data.recipe import Written

_TOKEN_FORMATS = ("packed", "megatron")
"""They hold token ids alone: no column of the input, and no weight of an example."""


def lost_weights(written: Written) -> int:
    """Rows whose weight is not 1 and does not reach a format of tokens that was written."""
    found: dict[str, int] = {}
    for shard in (*written.shards, *written.others):
        weighted = shard.get("facts", {}).get("weighted", 0)
        form = shard.get("format", "")
        found[form] = found.get(form, 0) + int(weighted)
    return max((found.get(name, 0) for name in _token_formats(written)), default=0)


def weights_line(written: Written) -> str:
    """How the plan's weights reach the trainer, in each format."""
    rows, tokens = _row_formats(written), _token_formats(written)
    way = written.weights
    if way == "copies":
        end = "; `curate_weight` is 1." if rows else "."
        return f"Weights: all in the number of copies, which are drawn{end}"
    text = _WAYS[way]
    if rows:
        where = f" (in {_names(rows)})" if tokens else ""
        text += f" `curate_weight`{where} is for the loss."
    if not tokens:
        return text
    text += f" {_names(tokens)} {'holds' if len(tokens) == 1 else 'hold'} no weights of examples"
    if lost := lost_weights(written):
        return (
            f"{text}: **those of the {lost:,} rows that do not weigh 1 are lost there**."
            " `curate write --weights copies` turns weights into copies."
        )
    return f"{text}."


def columns_section(written: Written) -> str:
    """The columns of each format."""
    rows, tokens = _row_formats(written), _token_formats(written)
    lines = ["## Columns", ""]
    if rows:
        where = f" (of {_names(rows)})" if tokens else ""
        lines += [f"The columns of the input in their types{where}, and:", ""]
        meanings = {**_MEANINGS, "curate_weight": _WEIGHTS[written.weights]}
        lines += [f"- `{name}`: {text}" for name, text in meanings.items()]
    if "packed" in tokens:
        lines += ["", "Of `packed`:", ""] if rows else ["Of `packed`:", ""]
        lines += [f"- `{name}`: {text}" for name, text in _PACKED.items()]
    if "megatron" in tokens:
        lines += ["", _MEGATRON] if len(lines) > 2 else [_MEGATRON]
    return "\n".join(lines)


def _row_formats(written: Written) -> list[str]:
    return [name for name in written.formats if name not in _TOKEN_FORMATS]


def _token_formats(written: Written) -> list[str]:
    return [name for name in written.formats if name in _TOKEN_FORMATS]


def _names(formats: list[str]) -> str:
    *first, last = [f"`{name}`" for name in formats]
    return f"{', '.join(first)} and {last}" if first else last


_WAYS = {
    "column": "Weights: copies are written.",
    "domains": "Weights: every example is written once; a loader draws domains with the"
    " probabilities of `mixture.json`.",
}

_MEANINGS = {
    "curate_source": "name of the input data set in the settings of the run.",
    "curate_file": "file of that data set, relative to it.",
    "curate_row": "position of the row in that file. Source, file and row identify an example;"
    " an example with several copies has them all.",
    "curate_weight": "",
    "curate_domain": "domain of the example in the mixture.",
}

_DROPPED = " The `Trainer` of transformers drops this column unless the loss uses it."

_WEIGHTS = {
    "column": "weight of the example in the loss; the mean over the examples kept is 1. It says"
    " nothing about domains: their shares are realised by selection and copies." + _DROPPED,
    "copies": "1: what the plan gives an example is in the number of its copies.",
    "domains": "weight of the example in the loss; the mean over each domain is 1, and what the"
    " domain gets is its probability in `mixture.json`." + _DROPPED,
}

_PACKED = {
    "input_ids": "token ids, as many in each row.",
    "labels": "the same, and -100 where no loss is taken.",
    "seq_lengths": "stretches of one document each.",
    "num_tokens": "tokens that are no padding.",
    "num_documents": "documents that begin in the row.",
    "curate_domain": "domain of the documents; null where a row holds several.",
}

_MEGATRON = "`megatron` has no columns: token ids of one document after another."
