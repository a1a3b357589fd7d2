"""The chart of the correctness notebook: what a head gets accepted, by category and by depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eagle_lab.report.charts.style import BLUE, GREY, depth_colour, style


def acceptance_figure(categories: Sequence[dict[str, Any]], depths: Sequence[dict[str, Any]]) -> go.Figure:
    """τ by category (rows of `correctness.acceptance_rows`) beside the share accepted by depth (`depth_rows`)."""
    figure = make_subplots(
        1,
        2,
        subplot_titles=("τ: tokens committed a cycle", "drafts accepted, by depth"),
        column_widths=[0.55, 0.45],
    )
    ordered = sorted(categories, key=lambda row: row["τ"])
    figure.add_bar(
        x=[row["τ"] for row in ordered],
        y=[row["prompts"] for row in ordered],
        orientation="h",
        marker={"color": [GREY if row["prompts"] == "all" else BLUE for row in ordered]},
        text=[f"{row['τ']:.2f}" for row in ordered],
        hovertemplate="%{y}: τ = %{x:.2f}<extra></extra>",
        row=1,
        col=1,
    )
    reached = [row for row in depths if row["reached"]]
    figure.add_bar(
        x=[row["depth"] for row in reached],
        y=[row["accepted"] for row in reached],
        marker={"color": [depth_colour(row["depth"]) for row in reached]},
        text=[f"{row['accepted']:.0%}" for row in reached],
        customdata=[row["reached"] for row in reached],
        hovertemplate="depth %{x}: %{y:.0%} of %{customdata} cycles that got there<extra></extra>",
        row=1,
        col=2,
    )
    figure.update_xaxes(title="τ", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title="depth in the tree", dtick=1, row=1, col=2)
    figure.update_yaxes(title="category", row=1, col=1)
    figure.update_yaxes(title="accepted where reached", range=[0, 1.05], tickformat=".0%", row=1, col=2)
    figure.update_layout(showlegend=False)
    return style(figure, height=360)
