"""How many tokens a draft head gets accepted: τ overall, by category, by depth in the tree and by size of the tree.

τ is the field's mean acceptance length. A greedy decode has no noise of its own: the intervals are those of the choice of
prompts, each prompt one sample of (tokens, cycles).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats

from eagle_lab.decode.generate import Cycle, generate, tau
from eagle_lab.measure.records import Part, Record
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt, prepare
from eagle_lab.runtime.progress import progress as bar_of

SIZES = (63, 31, 15, 7)


class AcceptanceSettings(Part):
    """How acceptance was measured: new tokens a prompt, the tree, the number of prompts, and how it was decoded.

    `temperature`: 0 is greedy. `device`: cpu or cuda, None in records from before it was kept.
    """

    max_new_tokens: int
    top_k: int
    depth: int
    total_tokens: int
    prompts: int
    strategy: str
    temperature: float = 0.0
    device: str | None = None


class Depth(Part):
    """A depth of the tree, from 1: the cycles that reached it (all shallower levels accepted), and the share of those
    in which a token of this depth was accepted."""

    depth: int
    reached: int
    accepted: float


class Estimate(Part):
    """A value with its 95% confidence interval over so many prompts."""

    value: float
    low: float
    high: float
    prompts: int


class Acceptance(Part):
    """What a head gets accepted: τ is the mean of tokens committed a cycle, the bonus token counted.

    τ of a group is over all its cycles together, so a prompt weighs by its length. `by_tree_size` is by draft nodes,
    the root not counted; all else is of the first size. `lengths` has, of each prompt, how many cycles committed 1, 2, …
    tokens (None in records from before it was kept); what is derived from it is a property.
    """

    settings: AcceptanceSettings
    tau: float
    cycles: int
    by_category: dict[str, float]
    by_depth: list[Depth]
    by_prompt: dict[str, float]
    by_tree_size: dict[int, float]
    lengths: dict[str, list[int]] | None

    @property
    def interval(self) -> Estimate | None:
        """τ with its interval over prompts; None without `lengths` or with one prompt."""
        if self.lengths is None or len(self.lengths) < 2:
            return None
        return _estimate(*_influence(self.lengths))

    def on(self, prompts: Collection[str]) -> Estimate | None:
        """τ over some of the prompts, with its interval; None without `lengths` or where one of them is missing."""
        if self.lengths is None or not set(prompts) <= set(self.lengths):
            return None
        return _estimate(*_influence({prompt: self.lengths[prompt] for prompt in prompts}))

    @property
    def mean_over_requests(self) -> float:
        """The mean of the prompts' own τ: each prompt weighs the same."""
        return sum(self.by_prompt.values()) / len(self.by_prompt)

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted drafts by drafted ones; every node of the tree is drafted."""
        return (self.tau - 1) / self.settings.total_tokens

    @property
    def acceptance_by_position(self) -> list[float]:
        """The share of all cycles that accepted a draft at depth 1, 2, …; `by_depth` has that of those that got there."""
        return [level.accepted * level.reached / self.cycles for level in self.by_depth]


class Difference(Part):
    """τ of one head less that of another, paired by prompt."""

    tau: Estimate
    by_prompt: dict[str, float]


class Beside(Part):
    """The other head of a comparison, decoding the same prompts; `difference` is the record's own head less this one."""

    draft: str
    acceptance: Acceptance
    difference: Difference


class AcceptanceRecord(Record):
    """What a head gets accepted, measured by itself or beside another."""

    schema_name: Literal["eagle_lab.acceptance.v2"] = Field("eagle_lab.acceptance.v2", alias="schema")
    target: str
    draft: str
    acceptance: Acceptance
    beside: Beside | None = None


def by_depth(cycles: Sequence[Cycle], depth: int) -> list[Depth]:
    """What is accepted at each depth of the tree, to one below its deepest level."""
    found = []
    for level in range(1, depth + 2):
        reached = sum(len(c.committed) >= level for c in cycles)
        accepted = sum(len(c.committed) > level for c in cycles)
        found.append(
            Depth(depth=level, reached=reached, accepted=round(accepted / reached, 4) if reached else 0.0)
        )
    return found


