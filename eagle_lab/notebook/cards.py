"""What the controls show as HTML: text coloured by how each token came, its figures, the verdict, a problem."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from eagle_lab.notebook.live import Run
from eagle_lab.report.charts.style import BLUE, GREEN, GREY, RED, depth_colour, faint
from eagle_lab.report.page import reasons
from eagle_lab.report.words import render
from eagle_lab.verdict.mask_check import Finding
from eagle_lab.verdict.stats import Decision, Verdict

DECISION_COLOURS = {
    Decision.ADOPT: GREEN,
    Decision.REVERT: RED,
    Decision.NO_DIFFERENCE: BLUE,
    Decision.INCONCLUSIVE: GREY,
}
TEXT = "color:var(--jp-content-font-color1,inherit);font-family:var(--jp-content-font-family,sans-serif)"


def story(run: Run) -> str:
    """The text so far, each token on the colour of how it came, and what the colours mean."""
    tokens = [
        {
            "text": text,
            "depth": depth,
            "line": depth_colour(depth),
            "ground": faint(depth_colour(depth), 0.3),
        }
        for text, (_, depth) in zip(run.texts, run.tokens, strict=True)
    ]
    by_depth = sorted(Counter(depth for _, depth in run.tokens).items())
    legend = [(depth, number, depth_colour(depth)) for depth, number in by_depth]
    return render("story.html.j2", tokens=tokens, legend=legend, text_style=TEXT)


def run_words(run: Run) -> str:
    """What a run shows, in a few sentences of Markdown computed from it."""
    by_depth = Counter(dict(sorted(Counter(depth for _, depth in run.tokens).items())))
    seconds: Counter[str] = Counter()
    for stages in run.stages:
        seconds.update(stages)
    whole = sum(seconds.values())
    shares = {name: spent / whole for name, spent in seconds.items()} if whole else {}
    longest = max(shares, key=lambda name: shares[name], default=None)
    drafted = len(run.tokens) - by_depth[0]
    return render("run.md.j2", run=run, by_depth=by_depth, drafted=drafted, shares=shares, longest=longest)


def meter(run: Run) -> str:
    """Tokens per second, time of a cycle, acceptance length and what it is made of."""
    return render("meter.html.j2", run=run, text_style=TEXT)


def about(of: Any, own_head: str, stale: bool) -> str:
    """What a result is of, for the line above it; `own_head` is the one that need not be named."""
    return render("about.html.j2", of=of, own_head=own_head, stale=stale, text_style=TEXT)


def progress(what: str, **values: Any) -> str:
    """What goes on, in a few words."""
    return render("progress.html.j2", what=what, text_style=TEXT, **values)


def rule(iterations: int, delta: float, same: bool) -> str:
    """By what rule a comparison would be judged, before it begins; `same`: its arms are equal."""
    return render("rule.html.j2", iterations=iterations, delta=delta, same=same, text_style=TEXT)


def kept(taken: int, total: int, path: Path) -> str:
    """What a stopped comparison left."""
    return render("kept.j2", taken=taken, total=total, path=path).strip()


def table_heading(columns: str) -> str:
    """The names of the columns over the table of what was tried."""
    return render("tried.html.j2", columns=columns, text_style=TEXT)


def _card(kind: str, paint: str, **values: Any) -> str:
    return render("card.html.j2", kind=kind, paint=paint, ground=faint(paint, 0.1), text_style=TEXT, **values)


def verdict_card(verdict: Verdict, baseline: str, candidate: str, meaning: str) -> str:
    """The verdict with its interval and its reasons; `meaning` says what to do about it, "" before the end."""
    values = {"baseline": baseline, "candidate": candidate, "meaning": meaning, "reasons": reasons(verdict)}
    return _card(
        "verdict", DECISION_COLOURS[verdict.decision], verdict=verdict, known=verdict.known, **values
    )


def finding_card(finding: Finding) -> str:
    """What a check of a mask builder found."""
    return _card("finding", GREEN if finding.ok else RED, finding=finding)


def problem_card(words: str) -> str:
    """Something that could not be done, in a sentence."""
    return _card("problem", RED, words=words)
