"""Engines beside each other on one H100: the table that was measured, and its chart."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eagle_lab import ROOT
from eagle_lab.report.charts.style import BLUE, GREEN, ORANGE, style
from eagle_lab.report.words import plain

FILE = ROOT / "data" / "engines-h100.csv"
PAINTS = {"eagle_lab": BLUE, "vllm": ORANGE, "sglang": GREEN}
PANELS = {
    "cycle_ms": "time of a cycle, ms",
    "acceptance_length": "tokens a cycle (τ)",
    "tokens_per_s": "output, tokens/s",
}
HEADINGS = {
    "cycle_ms": "a cycle, ms",
    "acceptance_length": "τ",
    "tokens_per_s": "tokens/s",
    "tokens_per_s_whole": "tokens/s, prefill included",
}


def engines_table(target: str) -> pd.DataFrame:
    """Batch 1, bfloat16, greedy, 8 prompts × 128 tokens on one H100 80GB, all in one session; medians without the prefill.

    tokens_per_s_whole has the prefill in it. Random weights (a shape) have no τ. Raises ValueError for a target that the
    table doesn't have.
    """
    rows = pd.read_csv(FILE)
    if target not in set(rows.target):
        raise ValueError(f"{target!r} wasn't measured; there are {', '.join(rows.target.unique())}.")
    return rows[rows.target == target].drop(columns="target").reset_index(drop=True)


def engines_rows(target: str) -> list[dict[str, str]]:
    """The same for `words.table`, what no engine has left out, "–" for what one hasn't. Raises ValueError as above."""
    rows = engines_table(target).drop(columns="drafted")
    if rows.tokens_per_s.isna().all():  # a shape: nothing is accepted, so only times stand
        rows = rows.drop(columns=["acceptance_length", "tokens_per_s", "tokens_per_s_whole"])
    return [
        {str(name): cell if isinstance(cell, str) else plain(cell) for name, cell in row.items()}
        for row in rows.rename(columns=HEADINGS).to_dict("records")
    ]


def engines_figure(target: str = "SmolLM2-135M") -> go.Figure:
    """Cycle time, τ and throughput of each engine and mode, a panel each."""
    rows = engines_table(target)
    figure = make_subplots(1, len(PANELS), shared_yaxes=True, horizontal_spacing=0.04)
    for column, (metric, title) in enumerate(PANELS.items(), 1):
        for engine, own in rows.groupby("engine", sort=False):
            figure.add_bar(
                y=[f"{engine}, {mode}" for mode in own["mode"]],
                x=own[metric].tolist(),
                orientation="h",
                name=str(engine),
                marker={"color": PAINTS[str(engine)]},
                showlegend=column == 1,
                hovertemplate="%{y}: %{x}<extra></extra>",
                row=1,
                col=column,
            )
        figure.update_xaxes(title=title, row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(title=f"{target}, batch 1, bfloat16, one H100")
    return style(figure, 480)
