"""Each claim of the investigation that this kit grew out of, with our finding beside it.

A claim is CONFIRMED or REFUTED where its own figures or our records decide it, else NOT SUPPORTED: nothing that it
measured decides it, whatever the truth is. Records of different machines are told apart, never mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from eagle_lab.decode.masks import MASK_BUILDERS
from eagle_lab.measure.environment import machine_key
from eagle_lab.measure.old_records import Record
from eagle_lab.studies import sweep_summary
from eagle_lab.studies.breakdown import gain, hot_list, random_weights, stages
from eagle_lab.studies.profile import ProfileRecord
from eagle_lab.studies.seed_audit import figures, most_calls
from eagle_lab.studies.seed_masks import clone_part, growth, ratio
from eagle_lab.verdict.consistency import contradiction
from eagle_lab.verdict.old_form import comparison, consistency_words
from eagle_lab.verdict.summary import consistency_of, part_share, verdict_of

CONFIRMED, REFUTED, UNSUPPORTED = "confirmed", "refuted", "not supported by its data"
NODES = 63  # of the investigation's tree, root not counted

Records = Mapping[str, Record]
Rule = Callable[[dict[str, Any], Records, Records, Mapping[str, Any]], tuple[str, str]]


@dataclass(frozen=True)
class Finding:
    """A claim of the investigation, what we find, and why."""

    id: str
    quote: str
    finding: str
    words: str


def _on(record: Any) -> str:
    if isinstance(record, ProfileRecord):
        record = record.model_dump()
    return f"{machine_key(record['environment'])}, {weights_words(record)}"


def weights_words(record: Record) -> str:
    """The target; where its weights are random, also how the acceptance came about."""
    settings = record["settings"]
    target, stated = settings["target"].rpartition("/")[2], settings.get("stated_acceptance")
    if not random_weights(settings["target"]):
        return target
    return f"{target}, random weights" + (f", acceptance length {stated:g} stated" if stated else "")


def _gpu(records: Records) -> list[Record]:
    return [r for r in records.values() if r["environment"].get("gpu")]


def _cpu(records: Records) -> list[Record]:
    return [r for r in records.values() if not r["environment"].get("gpu")]


def _mask_words(records: Records, builder: str, nodes: int) -> str:
    told = []
    for r in records.values():
        low, at, high = ratio(r["masks"], builder, nodes)
        told.append(
            f"{builder} takes {at:.2f}× [{low:.2f}, {high:.2f}] of rebuild's time at {nodes} nodes ({_on(r)})"
        )
    return "; ".join(told) or "no record of ours is there"


def _verdict_words(records: Records) -> str:
    told = [f"{verdict_of(comparison(r['comparison']))} ({_on(r)})" for r in records.values()]
    return "; ".join(told) or "no record of ours is there"


def _share_words(profiles: Records) -> str:
    told = []
    for r in profiles.values():
        mask = next((s for s in stages(r) if s.name == "tree_mask"), None)
        if mask:
            told.append(f"{mask.share:.2%} of a cycle, ceiling {mask.ceiling:+.2%} ({_on(r)})")
    return "; ".join(told) or "no profile of ours is there"


def _arm_shares(seeds: Records, arm: str) -> str:
    """The mask's share of a whole decode in one arm of the redone experiments."""
    told = []
    for r in seeds.values():
        found = part_share(comparison(r["comparison"]), arm)
        if found:
            told.append(
                f"{getattr(comparison(r['comparison']).settings, arm)} {found[0]:.2%} of a decode ({_on(r)})"
            )
    return "; ".join(told) or "no record of ours is there"


def _alone(sweeps: Mapping[str, Any], name: str) -> list[tuple[str, tuple[float, float, float]]]:
    """A builder alone on GPUs, by the sweeps: in words, and its time over rebuild's as low, estimate and high."""
    found = [(r, sweep_summary.ratio(r, name, NODES)) for r in sweeps.values() if r.environment.gpu]
    told = []
    for r, x in found:
        if x:
            word, (low, at, high) = ("faster", (1 / x[2], 1 / x[1], 1 / x[0])) if x[1] < 1 else ("slower", x)
            said = f"{name} is {at:.3g}× [{low:.3g}, {high:.3g}] {word} at {NODES} nodes"
            told.append((f"{said} ({machine_key(r.environment)})", x))
    return told


def _awaits(records: Records) -> str:
    return "" if _gpu(records) else " A GPU's record is missing, and the claim is about a GPU."


