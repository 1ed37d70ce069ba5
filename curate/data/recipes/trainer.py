"""transformers' `Trainer` and TRL's `SFTTrainer`."""

from curate.data.recipes.blend import Blend, chosen_columns, header
from curate.data.recipes.parts import FIND, LOSS, PARQUET_FILES, SAMPLER

_TRAINER_USE = """Use: `from trainer import load, {made}`; `rows = load(phase=0,
prepare=tokenize)`, where tokenize makes model inputs of a row, then {call}. Needs transformers
and `datasets`, not curate; where curate is installed, `mixers.online.apply_weights` does the
same and more."""

_TRL_USE = """Use: `from trl_sft import load, {made}`; then {call}. Needs trl and `datasets`, not
curate; where curate is installed, `mixers.online.apply_weights` does the same and more."""

_UNIT = """Unit: rows. {how}"""

_DRAWN = """A domain is drawn with row_probability, its share of tokens divided by the mean
tokens of a row; an epoch has epoch_rows draws."""
_READ = """An epoch is every row once, in random order: that is the mixture."""

_HONOURED = {
    "column": """Weights: honoured exactly. Trainer drops the column, or lets the model swallow
it; here it reaches the loss.""",
    "copies": """Weights: honoured by the copies; the plain trainer needs nothing else.""",
    "domains": """Weights: honoured by the sampler (domains) and in the loss (examples within
them). Approximated: domains are drawn at random, so their numbers of rows vary as sqrt(n).""",
}

_LOAD = '''

def load(phase=0, prepare=None):
    """All rows of a phase, domain after domain; do not filter or reorder them."""
    paths = [file for d in domains(phase).values() for file in files(d["folder"])]
    rows = load_dataset("parquet", data_files={{"train": paths}}, split="train"{columns})
    if prepare is not None:
        others = [name for name in rows.column_names if name != "curate_weight"]
        rows = rows.map(prepare, remove_columns=others)
    return rows
'''

_SAMPLED = """
    phase = 0

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if len(rows) != sum(d["rows"] for d in domains(self.phase).values()):
            raise ValueError("train_dataset has other rows than the phase: set trainer.phase")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return MixtureSampler(self.phase, seed=seed)
"""


def transformers(blend: Blend) -> str:
    """`trainer.py`."""
    made = "Trainer" if blend.way == "copies" else "WeightedTrainer"
    call = (
        "`Trainer(model, args, train_dataset=rows, ...)` as ever"
        if blend.way == "copies"
        else "`WeightedTrainer(model, TrainingArguments(..., remove_unused_columns=False),"
        " train_dataset=rows, ...)`"
    )
    use = _TRAINER_USE.format(made=made, call=call)
    title = "The mixture for the Trainer of transformers."
    return _text(blend, title, use, base="Trainer", package="transformers", made=made)


def trl(blend: Blend) -> str:
    """`trl_sft.py`."""
    made = "SFTTrainer" if blend.way == "copies" else "WeightedSFTTrainer"
    call = (
        "`SFTTrainer(model, args, train_dataset=load())` as ever"
        if blend.way == "copies"
        else "`WeightedSFTTrainer(model, SFTConfig(..., remove_unused_columns=False),"
        " train_dataset=load(phase=0))`"
    )
    use = _TRL_USE.format(made=made, call=call)
    title = "The mixture for TRL's SFTTrainer."
    return _text(blend, title, use, base="SFTTrainer", package="trl", made=made)


def _text(blend: Blend, title: str, use: str, *, base: str, package: str, made: str) -> str:
    unit = _UNIT.format(how=_DRAWN if blend.way == "domains" else _READ)
    text = header(blend, title, use, unit, _HONOURED[blend.way])
    standard, rest = FIND.split("\n\n", 1)
    imports = [f"from datasets import load_dataset\nfrom {package} import {base}"]
    if blend.way != "copies":
        imports.insert(0, "import torch")
    if blend.way == "domains":
        imports.insert(0, "import numpy as np")
    text += f"{standard}\n\n" + "\n".join(imports) + f"\n\n{rest}"
    text += PARQUET_FILES.format(room="data") + _LOAD.format(columns=chosen_columns(blend))
    if blend.way == "domains":
        text += SAMPLER
    if blend.way != "copies":
        what = f"{base} with the weights of the shards" + (
            ", and their mixture." if blend.way == "domains" else "."
        )
        text += f'{LOSS}\n\nclass {made}(WeightedLoss, {base}):\n    """{what}"""\n'
    if blend.way == "domains":
        text += _SAMPLED
    return text
