"""torchtitan: a mix of documents before they are packed."""

from curate.data.recipes.blend import Blend, header
from curate.data.recipes.parts import FIND

_USE = """Use: `from torchtitan_mix import mix` in your config, `config.dataloader =
GrainDataLoader.Config(dataset=mix(), repeat=True)`. Needs torchtitan as of the second half of
2026 (torchtitan.components.data), not curate. Checked against its documentation, not run."""

_UNIT = """Unit: rows. Documents are mixed before they are packed, so weights count documents: a
domain is drawn with row_probability, its share of tokens divided by the mean tokens of a row.
Packed first, they would count tokens."""

_HONOURED = {
    "column": """Weights: the domains' shares are honoured; curate_weight is lost, as torchtitan
weighs no document: write with `--weights copies` to have it honoured.""",
    "copies": """Weights: honoured by the copies, domains and examples alike.""",
    "domains": """Weights: the domains' shares are honoured; curate_weight is lost, as torchtitan
weighs no document: write with `--weights copies` to have it honoured.""",
}

_CODE = '''

{text_of}

def mix(phase=0):
    """The mixture, packed."""
    return ConcatThenSplitPackingConfig(
        dataset=DatasetMixConfig(
            datasets=tuple(
                WeightedDataset(
                    dataset=SingleDatasetConfig(
                        source=HuggingFaceRandomAccessSource.Config(
                            path=str(SHARDS / "data" / d["folder"]), split="train"
                        ),
                        processor=TextProcessor.Config(text_fn=text_of),
                        post_filters=(lambda sample: sample is not None,),
                    ),
                    weight=d["row_probability"],
                )
                for d in domains(phase).values()
                if d["row_probability"]
            )
        )
    )
'''

_ONE = '''def text_of(row):
    """The text of a row."""
    return row[{column!r}]
'''

_EACH = '''# Column of the text of each source.
TEXTS = {{
{lines}
}}


def text_of(row):
    """The text of a row, in the column of its source."""
    return row[TEXTS[row["curate_source"]]]
'''

_NO_TEXT = """Some sources have no column of text (prompts and responses, chats): they are not in
TEXTS, so make a text of their rows in text_of."""

_IMPORTS = """from torchtitan.components.data import (
    ConcatThenSplitPackingConfig,
    DatasetMixConfig,
    HuggingFaceRandomAccessSource,
    SingleDatasetConfig,
    WeightedDataset,
)
from torchtitan.hf_datasets.text_datasets import TextProcessor
"""


def text(blend: Blend) -> str:
    """`torchtitan_mix.py`."""
    standard, rest = FIND.split("\n\n", 1)
    title = "The mixture for torchtitan."
    is_whole = blend.text is not None or not any(blend.texts.get(s) for s in blend.sources)
    lacking = [] if is_whole or all(blend.texts.get(s) for s in blend.sources) else [_NO_TEXT]
    return (
        header(blend, title, _USE, _UNIT, _HONOURED[blend.way], *lacking)
        + f"{standard}\n\n{_IMPORTS}\n{rest}"
        + _CODE.format(text_of=_text_of(blend, is_whole=is_whole))
    )


def _text_of(blend: Blend, *, is_whole: bool) -> str:
    if is_whole:
        return _ONE.format(column=blend.text or "text")
    lines = [f"    {s!r}: {text!r}," for s in blend.sources if (text := blend.texts.get(s))]
    return _EACH.format(lines="\n".join(lines))
