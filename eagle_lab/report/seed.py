"""The first investigation's redone experiments in tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import pandas as pd

from eagle_lab.measure.old_records import Record
from eagle_lab.studies.breakdown import random_weights
from eagle_lab.studies.seed_claims import weights_words
from eagle_lab.verdict.old_form import comparison
from eagle_lab.verdict.summary import table


def seed_overview(records: Mapping[str, Record]) -> pd.DataFrame:
    """One row for each metric of each redone investigation: both arms and candidate / baseline, with intervals."""
    rows: list[dict[str, Any]] = []
    for name, r in records.items():
        for row in table(comparison(r["comparison"])):
            if row.metric == "throughput" and random_weights(r["settings"]["target"]):
                continue  # tokens of random weights: what they accept says nothing
            rows.append(
                {
                    "record": name,
                    "target": weights_words(r),
                    "metric": f"{row.metric}, {row.unit}",
                    "rebuild": _interval(row.baseline),
                    "incremental": _interval(row.candidate),
                    "candidate / baseline": _interval(row.ratio),
                }
            )
    return pd.DataFrame(rows)


def seed_settings(records: Mapping[str, Record]) -> pd.DataFrame:
    """One row for each redone investigation: pairs, fresh processes, control, and how long its decodes were."""
    rows = []
    for name, r in records.items():
        compared = comparison(r["comparison"])
        s, samples = compared.settings, compared.samples
        kept = [sample for sample in samples if not sample.control]
        stated = r["settings"].get("stated_acceptance")
        rows.append(
            {
                "record": name,
                "pairs": len(kept),
                "processes": len({sample.fork for sample in kept}),
                "pairs of the A/A control": len(samples) - len(kept),
                "tokens a decode": s.max_new_tokens,
                "cycles a decode": median(sample.cycles for sample in kept),
                "reckoned as": f"{r['settings']['tokens_reckoned_with']} tokens at {stated:g} a cycle"
                if stated
                else "–",
            }
        )
    return pd.DataFrame(rows)


def _interval(found: tuple[float, float, float]) -> str:
    low, at, high = found
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{at:.4g} (too few for an interval)"
    return f"{at:.4g} [{low:.4g}, {high:.4g}]"
