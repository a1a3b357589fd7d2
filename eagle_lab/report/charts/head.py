"""A draft head: what of it is accepted, by category and by depth, and how its training went."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eagle_lab.measure.acceptance import Depth
from eagle_lab.report.charts.style import BLUE, GREY, depth_colour, style
from eagle_lab.studies.correctness import Accepted
from eagle_lab.train.train import Step

MOST = 300  # points of a line


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
    figure.update_yaxes(title="category", row=1, col=1)
    figure.update_xaxes(title="depth in the tree", dtick=1, row=1, col=2)
    figure.update_yaxes(title="accepted where reached", range=[0, 1.05], tickformat=".0%", row=1, col=2)
    figure.update_layout(showlegend=False)
    return style(figure, height=360)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [round(sum(part) / len(part), 4) for part in parts]


def training_figure(history: Sequence[Step]) -> go.Figure:
    """Loss and accuracy by draft step against the training step, each a mean over the last twentieth of the run.

    Args: history: as `train` returns it.
    Raises: ValueError where the history is empty.
    """
    if not history:
        raise ValueError("the history is empty; there is nothing to draw before the first training step.")
    window, stride = max(1, len(history) // 20), max(1, -(-len(history) // MOST))
    steps = [entry.step for entry in history][::stride]
    figure = make_subplots(rows=1, cols=2, subplot_titles=("loss", "drafts that are the target's token"))
    loss = _smooth([entry.loss for entry in history], window)[::stride]
    figure.add_scatter(
        x=steps, y=loss, mode="lines", name="loss", showlegend=False, line={"color": GREY}, row=1, col=1,
        hovertemplate="step %{x}: %{y:.2f}<extra></extra>",
    )  # fmt: skip
    count = len(history[0].accuracy)
    for i in range(count):
        rate = _smooth([entry.accuracy[i] for entry in history], window)[::stride]
        figure.add_scatter(
            x=steps, y=rate, mode="lines", name=f"draft step {i + 1}", row=1, col=2,
            line={"color": depth_colour(i + 1)},  # as tokens of that depth are elsewhere
            hovertemplate=f"draft step {i + 1}, step %{{x}}: %{{y:.1%}}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(title="weighted cross-entropy (nats)", row=1, col=1)
    figure.update_yaxes(title="share of drafts", tickformat=".0%", row=1, col=2)
    figure.update_xaxes(title="training step")
    return style(figure, 440).update_layout(legend={"y": -0.22, "yanchor": "top"})
