"""ScaleBiO: the quadratic case with its known optimum, and two models in one loop."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from online_training import language_model, parameters
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import ConfigError, DivergedError
from curate.models.optimiser import Optimiser
from curate.models.settings import Train
from mixers.lisa import Lisa
from mixers.rules import Piece, Seen, Tokens
from mixers.scalebio import ScaleBiO, SourceWeights, lambda_gradient
from mixers.scalebio_rule import ScaleBiORule, example_counts, example_means


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


CENTRES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
TARGET = vector(0.2, 0.5)
BEST = vector(0.3, 0.6, 0.1)
"""Sources of loss |w - c_i|^2 / 2, a target of loss |w - t|^2 / 2: BEST @ CENTRES == TARGET."""
ALL = torch.ones(3, dtype=torch.bool)


def losses(theta: Tensor, centres: Tensor) -> Tensor:
    """(..., m) of |theta - c|^2 / 2."""
    return 0.5 * (theta[..., None, :] - centres).square().sum(-1)


def descend(
    centres: Tensor,
    target: Tensor,
    move: Callable[[Tensor, Tensor], None],
    weights: Callable[[], Tensor],
    *,
    steps: int,
    alpha: float = 10.0,
    noise: Tensor | None = None,
    is_shared: bool = True,
    seed: int = 0,
) -> None:
    """u and w by gradient descent, with steps of .5 / alpha and .5 / (1 + alpha).

    Args:
        centres: (m, d)
        target: (d,)
        move: takes the gradient of lambda and `weights` moves on.
        weights: p.
        steps: how many.
        alpha: the penalty.
        noise: (m, 1) standard deviation of the centres of a step.
        is_shared: whether u and w see the same centres.
        seed: of the noise.
    """
    source = torch.Generator().manual_seed(seed)
    u = w = torch.zeros_like(target)

    def seen() -> Tensor:
        if noise is None:
            return centres
        return centres + noise * torch.randn(centres.shape, generator=source, dtype=torch.float64)

    for _ in range(steps):
        p, of_w = weights(), seen()
        of_u = of_w if is_shared else seen()
        move(p, lambda_gradient(p, losses(w, of_w), losses(u, of_u), alpha=alpha))
        u = u - 0.5 * (u - p @ of_u)
        w = w - 0.5 / (1 + alpha) * ((w - target) + alpha * (w - p @ of_w))


class ByAdam:
    """lambda on its AdamW; also the mean of p over all steps."""

    def __init__(self, lr: float) -> None:
        self.lr, self.state = lr, SourceWeights.uniform(3)
        self.sums, self.num = torch.zeros(3, dtype=torch.float64), 0

    def weights(self) -> Tensor:
        return self.state.weights

    def move(self, _weights: Tensor, gradient: Tensor) -> None:
        self.state = self.state.moved(gradient, ALL, lr=self.lr)
        self.sums, self.num = self.sums + self.state.weights, self.num + 1


def test_the_gradient_at_the_optimum_of_both_models_is_the_true_one_times_a_constant():
    p, alpha = vector(0.5, 0.2, 0.3), 10.0
    u = p @ CENTRES
    w = (TARGET + alpha * u) / (1 + alpha)
    torch.testing.assert_close(u, vector(0.2, -0.1))
    torch.testing.assert_close(w, vector(0.2, -0.0454545454))
    gap = p @ (losses(w, CENTRES) - losses(u, CENTRES))
    value = losses(w, TARGET[None]).sum() + alpha * gap
    assert float(value) == pytest.approx(0.163636, abs=1e-6)
    found = lambda_gradient(p, losses(w, CENTRES), losses(u, CENTRES), alpha=alpha)
    torch.testing.assert_close(found, vector(-0.0272727272, -0.12, 0.1472727272))
    torch.testing.assert_close(found, 10 / 11 * vector(-0.03, -0.132, 0.162))
    # The true one, by differences of the loss of the inner optimum on the target.
    logits = p.log()

    def outer(logits: Tensor) -> Tensor:
        return losses(logits.softmax(0) @ CENTRES, TARGET[None])[0]

    wanted = [
        (outer(logits + step) - outer(logits - step)) / 2e-5
        for step in 1e-5 * torch.eye(3, dtype=torch.float64)
    ]
    torch.testing.assert_close(found * 1.1, torch.stack(wanted), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("alpha", "share"), [(1.0, 0.5), (10.0, 0.909091), (100.0, 0.990099)])
def test_the_gradient_comes_near_the_true_one_as_alpha_grows(alpha: float, share: float):
    p = vector(0.5, 0.2, 0.3)
    u = p @ CENTRES
    w = (TARGET + alpha * u) / (1 + alpha)
    found = lambda_gradient(p, losses(w, CENTRES), losses(u, CENTRES), alpha=alpha)
    torch.testing.assert_close(found, share * vector(-0.03, -0.132, 0.162), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [1.0, 10.0, 100.0])
def test_descent_finds_the_known_weights_for_every_alpha(alpha: float):
    logits = [torch.zeros(3, dtype=torch.float64)]

    def move(_weights: Tensor, gradient: Tensor) -> None:
        logits[0] = logits[0] - gradient

    descend(CENTRES, TARGET, move, lambda: logits[0].softmax(0), steps=4000, alpha=alpha)
    torch.testing.assert_close(logits[0].softmax(0), BEST, atol=1e-5, rtol=0)


def test_adamw_on_lambda_finds_them_too():
    rule = ByAdam(1e-2)
    descend(CENTRES, TARGET, rule.move, rule.weights, steps=8000)
    torch.testing.assert_close(rule.weights(), BEST, atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_shared", [True, False])
def test_u_and_w_must_see_the_same_batch(is_shared: bool):
    """Noise of .3 in the centres of each step: shared, it cancels out of the difference."""
    logits, sums = [torch.zeros(3, dtype=torch.float64)], [torch.zeros(3, dtype=torch.float64)]

    def move(weights: Tensor, gradient: Tensor) -> None:
        logits[0] = logits[0] - gradient
        sums[0] = sums[0] + weights / 4000

    descend(
        CENTRES,
        TARGET,
        move,
        lambda: logits[0].softmax(0),
        steps=4000,
        noise=vector(0.3, 0.3, 0.3)[:, None],
        is_shared=is_shared,
    )
    furthest = float((sums[0] - BEST).abs().max())
    assert furthest < 0.02 if is_shared else furthest > 0.2


def test_a_source_like_the_target_is_found_among_noise():
    """Twenty dimensions: like the target, unrelated, and noise."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(5):
        source = torch.Generator().manual_seed(100 + seed)
        target, other, third = torch.randn(3, 20, generator=source, dtype=torch.float64)
        noise = vector(0.05, 0.05, 1.0)[:, None]
        for is_shared in (True, False):
            rule = ByAdam(1e-2)
            descend(
                torch.stack([target, other, third]),
                target,
                rule.move,
                rule.weights,
                steps=3000,
                noise=noise,
                is_shared=is_shared,
                seed=seed,
            )
            found[is_shared].append(float(rule.weights()[0]))
    shared, separate = (torch.tensor(found[key]) for key in (True, False))
    torch.testing.assert_close(shared, torch.full((5,), 0.9865), atol=1.5e-3, rtol=0)
    assert float(separate.max()) < float(shared.min())
    assert float(separate.std()) > 10 * float(shared.std())


