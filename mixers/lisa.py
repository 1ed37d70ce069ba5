"""LISA: in each period only a few of a transformer's blocks learn, drawn at random.

    blocks of step t = `blocks` of all, drawn anew every `every` steps

Embeddings, the last norm and the head always learn. What does not learn gets no gradient, no weight
decay, and has no moments: these are where the memory goes.

Source: Pan, Liu, Diao, Pi, Zhang, Han and Zhang, "LISA: Layerwise Importance Sampling for
Memory-Efficient Large Language Model Fine-Tuning", NeurIPS 2024, arXiv:2403.17919.
Departures: a block that is drawn again starts with fresh moments, as its old ones would be of
weights and losses long gone.
Cost: less than without: the frozen blocks' weight gradients and moments are never made.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from curate.config import STRICT
from curate.errors import ConfigError
from curate.models.epochs import random_permutation, random_seed
from curate.models.optimiser import Optimiser


@dataclass(frozen=True, slots=True, kw_only=True)
class Lisa:
    """How many blocks learn, and for how long."""

    __pydantic_config__: ClassVar = STRICT

    blocks: int = 2
    """Blocks that learn at a time."""
    every: int = 20
    """Steps until others are drawn."""

    def __post_init__(self) -> None:
        for name in ("blocks", "every"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"lisa.{name} is {getattr(self, name)}, not above 0",
                    fix=f"remove {name} to use its default, or lisa to train all blocks",
                )

    def drawn(self, step: int, *, num_blocks: int, seed: int) -> tuple[int, ...]:
        """Which blocks learn in a step, ascending.

        Args:
            step: from 1.
            num_blocks: of the model.
            seed: of the run; models with the same seed have the same draw.

        Raises:
            ConfigError: the model has fewer blocks than are to learn.
        """
        if self.blocks > num_blocks:
            raise ConfigError(
                f"lisa.blocks is {self.blocks}, but the model has {num_blocks} blocks",
                fix="lower it, or remove lisa to train all of them",
            )
        key = random_seed(seed, "lisa", (step - 1) // self.every)
        order = random_permutation(num_blocks, key)
        return tuple(sorted(int(block) for block in order[: self.blocks]))


def find_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The model's blocks: its longest list of equal modules that learn, inside of no other such.

    Raises:
        ConfigError: it has none.
    """
    found: list[nn.ModuleList] = []
    inside = set[nn.Module]()
    for module in model.modules():  # outer modules come before what is inside
        if module not in inside and isinstance(module, nn.ModuleList) and _equal(module):
            found.append(module)
            inside.update(module.modules())
    if not found:
        raise ConfigError(
            f"lisa draws blocks, but {type(model).__name__} is not made of equal blocks that learn",
            fix="remove lisa",
        )
    return list(max(found, key=len))


@contextmanager
def learning(blocks: Sequence[nn.Module], chosen: Sequence[int]) -> Generator[list[nn.Parameter]]:
    """Inside, all blocks but the chosen are frozen; gives the parameters that are."""
    kept = {id(p) for number in chosen for p in blocks[number].parameters()}
    parameters = (parameter for block in blocks for parameter in block.parameters())
    frozen = {id(p): p for p in parameters if p.requires_grad and id(p) not in kept}
    try:
        for parameter in frozen.values():
            parameter.requires_grad_(False)
        yield list(frozen.values())
    finally:
        for parameter in frozen.values():
            parameter.requires_grad_(True)


class Sampled:
    """The blocks of several models that learn together, always the same in all.

    Args:
        settings: how many and how long.
        optimisers: of the models, which are alike; the first one's seed decides.
    """

    def __init__(self, settings: Lisa, optimisers: Sequence[Optimiser]) -> None:
        self._settings, self._optimisers = settings, tuple(optimisers)
        self._blocks = [find_blocks(optimiser.model) for optimiser in optimisers]
        self.drawn(1)  # says now what is wrong with the settings

    def drawn(self, step: int) -> tuple[int, ...]:
        """The blocks of a step, from 1."""
        size, seed = len(self._blocks[0]), self._optimisers[0].seed
        return self._settings.drawn(step, num_blocks=size, seed=seed)

    @contextmanager
    def learning(self, step: int) -> Generator[None]:
        """Inside, gradients reach the step's blocks only; the others lose their moments."""
        chosen = self.drawn(step)
        with ExitStack() as stack:
            for optimiser, blocks in zip(self._optimisers, self._blocks, strict=True):
                optimiser.forget(stack.enter_context(learning(blocks, chosen)))
            yield


def _equal(modules: nn.ModuleList) -> bool:
    """Whether all are of one kind and learn."""
    return len({type(module) for module in modules}) == 1 and all(
        any(parameter.requires_grad for parameter in module.parameters()) for module in modules
    )
