"""Which parameters a gradient norm is over: all, the last layer, or those of a name; and by layer.

A quantity of a gradient pass is named by what it is over:

    grad_sq_norm                all parameters that can be trained
    grad_sq_norm[head]          the last layer
    grad_sq_norm[REGEX]         parameters in whose name the expression is found
    grad_sq_norm/layer_3        one group of layers; of a selection: grad_sq_norm[REGEX]/layer_3
    grad_sq_norm/*              what a scorer asks for to have them all
    sketched_grad_sq_norm       from a sketch, see `sketch.py`; likewise of a selection or group

A name never depends on the order in which scorers ask. Groups come from the parameters' names: the
number in the list of blocks, `embeddings` before the first of them, `final` behind it, `head`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from curate.errors import ConfigError

SQUARES = "grad_sq_norm"
ALL = "all"
HEAD = "head"

_NAME = re.compile(
    rf"(?P<sketched>sketched_)?{SQUARES}(?:\[(?P<selection>.+)\])?(?:/(?P<group>\*|\w+))?",
    re.DOTALL,
)


class Squared(NamedTuple):
    """What a quantity is over."""

    selection: str
    """`all`, `head`, or a regular expression."""
    group: str | None = None
    """One group of layers; `*` all of them, each by itself."""
    sketched: bool = False
    """Whether an estimate will do."""

    @property
    def name(self) -> str:
        chosen = "" if self.selection == ALL else f"[{self.selection}]"
        first = f"sketched_{SQUARES}" if self.sketched else SQUARES
        return f"{first}{chosen}" + ("" if self.group is None else f"/{self.group}")


def parse_name(name: str) -> Squared | None:
    """What a quantity is over; None where it is no squared gradient norm."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return Squared(found["selection"] or ALL, found["group"], found["sketched"] is not None)


def matching(needs: Collection[str], held: Collection[str]) -> list[str]:
    """The names that `needs` asks for, a family of groups written out with those in `held`."""
    parsed = [one for need in needs if (one := parse_name(need)) is not None]
    families = {one._replace(group=None) for one in parsed if one.group == "*"}

    def is_member(name: str) -> bool:
        one = parse_name(name)
        if one is None or one.group is None:
            return False
        return one._replace(group=None) in families

    single = [one for one in needs if (of := parse_name(one)) is None or of.group != "*"]
    return sorted({*single, *filter(is_member, held)})


def last_layer(model: nn.Module) -> nn.Module:
    """The layer that gives the logits: the output embeddings, or else the last Linear.

    Raises:
        ConfigError: there is no Linear layer.
    """
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if isinstance(head, nn.Linear):
        return head
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer that could be its last",
            fix="name the parameters by a regular expression in place of `head`",
        )
    return layers[-1]


def selected(selection: str, names: Sequence[str], head: Collection[str]) -> list[str]:
    """The parameters of a selection, in their order.

    Args:
        selection: `all`, `head`, or a regular expression.
        names: parameters that can be trained.
        head: those of the last layer.

    Raises:
        ConfigError: there is none.
    """
    if selection == ALL:
        return list(names)
    if selection == HEAD:
        found = [name for name in names if name in head]
        if not found:
            raise ConfigError("the last layer is frozen", fix="measure other parameters")
        return found
    pattern = re.compile(selection)
    found = [name for name in names if pattern.search(name)]
    if not found:
        shown = ", ".join([*names[:3], "...", *names[-2:]] if len(names) > 5 else names)
        raise ConfigError(
            f"no parameter that can be trained has {selection!r} in its name",
            fix=f"the names are {shown}",
        )
    return found


def groups_of(names: Sequence[str], head: Collection[str]) -> dict[str, str]:
    """Parameter -> its group, in the parameters' order.

    A model with several lists of blocks, an encoder and a decoder say, has their names in front.

    Args:
        names: all parameters of the model.
        head: those of the last layer that are not those of another one too.
    """
    paths = {
        name: place for name in names if name not in head and (place := _block(name)) is not None
    }
    lists = {path for path, _ in paths.values()}
    blocks = [position for position, name in enumerate(names) if name in paths]
    found: dict[str, str] = {}
    for position, name in enumerate(names):
        if name in head:
            found[name] = HEAD
        elif name in paths:
            path, number = paths[name]
            found[name] = f"layer_{number}" if len(lists) == 1 else f"{_word(path)}_{number}"
        else:
            found[name] = "final" if blocks and position > blocks[0] else "embeddings"
    return found


def by_group(names: Sequence[str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    """Group -> its parameters among `names`; the head comes last."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(groups[name], []).append(name)
    if HEAD in found:
        found[HEAD] = found.pop(HEAD)
    return found


def _block(name: str) -> tuple[str, int] | None:
    """The list of blocks that a parameter lies in, and the number of its block."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal() and place > 0:
            return ".".join(parts[:place]), int(part)
    return None


def _word(path: str) -> str:
    return re.sub(r"\W", "_", path)
