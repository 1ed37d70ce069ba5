"""The plot of a comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from curate.data.files import replace
from curate.errors import MissingDependencyError
from jobs.compare_results import Question, last_points


def write_plot(
    path: Path, table: pl.DataFrame, arms: Sequence[str], question: Question, title: str
) -> None:
    """Every seed a point, the mean a tick, arm by arm; below it the curve, where there is one.

    Raises:
        MissingDependencyError: altair or vl-convert are not installed.
    """
    try:
        import altair as alt
        import vl_convert as _  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"the plot needs {error.name}; table and verdict are written",
            fix="pip install 'curate-data[report]', or set compare.plot to none",
        ) from error
    own = table.filter(
        (pl.col("part") == question.part)
        & (pl.col("metric") == question.metric)
        & pl.col("value").is_not_null()
    )
    last = last_points(own)
    label = question.told
    scale = alt.Scale(zero=False)
    base = alt.Chart(alt.Data(values=last.select("arm", "seed", "value").to_dicts()), title=title)
    order = list(arms)
    points = base.mark_circle(size=45, opacity=0.6).encode(
        x=alt.X("value:Q", scale=scale, title=label),
        y=alt.Y("arm:N", sort=order, title=None),
        tooltip=["arm:N", "seed:Q", "value:Q"],
    )
    means = base.mark_tick(thickness=3, size=18).encode(
        x=alt.X("mean(value):Q", scale=scale), y=alt.Y("arm:N", sort=order)
    )
    chart: Any = (points + means).properties(width=420, height=28 * max(2, len(order)))
    if own.height > last.height:
        rows = own.group_by("arm", "step", maintain_order=True).agg(
            pl.col("tokens", "value").mean()
        )
        curve = (
            alt.Chart(alt.Data(values=rows.drop_nulls().to_dicts()))
            .mark_line(point=True)
            .encode(
                x=alt.X("tokens:Q", title="tokens trained on"),
                y=alt.Y("value:Q", scale=scale, title=label),
                color=alt.Color("arm:N", sort=order),
            )
            .properties(width=420, height=220)
        )
        chart = alt.vconcat(chart, curve)
    replace(path, lambda target: _save(chart, target, path.suffix.removeprefix(".")))


def _save(chart: Any, target: Path, kind: str) -> None:
    chart.save(str(target), format=kind)
