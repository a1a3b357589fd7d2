"""A comparison's record → one Markdown page for a pull request. The record alone is enough, on any machine."""

from __future__ import annotations

import math
from pathlib import Path

from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.old_records import Record, RecordError
from eagle_lab.verdict.stats import Decision, judge
from eagle_lab.verdict.summary import (
    Interval,
    Row,
    acceptance_length,
    again,
    ceiling,
    consistency_of,
    fork_pairs,
    sentence,
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


def verdict_words(record: Record) -> str:
    """The verdict in words, its reasons, and how sure it is."""
    verdict = verdict_of(record)
    settings = record["settings"]
    lines = [f"**{sentence(record)}.**", "", MEANING[verdict.decision], ""]
    lines += [f"- {reason}" for reason in verdict.reasons]
    lines.append(
        f"- Rule, declared before the run: δ = {settings['delta']:.1%}, {1 - verdict.alpha:.1%} interval by {verdict.method}."
    )
    return "\n".join(lines)


def correctness_words(record: Record) -> str:
    """What was checked before anything was timed."""
    found = record["correctness"]
    ties = [s["difference"] for s in record["samples"] if s.get("difference")]
    lines = [
        f"Both mask builders equal the reference on {found['random_trees']} random trees. On prompt `{found['prompt']}`, "
        f"{found['tokens']} tokens against plain decoding: baseline {found['baseline_against_plain']}, candidate "
        f"{found['candidate_against_plain']}."
    ]
    pairs = len(record["samples"])
    lines.append(f"In the {pairs} timed pairs the arms' tokens were identical in {pairs - len(ties)}" + (
        f"; the others parted at a near tie of logits ({ties[0]})." if ties else "."))  # fmt: skip
    return " ".join(lines)


def control_words(record: Record) -> str:
    """What the baseline against itself came to, in the same pairs and processes."""
    forks = fork_pairs(record, control=True)
    if not forks:
        return "There was no A/A control."
    found = judge(forks, record["settings"]["delta"], record["settings"]["alpha"])
    count = f"{found.pairs} pair{'s' * (found.pairs != 1)} in {found.forks} fork{'s' * (found.forks != 1)}"
    return f"The A/A control, the baseline against itself in {count}, came to {change_text((found.low, found.estimate, found.high))}."


def ceiling_words(record: Record) -> str:
    """The part's share and what its removal could bring at most."""
    top = ceiling(record)
    if top is None:
        return "The mask's construction was not measured, so its ceiling is unknown."
    return (
        f"Mask construction takes {top.share:.2%} of the baseline's time ({top.calls:g} calls a run). A builder that took "
        f"no time at all would bring at most {top.gain:.2%} end to end."
    )


def machine_words(record: Record) -> str:
    """Machine, software and state, in one paragraph."""
    e = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    state = {None: "unknown state", True: "uncommitted changes", False: "clean"}[e["dirty"]]
    return (
        f"{machine_key(e)}; {e['platform']}; Python {e['python']}; {versions}; commit {(e['commit'] or 'unknown')[:12]} "
        f"({state}); {e['cpu']['torch_threads']} threads, load {e['cpu']['load_1min']} at the start; {record['created']}."
    )


def report(record: Record, picture: str | None = None) -> str:
    """The page as Markdown; `picture` is the file name of a chart that lies beside it.

    Raises RecordError where the record is no comparison.
    """
    if record["kind"] != "comparison":
        raise RecordError(f"this record is a {record['kind']}; a report is written from a comparison.")
    s = record["settings"]
    consistent = consistency_of(record)
    tau = acceptance_length(record)
    parts = [
        f"# Is `{s['candidate']}` faster than `{s['baseline']}`?",
        f"Target {s['target']}, draft head {Path(s['draft']).name}, {s['device']}, {s['dtype']}; tree of {s['total_tokens']} "
        f"draft tokens (depth {s['depth']}, top_k {s['top_k']}), {s['max_new_tokens']} new tokens a run"
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
        consistent.words
        if consistent
        else "The part was not measured, so it can't be held against the whole.",
        "## Machine",
        machine_words(record),
        "## Run it again",
        f"```\n{record.get('command') or again(s)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def write_report(record: Record, path: Path, picture: bytes | None = None, kind: str = "svg") -> Path:
    """Write the page at `path` (.md), with its chart beside it where there is one."""
    chart = path.with_suffix(f".{kind}")
    if picture is not None:
        chart.write_bytes(picture)
    path.write_text(report(record, chart.name if picture is not None else None), encoding="utf-8")
    return path
