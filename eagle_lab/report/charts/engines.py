"""Engines beside each other on one H100: the record of what was measured, its table, its chart and its words."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from pydantic import Field

from eagle_lab.measure.records import RESULTS, Part, Reported, read
from eagle_lab.report.charts.style import BLUE, GREEN, ORANGE, style
from eagle_lab.report.words import plain, render

FILE = RESULTS / "engines-h100.json"
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


class EngineUsed(Part):
    """One engine. packages: what it had in other versions than the record's; told: options that matter at batch 1."""

    version: str
    packages: dict[str, str] = {}
    told: dict[str, str] = {}


class EngineRow(Part):
    """One engine and tree on one target. drafted: the tree's tokens, the root not counted, 0 for plain decoding, which has
    no top_k and depth; cycle_ms: the median of a cycle, the prefill left out; acceptance_length: τ; tokens_per_s: after the
    first token; tokens_per_s_whole: the prefill included. None: not told."""

    target: str
    engine: str
    drafted: int
    top_k: int | None
    depth: int | None
    cycle_ms: float
    acceptance_length: float | None
    tokens_per_s: float | None
    tokens_per_s_whole: float | None

    @property
    def mode(self) -> str:
        """ "plain", "chain of 3" or "tree of 63"."""
        return f"{'chain' if self.top_k == 1 else 'tree'} of {self.drafted}" if self.drafted else "plain"


class EnginesRecord(Reported):
    """Engines beside each other. again: the command that measures vLLM beside this kit anew; versions: of Python and
    packages; prompts: by target, their ids; strategies: by target, that of this kit."""

    schema_name: Literal["eagle_lab.engines.v1"] = Field("eagle_lab.engines.v1", alias="schema")
    again: str
    versions: dict[str, str]
    dtype: str
    batch: int
    temperature: float
    max_new_tokens: int
    prompts: dict[str, tuple[str, ...]]
    strategies: dict[str, str]
    engines: dict[str, EngineUsed]
    rows: tuple[EngineRow, ...]


def engines_record(path: str | Path = FILE) -> EnginesRecord:
    """The committed record of one H100, or another file's. Raises RecordError as `read` does."""
    return read(path, EnginesRecord)


def engines_words(record: EnginesRecord) -> str:
    """What was measured, when, on what machine and how, and what measures it anew; Markdown."""
    return render("engines.md.j2", record=record).strip()


def engines_table(record: EnginesRecord, target: str) -> pd.DataFrame:
    """The rows of a target: engine, version, mode, and numbers as `EngineRow` has them, NaN where one wasn't told.

    Raises ValueError for a target that the record doesn't have.
    """
    rows = [row for row in record.rows if row.target == target]
    if not rows:
        there = dict.fromkeys(row.target for row in record.rows)
        raise ValueError(f"{target!r} wasn't measured; there are {', '.join(there)}.")
    return pd.DataFrame(
        [
            {"engine": row.engine, "version": record.engines[row.engine].version, "mode": row.mode}
            | {metric: getattr(row, metric) for metric in HEADINGS}
            for row in rows
        ]
    ).astype(dict.fromkeys(HEADINGS, float))


def engines_rows(record: EnginesRecord, target: str) -> list[dict[str, str]]:
    """The same for `words.table`, what no engine has left out, "–" for what one hasn't. Raises ValueError as above."""
    rows = engines_table(record, target)
    if rows.tokens_per_s.isna().all():  # a shape: nothing is accepted, so only times stand
        rows = rows.drop(columns=["acceptance_length", "tokens_per_s", "tokens_per_s_whole"])
    return [
        {str(name): cell if isinstance(cell, str) else plain(cell) for name, cell in row.items()}
        for row in rows.rename(columns=HEADINGS).to_dict("records")
    ]


def engines_figure(record: EnginesRecord, target: str = "SmolLM2-135M") -> go.Figure:
    """Cycle time, τ and throughput of each engine and mode, a panel each."""
    rows = engines_table(record, target)
    figure = make_subplots(1, len(PANELS), shared_yaxes=True, horizontal_spacing=0.04)
    for column, (metric, title) in enumerate(PANELS.items(), 1):
        for engine, own in rows.groupby("engine", sort=False):
            figure.add_bar(
                y=[f"{engine}, {mode}" for mode in own["mode"]], x=own[metric].tolist(), orientation="h", name=str(engine),
                marker={"color": PAINTS[str(engine)]}, showlegend=column == 1, hovertemplate="%{y}: %{x}<extra></extra>",
                row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(title=title, row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(
        title=f"{target}, batch {record.batch}, {record.dtype}, one {record.machine.partition(' ')[0]}"
    )
    return style(figure, 480)
