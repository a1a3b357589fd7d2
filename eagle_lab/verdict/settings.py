"""What a comparison was asked to do: checked before any work, and written down so that it can be done again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle_lab.models.pair import DEFAULT_DRAFT, DEFAULT_TARGET, Pair, project_path
from eagle_lab.models.prompts import Prompt, brought
from eagle_lab.verdict.stats import look_alpha


def check_counts(
    iterations: int, forks: int | None, delta: float, alpha: float, seed: int, looks: Sequence[int]
) -> None:
    """ValueError, one sentence, for counts and thresholds that make no comparison."""
    for name, value in (("iterations", iterations), ("forks", 1 if forks is None else forks)):
        if not _whole(value) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if forks is not None and forks > iterations:
        raise ValueError(
            f"forks is {forks}, but {iterations} iterations give each fork less than a pair; lower forks."
        )
    if not _number(delta) or not 0 < delta < 1:
        raise ValueError(f"delta is {delta!r}; it must lie between 0 and 1 (0.01 for 1%).")
    if not _number(alpha) or not 0 < alpha < 0.5:
        raise ValueError(f"alpha is {alpha!r}; it must lie between 0 and 0.5.")
    if not _whole(seed) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; it must be a whole number.")
    if not isinstance(looks, Sequence) or not all(_whole(look) for look in looks):
        raise ValueError(f"looks is {looks!r}; it must be rising numbers of pairs, such as 10, 15, 20.")
    if looks:
        look_alpha(alpha, looks)
        if looks[-1] != iterations:
            raise ValueError(
                f"the last look is at {looks[-1]} pairs, but {iterations} are planned; end looks with {iterations}."
            )


def check_spans(spans: object) -> None:
    """ValueError where it isn't a (baseline, candidate) pair of booleans."""
    if not isinstance(spans, tuple | list) or [type(x) for x in spans] != [bool, bool]:
        raise ValueError(f"spans is {spans!r}; it must say True or False for (baseline, candidate).")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def control_forks(forks: int) -> int:
    """A/A control forks: a quarter of the forks; none where this process measures alone (it is provisional anyway)."""
    return math.ceil(forks / 4) if forks > 1 else 0


def of_pair(pair: Pair) -> dict[str, Any]:
    """The pair as a record has it: names that read the same on every machine, and what else `load` was told."""
    found: dict[str, Any] = {
        "target": project_path(pair.target_name),
        "draft": project_path(pair.draft_name),
        "embedded": pair.target_name == DEFAULT_TARGET and Path(pair.draft_name) == DEFAULT_DRAFT,
        "device": str(pair.device),
        "dtype": str(pair.dtype).removeprefix("torch."),
    }
    asked = {name: pair.origin.get(name) for name in ("device_map", "tp_plan", "trust_remote_code")}
    load = {name: x if isinstance(x, str | bool) else str(x) for name, x in asked.items() if x}
    return found | ({"load": load} if load else {})


def of_prompts(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Prompts by id, and the token ids of those that aren't the kit's own: a record must be enough to decode them again."""
    own = brought(prompts)
    return {"prompts": [p.id for p in prompts]} | ({"own_prompts": own} if own else {})
