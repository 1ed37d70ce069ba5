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

def text_of(row):
    """The text of a row."""
    return row[{column}]


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
    return (
        header(blend, title, _USE, _UNIT, _HONOURED[blend.way])
        + f"{standard}\n\n{_IMPORTS}\n{rest}"
        + _CODE.format(column=_column(blend))
    )


def _column(blend: Blend) -> str:
    return repr(blend.text or "text")