def acceptance(
    pair: Pair,
    prompts: str | Sequence[str | Prompt | Sequence[int]] = "heldout",
    max_new_tokens: int = 128,
    top_k: int = 10,
    depth: int = 7,
    sizes: Sequence[int] = SIZES,
    strategy: str = "rebuild",
    progress: bool = True,
    temperature: float = 0.0,
) -> Acceptance:
    """Decode the prompts and count what is accepted; the first of `sizes` is the tree that is reported in full.

    Args: prompts: as for `eagle_lab.models.prompts.prepare`; sizes: draft nodes of the trees, root not counted;
    strategy: how to decode, which changes the time and nothing else; progress: show a bar; temperature: 0 is greedy,
    else the seed of each prompt's random numbers is its place in the list.
    Raises ValueError where there is no size, and as `generate` does.
    """
    chosen = prepare(pair.tokenizer, prompts)
    if not sizes:
        raise ValueError("sizes is empty; give at least one number of draft nodes.")
    runs: dict[int, list[list[Cycle]]] = {}
    with bar_of(len(chosen) * len(sizes), "run", "acceptance", shown=progress) as bar:
        for size in sizes:
            runs[size] = []
            for seed, prompt in enumerate(chosen):
                done = generate(
                    pair, prompt.ids, max_new_tokens, strategy=strategy, record=False, top_k=top_k, depth=depth,
                    total_tokens=size, temperature=temperature, seed=seed,
                )  # fmt: skip
                runs[size].append(done.cycles)
                bar.update()
    full = runs[sizes[0]]
    categories: dict[str, list[Cycle]] = defaultdict(list)
    for prompt, cycles in zip(chosen, full, strict=True):
        categories[prompt.category] += cycles
    every = [cycle for cycles in full for cycle in cycles]
    settings = AcceptanceSettings(
        max_new_tokens=max_new_tokens, top_k=top_k, depth=depth, total_tokens=sizes[0], prompts=len(chosen),
        strategy=strategy, temperature=temperature, device=pair.device.type,
    )  # fmt: skip
    return Acceptance(
        settings=settings,
        tau=round(tau(every), 4),
        cycles=len(every),
        by_category={name: round(tau(cycles), 4) for name, cycles in categories.items()},
        by_depth=by_depth(every, depth),
        by_prompt={p.id: round(tau(cycles), 4) for p, cycles in zip(chosen, full, strict=True)},
        by_tree_size={n: round(tau([c for cycles in runs[n] for c in cycles]), 4) for n in sizes},
        lengths={p.id: committed_lengths(c, depth + 2) for p, c in zip(chosen, full, strict=True)},
    )


def committed_lengths(cycles: Sequence[Cycle], most: int) -> list[int]:
    """How many of the cycles committed 1, 2, … `most` tokens."""
    return [sum(len(c.committed) == n for c in cycles) for n in range(1, most + 1)]


def difference(one: Acceptance, other: Acceptance) -> Difference:
    """How much more of `one` is accepted than of `other`, with the interval of the difference paired by prompt.

    Raises ValueError where they weren't measured alike, on the same prompts (at least two), or have no counts by prompt.
    """
    alike = [a.settings.model_dump(exclude={"strategy", "device"}) for a in (one, other)]
    if differing := [name for name in alike[0] if alike[0][name] != alike[1][name]]:
        raise ValueError(
            f"the two heads were measured with different {', '.join(differing)}; measure them alike."
        )
    if one.lengths is None or other.lengths is None:
        raise ValueError(
            "a record has no counts by prompt, so no difference can be paired; measure the head anew."
        )
    if set(one.lengths) != set(other.lengths):
        raise ValueError("the two heads were measured on different prompts; measure them on the same ones.")
    if len(one.lengths) < 2:
        raise ValueError("one prompt has no interval; give at least two.")
    mine, my_influence = _influence(one.lengths)
    theirs, their_influence = _influence({prompt: other.lengths[prompt] for prompt in one.lengths})
    return Difference(
        tau=_estimate(mine - theirs, my_influence - their_influence),
        by_prompt={p: round(one.by_prompt[p] - other.by_prompt[p], 4) for p in one.by_prompt},
    )


def _influence(lengths: dict[str, list[int]]) -> tuple[float, NDArray[np.float64]]:
    """τ, and how far each prompt moves it: the linearised ratio of two sums (Cochran, Sampling Techniques, 6.4)."""
    counts = np.array(list(lengths.values()), dtype=np.float64)
    cycles = counts.sum(1)
    tokens = counts @ np.arange(1, counts.shape[1] + 1)
    value = tokens.sum() / cycles.sum()
    return float(value), (tokens - value * cycles) / cycles.mean()


def _estimate(value: float, influence: NDArray[np.float64]) -> Estimate:
    """The t interval of a value that is a mean over prompts up to linearisation."""
    count = len(influence)
    half = float(stats.t.ppf(0.975, count - 1) * influence.std(ddof=1) / math.sqrt(count))
    return Estimate(
        value=round(value, 4), low=round(value - half, 4), high=round(value + half, 4), prompts=count
    )
