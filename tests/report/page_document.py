"""A document for the tests of the page: made up, complete, and hostile where data can be."""

import base64
import math
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise

from curate.report import document as d

SCRIPT = "</script><script>window.pwned = 'script'</script>"
IMAGE = "<img src=x onerror=\"window.pwned = 'image'\">"
QUOTES = "\"' onmouseover='window.pwned = 1' {{ 7 * 7 }} ${window.pwned = 2} `"
TURNED = "user\u202egnp.exe\u2066 \u2028 line \x00 end"
HOSTILE = f"{SCRIPT} {IMAGE} {QUOTES} {TURNED} <!-- </noscript></style> javascript:alert(1)"
DOMAINS = ("news", "forums", "books", "code", "recipes", IMAGE)
LABELS = ("world", "sport", "business", "science")


def picture(red: int, green: int, blue: int, *, size: int = 24) -> str:
    """A data URI of a PNG of one colour with a dark square in it."""
    rows = b"".join(
        b"\0"
        + b"".join(
            bytes((20, 20, 20) if 6 < x < 14 and 6 < y < 14 else (red, green, blue))
            for x in range(size)
        )
        for y in range(size)
    )

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def spread(edges: Sequence[float], density: Callable[[float], float], rows: int) -> d.Distribution:
    """A distribution over bins, from a density."""
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    mass = [density(x) for x in middles]
    counts = [round(rows * m / sum(mass)) for m in mass]
    total = sum(counts)
    quantiles: list[float] = []
    for q in d.QUANTILES:
        seen = 0
        for at, count in enumerate(counts):
            seen += count
            if seen >= q * total and count:
                quantiles.append(middles[at])
                break
    mean = sum(c * x for c, x in zip(counts, middles, strict=True)) / total
    std = math.sqrt(sum(c * (x - mean) ** 2 for c, x in zip(counts, middles, strict=True)) / total)
    return d.Distribution(
        rows=total, missing=3, mean=mean, std=std, quantiles=quantiles, counts=counts, above=12
    )


