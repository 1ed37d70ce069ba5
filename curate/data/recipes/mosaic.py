"""Mosaic Streaming: a stream for each domain."""

from curate.data.recipes.blend import Blend, header
from curate.data.recipes.parts import FIND

_USE = """Use: `from mosaic import mixed`, then `mixed(phase=0, batch_size=8)`: a
StreamingDataset for a StreamingDataLoader. Needs mosaicml-streaming, not curate."""

_UNIT = """Unit: samples, that is rows. `choose` rows of a domain come in an epoch: `repeat`
times its rows, rounded."""

_HONOURED = {
    "column": """Weights: the domains' numbers are exact; samples carry curate_weight, which your
loss must apply (Mosaic's own losses ignore it).""",
    "copies": """Weights: honoured by the copies, exactly; nothing else is to be done.""",
    "domains": """Weights: the domains' numbers are exact; samples carry curate_weight, of mean 1
in each domain, which your loss must apply (Mosaic's own losses ignore it).""",
}

_APPROXIMATED = """Approximated: where `choose` is no multiple of a domain's rows, the rest of a
pass is a random part of it, another one in each epoch."""

_CODE = '''

def streams(phase=0):
    """One stream for each domain."""
    entry = MIXTURE["phases"][phase]
    return [
        Stream(
            local=str(SHARDS / "mds" / d["folder"]),
            choose=max(1, round(d["row_probability"] * entry["epoch_rows"])),
        )
        for d in domains(phase).values()
        if d["row_probability"]
    ]


def mixed(phase=0, *, batch_size, seed=0, **options):
    """The mixture; ranks and workers are dealt with by Mosaic."""
    return StreamingDataset(
        streams=streams(phase),
        batch_size=batch_size,
        shuffle=True,
        shuffle_seed=seed,
        **options,
    )
'''


def text(blend: Blend) -> str:
    """`mosaic.py`."""
    standard, rest = FIND.split("\n\n", 1)
    title = "The mixture for Mosaic Streaming."
    return (
        header(blend, title, _USE, _UNIT, _HONOURED[blend.way], _APPROXIMATED)
        + f"{standard}\n\nfrom streaming import Stream, StreamingDataset\n\n{rest}"
        + _CODE
    )