def test_the_closed_form_is_the_gradient_through_the_softmax():
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=source, dtype=torch.float64, requires_grad=True)
    of_w, of_u = torch.randn(2, 7, generator=source, dtype=torch.float64)
    p = logits.softmax(0)
    (wanted,) = torch.autograd.grad(25.0 * (p @ of_w - p @ of_u), logits)
    found = lambda_gradient(p.detach(), of_w, of_u, alpha=25.0)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    assert abs(float(found.sum())) < 1e-12


def test_lambda_moves_as_by_torchs_adamw_without_decay():
    source = torch.Generator().manual_seed(1)
    logits = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    theirs = torch.optim.AdamW([logits], lr=0.03, weight_decay=0.0)
    state, every = SourceWeights.uniform(4), torch.ones(4, dtype=torch.bool)
    for gradient in torch.randn(50, 4, generator=source, dtype=torch.float64):
        logits.grad = gradient.clone()
        theirs.step()
        state = state.moved(gradient, every, lr=0.03)
    torch.testing.assert_close(state.logits, logits.detach(), atol=1e-12, rtol=0)


def test_an_absent_source_keeps_its_lambda_and_gives_no_signal():
    p, alpha = vector(0.5, 0.2, 0.3), 10.0
    of_w, of_u = vector(1.0, torch.nan, 2.0), vector(1.5, torch.nan, 2.1)
    found = lambda_gradient(p, of_w, of_u, alpha=alpha)
    mean = (0.5 * -0.5 + 0.3 * -0.1) / 0.8
    wanted = alpha * vector(0.5 * (-0.5 - mean), 0.0, 0.3 * (-0.1 - mean))
    torch.testing.assert_close(found, wanted)
    present = torch.tensor([True, False, True])
    state = SourceWeights.uniform(3).moved(vector(1.0, 2.0, 3.0), ALL, lr=0.1)
    after = state.moved(found, present, lr=0.1)
    for name in ("logits", "first", "second", "steps"):
        before, now = getattr(state, name), getattr(after, name)
        assert bool(before[1] == now[1])
        assert bool((before != now)[present].all())


