"""What the controls show as HTML: text coloured by how each token came, its figures, the verdict, a problem."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
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
MOST_DEPTHS = 8  # the legend's; deeper levels are rare, and their blues can't be told apart


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character of several tokens comes with its last one; ids without a tokenizer."""
    if tokenizer is None:
        return [f"#{token} " for token in ids]
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        unfinished = text.endswith("�") and end < len(ids)
        found.append("" if unfinished else text[len(before) :])
        before = before if unfinished else text
    return found


def story(run: Run, tokenizer: Any) -> str:
    """The text so far, each token on the colour of how it came."""
    texts = pieces(tokenizer, [token for token, _ in run.tokens])
    tokens = [
        {
            "text": text,
            "depth": depth,
            "line": depth_colour(depth),
            "ground": faint(depth_colour(depth), 0.38),
        }
        for text, (_, depth) in zip(texts, run.tokens, strict=True)
    ]
    return render("story.html.j2", tokens=tokens, text_style=TEXT)


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


def legend(depth: int) -> str:
    """What the colours mean, for trees of this many levels."""
    colours = [depth_colour(level) for level in range(min(depth + 1, MOST_DEPTHS) + 1)]
    return render("legend.html.j2", colours=colours, text_style=TEXT)


def meter(run: Run, done: bool) -> str:
    """Tokens per second and acceptance length, now."""
    return render("meter.html.j2", run=run, done=done, text_style=TEXT)


def _card(kind: str, paint: str, **values: Any) -> str:
    return render("card.html.j2", kind=kind, paint=paint, ground=faint(paint, 0.1), text_style=TEXT, **values)


def verdict_card(verdict: Verdict, baseline: str, candidate: str, meaning: str) -> str:
    """The verdict with its interval and its reasons; `meaning` says what to do about it."""
    values = {"baseline": baseline, "candidate": candidate, "meaning": meaning, "reasons": reasons(verdict)}
    known = math.isfinite(verdict.high)
    return _card("verdict", DECISION_COLOURS[verdict.decision], verdict=verdict, known=known, **values)


def finding_card(finding: Finding) -> str:
    """What a check of a mask builder found."""
    return _card("finding", GREEN if finding.ok else RED, finding=finding)


def problem_card(words: str) -> str:
    """Something that could not be done, in a sentence."""
    return _card("problem", RED, words=words)
