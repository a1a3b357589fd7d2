"""The first investigation in tables and words: what it published, its experiment done again, each claim's finding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from eagle_lab.measure.records import RESULTS, committed
from eagle_lab.report.page import consistency_words
from eagle_lab.report.words import change, render, spread
from eagle_lab.studies import seed as study
from eagle_lab.studies.breakdown import random_weights
from eagle_lab.studies.profile import ProfileRecord
from eagle_lab.studies.seed import Published, SeedRecord
from eagle_lab.studies.sweep import SweepRecord
from eagle_lab.verdict.summary import consistency_of, counted, table, verdict_of

Seeds = Mapping[str, SeedRecord]


def table_published(p: Published) -> list[dict[str, str]]:
    """The table as it was published, an arm a row."""
    return [
        {
            "arm": arm.strategy,
            "E2E latency, ms": f"{arm.latency_ms:,.2f}",
            "mask construction, a call, ms": f"{arm.mask_ms_per_call:.2f}",
            "output throughput, tokens/s": f"{arm.tokens_per_second:.2f}",
            "mask's share of the time": f"{arm.mask_share:.0%}",
        }
        for arm in p.arms.values()
    ]


def arithmetic(p: Published) -> str:
    """Every derived figure worked out again from the others, and whether they fit, as Markdown."""
    return render("seed_arithmetic.md.j2", p=p, a=study.audit(p))


def overview(seeds: Seeds) -> list[dict[str, str]]:
    """Both arms and the change, a row for each metric and record.

    Throughput is left out where the weights are random: what they accept says nothing.
    """
    return [
        {
            "record": name, "metric": f"{row.metric}, {row.unit}", "rebuild": spread(row.baseline),
            "incremental": spread(row.candidate), "change": change(row.ratio),
        }
        for name, r in seeds.items()
        for row in table(r.comparison)
        if row.metric != "output throughput" or not random_weights(r.settings.target)
    ]  # fmt: skip


def settings(seeds: Seeds) -> list[dict[str, Any]]:
    """Pairs, processes and control of each record, and how long its decodes were."""
    rows = []
    for name, r in seeds.items():
        kept, control = counted(r.comparison), counted(r.comparison, control=True)
        stated = r.settings.stated_acceptance
        rows.append(
            {
                "record": name, "pairs": len(kept), "processes": len({s.fork for s in kept}), "A/A pairs": len(control),
                "tokens a decode": r.comparison.settings.max_new_tokens,
                "cycles a decode": f"{median(s.cycles or 0 for s in kept):g}",
                "stands for": f"{r.settings.tokens} tokens at {stated:g} a cycle" if stated else "itself",
            }
        )  # fmt: skip
    return rows


def redone(seeds: Seeds) -> str:
    """Each verdict, and whether the mask accounts for it, as Markdown."""
    rows = []
    for r in seeds.values():
        found = consistency_of(r.comparison)
        rows.append((r, verdict_of(r.comparison), consistency_words(found, r.comparison) if found else None))
    return render("seed_redone.md.j2", rows=rows, short=study.short)


def claims(p: Published, seeds: Seeds, folder: str | Path = RESULTS) -> str:
    """Claim, ours on a CPU and on a GPU, finding: a line each, and below it why, as Markdown."""
    others = committed(ProfileRecord, Path(folder)), committed(SweepRecord, Path(folder))
    cpu, gpu = (study.ours(on_gpu, seeds, *others) for on_gpu in (False, True))
    found = study.findings(p, cpu, gpu)
    tally = {finding: list(found.values()).count(finding) for finding in study.Finding}
    return render(
        "seed_claims.md.j2", p=p, a=study.audit(p), cpu=cpu, gpu=gpu, found=found, tally=tally, large=study.LARGE
    )  # fmt: skip
