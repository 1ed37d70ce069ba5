"""One rule for each kind of layer: from its input and output gradient to its parameters' forms."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from curate.models.gradients.forms import Form
from curate.models.gradients.layout import Layout
from curate.models.gradients.rules import convolution, embedding, experts, linear, local, norm

Rule = Callable[[nn.Module, tuple[Tensor, ...], Tensor, Layout], Iterator[tuple[str, Form]]]
"""(module, what its call was given, gradient of its output, layout) -> own parameter name, form."""

_RULES = (linear, embedding, norm, convolution, experts, local)


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module's own parameters; None where there is none."""
    return next((rules.forms for rules in _RULES if rules.applies(module)), None)