# In the loop: a small step of our own in place of the loop's.

STEPS, VOCABULARY = 6, 23
TRAIN = Train(lr=0.02, schedule="cosine", warmup=0.2, weight_decay=0.1, clip_norm=0.05)


def piece(number: int, domains: Sequence[int], *, seed: int = 0) -> Piece:
    """Sequences of 3 to 8 tokens of which the first one or two do not count."""
    source = torch.Generator().manual_seed(1000 * seed + number)
    ids = torch.randint(VOCABULARY, (len(domains), 8), generator=source)
    targets = ids[:, 1:].clone()
    for row in range(len(domains)):
        targets[row, : row % 2] = -100
        targets[row, 2 + row % 6 :] = -100
    batch = {"input_ids": ids, "targets": targets}
    return Piece(batch, torch.tensor(domains), (targets != -100).sum(1), None, number)


def part(given: Piece, rows: slice) -> Piece:
    batch = {key: value[rows] for key, value in given.batch.items()}
    return Piece(batch, given.domains[rows], given.counts[rows], None, given.seed)


@dataclass
class Fake:
    """A step of one process."""

    number: int
    lr: float
    optimiser: Optimiser
    pieces: Sequence[Piece]
    on_target: Sequence[Piece]
    others: Sequence[Piece] = ()
    total_steps: int = STEPS
    num_domains: int = 3
    num_ranks: int = 1
    asked: list[Any] = field(default_factory=list[Any])

    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.optimiser.model

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return self.optimiser.trained

    def tokens(self, piece: Piece, model: nn.Module | None = None) -> Tokens:
        torch.manual_seed(piece.seed)
        used: Any = model or self.model
        assert used.training
        logits = used(input_ids=piece.batch["input_ids"]).logits[:, :-1]
        rows, columns = (piece.batch["targets"] != -100).nonzero(as_tuple=True)
        chosen = piece.batch["targets"][rows, columns]
        losses = functional.cross_entropy(logits[rows, columns], chosen, reduction="none")
        return Tokens(losses, rows, piece.domains[rows])

    def second_moments(self) -> Sequence[Tensor] | None:
        return None

    def backward(self, loss: Tensor) -> None:
        self.optimiser.backward(loss)

    def total(self, values: Tensor) -> Tensor:
        return values

    def more(self, purpose: str, each: int | Tensor) -> Sequence[Piece]:
        self.asked.append((purpose, torch.as_tensor(each).tolist()))
        return self.others

    def target(self, purpose: str, count: int) -> Sequence[Piece]:
        self.asked.append((purpose, count))
        return self.on_target


def optimiser(train: Train = TRAIN, model: nn.Module | None = None, **fields: Any) -> Optimiser:
    return Optimiser(
        model or language_model(**fields),
        train,
        seed=3,
        total_steps=STEPS,
        device=torch.device("cpu"),
    )


def started(settings: ScaleBiO, given: Optimiser) -> ScaleBiORule:
    rule = ScaleBiORule(settings, 3)
    rule.start(given)
    return rule


