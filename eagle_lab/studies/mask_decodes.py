"""What a mask builder, or any other strategy, brings in whole decodes: `compare` on a sweep's device, both gains in words.

A builder's gain alone says something about whole decodes only where the two strategies differ in nothing but the mask;
elsewhere the verdict stands by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eagle_lab.decode.strategy import check, parse
from eagle_lab.measure.old_records import Record
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.studies import sweep_summary as sweep_report
from eagle_lab.studies.sweep_summary import BASELINE
from eagle_lab.verdict.compare import compare
from eagle_lab.verdict.old_form import comparison
from eagle_lab.verdict.summary import ceiling, verdict_of

NODES = 63


def alone(baseline: str, candidate: str) -> str | None:
    """The builder whose gain alone may stand beside the candidate's gain in whole decodes; None where the strategies
    differ in more than the mask, or the baseline's mask isn't the one that a sweep holds builders against."""
    one, other = parse(baseline), parse(candidate)
    return other.mask if one.mask == BASELINE and replace(one, mask=other.mask) == other else None


def able(baseline: str, builders: Sequence[str], device: torch.device | str) -> list[str]:
    """Of the builders, those that can build the baseline's mask on the device, its other choices as they are."""
    plan, found = parse(baseline), []
    for name in builders:
        try:
            check(replace(plan, mask=name), device)
        except ValueError:
            continue
        found.append(name)
    return found


def check_arms(
    baseline: str | None, candidate: str | None, builders: Sequence[str], device: torch.device | str
) -> None:
    """ValueError where `in_decodes` would refuse its strategies after the sweep; so it is called before."""
    check(baseline or BASELINE, device)
    if candidate:
        check(candidate, device)
    elif not able(baseline or BASELINE, builders, device):
        raise ValueError(
            f"none of {', '.join(builders)} can build the mask of {baseline or BASELINE} on {device}; name a candidate."
        )


def best_candidate(record: Record, baseline: str, nodes: int, device: torch.device | str) -> str:
    """The baseline with the sweep's fastest builder that goes with it, at the swept size nearest to `nodes`.

    Raises ValueError where the sweep has no number.
    """
    size = min(record["settings"]["sizes"], key=lambda n: abs(n - nodes))
    top = sweep_report.best(record, size, among=able(baseline, record["settings"]["builders"], device))
    if top is None:
        raise ValueError(
            f"the sweep has no builder with a time at {size} nodes that goes with {baseline} on {device}."
        )
    return str(replace(parse(baseline), mask=top[0])).removeprefix("mask=")


def in_decodes(
    record: Record,
    pair: Pair,
    *,
    baseline: str | None = None,
    candidate: str | None = None,
    nodes: int = NODES,
    iterations: int = 20,
    forks: int = 1,
    max_new_tokens: int = 32,
    prompts: str | Sequence[str | Prompt | Sequence[int]] = "heldout",
    seed: int = 0,
    results_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Two strategies in whole decodes on the sweep's device; → JSON values.

    Args: baseline: None for `rebuild`; candidate: None for the baseline with the sweep's fastest builder.
    Returns "builder" (the candidate's, where its gain alone may stand beside; else None), "nodes" and "comparison", the
    record of the comparison. Raises ValueError where the sweep has no number.
    """
    first = baseline or BASELINE
    second = candidate or best_candidate(record, first, nodes, pair.device)
    done = compare(
        pair, baseline=first, candidate=second, total_tokens=nodes, iterations=iterations, forks=forks,
        max_new_tokens=max_new_tokens, prompts=prompts, seed=seed, results_dir=results_dir, progress=False,
    )  # fmt: skip
    return {
        "builder": alone(first, second),
        "nodes": nodes,
        "comparison": done.record.model_dump(mode="json"),
    }


def whole_words(record: Record) -> str:
    """The gain alone beside the gain in whole decodes, and the most that it could have been, as Markdown.

    Where the two strategies don't differ in the mask alone, it is the verdict with their names.
    """
    found = record.get("end_to_end")
    if not found:
        return "What the best builder brings in whole decodes is not measured yet."
    name, nodes, compared = found["builder"], found["nodes"], comparison(found["comparison"])
    arms = compared.settings.baseline, compared.settings.candidate
    # a builder against `rebuild`, and nothing else, is told by the sentence on the builder alone
    who = "" if arms == (BASELINE, name) else f", `{arms[1]}` against `{arms[0]}`"
    words = sweep_report.beside(record, name, nodes, verdict_of(compared), who)
    target = compared.settings.target.rpartition("/")[2]
    top = ceiling(compared) if name else None
    most = (
        f" The mask takes {top.share:.2%} of a decode, so no builder could bring more than {top.gain:.2%}."
        if top
        else ""
    )
    return f"{words}{most} ({target}, {compared.settings.dtype})"
