"""Text that several recipes share: where they find the shards, how they draw and how they weigh."""

FIND = '''import json
from pathlib import Path

SHARDS = Path(__file__).resolve().parents[1]
MIXTURE = json.loads((SHARDS / "mixture.json").read_text(encoding="utf-8"))


def domains(phase=0):
    """Domain -> its numbers, where it has rows; phases count from 0, in the order of training."""
    return {name: d for name, d in MIXTURE["phases"][phase]["domains"].items() if d["rows"]}
'''

PARQUET_FILES = '''

def files(folder):
    """Files of a domain, in order."""
    return sorted(str(path) for path in (SHARDS / "{room}" / folder).glob("train-*.parquet"))
'''

SAMPLER = '''

class MixtureSampler(torch.utils.data.Sampler):
    """Draws a domain by its probability, then its next row; every pass over a domain is in a new
    random order, and no row comes a second time before all have come once.

    A function of seed and epoch, in chunks: no limit to the number of rows (the one of torch,
    WeightedRandomSampler, fails above 2^24). Ranks take turns in one sequence. To resume, say how
    many draws of the epoch were taken on all ranks: `start`. Under Trainer and accelerate leave
    rank, num_ranks and start: they deal out and skip the batches themselves.
    """

    def __init__(self, phase=0, *, seed=0, rank=0, num_ranks=1, start=0, epochs=1.0):
        chosen = list(domains(phase).values())
        self.sizes = [d["rows"] for d in chosen]
        self.probabilities = np.array([d["row_probability"] for d in chosen])
        self.total = round(epochs * MIXTURE["phases"][phase]["epoch_rows"])
        self.seed, self.rank, self.num_ranks, self.start = seed, rank, num_ranks, start
        self.epoch = 0

    def set_epoch(self, epoch):
        self.start = 0 if epoch != self.epoch else self.start
        self.epoch = epoch

    def __len__(self):
        return (self.total - self.start) // self.num_ranks

    def __iter__(self):
        left = len(self)
        for at, rows in self._chunks():
            first = max(self.start - at, 0)
            first += (self.rank - (at + first - self.start)) % self.num_ranks
            mine = rows[first :: self.num_ranks][:left].tolist()
            left -= len(mine)
            yield from mine

    def _chunks(self, size=1 << 16):
        """Place of the first draw and rows of each chunk, of all ranks."""
        random = np.random.default_rng([self.seed, self.epoch])
        begins = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        orders, places = {}, {}
        for at in range(0, self.total, size):
            count = min(size, self.total - at)
            drawn = random.choice(len(self.sizes), size=count, p=self.probabilities)
            rows = np.empty(count, np.int64)
            for domain in np.unique(drawn).tolist():
                where = np.flatnonzero(drawn == domain)
                taken = []
                while sum(map(len, taken)) < len(where):
                    place = places.get(domain, 0)
                    if place == 0:
                        orders[domain] = random.permutation(self.sizes[domain])
                    piece = orders[domain][place:][: len(where) - sum(map(len, taken))]
                    places[domain] = (place + len(piece)) % self.sizes[domain]
                    taken.append(piece)
                rows[where] = begins[domain] + np.concatenate(taken)
            yield at, rows
'''

LOSS = '''

class WeightedLoss:
    """Carries the column curate_weight past the model into the loss: sum of weight times loss, over
    the number of target tokens (or examples). Evaluation without the column stays unweighted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.remove_unused_columns:
            raise ValueError("set remove_unused_columns=False: else the weights are dropped")
        if getattr(self.args, "packing", False):
            raise ValueError("set packing=False: a packed row has no single weight")
        if self.args.label_smoothing_factor or getattr(self.args, "use_liger_kernel", False):
            raise ValueError("label smoothing and Liger kernels compute a loss without weights")
        if "curate_weight" not in (getattr(self.train_dataset, "column_names", None) or []):
            raise ValueError("train_dataset has lost the column curate_weight")
        inner = self.data_collator

        def collate(rows):
            taken = [{k: v for k, v in row.items() if not k.startswith("curate_")} for row in rows]
            batch = inner(taken)
            if all("curate_weight" in row for row in rows):
                batch["curate_weight"] = torch.tensor([float(row["curate_weight"]) for row in rows])
            return batch

        self.data_collator = collate
        self.compute_loss_func = self._weighted
        self._weights = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        self._weights = inputs.pop("curate_weight", None)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _weighted(self, outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if labels.dim() > 1:  # a language model's
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="none"
        )
        losses = losses.view(len(labels), -1).sum(dim=1)
        if self._weights is not None:
            losses = losses * self._weights.to(losses.device)
        counted = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / counted
'''
