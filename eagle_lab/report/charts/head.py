"""What a head gets accepted, by category and by depth."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eagle_lab.measure.acceptance import Depth
from eagle_lab.report.charts.style import BLUE, GREY, depth_colour, style
from eagle_lab.studies.correctness import Accepted


def acceptance_figure(categories: Sequence[Accepted], depths: Sequence[Depth]) -> go.Figure:
    """τ by category beside the share of drafts accepted by depth."""
    figure = make_subplots(
        1, 2, subplot_titles=("τ: tokens committed a cycle", "drafts accepted, by depth"), column_widths=[0.55, 0.45],
        horizontal_spacing=0.16,
    )  # fmt: skip
    ordered = sorted(categories, key=lambda row: row.tau)
    figure.add_bar(
        x=[row.tau for row in ordered], y=[row.category or "all" for row in ordered], orientation="h",
        marker={"color": [BLUE if row.category else GREY for row in ordered]}, text=[f"{row.tau:.2f}" for row in ordered],
        hovertemplate="%{y}: τ = %{x:.2f}<extra></extra>", row=1, col=1,
    )  # fmt: skip
    reached = [row for row in depths if row.reached]
    figure.add_bar(
        x=[row.depth for row in reached], y=[row.accepted for row in reached],
        marker={"color": [depth_colour(row.depth) for row in reached]}, text=[f"{row.accepted:.0%}" for row in reached],
        customdata=[row.reached for row in reached],
        hovertemplate="depth %{x}: %{y:.0%} of %{customdata} cycles that got there<extra></extra>", row=1, col=2,
    )  # fmt: skip
    figure.update_xaxes(title="τ", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title="depth in the tree", dtick=1, row=1, col=2)
    figure.update_yaxes(title="category", row=1, col=1)
    figure.update_yaxes(title="accepted where reached", range=[0, 1.05], tickformat=".0%", row=1, col=2)
    figure.update_layout(showlegend=False)
    return style(figure, height=360)
