"""Everything that the page of a run shows, as plain values: gathered in `jobs`, drawn by `page`.

Every text is as it stands in the data: whoever draws it has to escape it. `dataclasses.asdict` of a
document is JSON. Its size is bounded, whatever the size of the data: many domains, labels or
columns are shown by the largest of them and a line for the rest.

Shapes: B bins, G groups, K columns, D domains, S steps.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""Of every `Distribution.quantiles`."""

SECTIONS = (
    "scores",
    "agreement",
    "samples",
    "mixture",
    "shifts",
    "removed",
    "duplicates",
    "leakage",
    "quarantine",
    "weights",
    "stability",
    "comparison",
)
"""Fields of a document that may be None; `Document.missing` then says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A name and what there is to say: one line of a list of facts."""

    name: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How the values of some rows are spread over bins that others share."""

    rows: int
    """With a value."""
    missing: int
    """Without one: null, or not a number."""
    mean: float | None
    std: float | None
    quantiles: list[float]
    """One for each of `QUANTILES`, to the width of a fine bin; empty where no row has a value."""
    counts: list[int]
    """(B,) rows in each bin."""
    below: int = 0
    """Rows below the first edge; the tails of a long distribution lie outside the bins."""
    above: int = 0
    """Rows above the last edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A domain or a label, and how a score is spread in it."""

    name: str
    distribution: Distribution
    kept: int | None = None
    """Of its rows with a value, those that the plan keeps; None before there is a plan."""
    cuts: list[float | None] = field(default_factory=list[float | None])
    """Where the plan cuts this group's order: below the first and above the second nothing is
    taken, null is no cut at that end; empty where the plan does not cut this column so."""
    num_groups: int = 1
    """More than 1: all those that are not shown one by one, together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreColumn:
    """One column of one scorer, over all training examples."""

    scorer: str
    column: str
    name: str
    """As in a plan: `el2n.el2n`; the key of this column in all other places."""
    title: str
    """Short: `el2n`."""
    measures: str
    """One line on unit, range and which end is which; empty where nobody says."""
    edges: list[float]
    """(B + 1,) of the bins, ascending; empty where no row has a value."""
    scale: Literal["linear", "log"]
    everything: Distribution
    kept: Distribution | None
    """Of what the plan keeps; None before there is a plan."""
    by_domain: list[Group]
    """The largest domains, then one for the rest; empty where there is one domain."""
    by_label: list[Group]
    """Likewise; empty without labels."""
    is_planned: bool = False
    """Whether the plan's score is this column."""
    cuts: list[float | None] = field(default_factory=list[float | None])
    """Where the plan cuts this column, as in `Group.cuts`, if it has the same cut for all rows."""
    doubts: list[str] = field(default_factory=list[str])
    """What speaks against the model that measured it: hardly trained, nothing learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The columns of all scorers, those of the plan first."""

    columns: list[ScoreColumn]
    num_columns: int
    """There are; more than are shown where there are very many."""
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Spearman's rank correlation of every two columns."""

    columns: list[str]
    """(K,) names, as `ScoreColumn.name`."""
    titles: list[str]
    """(K,) short names."""
    matrix: list[list[float | None]]
    """(K, K) in [-1, 1]; null where one of the two is constant or they share too few rows."""
    rows: int
    """That the figures stand on."""
    of_rows: int
    """Training examples there are; more than `rows` where a seeded sample was drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A stretch of a text that a method points at."""

    start: int
    """In characters of `Example.text`."""
    end: int
    kind: str
    """Why: `leakage`, for words that stand in an evaluation example too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One example."""

    source: str
    file: str
    row: int
    domain: str
    label: str | None
    """The class by name, or its number."""
    text: str
    """Its content, cut to some hundreds of characters; words for an image."""
    is_cut: bool
    scores: dict[str, float | None]
    """Column (`ScoreColumn.name`) -> value; null where it could not be scored."""
    reason: str | None
    """What the plan says of it; None before there is a plan."""
    weight: float | None = None
    """For the loss; None before there is a plan."""
    copies: int | None = None
    num_tokens: int | None = None
    likely_label: str | None = None
    """The class that another model finds likelier than the given one."""
    marks: list[Mark] = field(default_factory=list[Mark])
    """Not overlapping, in order."""
    picture: str | None = None
    """A data URI of a reduced image (PNG or JPEG), for image tasks."""
    facts: list[Fact] = field(default_factory=list[Fact])
    """What else methods say of it: which evaluation example stands in it, which one it repeats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """Some examples, and why these."""

    name: str
    """Of the column (`ScoreColumn.name`) for the ends of a score, else `random`."""
    which: Literal["highest", "lowest", "random"]
    title: str
    """In words: `highest el2n`."""
    examples: list[int]
    """Places in `Samples.examples`, the most extreme first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Examples to read; each stands once, however many lists it is in."""

    examples: list[Example]
    picks: list[Pick]
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureDomain:
    """One domain of a mixture; shares are of tokens (of examples, for tables)."""

    domain: str
    natural: float
    """Of the pool."""
    asked: float
    """Of the budget, by the mixer."""
    kept: float | None
    """Of what the plan keeps; None before there is a plan."""
    random: float | None
    """Of what random keeps at an equal budget."""
    epochs: float | None
    """How often the kept tokens go through the domain's own."""
    by_phase: list[float]
    """Asked in each phase."""
    why: str = ""
    """One sentence of the mixer."""
    num_domains: int = 1
    """More than 1: the rest together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve: a domain's weight, or its loss, over the steps."""

    name: str
    values: list[float | None]
    """(S,)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixturePath:
    """How the weights moved while a proxy was trained."""

    run: str
    """Which proxy: a mixer may train several."""
    steps: list[int]
    """(S,) at most some hundreds."""
    weights: list[Line]
    """The domains with the largest weights, in the order of `Mixture.domains`."""
    losses: list[Line]
    """The same domains; empty where none was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The share that each domain gets, and how it came about."""

    mixer: str
    phases: list[float]
    """Share of the budget of each phase; one of 1.0 without a schedule."""
    domains: list[MixtureDomain]
    """The largest by what is asked, then the rest together."""
    paths: list[MixturePath]
    """Of trained mixers; empty for those that only compute."""
    notes: list[str]
    facts: list[Fact] = field(default_factory=list[Fact])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """One domain, label, source or class of lengths, before and after."""

    name: str
    rows: int
    """Training examples there are."""
    tokens: int | None
    kept_rows: int
    kept_tokens: int | None
    """Copies counted."""
    share: float
    """Of all training tokens (of examples, where there are none)."""
    kept_share: float
    """Of the kept ones."""
    random_share: float | None = None
    """Of what random keeps at an equal budget, where that is known."""
    num_names: int = 1
    """More than 1: the rest together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long the examples are, before and after."""

    unit: str
    """tokens or characters."""
    edges: list[float]
    """(B + 1,) on a logarithmic scale."""
    before: Distribution
    after: Distribution
    """Rows with copies counted as often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shifts:
    """What the plan changed."""

    unit: str
    """Of the shares: tokens, characters or examples."""
    domains: list[Shift]
    labels: list[Shift]
    """Empty without labels."""
    sources: list[Shift]
    lengths: Lengths | None
    yardsticks: list["Yardstick"]
    """The plan itself first, then random and others at an equal budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """What the plan, random or the longest keep at an equal budget."""

    name: str
    what: str
    rows: int
    tokens: int | None
    mean_score: float | None
    """Of the plan's score."""
    overlap: float | None
    """Share of the plan's rows that it keeps too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why the plan leaves rows out, or keeps them."""

    reason: str
    what: str
    """A sentence."""
    rows: int
    share: float
    """Of all rows of the index."""
    examples: list[int]
    """Places in `Samples.examples`; empty without samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What became of every row."""

    rows: int
    """Of the index."""
    reasons: list[Reason]
    """`kept` first, then by size; reasons without rows are left out."""
    rule: list[Fact]
    """The settings of the plan in words: score, order, keep, within ..."""
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateGroup:
    """Examples that repeat each other."""

    size: int
    stays: str
    """Key of the one that stays."""
    others: list[str]
    """Keys of some of the others."""
    similarity: float | None
    """Smallest among those shown."""
    text: str
    """Of the one that stays, cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """What repeats."""

    facts: list[Fact]
    """Method, groups, rows in them, the largest."""
    sizes: list[tuple[str, int]]
    """Size of a group in words (`2`, `3`, `4 to 7` ...) -> rows in groups of that size."""
    groups: list[DuplicateGroup]
    """The largest."""
    held_out: int | None = None
    """Training rows that repeat a held-out one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakedSet:
    """One evaluation set."""

    name: str
    examples: int
    found_kept: int
    """Of its examples, those that stand in what is kept."""
    found_left_out: int
    """In what the plan leaves out; in any training row, where there is no plan."""
    rows_kept: int
    rows_left_out: int
    exact_kept: int
    """Of its examples, those that stand in what is kept from the first word to the last."""
    short: int
    """Too short to be looked for by runs of words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leakage:
    """What of the evaluation sets stands in the training data."""

    sets: list[LeakedSet]
    found_from: float
    """Share of an evaluation example's words from which it counts as found."""
    examples: list[int]
    """Places in `Samples.examples`: the training rows that hold most, with marks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """A row, or a whole file, that could not be used."""

    source: str
    file: str
    row: int | None
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """Rows that were set aside."""

    counts: dict[str, int]
    """Reason -> rows, the most frequent first."""
    rows: list[SetAside]
    """A few of each reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How unevenly the kept rows count."""

    rows: int
    copies: int
    effective_size: float
    """How many equally weighted examples carry as much (Kish); weight times copies."""
    effective_share: float
    """Of the kept rows."""
    mean: float
    """Of the average copy."""
    edges: list[float]
    """(B + 1,) of the loss weights."""
    distribution: Distribution
    """Of the loss weights of kept rows; one bin where all are equal."""
    by_copies: list[tuple[str, int]]
    """Copies in words (`1`, `2`, `4 to 7` ...) -> kept rows."""
    scale: Literal["linear", "log"] = "linear"
    """Of the edges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StableColumn:
    """How far a score depends on the seed of the models that measured it."""

    name: str
    title: str
    seeds: int | None
    """Independent models; None where the tables do not say."""
    rank_correlation: float | None
    """Spearman's, mean over pairs of seeds, on the same rows."""
    lowest: float | None
    """Of the pairs."""
    reliability: float | None
    """Share of the variance of the mean score that is not the spread over seeds, 0 to 1."""
    mean_std: float | None
    """Mean of the column's `_std` over the examples."""
    spread: float | None
    """Standard deviation of the score over the examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """Whether another seed would have given the same order."""

    columns: list[StableColumn]
    rows: int
    """That the figures stand on."""
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One arm against random."""

    arm: str
    word: str
    """helps, hurts, not distinguishable from random, no verdict."""
    sentence: str
    mean_arm: float | None
    mean_random: float | None
    difference: float | None
    low: float | None
    """Of the 95 % interval of the difference."""
    high: float | None
    p: float | None
    """Corrected for the number of arms."""
    detectable: float | None
    """The smallest difference that four of five such comparisons would find."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedPart:
    """One number of one arm, without a verdict."""

    part: str
    metric: str
    arm: str
    seeds: int
    mean: float | None
    spread: float | None
    difference: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedPoint:
    """One training run's number that the verdict stands on."""

    arm: str
    seed: int
    value: float | None
    """None where the run diverged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Does the plan help? What `curate compare` found."""

    metric: str
    """In words: `accuracy on the target`."""
    better: Literal["higher", "lower"]
    verdicts: list[Verdict]
    points: list[ComparedPoint]
    parts: list[ComparedPart]
    num_parts: int
    """There are; more than are shown with very many domains."""
    facts: list[Fact]
    """Seeds, budget, scale, cost."""
    notes: list[str]
    doubts: list[str] = field(default_factory=list[str])
    """What speaks against any verdict: arms that were hardly trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of the run."""

    name: str
    state: str
    """done, failed, to do."""
    done: int
    """Finished files that the stage has made."""
    failed: int
    """Tasks."""
    remaining: int
    finished: str | None
    """When it last ran to its end."""
    seconds: float | None
    """How long that took."""
    why: list[str]
    """What is due and why, or how it failed."""
    summary: str = ""
    """What it came to, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Run, cost, versions, how to load the shards, how to make them again."""

    stages: list[Stage]
    software: list[Fact]
    """Versions and the kind of machine."""
    inputs: list[Fact]
    """Source -> path and what was found there."""
    disk: list[Fact]
    """Part of the run folder -> its size."""
    load: list[str]
    """Lines of Python that load the shards; empty before they are written."""
    reproduce: list[str]
    """Commands."""
    config: str
    """The resolved settings as YAML, cut where they are very long."""
    seed: int
    seconds: float
    """All stages together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """All that the page shows. Sections that there is nothing for are None: `missing` says why."""

    schema_version: int = SCHEMA_VERSION
    run: str
    """The run folder."""
    title: str
    """Its last name."""
    made: str
    """When this was gathered: 2026-11-22 18:40 UTC."""
    version: str
    """Of curate."""
    task: str
    """Kind of the task; empty where no model is asked for."""
    unit: str
    """What lengths and shares count: tokens, characters or examples."""
    summary: list[str]
    """What was done, in five lines or fewer."""
    facts: list[Fact]
    """The figures of the page's head: examples, kept, tokens, domains ..."""
    notes: list[str]
    """What a reader must not miss: of the plan, the mixture, the comparison."""
    scores: Scores | None
    agreement: Agreement | None
    samples: Samples | None
    mixture: Mixture | None
    shifts: Shifts | None
    removed: Removed | None
    duplicates: Duplicates | None
    leakage: Leakage | None
    quarantine: Quarantine | None
    weights: Weights | None
    stability: Stability | None
    comparison: Comparison | None
    provenance: Provenance
    missing: dict[str, str]
    """Section (of `SECTIONS`) that is None -> a sentence that says why, and what would give it."""


def values(document: Document) -> dict[str, Any]:
    """The document as JSON values."""
    return asdict(document)
