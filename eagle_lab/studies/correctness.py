"""The proof for a pair: that EAGLE-3 decodes what the target alone decodes, greedily and in distribution.

Each check passes, fails or is skipped with a reason; `require` raises where one failed. The checks are not timed, and
stand on what is independent of them: a slow reference for the masks, the target's own decoding without a head,
transformers' own forward without a cache or a tree.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from scipy.stats import chisquare
from torch import Tensor

from eagle_lab.decode.generate import Cycle, decode, decode_plain, tau
from eagle_lab.decode.masks import MASK_BUILDERS, rebuild
from eagle_lab.decode.prefill import logits_after
from eagle_lab.decode.sampling import Sampling, accept, distribution, draw
from eagle_lab.decode.strategy import Decoding, parse, unavailable
from eagle_lab.decode.strategy import check as check_strategy
from eagle_lab.measure.records import Difference
from eagle_lab.models.pair import Pair, check_device
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.agreement import agree
from eagle_lab.verdict.mask_check import check as check_builder

LEAST = 1e-4  # a chi-square less probable fails; with a fixed seed a correct pair fails once in 10,000 pairs
CHUNK = 20_000  # draws that go through acceptance at once


class IncorrectPair(RuntimeError):
    """At least one check failed; the message names them."""


class Outcome(StrEnum):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class MaskCheck:
    """A mask builder against the reference, on so many trees. fault: what is wrong, or why it can't run here."""

    builder: str
    outcome: Outcome
    trees: int = 0
    fault: str | None = None

    @property
    def name(self) -> str:
        """What was checked."""
        return f"mask {self.builder}"


@dataclass(frozen=True)
class DecodingCheck:
    """Decoding by a strategy against the target alone. differences: by prompt, where a near tie parted them; the last
    one failed the check where it failed."""

    decoding: Decoding
    outcome: Outcome
    prompts: int
    tokens: int
    differences: tuple[tuple[str, Difference], ...]

    @property
    def sampled(self) -> bool:
        """Whether tokens were drawn."""
        return self.decoding.sampling.temperature > 0

    @property
    def name(self) -> str:
        """What was checked."""
        return f"{'sampled decoding, same seed' if self.sampled else 'greedy decoding'}, {self.decoding.strategy}"


@dataclass(frozen=True)
class DistributionCheck:
    """Chi-squares of draws on a real tree: (after which token, None for the first; p). forward: the expectation is of
    transformers' own forward, else of the tree's own logits. Fails where a p is not above `least`."""

    draws: int
    forward: bool
    p_values: tuple[tuple[int | None, float], ...]
    least: float = LEAST
    name: str = "sampling's distribution"

    @property
    def outcome(self) -> Outcome:
        """Failed where one of the draws is too improbable."""
        return Outcome.PASSED if all(p > self.least for _, p in self.p_values) else Outcome.FAILED


@dataclass(frozen=True)
class CyclesCheck:
    """Whether each cycle starts where the last ended, on a path of its tree; fault: the prefix of the first that
    doesn't ("gap") or commits what is no path ("path")."""

    cycles: int
    fault: tuple[Literal["gap", "path"], int] | None = None
    name: str = "cycles fit together"

    @property
    def outcome(self) -> Outcome:
        """Failed where one has a fault."""
        return Outcome.FAILED if self.fault else Outcome.PASSED


Check = MaskCheck | DecodingCheck | DistributionCheck | CyclesCheck


def arms(strategy: str, beside: str | None, device: str | torch.device | None) -> list[str]:
    """The strategies that are held against plain decoding, checked before anything is loaded.

    Raises ValueError for one that can't run on the device (None: the best one), and where both are the same.
    """
    chosen = [strategy] if beside is None else [strategy, beside]
    plans = [check_strategy(one, check_device(device)) for one in chosen]
    if len(set(plans)) < len(plans):
        raise ValueError(f"beside is {beside!r}, the same as the strategy; name another one, or none.")
    return chosen


