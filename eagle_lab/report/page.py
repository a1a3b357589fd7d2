"""A comparison's record → one Markdown page for a pull request. The record alone is enough, on any machine."""

from __future__ import annotations

import math
from pathlib import Path

from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.records import Difference
from eagle_lab.report.words import count, render
from eagle_lab.verdict.consistency import Consistency
from eagle_lab.verdict.record import ComparisonRecord, Event, ForkDied
from eagle_lab.verdict.settings import again
from eagle_lab.verdict.stats import Decision, Interval, Reason, Verdict, Why, judge
from eagle_lab.verdict.summary import (
    Row,
    acceptance_length,
    ceiling,
    consistency_of,
    fork_pairs,
    table,
    verdict_of,
)

MEANING = {
    Decision.ADOPT: "The candidate is faster by at least δ: adopt it.",
    Decision.REVERT: "The candidate is slower by at least δ: revert it.",
    Decision.NO_DIFFERENCE: "Any difference is smaller than δ: choose by other merits.",
    Decision.INCONCLUSIVE: "The data do not decide: take more forks and pairs, or a quieter machine.",
}


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, without exponents; "–" where there is none."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def interval_text(interval: Interval) -> str:
    """ "12.3 [12.1, 12.6]", or the middle alone where there are too few values for an interval."""
    low, middle, high = interval
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{number(middle)} (too few for an interval)"
    return f"{number(middle)} [{number(low)}, {number(high)}]"


def change_text(ratio: Interval) -> str:
    """A ratio as a change in percent with its interval."""
    low, middle, high = ((100 * (x - 1)) for x in ratio)
    if not (math.isfinite(low) and math.isfinite(high)) or ratio[0] == 0:
        return f"{middle:+.1f}% (too few for an interval)"
    return f"{middle:+.1f}% [{low:+.1f}, {high:+.1f}]"


def table_rows(rows: list[Row]) -> list[dict[str, str]]:
    """The table's rows as text, for Markdown and for a notebook's data frame."""
    return [
        {
            "metric": row.metric,
            "unit": row.unit,
            "baseline": interval_text(row.baseline),
            "candidate": interval_text(row.candidate),
            "Δ": change_text(row.ratio),
        }
        for row in rows
    ]


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys as a Markdown table."""
    if not rows:
        return "(no pair was kept)"
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row[key] for key in head) + " |" for row in rows])


def consistency_words(found: Consistency) -> str:
    """Part and whole, in a sentence."""
    return render("consistency.md.j2", c=found).strip()


def sentence(record: ComparisonRecord) -> str:
    """The verdict line: who against whom, the decision, the ratio with its interval, what stands behind it."""
    return f"{record.settings.candidate} against {record.settings.baseline}: {verdict_of(record)}"


def told(record: ComparisonRecord) -> list[str]:
    """The verdict's reasons, then what happened during the run, a sentence each."""
    return [*reasons(verdict_of(record)), *(event_words(event, record) for event in record.events)]


def reasons(verdict: Verdict) -> list[str]:
    """A verdict's reasons, a sentence each."""
    return [reason_words(reason, verdict) for reason in verdict.reasons]


def reason_words(reason: Reason, v: Verdict) -> str:
    """One reason as a sentence."""
    level, near = f"{1 - v.alpha:.1%} interval", f"{1 - 2 * v.alpha:.1%} interval"
    around = f"{near}, {v.equivalence[0]:.4f} to {v.equivalence[1]:.4f},"
    ends, delta = f"The {level} is {v.low:.4f} to {v.high:.4f}", f"delta, {v.delta:.1%},"
    which = "pairs of the A/A control" if reason.control else "pairs"
    ratio = change_text(reason.interval) if reason.interval else ""
    return {
        Why.CLEAR: f"{ends} and excludes 1; the estimate, {v.estimate:.4f}, is at least {delta} away from it.",
        Why.SMALL: f"{ends} and excludes 1; the estimate, {v.estimate:.4f}, is within {delta} of 1, but the {around} reaches beyond it.",
        Why.HOLDS_ONE: f"{ends} and holds 1, and the {around} reaches beyond {delta[:-1]}.",
        Why.WITHIN_DELTA: f"The {around} lies within {delta} of 1.",
        Why.NO_INTERVAL: f"One fork with so few pairs has no {level}.",
        Why.NO_PAIRS: "No pair is left to judge.",
        Why.FEW_PAIRS: f"Too few pairs: {reason.count} of at least {reason.of}.",
        Why.PAIRS_LOST: f"Too few pairs are left: {reason.count} of {reason.of}.",
        Why.CONTROL_DIFFERS: f"The A/A control, {ratio}, differs from 1 by itself: more than the change moves these times.",
        Why.NO_CONTROL: "No pair of the declared A/A control is left.",
        Why.PROVISIONAL: f"Provisional: {reason.count} of at least {reason.of} forks, so run it again with as many before acting on it.",
        Why.DROPPED: f"{reason.count} of {reason.of} {which} were dropped by the declared rule ({', '.join(reason.causes)}).",
        Why.NOT_TAKEN: f"{reason.count} of the {reason.of} planned pairs were taken.",
    }[reason.why]


def event_words(event: Event, record: ComparisonRecord) -> str:
    """What happened during the run, as a sentence."""
    if isinstance(event, ForkDied):
        said = event.last_words or "it said nothing"
        return (
            f"Fork {event.fork} ended with exit code {event.exit_code}: {said}; its finished pairs are kept."
        )
    changed = event.commit != record.environment.commit
    here = (event.commit or "an unknown commit")[:12] + " with changes" * bool(event.dirty)
    code = f", with the code at {here}" * changed
    return f"The run was resumed after {count(event.samples, 'pair')}{code}."


