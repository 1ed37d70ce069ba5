"""WebDataset: a random mix of the domains' archives."""

from curate.data.recipes.blend import Blend, header
from curate.data.recipes.parts import FIND

_USE = """Use: `from webdataset_mix import mixed`, then `mixed(phase=0, rank=0, num_ranks=1,
num_workers=2)` in a DataLoader with as many workers and batch_size=None or your own collation.
Needs webdataset, not curate."""

_UNIT = """Unit: rows. A domain is drawn with row_probability, its share of tokens divided by the
mean tokens of a row."""

_HONOURED = {
    "column": """Weights: the JSON of a sample has curate_weight, which your loss must apply.""",
    "copies": """Weights: honoured by the copies; nothing else is to be done.""",
    "domains": """Weights: the domains' part is honoured here; the JSON of a sample has
curate_weight, which your loss must apply.""",
}

_APPROXIMATED = """Approximated: domains are drawn at random, so their numbers of rows vary as
sqrt(n). Every worker of every rank reads archives of its own, as often as it needs; a domain
with fewer archives than there are readers is refused (set shards.min_files)."""

_CODE = '''

class Mixed(torch.utils.data.IterableDataset):
    """What one worker of one rank reads: its share of an epoch."""

    def __init__(self, phase, *, epochs, seed, buffer_size, rank, num_ranks, num_workers):
        readers = num_ranks * max(num_workers, 1)
        self.chosen = [d for d in domains(phase).values() if d["row_probability"]]
        self.files = [files(d["folder"]) for d in self.chosen]
        if min(map(len, self.files)) < readers:
            raise ValueError(f"a domain has fewer archives than there are readers, {readers}")
        self.total = round(epochs * MIXTURE["phases"][phase]["epoch_rows"])
        self.seed, self.buffer_size = seed, buffer_size
        self.rank, self.num_ranks, self.num_workers = rank, num_ranks, num_workers

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        if workers != max(self.num_workers, 1):
            raise ValueError(f"num_workers is {self.num_workers}, the DataLoader has {workers}")
        readers = self.num_ranks * workers
        reader = self.rank * workers + (0 if worker is None else worker.id)
        random.seed(f"{self.seed} {reader} of {readers}")  # RandomMix draws from this
        parts = [
            wds.DataPipeline(
                wds.SimpleShardList(mine[reader::readers]),
                wds.detshuffle(bufsize=len(mine), initial=len(mine), seed=self.seed),
                wds.tarfile_to_samples(),
                wds.shuffle(self.buffer_size, initial=self.buffer_size, seed=self.seed),
                wds.decode(),
            ).repeat()
            for mine in self.files
        ]
        mix = wds.RandomMix(parts, [d["row_probability"] for d in self.chosen])
        share = (reader + 1) * self.total // readers - reader * self.total // readers
        return itertools.islice(iter(mix), share)


def files(folder):
    """Archives of a domain, in order."""
    return sorted(str(path) for path in (SHARDS / "webdataset" / folder).glob("train-*.tar"))


def mixed(
    phase=0, *, epochs=1.0, seed=0, buffer_size=1000, rank=0, num_ranks=1, num_workers=0
):
    """The mixture of so many epochs; each sample is a dict of its files."""
    return Mixed(
        phase,
        epochs=epochs,
        seed=seed,
        buffer_size=buffer_size,
        rank=rank,
        num_ranks=num_ranks,
        num_workers=num_workers,
    )
'''


def text(blend: Blend) -> str:
    """`webdataset_mix.py`."""
    standard, rest = FIND.split("\n\n", 1)
    standard = "import itertools\nimport json\nimport random\nfrom pathlib import Path"
    title = "The mixture for WebDataset."
    return (
        header(blend, title, _USE, _UNIT, _HONOURED[blend.way], _APPROXIMATED)
        + f"{standard}\n\nimport torch\nimport webdataset as wds\n\n{rest}"
        + _CODE
    )