def steps(
    rule: ScaleBiORule,
    given: Optimiser,
    numbers: Sequence[int] = range(1, STEPS + 1),
    *,
    cut: Sequence[slice] = (slice(None),),
    on_target: Callable[[int], Piece] = lambda number: piece(number, [0, 0, 0], seed=7),
    domains: Sequence[int] = (0, 0, 1, 1, 2, 2, 2),
    fresh: bool = True,
) -> list[Seen]:
    found: list[Seen] = []
    for number in numbers:
        whole = piece(number if fresh else 1, domains)
        pieces = [part(whole, rows) for rows in cut]
        lr = given.begin()
        found.append(rule.step(Fake(number, lr, given, pieces, [on_target(number)])))
        given.finish()
    return found


def second(rule: ScaleBiORule) -> Tensor:
    """All weights of u."""
    state = rule.state()
    return torch.cat([v.flatten() for k, v in state.items() if k.startswith("u.weight.")])


def trained(given: Optimiser) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in given.trained])


QUICK = ScaleBiO(lr=0.6, alpha=4.0)


def test_losses_are_means_over_the_examples_of_the_means_over_their_tokens():
    given = piece(1, [0, 2, 0, 2])
    counts = given.counts.tolist()
    tokens = torch.arange(1.0, sum(counts) + 1)
    owner = torch.repeat_interleave(torch.arange(4), given.counts)
    found = example_means(Tokens(tokens, owner, given.domains[owner]), given)
    wanted = [float(own.mean()) for own in tokens.split(counts)]
    assert found.tolist() == pytest.approx(wanted)
    assert len(set(counts)) > 1
    empty = given._replace(counts=torch.tensor([2, 0, 3, 1]))
    assert example_counts([given, empty], 3).tolist() == [4.0, 0.0, 3.0]


@pytest.mark.parametrize("alpha", [1.0, 10.0])
def test_without_a_learning_rate_u_is_plain_training_at_uniform_weights(alpha: float):
    """And dropout is that of the plain training."""
    given = optimiser(attention_dropout=0.3)
    rule = started(ScaleBiO(lr=0.0, alpha=alpha), given)
    steps(rule, given)
    plain = optimiser(attention_dropout=0.3)
    for number in range(1, STEPS + 1):
        whole = piece(number, (0, 0, 1, 1, 2, 2, 2))
        plain.begin()
        tokens = Fake(number, 0.0, plain, [whole], []).tokens(whole)
        means = torch.stack(
            [own.mean() for own in tokens.losses.split(torch.bincount(tokens.owner).tolist())]
        )
        parts = [means[:2].mean(), means[2:4].mean(), means[4:].mean()]
        plain.backward(sum(parts, torch.zeros(())) / 3)
        plain.finish()
    torch.testing.assert_close(second(rule), trained(plain), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(rule.mixture(), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_the_proxy_goes_down_the_loss_of_target_and_sources():
    """In one step: its gradient is that of (L1 + alpha L2) / alpha, by autograd, of losses in one
    expression."""
    given = optimiser()
    rule = started(QUICK, given)
    whole, on_target = piece(1, (0, 0, 1, 1, 2, 2, 2)), piece(9, [0, 0])
    step = Fake(1, given.begin(), given, [whole], [on_target])
    seen = rule.step(step)
    found = [parameter.grad for parameter in given.trained]

    def means(one: Piece) -> Tensor:
        tokens = step.tokens(one)
        return torch.stack(
            [own.mean() for own in tokens.losses.split(torch.bincount(tokens.owner).tolist())]
        )

    own = means(whole)
    sources = torch.stack([own[:2].mean(), own[2:4].mean(), own[4:].mean()])
    loss = (means(on_target).mean() + 4 * (sources @ torch.full((3,), 1 / 3))) / 4
    wanted = torch.autograd.grad(loss, given.trained)
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen.values["loss_w"].float(), sources)
    torch.testing.assert_close(seen.values["target_loss"][0].float(), means(on_target).mean())
    assert seen.counts.tolist() == [sum(whole.counts[own].tolist()) for own in ROWS]
    assert step.asked == [("scalebio", 8)]


ROWS = (slice(0, 2), slice(2, 4), slice(4, 7))


def test_before_the_first_update_both_models_say_the_same_and_lambda_stays():
    given = optimiser(attention_dropout=0.3)
    rule = started(QUICK, given)
    first, later, *_ = steps(rule, given, [1, 2, 3])
    assert first.values["difference"].tolist() == [0.0] * 3
    assert float(later.values["difference"].abs().max()) > 0
    torch.testing.assert_close(later.weights, first.weights)  # of step 2: lambda has not moved yet


def test_lambda_follows_the_differences_seen_on_the_models_schedule():
    given = optimiser()
    rule = started(QUICK, given)
    seen = steps(rule, given)
    state = SourceWeights.uniform(3)
    rates = [0.5, 1.0]  # warm-up of two steps, then half a cosine without its end
    rates += [0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * k / 5)))) for k in range(1, 5)]
    weights: list[Tensor] = []
    for each, rate in zip(seen, rates, strict=True):
        torch.testing.assert_close(each.weights, state.weights, atol=1e-6, rtol=0)
        difference = each.values["difference"]
        p = state.weights
        jacobian = torch.diag(p) - p[:, None] * p
        state = state.moved(4.0 * jacobian @ difference, ALL, lr=0.6 * rate)
        weights.append(state.weights)
    assert float((state.weights - 1 / 3).abs().max()) > 0.05
    half = torch.stack(weights[3:]).mean(0)
    torch.testing.assert_close(rule.mixture(), half, atol=1e-6, rtol=0)
    rule.settings = ScaleBiO(lr=0.6, alpha=4.0, mixture="last")
    torch.testing.assert_close(rule.mixture(), weights[-1], atol=1e-6, rtol=0)


