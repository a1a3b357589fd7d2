"""Where a cycle's time went, as a chart."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

from eagle_lab.report.charts.style import INK, SKY, style


def stage_bars(
    stages: Mapping[str, float | tuple[float, float, float]], title: str = "Where the cycle's time went"
) -> go.Figure:
    """Stage times in ms as bars, longest at the top; values in seconds, or (low, value, high) for whiskers."""
    found = {
        name: value if isinstance(value, tuple) else (value, value, value) for name, value in stages.items()
    }
    order = sorted(found, key=lambda name: found[name][1])
    low, middle, high = ([round(found[name][i] * 1e3, 3) for name in order] for i in range(3))
    spread = low != middle or high != middle
    figure = go.Figure(
        go.Bar(
            x=middle, y=[f"{name}  {value:.3g} ms" for name, value in zip(order, middle, strict=True)],
            orientation="h", marker={"color": SKY},
            error_x={
                "array": [h - m for h, m in zip(high, middle, strict=True)],
                "arrayminus": [m - l for m, l in zip(middle, low, strict=True)],
                "visible": spread,
                "color": INK,
            },
            hovertemplate="%{y}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="time (ms)", rangemode="tozero")
    figure.update_layout(title=title)
    return style(figure, 110 + 30 * len(order))
