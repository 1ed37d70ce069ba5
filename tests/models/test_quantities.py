import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from curate.models.quantities import error_norms, summarise, terms
from curate.models.tasks import Flat

LOGITS = torch.tensor([[2.0, 1, 0], [0, 0, 0], [0, 5, 0]])
TARGETS = torch.tensor([0, 2, 0])


def random_logits(rows: int = 40, classes: int = 9, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def random_targets(rows: int = 40, classes: int = 9) -> torch.Tensor:
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(4))


def close(found: torch.Tensor, wanted: list[float], *, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(wanted).double(), atol=atol, rtol=0)


def test_three_rows_give_the_published_norms_and_losses():
    found = terms(LOGITS, TARGETS)
    close(found.error, [0.424336, 0.816497, 1.400134])
    close(found.loss, [0.407606, 1.098612, 5.013386])


@pytest.mark.parametrize(("classes", "norm"), [(2, 0.707107), (10, 0.948683), (50257, 0.999990)])
def test_a_uniform_prediction_has_the_norm_of_its_number_of_classes(classes: int, norm: float):
    close(error_norms(torch.zeros(1, classes), torch.tensor([0])), [norm])
    assert math.isclose(norm, math.sqrt(1 - 1 / classes), abs_tol=1e-6)


def test_two_classes_give_root_two_times_the_miss():
    probability = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    logits = torch.stack([probability.log(), (1 - probability).log()], dim=1)
    close(error_norms(logits, torch.zeros(3, dtype=torch.long)), [0.141421, 0.707107, 1.272792])


def test_the_mean_over_seeds_is_the_mean_of_norms_not_the_norm_of_the_mean():
    seeds = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3]], dtype=torch.float64)
    norms = error_norms(seeds.log(), torch.tensor([0, 0]))
    close(norms.mean()[None], [0.617199])
    close(error_norms(seeds.mean(0, keepdim=True).log(), torch.tensor([0])), [0.616441])


def test_a_sequence_has_the_mean_and_the_norm_of_its_counted_tokens():
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 3]])
    targets = torch.tensor([0, 1, 2])
    close(error_norms(logits, targets), [0.333438, 0.605794, 1.294596])
    found = summarise(Flat(logits, targets, torch.zeros(3, dtype=torch.long)), 1)
    close(found["error_norms"], [0.744609])
    close(found["error_frob"], [1.467701])


def test_the_last_layer_gradient_is_the_error_norm_times_the_length_of_the_features():
    features = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    probabilities = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    head = nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(probabilities.log())
    functional.cross_entropy(head(features)[None], torch.tensor([1])).backward()
    assert head.weight.grad is not None
    assert head.bias.grad is not None
    norm = error_norms(head(features)[None].detach(), torch.tensor([1]))
    close(norm, [1.067708])
    close(head.weight.grad.norm()[None], [3.203123])
    both = torch.cat([head.weight.grad.flatten(), head.bias.grad])
    close(both.norm()[None], [3.376389])


def test_a_confident_prediction_in_float32_keeps_its_tiny_error():
    """`|p|^2 - 2 p_y + 1` in float32 gives 0 here."""
    logits = torch.zeros(1, 50257)
    logits[0, 0] = 25
    found = error_norms(logits, torch.tensor([0]))
    assert found.dtype == torch.float32
    assert math.isclose(found.item(), 6.97960e-7, rel_tol=1e-5)


def test_errors_equal_the_gradient_of_cross_entropy_with_respect_to_the_logits():
    """At the logits that gradient is p - y."""
    logits = random_logits().requires_grad_()
    targets = random_targets()
    functional.cross_entropy(logits, targets, reduction="sum").backward()
    assert logits.grad is not None
    torch.testing.assert_close(error_norms(logits.detach(), targets), logits.grad.norm(dim=-1))


def test_loss_entropy_and_margin_equal_their_textbook_forms():
    logits, targets = random_logits(), random_targets()
    found = terms(logits, targets)
    torch.testing.assert_close(
        found.loss, functional.cross_entropy(logits, targets, reduction="none")
    )
    torch.testing.assert_close(
        found.entropy, torch.distributions.Categorical(logits=logits).entropy()
    )
    for row, target in enumerate(targets.tolist()):
        others = [float(z) for k, z in enumerate(logits[row]) if k != target]
        assert math.isclose(found.margin[row], float(logits[row, target]) - max(others))
        assert bool(found.correct[row]) == (int(logits[row].argmax()) == target)


def test_a_tie_for_the_largest_logit_counts_as_wrong():
    assert terms(torch.zeros(1, 4), torch.tensor([0])).correct.item() == 0


@pytest.mark.parametrize("certainty", [40.0, 90.0, 300.0])
def test_extreme_logits_give_finite_values_of_the_right_size(certainty: float):
    logits = torch.zeros(2, 5)
    logits[:, 0] = certainty
    right, wrong = (terms(logits[i : i + 1], torch.tensor([i])) for i in (0, 1))
    assert right.loss.item() == pytest.approx(4 * math.exp(-certainty), rel=1e-5, abs=1e-45)
    assert wrong.loss.item() == pytest.approx(certainty)
    assert wrong.error.item() == pytest.approx(math.sqrt(2))
    assert all(torch.isfinite(column).all() for column in (*right, *wrong))


@given(st.floats(-50, 50), st.integers(0, 39))
def test_a_constant_added_to_all_logits_changes_nothing(shift: float, row: int):
    logits, targets = random_logits()[row : row + 1], random_targets()[row : row + 1]
    for plain, shifted in zip(terms(logits, targets), terms(logits + shift, targets), strict=True):
        torch.testing.assert_close(plain, shifted, atol=1e-9, rtol=1e-9)


@given(st.permutations(range(9)))
def test_renaming_the_classes_changes_nothing(order: list[int]):
    logits, targets = random_logits(), random_targets()
    place = torch.tensor(order)
    renamed = torch.argsort(place)[targets]
    for plain, moved in zip(terms(logits, targets), terms(logits[:, place], renamed), strict=True):
        torch.testing.assert_close(plain, moved)


def test_norms_lie_between_0_and_root_two_and_entropy_below_the_log_of_the_classes():
    for scale in (0.01, 1.0, 30.0):
        found = terms(random_logits(scale=scale), random_targets())
        assert 0 <= found.error.min() <= found.error.max() <= math.sqrt(2) + 1e-12
        assert 0 <= found.entropy.min() <= found.entropy.max() <= math.log(9) + 1e-12


def test_half_precision_is_raised_before_any_softmax():
    logits, targets = random_logits().to(torch.bfloat16), random_targets()
    found = terms(logits, targets)
    for half, full in zip(found, terms(logits.double(), targets), strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), full, rtol=1e-5, atol=1e-6)


def test_pieces_of_a_large_table_give_what_the_whole_gives():
    rows, classes = 300, 4001  # more than one piece
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator)
    targets = torch.randint(classes, (rows,), generator=generator)
    whole = terms(logits, targets)
    one_by_one = [terms(logits[i : i + 1], targets[i : i + 1]) for i in range(0, rows, 37)]
    for column, parts in zip(whole, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(column[::37], torch.cat(parts), rtol=1e-6, atol=1e-6)


def test_an_example_without_a_counted_position_has_no_value():
    flat = Flat(LOGITS, TARGETS, torch.tensor([0, 0, 2]))
    found = summarise(flat, 3)
    for values in found.values():
        assert np.isnan(values.numpy()).tolist() == [False, True, False]