def _column(name: str, centre: float, rows: int, *, planned: bool = False) -> d.ScoreColumn:
    edges = [i / 30 * 1.4 for i in range(31)]

    def bump(at: float) -> Callable[[float], float]:
        return lambda x: math.exp(-((x - at) ** 2) / 0.08) + 0.05

    everything = spread(edges, bump(centre), rows)
    kept_counts = [round(c * min(1, i / 20)) for i, c in enumerate(everything.counts)]
    kept = d.Distribution(
        rows=sum(kept_counts),
        missing=0,
        mean=0.8,
        std=0.2,
        quantiles=[min(1.4, q + 0.1) for q in everything.quantiles],
        counts=kept_counts,
    )

    def groups(names: Sequence[str]) -> list[d.Group]:
        return [
            d.Group(
                name=group,
                kept=rows // 2 // len(names),
                cuts=[0.3 + i / 20, None] if names is LABELS else [],
                distribution=spread(edges, bump(centre + 0.09 * (i - 2)), rows // len(names)),
            )
            for i, group in enumerate(names)
        ]

    return d.ScoreColumn(
        scorer=name,
        column=name,
        name=f"{name}.{name}",
        title=name,
        measures="0 to sqrt(2); higher is harder",
        edges=edges,
        scale="linear",
        everything=everything,
        kept=kept,
        by_domain=groups(DOMAINS),
        by_label=groups(LABELS),
        is_planned=planned,
        cuts=[0.42, None] if planned else [],
    )


def _examples(count: int) -> list[d.Example]:
    draw = random.Random(0)
    words = (
        "market",
        "court",
        "river",
        "engine",
        "season",
        "player",
        "bank",
        "storm",
        "virus",
        "garden",
        "minister",
        "orbit",
        "recipe",
        "function",
        "returns",
        "quietly",
        "with",
        "the",
        "of",
        "a",
        "after",
        "under",
    )
    examples: list[d.Example] = []
    for i in range(count):
        text = " ".join(draw.choice(words) for _ in range(draw.randrange(12, 160))).capitalize()
        marks: list[d.Mark] = []
        if i == 0:
            text = f"Zanzibar {HOSTILE}"
        if i == 1:
            marks = [d.Mark(start=4, end=20, kind="leakage")]
        examples.append(
            d.Example(
                source="pool",
                file=f"part-{i % 7:05d}.parquet",
                row=i * 17,
                domain=DOMAINS[i % len(DOMAINS)],
                label=LABELS[i % len(LABELS)],
                text=text,
                is_cut=i % 5 == 0,
                scores={
                    "el2n.el2n": draw.random(),
                    "length.length": draw.randrange(900),
                    "loss.loss": None if i % 9 == 0 else 3 * draw.random(),
                },
                reason=("kept", "order", "duplicate", "budget")[i % 4],
                weight=1.0,
                copies=1,
                num_tokens=draw.randrange(20, 400),
                likely_label=LABELS[(i + 1) % 4] if i % 6 == 0 else None,
                marks=marks,
                picture=(
                    picture(40 * (i % 6), 120, 200 - 9 * (i % 20))
                    if i % 11 == 3
                    else "javascript:alert(1)"
                    if i == 0
                    else None
                ),
                facts=[d.Fact(name="repeats", value="pool part-00001:99")] if i == 2 else [],
            )
        )
    return examples


def _path() -> d.MixturePath:
    steps = list(range(0, 2001, 25))
    names = DOMAINS[:5]
    weights = [
        [math.exp(math.sin(i) * s / 900 - 0.2 * i) for s in steps] for i, _ in enumerate(names)
    ]
    sums = [sum(w[t] for w in weights) for t in range(len(steps))]
    return d.MixturePath(
        run="seed 0",
        steps=steps,
        weights=[
            d.Line(name=n, values=[w / s for w, s in zip(weights[i], sums, strict=True)])
            for i, n in enumerate(names)
        ],
        losses=[
            d.Line(name=n, values=[2 + i / 3 + 5 / (1 + s / 80) for s in steps])
            for i, n in enumerate(names)
        ],
    )


def document(*, rows: int = 1_000_000, examples: int = 60) -> d.Document:
    """Everything filled in."""
    listed = _examples(examples)
    places = list(range(len(listed)))
    columns = [
        _column("el2n", 0.5, rows, planned=True),
        _column("loss", 0.7, rows),
        _column("length", 0.3, rows),
    ]
    length_edges = [2 ** (i / 3) for i in range(9, 34)]
    shares = (0.31, 0.27, 0.18, 0.12, 0.08, 0.04)
    kept = (0.22, 0.20, 0.24, 0.17, 0.11, 0.06)
    return d.Document(
        run="runs/demo",
        title="demo",
        made="2026-11-22 18:40 UTC",
        version="0.1.0",
        task="text-classification",
        unit="tokens",
        summary=[
            f"Indexed {rows:,} examples of 6 domains from 2 sources; 412 rows were set aside.",
            "Trained 3 small models for 2 epochs and scored every example with el2n and length.",
            "A mixture by unimax gives books and code more than their share of the pool.",
            "The plan keeps half of the tokens, the hardest of each domain; 1.2 % were duplicates.",
            "Compared with random over five seeds, the plan helps: +1.4 points of accuracy.",
        ],
        facts=[
            d.Fact(name=n, value=v)
            for n, v in (
                ("examples", f"{rows:,}"),
                ("kept", f"{rows // 2:,}"),
                ("tokens", "182.4 M"),
                ("tokens kept", "91.2 M"),
                ("domains", "6"),
                ("effective sample size", "431,207"),
            )
        ],
        notes=["The proxy has 9 M parameters: below 15 M, rankings of mixtures are unreliable."],
        scores=d.Scores(columns=columns, num_columns=3, notes=[]),
        agreement=d.Agreement(
            columns=[c.name for c in columns] + ["random.random"],
            titles=[c.title for c in columns] + ["random"],
            matrix=[
                [1, 0.82, -0.31, 0.01],
                [0.82, 1, -0.44, None],
                [-0.31, -0.44, 1, 0.02],
                [0.01, None, 0.02, 1],
            ],
            rows=100_000,
            of_rows=rows,
        ),
        samples=d.Samples(
            examples=listed,
            picks=[
                d.Pick(
                    name="el2n.el2n",
                    which="highest",
                    title="highest el2n",
                    examples=places[20:0:-1],
                ),
                d.Pick(
                    name="el2n.el2n", which="lowest", title="lowest el2n", examples=places[30:45]
                ),
                d.Pick(name="random", which="random", title="random", examples=places[::3]),
            ],
            notes=["20 of each end, drawn once."],
        ),
        mixture=d.Mixture(
            mixer="unimax",
            phases=[0.8, 0.2],
            domains=[
                d.MixtureDomain(
                    domain=n,
                    natural=s,
                    asked=k,
                    kept=k - 0.001,
                    random=s,
                    epochs=0.4 + i / 3,
                    by_phase=[k, k],
                    why="below its cap of epochs",
                )
                for i, (n, s, k) in enumerate(zip(DOMAINS, shares, kept, strict=True))
            ],
            paths=[_path()],
            notes=["No domain is repeated more than 4 times."],
        ),
        shifts=d.Shifts(
            unit="tokens",
            domains=[
                d.Shift(
                    name=n,
                    rows=int(rows * s),
                    tokens=int(182e6 * s),
                    kept_rows=int(rows * k / 2),
                    kept_tokens=int(91e6 * k),
                    share=s,
                    kept_share=k,
                    random_share=s,
                )
                for n, s, k in zip(DOMAINS, shares, kept, strict=True)
            ],
            labels=[
                d.Shift(
                    name=n,
                    rows=rows // 4,
                    tokens=45_600_000,
                    kept_rows=rows // 8,
                    kept_tokens=22_800_000,
                    share=0.25,
                    kept_share=k,
                )
                for n, k in zip(LABELS, (0.22, 0.2, 0.31, 0.27), strict=True)
            ]
            + [
                d.Shift(
                    name=f"a_label_with_a_very_long_name_{n:02}",
                    rows=9,
                    tokens=90,
                    kept_rows=4,
                    kept_tokens=40,
                    share=0.0001,
                    kept_share=0.0001,
                )
                for n in range(40)
            ]
            + [
                d.Shift(
                    name="47 others",
                    rows=rows,
                    tokens=182_400_000,
                    kept_rows=rows // 2,
                    kept_tokens=91_200_000,
                    share=0.9,
                    kept_share=0.9,
                    num_names=47,
                )
            ],
            sources=[
                d.Shift(
                    name="pool",
                    rows=rows,
                    tokens=182_400_000,
                    kept_rows=rows // 2,
                    kept_tokens=91_200_000,
                    share=1,
                    kept_share=1,
                )
            ],
            lengths=d.Lengths(
                unit="tokens",
                edges=length_edges,
                before=spread(length_edges, lambda x: math.exp(-((math.log(x) - 5) ** 2)), rows),
                after=spread(
                    length_edges, lambda x: math.exp(-((math.log(x) - 5.6) ** 2)), rows // 2
                ),
            ),
            yardsticks=[
                d.Yardstick(name=n, what=w, rows=r, tokens=91_200_000, mean_score=m, overlap=o)
                for n, w, r, m, o in (
                    ("plan", "the hardest of each domain", rows // 2, 0.81, 1.0),
                    ("random", "rows at random", rows // 2 + 911, 0.52, 0.5),
                    ("longest", "the longest rows", rows // 4, 0.44, 0.31),
                )
            ],
        ),
        removed=d.Removed(
            rows=rows + 412,
            reasons=[
                d.Reason(reason=n, what=w, rows=int(rows * s), share=s, examples=places[i::4])
                for i, (n, w, s) in enumerate(
                    (
                        ("kept", "in the shards", 0.5),
                        ("order", "below the cut of its domain", 0.42),
                        ("duplicate", "repeats another example", 0.068),
                        ("budget", "the domain's tokens were used up", 0.012),
                    )
                )
            ],
            rule=[
                d.Fact(name="score", value="el2n.el2n"),
                d.Fact(name="order", value="hardest"),
                d.Fact(name="keep", value="half of the tokens, within each domain"),
            ],
        ),
        duplicates=d.Duplicates(
            facts=[
                d.Fact(name="groups", value="9,121"),
                d.Fact(name="rows in them", value="24,080"),
            ],
            sizes=[("2", 14_220), ("3", 5_100), ("4 to 7", 3_000), ("8 to 15", 1_760)],
            groups=[
                d.DuplicateGroup(
                    size=15,
                    stays="pool part-0:1",
                    others=["pool part-0:9"],
                    similarity=0.91,
                    text=f"Repeated {HOSTILE}",
                )
            ],
            held_out=31,
        ),
        leakage=d.Leakage(
            sets=[
                d.LeakedSet(
                    name="quiz",
                    examples=1200,
                    found_kept=7,
                    found_left_out=11,
                    rows_kept=9,
                    rows_left_out=14,
                    exact_kept=2,
                    short=40,
                )
            ],
            found_from=0.8,
            examples=[1],
        ),
        quarantine=d.Quarantine(
            counts={"not valid UTF-8": 300, "empty text": 112},
            rows=[
                d.SetAside(
                    source="pool",
                    file="part-00003.parquet",
                    row=77,
                    reason="not valid UTF-8",
                    detail=HOSTILE,
                )
            ],
        ),
        weights=d.Weights(
            rows=rows // 2,
            copies=rows // 2 + 8_000,
            effective_size=431_207,
            effective_share=0.86,
            mean=1.0,
            edges=[i / 10 for i in range(31)],
            distribution=spread(
                [i / 10 for i in range(31)], lambda x: math.exp(-((x - 1) ** 2) / 0.3), rows // 2
            ),
            by_copies=[("1", rows // 2 - 4000), ("2", 4000)],
        ),
        stability=d.Stability(
            columns=[
                d.StableColumn(
                    name="el2n.el2n",
                    title="el2n",
                    seeds=3,
                    rank_correlation=0.88,
                    lowest=0.86,
                    reliability=0.95,
                    mean_std=0.08,
                    spread=0.27,
                ),
                d.StableColumn(
                    name="loss.loss",
                    title="loss",
                    seeds=3,
                    rank_correlation=0.79,
                    lowest=0.71,
                    reliability=0.9,
                    mean_std=0.2,
                    spread=0.66,
                ),
            ],
            rows=100_000,
        ),
        comparison=_comparison(),
        provenance=_provenance(),
        missing={},
    )


def empty() -> d.Document:
    """A run that has done nothing yet: every part missing, with its sentence."""
    return d.Document(
        run="runs/new",
        title="new",
        made="2026-11-22 18:40 UTC",
        version="0.1.0",
        task="",
        unit="examples",
        summary=[],
        facts=[],
        notes=[],
        scores=None,
        agreement=None,
        samples=None,
        mixture=None,
        shifts=None,
        removed=None,
        duplicates=None,
        leakage=None,
        quarantine=None,
        weights=None,
        stability=None,
        comparison=None,
        provenance=_provenance(),
        missing={name: f"Nothing of {name} yet." for name in d.SECTIONS},
    )


def _comparison() -> d.Comparison:
    draw = random.Random(1)
    arms = {"plan": 0.864, "random": 0.85, "longest": 0.838, "everything": 0.858}
    words = {"plan": "helps", "longest": "hurts", "everything": "not distinguishable from random"}
    return d.Comparison(
        metric="accuracy on held-out examples",
        better="higher",
        verdicts=[
            d.Verdict(
                arm=arm,
                word=word,
                sentence=f"{arm}: {word}, accuracy {arms[arm]}.",
                mean_arm=arms[arm],
                mean_random=0.85,
                difference=arms[arm] - 0.85,
                low=arms[arm] - 0.858,
                high=arms[arm] - 0.842,
                p=0.012,
                detectable=0.011,
            )
            for arm, word in words.items()
        ],
        points=[
            d.ComparedPoint(arm=arm, seed=seed, value=mean + draw.gauss(0, 0.004))
            for arm, mean in arms.items()
            for seed in range(5)
        ],
        parts=[
            d.ComparedPart(
                part=f"domain {part}",
                metric="accuracy",
                arm=arm,
                seeds=5,
                mean=mean,
                spread=0.004,
                difference=None if arm == "random" else mean - 0.85,
                low=None if arm == "random" else mean - 0.86,
                high=None if arm == "random" else mean - 0.84,
            )
            for part in DOMAINS
            for arm, mean in arms.items()
        ],
        num_parts=30,
        facts=[d.Fact(name="seeds", value="5")],
        notes=["A scaled-down comparison."],
    )


def _provenance() -> d.Provenance:
    return d.Provenance(
        stages=[
            d.Stage(
                name="index",
                state="done",
                done=8,
                failed=0,
                remaining=0,
                finished="2026-11-22 18:01 UTC",
                seconds=12.3,
                why=[],
                summary="1 M examples",
            ),
            d.Stage(
                name="write",
                state="part",
                done=3,
                failed=1,
                remaining=4,
                finished=None,
                seconds=None,
                why=["disk full"],
            ),
        ],
        software=[d.Fact(name="python", value="3.11")],
        inputs=[d.Fact(name="pool", value="data/pool/*.parquet, 8 files")],
        disk=[d.Fact(name="shards", value="81 MB")],
        load=["from datasets import load_dataset", 'rows = load_dataset("runs/demo/shards")'],
        reproduce=["curate run runs/demo/config.yaml"],
        config="run: runs/demo\nseed: 0\n",
        seed=0,
        seconds=431.0,
    )
