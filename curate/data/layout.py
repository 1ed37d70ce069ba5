"""Where things lie in a run folder."""

from dataclasses import dataclass
from pathlib import Path

from curate.data.partitions import Output, Partition, load_partitions


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run; knows names only, reads and writes nothing but the partition list."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def converted(self) -> Path:
        """Inputs that were not Parquet: `<source>/<file>.parquet`."""
        return self.root / "examples" / "data"

    @property
    def quarantine(self) -> Path:
        """Rows that were set aside: source, file, row, reason, detail."""
        return self.root / "quarantine"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that was trained in this run."""
        return self.root / "tokenizer"

    @property
    def target(self) -> Path:
        """The target, indexed like a run of its own."""
        return self.root / "target"

    @property
    def proxies(self) -> Path:
        """Small models that are trained to find a mixture, and the sequences they read."""
        return self.root / "proxies"

    @property
    def mixtures(self) -> Path:
        return self.root / "mixtures"

    @property
    def plan(self) -> Path:
        return self.root / "plan"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    def partitions(self) -> list[Partition]:
        """All partitions in canonical order; empty before `curate index` has run."""
        return load_partitions(self.root / "examples" / "partitions.json")

    def examples(self, part: Partition) -> Output:
        return self._table(part, "examples")

    def lengths(self, part: Partition, tokenizer_digest: str) -> Output:
        return self._table(part, "lengths", tokenizer_digest)

    def quantities(self, part: Partition, checkpoint: str) -> Output:
        """What one checkpoint measured; `checkpoint` is a name such as seed-0-step-000200."""
        return self._table(part, "quantities", checkpoint)

    def scores(self, part: Partition, scorer: str) -> Output:
        return self._table(part, "scores", scorer)

    @property
    def clusters(self) -> Output:
        """What is said of each clustered domain; domains are clustered where it is done."""
        return Output(self.root / "domains" / "clusters.json")

    def domains(self, part: Partition) -> Output:
        """The clustered domain of each example, over the index's own."""
        return self._table(part, "domains")

    def vectors(self, part: Partition, representation: str) -> Output:
        """(N, d) vectors of a partition's examples, NaN where there is none."""
        return Output(self.root / "vectors" / representation / f"{part.name}.npy")

    def vector_rows(self, part: Partition, representation: str) -> Output:
        """Key, and what was read, of each row of `vectors`."""
        return self._table(part, "vectors", representation)

    def planned(self, part: Partition) -> Output:
        return self._table(part, "plan")

    def _table(self, part: Partition, *folders: str) -> Output:
        return Output(self.root.joinpath(*folders, f"{part.name}.parquet"))