def _end_to_end(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    claimed = seed["deltas"]["latency_percent"] / 100
    own = "Two runs minutes apart, no spread and no interval: that design can't tell 5% from drift. "
    words = f"{own}Ours: {_verdict_words(seeds)}.{_awaits(seeds)}"
    inside = [verdict_of(comparison(r["comparison"])) for r in _gpu(seeds)]
    # another GPU than theirs: an effect of half to twice the size is the same finding, one surely outside is not
    words += f" Half to twice of {claimed:.1%} counts as the same size."
    if inside and all(v.low > 1 and claimed / 2 <= v.estimate - 1 <= claimed * 2 for v in inside):
        return CONFIRMED, words
    if inside and all(v.high < 1 + claimed / 2 or v.low > 1 + claimed * 2 for v in inside):
        return REFUTED, words
    same = [v for v in inside if v.low > 1 and claimed / 2 <= v.estimate - 1 <= claimed * 2]
    return (
        UNSUPPORTED,
        f"{words} {len(same)} of our {len(inside)} GPU records find{'s' * (len(same) == 1)} it.",
    )


def _eleven(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    claimed, found = (
        seed["deltas"]["mask_ratio"],
        [ratio(r["masks"], "incremental", NODES) for r in _gpu(seeds)],
    )
    words = (
        f"One figure for each arm, without spread. Ours: {_mask_words(seeds, 'incremental', NODES)}.{_awaits(seeds)} Half "
        f"to twice of {claimed:g}× counts as the same size."
    )
    if found and all(claimed / 2 <= low and high <= claimed * 2 for low, _, high in found):
        return CONFIRMED, words
    if found and all(high < claimed / 2 or low > claimed * 2 for low, _, high in found):
        return REFUTED, words
    if found and all(low > 1 for low, _, _ in found):
        words += " That it is slower is certain; that it is eleven times is not what we find."
    return UNSUPPORTED, words


def _clone(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    told, parts = [], []
    for r in seeds.values():
        parts.append(clone_part(r["masks"], NODES))
        told.append(
            f"without the clone, incremental takes {abs(parts[-1]):.0%} {'less' if parts[-1] > 0 else 'more'} ({_on(r)})"
        )
    words = f"{'; '.join(told) or 'no record of ours is there'}. What costs is an operation for each node."
    if not parts:
        return UNSUPPORTED, words
    # eleven times as slow because of the clone would mean that without it over 90% of the time goes away
    return (REFUTED if max(parts) < 0.5 else CONFIRMED), words


def _optimal(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    """On a GPU, as the claim is about one; by the sweeps, which have all builders."""
    rows = [row for name in MASK_BUILDERS if name != "rebuild" for row in _alone(sweeps, name)]
    if not rows:
        return (
            UNSUPPORTED,
            f"No sweep of ours on a GPU is there. Ours: {_mask_words(seeds, 'doubling', NODES)}.",
        )
    words, (_, _, high) = min(rows, key=lambda row: row[1][2])
    best = f"Of all builders alone, {words}."
    return (REFUTED if high < 0.9 else UNSUPPORTED), best


def _large(records: list[Record]) -> str | None:
    """Whether `incremental` is faster at 511 and at 1,023 nodes: a finding, or None where the intervals don't tell."""
    found = [ratio(r["masks"], "incremental", n) for r in records for n in (511, 1023)]
    if found and all(high < 1 for _, _, high in found):
        return CONFIRMED
    return REFUTED if found and all(low > 1 for low, _, _ in found) else None


def _too_small(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    words = f"{_mask_words(seeds, 'incremental', 1023)}: the size isn't what is missing, as both do one row operation a node."
    return (REFUTED if _large(list(seeds.values())) == REFUTED else UNSUPPORTED), words


def _complexity(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    told = [
        f"time grows as n^{growth(r['masks'], 'rebuild'):.2f} for rebuild and n^{growth(r['masks'], 'incremental'):.2f} "
        f"for incremental ({_on(r)})"
        for r in seeds.values()
    ]
    own = "Both write n rows of n + 1 flags, one row operation a node: O(n²) bytes and O(n) operations, the two alike"
    return REFUTED, f"{own}. Measured: {'; '.join(told) or 'no record of ours is there'}."


def _share(which: int) -> Rule:
    def find(
        seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
    ) -> tuple[str, str]:
        f = figures(seed)
        why = contradiction(f["part"], f["whole"], f["shares"], most_calls(seed))
        most = most_calls(seed) * f["part"][which] / f["whole"][which]
        words = f"By its own table at most {most:.1%}, even with a tree for each token. {why or ''} "
        words += f"Ours: {_arm_shares(seeds, ('baseline', 'candidate')[which])}."
        if which == 0:
            words += f" By the profiles: {_share_words(profiles)}."
        return (REFUTED if most < f["shares"][which] else UNSUPPORTED), words

    return find


def _large_trees(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    words = "; ".join(_mask_words(seeds, "incremental", n) for n in (511, 1023))
    return _large(list(seeds.values())) or UNSUPPORTED, f"Not measured there. Ours: {words}."


def _cpu_only(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    here = {str(n): r for n, r in enumerate(_cpu(seeds))}
    words = f"Not measured there. Ours: {_mask_words(here, 'incremental', NODES)}; end to end {_verdict_words(here)}."
    found = [ratio(r["masks"], "incremental", NODES) for r in here.values()]
    if not found:
        return UNSUPPORTED, words
    return (
        REFUTED
        if all(low > 1 for low, _, _ in found)
        else CONFIRMED
        if all(h < 1 for *_, h in found)
        else UNSUPPORTED
    ), words


def _kernel(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    rows = _alone(sweeps, "cuda")
    told = "; ".join(words for words, _ in rows) or "no sweep of ours on a GPU is there"
    words = (
        f"Not measured there. A kernel of ours alone: {told}. Whatever a kernel does to the mask, end to end it brings at "
        f"most the mask's ceiling: {_share_words(profiles)}."
    )
    faster = bool(rows) and all(high < 1 for _, (_, _, high) in rows)
    return (CONFIRMED if faster else UNSUPPORTED), words


def _elsewhere(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    told, good = [], []
    for r in profiles.values():
        hot = hot_list(r)
        part = min(sum(s.whole for s in hot if s.name in ("draft", "target", "replay")), 0.999)
        told.append(
            f"hot: {', '.join(f'{s.name} {s.share:.0%}' for s in hot)}; forwards' ceiling {gain(part):+.0%} ({_on(r)})"
        )
        good.append(part > 0.5)
    words = f"The forwards are where the time is. Ours: {'; '.join(told) or 'no profile of ours is there'}."
    words += " Which of the four pays, and which does not, optimize.ipynb tells one by one."
    return (CONFIRMED if good and all(good) else UNSUPPORTED), words


def _dont(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    masks = [s for r in profiles.values() for s in stages(r) if s.name == "tree_mask"]
    words = (
        f"For another reason than given: {_share_words(profiles)}. This is of eager decoding; one graph of the whole cycle "
        "needs a mask that no loop on the host builds."
    )
    return (CONFIRMED if masks and all(s.ceiling < 0.02 for s in masks) else UNSUPPORTED), words


def _same_output(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> tuple[str, str]:
    told, good = [], []
    for r in seeds.values():
        c = comparison(r["comparison"])
        odd = [s for s in c.samples if s.difference]
        told.append(
            f"{len(c.samples) - len(odd)} of {len(c.samples)} pairs decoded identical tokens"
            f"{', the others parted at a near tie of logits' if odd else ''} ({_on(r)})"
        )
        good.append(not odd)
    words = f"The masks are equal bit by bit on random trees, and {'; '.join(told) or 'no record of ours is there'}."
    return (CONFIRMED if good and all(good) else UNSUPPORTED), words


CLAIMS: dict[str, Rule] = {
    "end-to-end-slower": _end_to_end,
    "mask-11x-slower": _eleven,
    "clone-overhead": _clone,
    "baseline-optimal": _optimal,
    "too-small": _too_small,
    "complexity": _complexity,
    "mask-2-percent": _share(0),
    "mask-20-percent": _share(1),
    "helps-large-trees": _large_trees,
    "helps-cpu-only": _cpu_only,
    "helps-custom-kernel": _kernel,
    "optimize-elsewhere": _elsewhere,
    "dont-optimize-mask": _dont,
    "output-consistent": _same_output,
}


def findings(
    seed: dict[str, Any], seeds: Records, profiles: Records, sweeps: Mapping[str, Any]
) -> list[Finding]:
    """Each claim with our finding.

    Args: seeds, profiles, sweeps: our records by any name (see `machine_records.committed` and `machine_records.sweeps`).
    Raises ValueError for a claim that has no rule here: no claim is passed over in silence.
    """
    unknown = [claim["id"] for claim in seed["claims"] if claim["id"] not in CLAIMS]
    if unknown:
        raise ValueError(f"there is no rule for the claim {unknown[0]!r} of the investigation.")
    return [
        Finding(claim["id"], claim["quote"], *CLAIMS[claim["id"]](seed, seeds, profiles, sweeps))
        for claim in seed["claims"]
    ]


def audit_words(seed: dict[str, Any]) -> str:
    """The contradiction among the published figures in words, or that there is none."""
    f = figures(seed)
    why = contradiction(f["part"], f["whole"], f["shares"], most_calls(seed))
    if why is None:
        return "One number of calls makes all its figures true."
    base = sorted(part / share * 1e3 for part, share in zip(f["part"], f["shares"], strict=True))
    return (
        f"{why}\n\nBoth shares fit another whole: something that takes {base[0]:.0f} to {base[1]:.0f} ms a call, as the draft "
        f"step does. So they may be shares of that step; of the whole time they are not."
    )


def redone_words(seeds: Records) -> str:
    """What the redone experiments say, one paragraph each: verdict, and whether the mask accounts for it."""
    told = []
    for record in seeds.values():
        check = consistency_of(comparison(record["comparison"]))
        told.append(
            f"**{_on(record)}**: {verdict_of(comparison(record['comparison']))}. "
            f"{consistency_words(check) if check else 'The mask was not timed in it, so it can not be held against the whole.'}"
        )
    return "\n\n".join(told) or "There is no record of the redone experiment yet."


def tally(found: list[Finding]) -> str:
    """How many claims came out how."""
    counts = {word: sum(f.finding == word for f in found) for word in (CONFIRMED, REFUTED, UNSUPPORTED)}
    return f"Of its {len(found)} claims, " + ", ".join(f"{n} {word}" for word, n in counts.items()) + "."