def test_without_a_loss_on_the_target_both_models_stay_one():
    given = optimiser(attention_dropout=0.3)
    rule = started(QUICK, given)

    def nothing(number: int) -> Piece:
        empty = piece(number, [0])
        targets = torch.full_like(empty.batch["targets"], -100)
        batch = {**empty.batch, "targets": targets}
        return Piece(batch, empty.domains, (targets != -100).sum(1), None, number)

    seen = steps(rule, given, on_target=nothing)
    assert bool((second(rule) == trained(given)).all())
    assert all(each.values["difference"].tolist() == [0.0] * 3 for each in seen)
    torch.testing.assert_close(rule.mixture(), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_the_source_that_is_the_target_gains_most():
    given = optimiser(Train(lr=0.02, clip_norm=1.0))
    rule = started(QUICK, given)

    def the_same(_number: int) -> Piece:
        own = part(piece(1, (0, 0, 1, 1, 2, 2, 2)), ROWS[1])
        return own._replace(domains=torch.zeros(2, dtype=torch.int64))

    steps(rule, given, on_target=the_same, fresh=False)
    assert int(rule.mixture().argmax()) == 1


def test_pieces_of_a_step_add_up():
    runs: list[Tensor] = []
    for cut in ([slice(None)], [slice(0, 3), slice(3, 4), slice(4, 7)]):
        given = optimiser()
        rule = started(QUICK, given)
        steps(rule, given, cut=cut)
        runs.append(torch.cat([rule.mixture().float(), second(rule), trained(given)]))
    torch.testing.assert_close(runs[0], runs[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("lisa", [None, Lisa(blocks=1, every=2)])
def test_a_resumed_run_goes_on_to_the_same_bytes(lisa: Lisa | None):
    settings = ScaleBiO(lr=0.6, alpha=4.0, lisa=lisa)
    given = optimiser(num_hidden_layers=3)
    rule = started(settings, given)
    steps(rule, given)
    first = optimiser(num_hidden_layers=3)
    half = started(settings, first)
    steps(half, first, range(1, 4))
    saved = {key: value.clone() for key, value in half.state().items()}
    tensors = {key: value.clone() for key, value in first.state().items()}
    again = optimiser(num_hidden_layers=3, seed=8)
    other = started(settings, again)
    again.load(tensors, first.facts())
    other.load(saved)
    steps(other, again, range(4, STEPS + 1))
    assert bool((trained(again) == trained(given)).all())
    for key, value in rule.state().items():
        assert bool((other.state()[key] == value).all()), key


def test_an_absent_source_is_left_out_of_a_step():
    given = optimiser()
    rule = started(QUICK, given)
    seen = steps(rule, given, [1, 2, 3], domains=(0, 0, 2))
    assert seen[-1].values["difference"].isnan().tolist() == [False, True, False]
    assert float(rule.state()["lambda.logits"][1]) == 0.0
    assert float(rule.state()["lambda.logits"].abs().max()) > 0


def test_u_can_learn_from_batches_of_its_own():
    given = optimiser()
    rule = started(ScaleBiO(lr=0.6, separate_batches=True), given)
    whole = piece(1, (0, 0, 1, 1, 2, 2))
    others = [piece(50 + domain, [domain, domain]) for domain in range(3)]
    step = Fake(1, given.begin(), given, [whole], [piece(9, [0])], others)
    seen = rule.step(step)
    assert ("scalebio", [2, 2, 2]) in step.asked
    with torch.no_grad():
        wanted = torch.stack([example_means(step.tokens(p), p).mean() for p in others])
    # u has moved since, by the clipped step of one warm-up: its loss was that of the shared start.
    fresh = Fake(1, 0.0, optimiser(), [], [])
    with torch.no_grad():
        wanted = torch.stack([example_means(fresh.tokens(p), p).mean() for p in others])
    torch.testing.assert_close(seen.values["loss_u"].float(), wanted)
    assert float(seen.values["difference"].abs().min()) > 0


def test_an_adapter_is_copied_and_the_model_under_it_is_not():
    peft = pytest.importorskip("peft")
    model = language_model()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.inject_adapter_in_model(config, model)
    given = optimiser(model=model)
    rule = started(QUICK, given)
    u = rule.second.model
    for (name, mine), own in zip(model.named_parameters(), u.parameters(), strict=True):
        assert (mine is own) == ("lora" not in name)
    before = trained(given)
    steps(rule, given)
    assert not torch.equal(second(rule), before)
    assert not torch.equal(second(rule), trained(given))
    assert not any("q_proj.base_layer" in key and "weight." in key for key in rule.state())


class Point(nn.Module):
    """Its one matrix is the point."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(2, 1))


@dataclass
class Quadratic(Fake):
    """Every sequence is one token, of loss |place - c|^2 / 2."""

    def tokens(self, piece: Piece, model: nn.Module | None = None) -> Tokens:
        used: Any = model or self.model
        found = 0.5 * (used.place[:, 0] - piece.batch["centres"]).square().sum(1)
        return Tokens(found, torch.arange(len(found)), piece.domains)


def test_the_rule_finds_the_known_weights():
    """Both models and lambda on AdamW, on one schedule."""
    total, model = 1500, Point()
    train = Train(lr=0.05, warmup=0.05, schedule="cosine", weight_decay=0.0)
    device = torch.device("cpu")
    given = Optimiser(model, train, seed=0, total_steps=total, device=device)
    rule = ScaleBiORule(ScaleBiO(lr=0.02), 3)
    rule.start(given)
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    batch = Piece({"centres": CENTRES.float()}, torch.arange(3), one.expand(3))
    goal = Piece({"centres": TARGET[None].float()}, zero, one)
    for number in range(1, total + 1):
        lr = given.begin()
        rule.step(Quadratic(number, lr, given, [batch], [goal], total_steps=total))
        given.finish()
    torch.testing.assert_close(rule.mixture(), BEST, atol=0.01, rtol=0)
    torch.testing.assert_close(model.place[:, 0].detach(), TARGET.float(), atol=0.01, rtol=0)


def test_too_low_a_rate_of_lambda_is_named(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        started(ScaleBiO(lr=0.01), optimiser())
    assert "below 3 / steps = 0.5" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        started(ScaleBiO(lr=0.5), optimiser())
    assert not caplog.text


def test_a_loss_that_is_not_finite_stops_the_run():
    model: Any = language_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = torch.nan
    given = optimiser(model=model)
    rule = started(QUICK, given)
    with pytest.raises(DivergedError, match="step 1"):
        steps(rule, given, [1])


@pytest.mark.parametrize("fields", [{"alpha": 0.0}, {"lr": -1.0}, {"target_sequences": 0}])
def test_settings_outside_their_range_are_refused(fields: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ScaleBiO(**fields)


def test_the_models_start_alike_and_apart():
    given = optimiser()
    rule = started(QUICK, given)
    assert bool((second(rule) == parameters(given.model)).all())
    assert all(a is not b for a, b in zip(given.trained, rule.second.trained, strict=True))