def builders(pair: Pair, cycles: Sequence[Cycle]) -> list[MaskCheck]:
    """Every mask builder against the reference, on all small trees, random ones and those of `cycles`."""
    recorded = [cycle.parents[1:] for cycle in cycles if cycle.parents]
    found = []
    for name, build in MASK_BUILDERS.items():
        reason = unavailable("mask", name, pair.device)
        if reason:
            found.append(MaskCheck(name, Outcome.SKIPPED, fault=reason))
            continue
        seen = check_builder(build, recorded, pair.device, name=name)
        outcome = Outcome.PASSED if seen.ok else Outcome.FAILED
        found.append(MaskCheck(name, outcome, seen.trees, seen.fault))
    return found


def exact(pair: Pair) -> bool:
    """Whether identity is demanded: float32 on the CPU. Elsewhere near ties of logits may fall either way."""
    return pair.dtype == torch.float32 and pair.device.type == "cpu"


def against_plain(
    pair: Pair, prompts: Sequence[Prompt], decoding: Decoding, plain: str | None = None
) -> tuple[DecodingCheck, list[list[Cycle]]]:
    """EAGLE-3 against plain decoding, prompt by prompt, sampled with the same seed → the check, each prompt's cycles.

    Args: plain: strategy of the plain decoding, None for the same. A failed check ends early.
    """
    alone = decoding if plain is None else dataclasses.replace(decoding, strategy=parse(plain))
    runs: list[list[Cycle]] = []
    differences: list[tuple[str, Difference]] = []
    outcome, tokens = Outcome.PASSED, 0
    for prompt in prompts:
        wanted = decode_plain(pair, prompt.ids, alone).tokens
        eagle = decode(pair, prompt.ids, decoding)
        runs.append(eagle.cycles)
        tokens += len(wanted)
        where = agree(pair, prompt.ids, eagle.tokens, wanted, decoding)
        if where is not None:
            differences.append((prompt.id, where))
            if exact(pair) or not where.tie:
                outcome = Outcome.FAILED
                break
    return DecodingCheck(decoding, outcome, len(runs), tokens, tuple(differences)), runs


def node_logits(pair: Pair, before: Sequence[int], cycle: Cycle, attention: str) -> Tensor:
    """The target's logits at each node of a cycle's tree, in one forward under the tree mask, float32 [n + 1, V]."""
    tokens, depths = (torch.tensor([ids], device=pair.device) for ids in (cycle.tokens, cycle.depths))
    prompt = torch.tensor([list(before)], device=pair.device)
    mask = rebuild(torch.tensor(cycle.parents[1:])).to(pair.device)[None]
    return logits_after(pair, prompt, tokens, depths, mask, attention)


@torch.inference_mode()
def sampling_distribution(
    pair: Pair, prompt: Prompt, cycle: Cycle, new_tokens: Sequence[int], decoding: Decoding, draws: int
) -> DistributionCheck:
    """Chi-square of the first two tokens that acceptance gives on a real tree, `draws` times, against the target's own.

    new_tokens: what was decoded before the cycle's root; decoding: its sampling, its seed, and the attention of its
    strategy. In float32 the expectation comes from transformers' forward of the plain text, so it checks the tree's
    attention too; in half precision, where that differs in the last bits and so many draws would show it, from the
    tree's own logits.
    """
    sampling, before = decoding.sampling, [*prompt.ids, *new_tokens]
    logits = node_logits(pair, before, cycle, decoding.strategy.attention)
    root, second = draw_from_tree(logits, cycle, sampling, draws, decoding.seed or 0)
    forward = pair.dtype == torch.float32

    def expected(node: int, ids: list[int]) -> Tensor:
        if not forward:
            return distribution(logits[node], sampling).cpu()
        text = torch.tensor([[*before, *ids]], device=pair.device)
        return distribution(pair.target(input_ids=text).logits[0, -1].float(), sampling).cpu()

    found: list[tuple[int | None, float]] = [(None, p_value(root, expected(0, [cycle.tokens[0]])))]
    children = [n for n in range(1, len(cycle.tokens)) if cycle.parents[n] == 0]
    for node in sorted(children, key=lambda n: -int((root == cycle.tokens[n]).sum()))[:3]:
        token = cycle.tokens[node]
        if int((root == token).sum()) >= 1000:
            following = expected(node, [cycle.tokens[0], token])
            found.append((token, p_value(second[root == token], following)))
    return DistributionCheck(draws, forward, tuple(found))