def difference_words(where: Difference | None) -> str:
    """ "identical", or where a near tie parted two decodes."""
    if where is None:
        return "identical"
    return (
        f"parted at a near tie: new token {where.position} is {where.left} in one and {where.right} in the other "
        f"({where.unit} margin {where.margin:.3g}, tolerance {where.tolerance:.3g})"
    )


def verdict_words(record: ComparisonRecord) -> str:
    """The verdict in words, its reasons, and how sure it is."""
    verdict = verdict_of(record)
    settings = record.settings
    lines = [f"**{sentence(record)}.**", "", MEANING[verdict.decision], ""]
    lines += [f"- {reason}" for reason in told(record)]
    lines.append(
        f"- Rule, declared before the run: δ = {settings.delta:.1%}, {1 - verdict.alpha:.1%} interval by {verdict.method}."
    )
    return "\n".join(lines)


def correctness_words(record: ComparisonRecord) -> str:
    """What was checked before anything was timed."""
    found = record.correctness
    ties = [s.difference for s in record.samples if s.difference]
    lines = [
        f"Both mask builders equal the reference on {found.random_trees} random trees. On prompt `{found.prompt}`, "
        f"{found.tokens} tokens against plain decoding: baseline {difference_words(found.baseline)}, candidate "
        f"{difference_words(found.candidate)}."
    ]
    pairs = len(record.samples)
    lines.append(f"In the {pairs} timed pairs the arms' tokens were identical in {pairs - len(ties)}" + (
        f"; the others parted at a near tie of logits ({difference_words(ties[0])})." if ties else "."))  # fmt: skip
    return " ".join(lines)


def control_words(record: ComparisonRecord) -> str:
    """What the baseline against itself came to, in the same pairs and processes."""
    forks = fork_pairs(record, control=True)
    if not forks:
        return "There was no A/A control."
    found = judge(forks, record.settings.delta, record.settings.alpha)
    count = f"{found.pairs} pair{'s' * (found.pairs != 1)} in {found.forks} fork{'s' * (found.forks != 1)}"
    return f"The A/A control, the baseline against itself in {count}, came to {change_text((found.low, found.estimate, found.high))}."


def ceiling_words(record: ComparisonRecord) -> str:
    """The part's share and what its removal could bring at most."""
    top = ceiling(record)
    if top is None:
        return "The mask's construction was not measured, so its ceiling is unknown."
    return (
        f"Mask construction takes {top.share:.2%} of the baseline's time ({top.calls:g} calls a run). A builder that took "
        f"no time at all would bring at most {top.gain:.2%} end to end."
    )


def machine_words(record: ComparisonRecord) -> str:
    """Machine, software and state, in one paragraph."""
    e = record.environment
    versions = ", ".join(f"{name} {version}" for name, version in e.versions.items() if version)
    state = {None: "unknown state", True: "uncommitted changes", False: "clean"}[e.dirty]
    return (
        f"{machine_key(e)}; {e.platform}; Python {e.python}; {versions}; commit {(e.commit or 'unknown')[:12]} "
        f"({state}); {e.cpu.torch_threads} threads, load {e.cpu.load_1min} at the start; {record.created:%Y-%m-%d %H:%M} UTC."
    )


def report(record: ComparisonRecord, picture: str | None = None) -> str:
    """The page as Markdown; `picture` is the file name of a chart that lies beside it."""
    s = record.settings
    consistent = consistency_of(record)
    tau = acceptance_length(record)
    parts = [
        f"# Is `{s.candidate}` faster than `{s.baseline}`?",
        f"Target {s.target}, draft head {Path(s.draft).name}, {s.device}, {s.dtype}; tree of {s.total_tokens} "
        f"draft tokens (depth {s.depth}, top_k {s.top_k}), {s.max_new_tokens} new tokens a run"
        + (f", acceptance length {tau:.2f}." if tau else "."),
        "## Verdict",
        verdict_words(record),
        *([f"![Candidate over baseline, pair by pair]({picture})"] if picture else []),
        "## Measured",
        markdown_table(table_rows(table(record))),
        "Medians with 95% intervals; Δ is the candidate against the baseline, from pairs. "
        + control_words(record),
        "## Correctness",
        correctness_words(record),
        "## Ceiling",
        ceiling_words(record),
        "## Consistency",
        consistency_words(consistent)
        if consistent
        else "The part was not measured, so it can't be held against the whole.",
        "## Machine",
        machine_words(record),
        "## Run it again",
        f"```\n{record.command or again(s)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def section(record: ComparisonRecord) -> str:
    """One comparison as a part of a page: verdict, table, ceiling and consistency."""
    consistent = consistency_of(record)
    parts = [f"**{sentence(record)}.**", markdown_table(table_rows(table(record))), ceiling_words(record)]
    return "\n\n".join([*parts, consistency_words(consistent)] if consistent else parts)


def write_report(
    record: ComparisonRecord, path: Path, picture: bytes | None = None, kind: str = "svg"
) -> Path:
    """Write the page at `path` (.md), with its chart beside it where there is one."""
    chart = path.with_suffix(f".{kind}")
    if picture is not None:
        chart.write_bytes(picture)
    path.write_text(report(record, chart.name if picture is not None else None), encoding="utf-8")
    return path
