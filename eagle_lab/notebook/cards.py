"""What the controls show as HTML: text coloured by how each token came, its figures, the verdict, a problem."""

from __future__ import annotations

from collections import Counter
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
        {"text": text, "depth": depth, "line": depth_colour(depth), "ground": faint(depth_colour(depth), 0.3)}
        for text, (_, depth) in zip(run.texts, run.tokens, strict=True)
    ]
    by_depth = sorted(Counter(depth for _, depth in run.tokens).items())
    legend = [(depth, number, depth_colour(depth)) for depth, number in by_depth]
    return html("story", tokens=tokens, legend=legend)


def run_words(run: Run) -> str:
    """What a run shows, in a few sentences of Markdown computed from it."""
    by_depth = Counter(sorted(depth for _, depth in run.tokens))
    seconds: Counter[str] = Counter()
    for stages in run.stages:
        seconds.update(stages)
    whole = sum(seconds.values())
    shares = {name: spent / whole for name, spent in seconds.items()} if whole else {}
    longest = max(shares, key=lambda name: shares[name], default=None)
    drafted = len(run.tokens) - by_depth[0]
    return render("run.md.j2", run=run, by_depth=by_depth, drafted=drafted, shares=shares, longest=longest)


def html(part: str, **values: Any) -> str:
    """A part of the console from its template, "meter" from meter.html.j2."""
    return render(f"{part}.html.j2", text_style=TEXT, **values)


def progress(what: str, **values: Any) -> str:
    """What goes on, in a few words."""
    return html("progress", what=what, **values)


def _card(kind: str, paint: str, **values: Any) -> str:
    return html("card", kind=kind, paint=paint, ground=faint(paint, 0.1), **values)


def verdict_card(verdict: Verdict, baseline: str, candidate: str, meaning: str) -> str:
    """The verdict with its interval and its reasons; `meaning` says what to do about it, "" before the end."""
    values = {"baseline": baseline, "candidate": candidate, "meaning": meaning, "reasons": reasons(verdict)}
    return _card("verdict", DECISION_COLOURS[verdict.decision], verdict=verdict, **values)


def finding_card(finding: Finding) -> str:
    """What a check of a mask builder found."""
    return _card("finding", GREEN if finding.ok else RED, finding=finding)


def problem_card(words: str) -> str:
    """Something that could not be done, in a sentence."""
    return _card("problem", RED, words=words)
