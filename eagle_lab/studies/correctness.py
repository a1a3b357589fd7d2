"""The proof for a pair: that EAGLE-3 decodes what the target alone decodes, greedily and in distribution.

Each check is a `Check`, green, red or skipped with a reason; `require` raises where one is red. The checks are not
timed, and stand on what is independent of them: a slow reference for the masks, the target's own decoding without a
head, transformers' own forward without a cache or a tree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import chisquare
from torch import Tensor

from eagle_lab.decode.generate import Cycle, generate, generate_plain
from eagle_lab.decode.masks import MASK_BUILDERS, rebuild
from eagle_lab.decode.prefill import logits_after
from eagle_lab.decode.sampling import Sampling, accept, distribution, draw
from eagle_lab.decode.strategy import Decoding, unavailable
from eagle_lab.decode.strategy import check as check_strategy
from eagle_lab.measure.acceptance import by_depth, tau
from eagle_lab.models.pair import Pair, check_device
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.agreement import agree
from eagle_lab.verdict.mask_check import check as check_builder

LEAST = (
    1e-4  # a chi-square this improbable is red; with a fixed seed a correct pair is red once in 10,000 pairs
)
CHUNK = 20_000  # draws that go through acceptance at once


class IncorrectPair(RuntimeError):
    """At least one check is red; the message names them."""


@dataclass(frozen=True)
class Check:
    """One row of the table: `ok` is None where the check could not run here, and `words` says why."""

    name: str
    ok: bool | None
    words: str

    @property
    def sign(self) -> str:
        """The outcome in a word."""
        return {True: "green", False: "RED", None: "skipped"}[self.ok]


def arms(strategy: str, beside: str | None, device: str | torch.device | None) -> list[str]:
    """The strategies that are held against plain decoding, checked before anything is loaded.

    Raises ValueError for one that can't run on the device (None: the best one), and where both are the same.
    """
    chosen = [strategy] if beside is None else [strategy, beside]
    plans = [check_strategy(one, check_device(device)) for one in chosen]
    if len(set(plans)) < len(plans):
        raise ValueError(f"beside is {beside!r}, the same as the strategy; name another one, or none.")
    return chosen


def builders(pair: Pair, cycles: Sequence[Cycle]) -> list[Check]:
    """Every mask builder against the reference, on all small trees, random ones and those of `cycles`."""
    recorded = [cycle.parents[1:] for cycle in cycles if cycle.parents]
    found = []
    for name, build in MASK_BUILDERS.items():
        reason = unavailable("mask", name, pair.device)
        if reason:
            found.append(Check(f"mask {name}", None, f"{reason}."))
            continue
        finding = check_builder(build, recorded, pair.device, name=name)
        words = f"equal to the reference on {finding.trees} trees" if finding.ok else finding.words
        found.append(Check(f"mask {name}", finding.ok, words))
    return found


def exact(pair: Pair) -> bool:
    """Whether identity is demanded: float32 on the CPU. Elsewhere near ties of logits may fall either way."""
    return pair.dtype == torch.float32 and pair.device.type == "cpu"


def decoding(
    pair: Pair,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sizes: dict[str, int],
    strategy: str = "rebuild",
    plain_strategy: str | None = None,
    **sampling: Any,
) -> tuple[Check, list[list[Cycle]]]:
    """EAGLE-3 against plain decoding with the same seed, prompt by prompt → the check, and each prompt's cycles.

    Args: plain_strategy: of the plain decoding, None for `strategy` too; sampling: temperature, top_p, top_k_sampling
    and seed; none is greedy.
    """
    name = f"{'sampled decoding, same seed' if sampling else 'greedy decoding'}, {strategy}"
    alone = plain_strategy or strategy
    runs, ties, tokens = [], [], 0
    for prompt in prompts:
        plain = generate_plain(pair, prompt.ids, max_new_tokens, strategy=alone, **sampling).tokens
        eagle = generate(pair, prompt.ids, max_new_tokens, strategy=strategy, **sizes, **sampling)
        runs.append(eagle.cycles)
        tokens += len(plain)
        where = agree(
            pair, prompt.ids, eagle.tokens, plain, Decoding.of(max_new_tokens, strategy, **sizes, **sampling)
        )
        if where is not None and (exact(pair) or not where.tie):
            return Check(name, False, f"prompt {prompt.id}: {where}."), runs
        if where is not None:
            ties.append(f"prompt {prompt.id}: {where}")
    words = f"{len(prompts)} prompts, {tokens} tokens: the same as the target alone"
    return Check(name, True, words + (f", but for near ties: {'; '.join(ties)}." if ties else "")), runs


def node_logits(pair: Pair, before: Sequence[int], cycle: Cycle, attention: str) -> Tensor:
    """The target's logits at each node of a cycle's tree, in one forward under the tree mask, float32 [n + 1, V]."""
    tokens, depths = (torch.tensor([ids], device=pair.device) for ids in (cycle.tokens, cycle.depths))
    prompt = torch.tensor([list(before)], device=pair.device)
    mask = rebuild(torch.tensor(cycle.parents[1:])).to(pair.device)[None]
    return logits_after(pair, prompt, tokens, depths, mask, attention)


@torch.inference_mode()
def sampling_distribution(
    pair: Pair,
    prompt: Prompt,
    cycle: Cycle,
    new_tokens: Sequence[int],
    sampling: Sampling,
    draws: int,
    seed: int,
    *,
    attention: str,
) -> Check:
    """Chi-square of the first two tokens that acceptance gives on a real tree, `draws` times, against the target's own.

    new_tokens: what was decoded before the cycle's root; attention: of the strategy that drew the tree.
    In float32 the expectation comes from transformers' forward
    of the plain text, so it checks the tree's attention too; in half precision, where that differs in the last bits
    and so many draws would show it, from the tree's own logits.
    """
    before = [*prompt.ids, *new_tokens]
    logits = node_logits(pair, before, cycle, attention)
    root, second = draw_from_tree(logits, cycle, sampling, draws, seed)
    plain = pair.dtype == torch.float32

    def expected(node: int, ids: list[int]) -> Tensor:
        if not plain:
            return distribution(logits[node], sampling).cpu()
        text = torch.tensor([[*before, *ids]], device=pair.device)
        return distribution(pair.target(input_ids=text).logits[0, -1].float(), sampling).cpu()

    tests = [("first token", root, expected(0, [cycle.tokens[0]]))]
    children = [n for n in range(1, len(cycle.tokens)) if cycle.parents[n] == 0]
    for node in sorted(children, key=lambda n: -int((root == cycle.tokens[n]).sum()))[:3]:
        token = cycle.tokens[node]
        if int((root == token).sum()) >= 1000:
            following = expected(node, [cycle.tokens[0], token])
            tests.append((f"second token after {token}", second[root == token], following))
    values = {name: p_value(found, p) for name, found, p in tests}
    ok = all(value > LEAST for value in values.values())
    said = ", ".join(f"{name}: p = {value:.2g}" for name, value in values.items())
    source = "transformers' own forward" if plain else "the tree's own logits"
    return Check("sampling's distribution", ok, f"{draws:,} draws on a real tree against {source}; {said}.")


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
            tokens.expand(rows, -1),
            parents.expand(rows, -1),
            mask.expand(rows, -1, -1),
            depths.expand(rows, -1),
            choice,
            width,
        )
        followed = choice.gather(1, path)
        second = torch.where(count > 1, followed[:, min(1, width - 1)], -1)
        found.append(torch.stack((followed[:, 0], second)))
    first, second = torch.cat(found, 1)
    return first, second


def p_value(found: Tensor, probabilities: Tensor) -> float:
    """Of the chi-square of drawn ids against probabilities [V]; ids expected fewer than five times are put together."""
    counts = torch.bincount(found.clamp(min=0), minlength=len(probabilities)).double()
    if bool((found < 0).any()) or bool(counts[probabilities == 0].any()):
        return (
            0.0  # a drafted token was drawn without what follows it, or something of probability 0 was drawn
        )
    expected = probabilities * len(found)
    big = expected >= 5
    cells, wanted = counts[big].tolist(), expected[big].tolist()
    if float(expected[~big].sum()) > 0:
        cells.append(float(counts[~big].sum()))
        wanted.append(float(expected[~big].sum()))
    scale = sum(cells) / sum(wanted)  # chisquare asks for equal sums to the last bits
    return float(chisquare(cells, [w * scale for w in wanted]).pvalue) if len(cells) > 1 else 1.0


def acceptance_rows(prompts: Sequence[Prompt], runs: Sequence[Sequence[Cycle]]) -> list[dict[str, Any]]:
    """τ of each category and of all, with the cycles it rests on."""
    groups: dict[str, list[Cycle]] = defaultdict(list)
    # a red check ends its runs early, and it is the check that has to say so
    for prompt, cycles in zip(prompts, runs, strict=False):
        groups[prompt.category] += cycles
    groups["all"] = [cycle for cycles in runs for cycle in cycles]
    return [{"prompts": name, "τ": round(tau(c), 2), "cycles": len(c)} for name, c in groups.items()]


def depth_rows(runs: Sequence[Sequence[Cycle]], depth: int) -> list[dict[str, Any]]:
    """For each depth of the tree, how often it was reached and the share of drafts accepted there."""
    return [row.model_dump() for row in by_depth([cycle for cycles in runs for cycle in cycles], depth)]


def consistent(runs: Sequence[Sequence[Cycle]]) -> Check:
    """Each cycle goes on where the last ended: prefix, root and bonus fit together, and the path is in the tree."""
    for cycles in runs:
        for one, after in zip(cycles, cycles[1:], strict=False):
            if after.prefix != one.prefix + len(one.committed) or after.committed[0] != one.bonus:
                return Check(
                    "cycles fit together",
                    False,
                    f"the cycle at {after.prefix} does not follow the one before.",
                )
        for cycle in cycles:
            if cycle.tokens and not _in_tree(cycle):
                return Check(
                    "cycles fit together",
                    False,
                    f"the cycle at {cycle.prefix} committed tokens that are no path.",
                )
    count = sum(map(len, runs))
    return Check(
        "cycles fit together",
        True,
        f"{count} cycles: each starts where the last ended, on a path of its tree",
    )


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


def said(checks: Sequence[Check]) -> str:
    """A paragraph for each check, as Markdown."""
    return "\n\n".join(f"**{c.name}: {c.sign}.** {c.words}" for c in checks)


def html(checks: Sequence[Check]) -> str:
    """The table, green, red or grey, with the outcome in words too."""
    paint = {True: "#009E73", False: "#D55E00", None: "#8C8C8C"}
    rows = "".join(
        f'<tr><td style="text-align:left">{c.name}</td>'
        f'<td style="text-align:left;color:white;background:{paint[c.ok]}"><b>{c.sign}</b></td>'
        f'<td style="text-align:left">{c.words}</td></tr>'
        for c in checks
    )
    return f"<table><tr><th>check</th><th>outcome</th><th>what was found</th></tr>{rows}</table>"


def require(checks: Sequence[Check]) -> str:
    """One sentence where nothing is red; IncorrectPair, naming what is, where something is."""
    red = [f"{c.name}: {c.words}" for c in checks if c.ok is False]
    if red:
        raise IncorrectPair(f"{len(red)} of {len(checks)} checks are red. {' '.join(red)}")
    skipped = sum(c.ok is None for c in checks)
    rest = f", {skipped} could not run here" if skipped else ""
    return (
        f"**{len(checks) - skipped} checks are green{rest}.** EAGLE-3 decodes what this target alone decodes."
    )