def draw_from_tree(
    logits: Tensor, cycle: Cycle, sampling: Sampling, draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """What `draws` cycles on the same tree commit after the root: first token, and second or -1, int64 [draws]."""
    logits = logits.cpu()
    totals = [distribution(row, sampling).cumsum(-1) for row in logits]
    width = max(cycle.depths) + 1
    uniforms = torch.rand(draws, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tokens, depths, parents = (torch.tensor([x]) for x in (cycle.tokens, cycle.depths, cycle.parents[1:]))
    mask = rebuild(parents[0])[None]
    found = []
    for part in uniforms.split(CHUNK):
        rows = part.shape[0]
        choice = torch.stack([draw(t, part[:, d]) for t, d in zip(totals, cycle.depths, strict=True)], 1)
        path, count = accept(
            tokens.expand(rows, -1), parents.expand(rows, -1), mask.expand(rows, -1, -1), depths.expand(rows, -1), choice, width
        )  # fmt: skip
        followed = choice.gather(1, path)
        second = torch.where(count > 1, followed[:, min(1, width - 1)], -1)
        found.append(torch.stack((followed[:, 0], second)))
    first, second = torch.cat(found, 1)
    return first, second


def p_value(found: Tensor, probabilities: Tensor) -> float:
    """Of the chi-square of drawn ids against probabilities [V]; ids expected fewer than five times are put together."""
    counts = torch.bincount(found.clamp(min=0), minlength=len(probabilities)).double()
    if bool((found < 0).any()) or bool(counts[probabilities == 0].any()):
        # a drafted token was drawn without what follows it, or something of probability 0 was drawn
        return 0.0
    expected = probabilities * len(found)
    big = expected >= 5
    cells, wanted = counts[big].tolist(), expected[big].tolist()
    if float(expected[~big].sum()) > 0:
        cells.append(float(counts[~big].sum()))
        wanted.append(float(expected[~big].sum()))
    scale = sum(cells) / sum(wanted)  # chisquare asks for equal sums to the last bits
    return float(chisquare(cells, [w * scale for w in wanted]).pvalue) if len(cells) > 1 else 1.0


@dataclass(frozen=True)
class Accepted:
    """τ of a category's prompts (None: of all) and the cycles that it rests on."""

    category: str | None
    tau: float
    cycles: int


def acceptance_rows(prompts: Sequence[Prompt], runs: Sequence[Sequence[Cycle]]) -> list[Accepted]:
    """τ of each category, then of all."""
    groups: dict[str | None, list[Cycle]] = defaultdict(list)
    # a failed check ends its runs early, and it is the check that has to say so
    for prompt, cycles in zip(prompts, runs, strict=False):
        groups[prompt.category] += cycles
    groups[None] = [cycle for cycles in runs for cycle in cycles]
    return [Accepted(name, tau(c), len(c)) for name, c in groups.items()]


def consistent(runs: Sequence[Sequence[Cycle]]) -> CyclesCheck:
    """Each cycle goes on where the last ended: prefix, root and bonus fit together, and the path is in the tree."""
    count = sum(map(len, runs))
    for cycles in runs:
        for one, after in zip(cycles, cycles[1:], strict=False):
            if after.prefix != one.prefix + len(one.committed) or after.committed[0] != one.bonus:
                return CyclesCheck(count, ("gap", after.prefix))
        for cycle in cycles:
            if cycle.tokens and not _in_tree(cycle):
                return CyclesCheck(count, ("path", cycle.prefix))
    return CyclesCheck(count)


def _in_tree(cycle: Cycle) -> bool:
    node = 0
    for token in cycle.committed[1:]:
        children = [
            n for n in range(1, len(cycle.tokens)) if cycle.parents[n] == node and cycle.tokens[n] == token
        ]
        if not children:
            return False
        node = children[0]
    return cycle.committed[0] == cycle.tokens[0]


def require(checks: Sequence[Check]) -> None:
    """Raises IncorrectPair, naming what failed, where a check failed."""
    failed = [check.name for check in checks if check.outcome == Outcome.FAILED]
    if failed:
        raise IncorrectPair(f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}.")
