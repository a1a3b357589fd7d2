"""What the controls show as HTML: text coloured by how each token came, its figures, the verdict, a problem.

Colours lie behind the text, half transparent, so that the text keeps the theme's own colour, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from eagle_lab.notebook.live import Run
from eagle_lab.report.charts.style import BLUE, GREEN, GREY, RED, depth_colour, faint
from eagle_lab.verdict.mask_check import Finding
from eagle_lab.verdict.stats import Decision, Verdict

DECISION_COLOURS = {
    Decision.ADOPT: GREEN,
    Decision.REVERT: RED,
    Decision.NO_DIFFERENCE: BLUE,
    Decision.INCONCLUSIVE: GREY,
}
_TEXT = "color:var(--jp-content-font-color1,inherit);font-family:var(--jp-content-font-family,sans-serif)"


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


def _token(text: str, depth: int) -> str:
    told = "bonus: the target's own token" if depth == 0 else f"drafted at depth {depth}, accepted"
    shown = escape(text).replace("\n", "<br>")
    return (
        f'<span class="eagle-token" title="{told}" style="background:{faint(depth_colour(depth), 0.38)};'
        f'border-bottom:2px solid {depth_colour(depth)};border-radius:3px">{shown}</span>'
    )


def story(run: Run, tokenizer: Any) -> str:
    """The text so far, each token on the colour of how it came."""
    texts = pieces(tokenizer, [token for token, _ in run.tokens])
    body = "".join(_token(text, depth) for text, (_, depth) in zip(texts, run.tokens, strict=True))
    style = f"{_TEXT};line-height:1.9;white-space:pre-wrap;max-width:70em"
    return f'<div class="eagle-story" style="{style}">{body}</div>'


def run_words(run: Run) -> str:
    """What a run shows, in a few sentences of Markdown computed from it."""
    if not run.tokens:
        return "Nothing was decoded."
    by_depth: dict[int, int] = {}
    for _, depth in run.tokens:
        by_depth[depth] = by_depth.get(depth, 0) + 1
    drafted = len(run.tokens) - by_depth.get(0, 0)
    depths = ", ".join(f"{count} at depth {depth}" for depth, count in sorted(by_depth.items()) if depth)
    words = (
        f"{len(run.tokens)} tokens in {len(run.cycles)} cycles: τ = {run.acceptance_length:.2f} tokens a cycle, "
        f"{run.speed:.1f} tokens/s with the prefill. The target itself chose {by_depth.get(0, 0)} of them; {drafted} had "
        f"been drafted{f' ({depths})' if drafted else ''}."
    )
    whole: dict[str, float] = {}
    for stages in run.stages:
        for name, seconds in stages.items():
            whole[name] = whole.get(name, 0.0) + seconds
    total = sum(whole.values())
    if total:
        longest = max(whole, key=lambda name: whole[name])
        words += f" Of the cycles' time `{longest}` takes {whole[longest] / total:.0%}"
        words += f" and `tree_mask` {whole['tree_mask'] / total:.2%}." if "tree_mask" in whole else "."
    return words


def legend(depth: int) -> str:
    """What the colours mean, for trees of this many levels."""
    names = [(0, "bonus"), *((d, f"depth {d}") for d in range(1, min(depth + 1, 8) + 1))]
    swatches = "".join(
        f'<span style="margin-right:1em"><span style="display:inline-block;width:.9em;height:.9em;border-radius:3px;'
        f'vertical-align:-.1em;background:{depth_colour(d)}"></span> {name}</span>'
        for d, name in names
    )
    return f'<div class="eagle-legend" style="{_TEXT};font-size:90%">{swatches}</div>'


def meter(run: Run, done: bool) -> str:
    """Tokens per second and acceptance length, now."""
    figures = (
        (f"{run.speed:.1f}", "tokens/s, prefill included"),
        (f"{run.acceptance_length:.2f}", "τ, tokens a cycle"),
        (f"{len(run.tokens)}", f"tokens in {len(run.cycles)} cycles"),
        (f"{run.seconds:.1f}", "s" + (", stopped" if run.stopped else "" if done else ", running")),
    )
    boxes = " ".join(
        f'<span style="margin-right:2em"><b style="font-size:150%">{value}</b> {unit}</span>'
        for value, unit in figures
    )
    return f'<div class="eagle-meter" style="{_TEXT}">{boxes}</div>'


def _card(kind: str, paint: str, head: str, body: str) -> str:
    return (
        f'<div class="{kind}" style="{_TEXT};border-left:6px solid {paint};background:{faint(paint, 0.1)};'
        f'padding:.6em 1em;margin:.4em 0;border-radius:4px;max-width:62em;line-height:1.5">'
        f'<b style="font-size:125%">{head}</b>{body}</div>'
    )


def verdict_card(verdict: Verdict, baseline: str, candidate: str, meaning: str) -> str:
    """The verdict with its interval drawn against ±δ, and its reasons; `meaning` says what to do about it."""
    paint = DECISION_COLOURS[verdict.decision]
    known = math.isfinite(verdict.high)
    ends = f"[{verdict.low:.3f}, {verdict.high:.3f}]" if known else "(too few pairs for an interval)"
    counts = f"{verdict.pairs} pairs in {verdict.forks} fork{'s' * (verdict.forks != 1)}"
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict.reasons)
    against = f"{escape(candidate)} against {escape(baseline)}"
    ratio = (
        f"{against}: <b>{verdict.estimate:.3f}</b> {ends} of the time, {counts}."
        if verdict.pairs
        else f"{against}."
    )
    body = (
        f"<div>{ratio} {escape(meaning)}</div>{_ruler(verdict, paint) if known else ''}"
        f'<ul style="margin:.3em 0 0 1.2em;padding:0">{reasons}</ul>'
    )
    provisional = " (provisional)" if verdict.provisional else ""
    return _card("eagle-verdict", paint, verdict.decision.replace("_", " ") + provisional, body)


def _ruler(verdict: Verdict, paint: str) -> str:
    """The interval as a bar on a scale of ratios, 1 in the middle, ±δ as a grey band."""
    reach = 1.15 * max(abs(verdict.low - 1), abs(verdict.high - 1), 2 * verdict.delta)

    def at(ratio: float) -> float:
        return 240 + 230 * (ratio - 1) / reach

    band, low, high = verdict.delta, at(verdict.low), at(verdict.high)
    text = f'fill="{GREY}" font-size="11" text-anchor'
    return (
        '<svg width="480" height="46" role="img" aria-label="interval">'
        f'<rect x="{at(1 / (1 + band)):.1f}" y="4" width="{at(1 + band) - at(1 / (1 + band)):.1f}" height="24" '
        f'fill="{GREY}" opacity="0.25"/>'
        f'<line x1="10" x2="470" y1="16" y2="16" stroke="{GREY}"/><line x1="240" x2="240" y1="2" y2="30" stroke="{GREY}"/>'
        f'<rect x="{low:.1f}" y="11" width="{max(high - low, 2):.1f}" height="10" rx="3" fill="{paint}" opacity="0.6"/>'
        f'<circle cx="{at(verdict.estimate):.1f}" cy="16" r="6" fill="{paint}"/>'
        f'<text x="10" y="42" {text}="start">faster</text><text x="240" y="42" {text}="middle">1 ± {band:.1%}</text>'
        f'<text x="470" y="42" {text}="end">slower</text></svg>'
    )


def finding_card(finding: Finding) -> str:
    """What a check of a mask builder found."""
    head = "Equal to the reference" if finding.ok else "Not the reference's mask"
    return _card("eagle-finding", GREEN if finding.ok else RED, head, f"<div>{escape(finding.words)}</div>")


def problem_card(words: str) -> str:
    """Something that could not be done, in a sentence."""
    return _card("eagle-problem", RED, "That did not work", f"<div>{escape(words)}</div>")
