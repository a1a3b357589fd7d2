"""Comparisons and verdicts as schema 1 had them, until the records that embed them are typed; then this file goes."""

from __future__ import annotations

import re
from typing import Any

from eagle_lab.measure.records import Difference
from eagle_lab.verdict.consistency import Consistency
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.stats import Verdict
from eagle_lab.verdict.summary import verdict_of

_TIE = re.compile(
    r"tie: new token (\d+) is (\d+) in one and (\d+) in the other; (\w+) margin (\S+), tolerance (\S+): .*"
)


def difference(words: str | None) -> Difference | None:
    """The fields of "tie: new token 6 is 288 in one and 281 in the other; logit margin 0.125, tolerance 0.295: …"."""
    if words is None or words == "identical":
        return None
    position, left, right, unit, margin, tolerance = _TIE.fullmatch(words).groups()  # type: ignore[union-attr]
    return Difference.model_validate(
        {
            "position": position,
            "left": left,
            "right": right,
            "unit": unit,
            "margin": margin,
            "tolerance": tolerance,
        }
    )


def words(where: Difference | None) -> str:
    """The inverse of `difference`."""
    if where is None:
        return "identical"
    return (
        f"tie: new token {where.position} is {where.left} in one and {where.right} in the other; {where.unit} margin "
        f"{where.margin:.3g}, tolerance {where.tolerance:.3g}: a tie within the arithmetic's error"
    )


def comparison(old: dict[str, Any] | ComparisonRecord) -> ComparisonRecord:
    """A comparison's record from its dict, of schema 1 or 2."""
    if isinstance(old, ComparisonRecord):
        return old
    if "kind" not in old:
        return ComparisonRecord.model_validate(old)
    checked = old["correctness"]
    found: dict[str, Any] = {
        **{
            k: old[k]
            for k in ("created", "command", "settings", "parts", "finished", "stopped_early")
            if k in old
        },
        "environment": {k: x for k, x in old["environment"].items() if k != "machine"},
        "correctness": {
            **{k: checked[k] for k in ("random_trees", "prompt", "tokens")},
            **{arm: difference(checked[f"{arm}_against_plain"]) for arm in ("baseline", "candidate")},
        },
        "samples": [
            {**s, "dropped": s["dropped"] or (), "difference": difference(s.get("difference"))}
            for s in old["samples"]
        ],
    }
    record = ComparisonRecord.model_validate(found)
    record.verdict = verdict_of(record) if record.finished else None
    return record


def verdict(old: dict[str, Any]) -> Verdict:
    """A verdict from its dict, of schema 1 (whose reasons were sentences, and are left out) or 2."""
    if not any(isinstance(reason, str) for reason in old["reasons"]):
        return Verdict.model_validate(old)
    method = {"t": "t over forks", "e": "signed rank"}.get(old["method"][len("Hodges-Lehmann, ")], "none")
    return Verdict.model_validate({**old, "reasons": (), "method": method})


def consistency_words(found: Consistency) -> str:
    """Part and whole in a sentence."""
    end = {
        True: "which the part accounts for.",
        False: f"so something else moved by {_ms(found.unexplained)}.",
        None: "which is too wide to tell.",
    }[found.accounts]
    return (
        f"{_ms(found.part)} a call in {found.calls:g} calls makes {_ms(found.expected)}; the whole changed by "
        f"{_ms(found.whole)}, {end}"
    )


def _ms(x: tuple[float, float, float]) -> str:
    low, at, high = (1e3 * y for y in x)
    return f"{at:+.2f} ms" + (f" [{low:+.2f}, {high:+.2f}]" if low != high else "")
