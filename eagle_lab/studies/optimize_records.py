"""The records of the optimizations: the ladder, the tree sizes and the batches of one machine, and what they say.

`python -m eagle_lab.studies.optimize_records --device cuda` measures both targets on a GPU and writes
data/results/optimize-<machine>-<target>.json; the notebooks read them from there. What is finished is on disk before
the next part begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import typer

from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.old_records import Record, check_folder, new, write
from eagle_lab.measure.records import RESULTS
from eagle_lab.models.pair import Pair, load
from eagle_lab.models.prompts import Prompt
from eagle_lab.studies import batches as throughput
from eagle_lab.studies import ladder
from eagle_lab.studies.machine_records import place
from eagle_lab.studies.operators import operators_of_any
from eagle_lab.studies.optimize_bars import acceptance, bars, best_size, head, remaining
from eagle_lab.studies.profile import get_prompts, profile_prompts, stated_acceptance, without_folder
from eagle_lab.studies.record import GPU_TARGETS
from eagle_lab.verdict.old_form import verdict as verdict_from
from eagle_lab.verdict.stats import Verdict

PLAIN_TOKENS = 64  # of the best strategy against plain decoding
MOST_KERNELS = 40  # nearly all of a cycle's, by name


def record_ladder(pair: Pair, found: dict[str, Any], **more: Any) -> Record:
    """A ladder, and what else was measured (tree_sizes, batches), as a record of kind "optimize"."""
    settings = {
        "target": without_folder(pair.target_name),
        "draft": without_folder(pair.draft_name),
        "dtype": str(pair.dtype).removeprefix("torch."),
        "stated_acceptance": found.get("stated_acceptance"),
    }
    return new("optimize", settings, str(pair.device)) | {"ladder": found} | more


def ladder_table(record: Record) -> pd.DataFrame:
    """One row a rung, then one for each that could not run here; tokens a second at one τ for all, `acceptance`."""
    found, tau = record["ladder"], acceptance(record)
    bottom = found["floor"].get("parts", {}).get("cycle", {}).get("seconds")
    at = "" if tau is None else f" at τ {tau:.2f}{', stated' if found.get('stated_acceptance') else ''}"
    rows, read = [], set[tuple[float, int]]()
    whole = found.get("verdict")
    gained = not whole or (whole["high"] is not None and whole["high"] < 1)  # else there is no gain to share
    for rung, share in zip(found["rungs"], ladder.shares(found), strict=True):
        verdict = verdict_from(rung["verdict"]) if rung["verdict"] else None
        ratio = _ratio(verdict)
        rows.append({
            "change": rung["change"], "strategy": rung["strategy"], "compared with": rung.get("against") or "–",
            "axes that differ": ", ".join(ladder.changed(rung)) or "–", "time / that": ratio,
            "verdict": verdict.decision.value + " (provisional)" * verdict.provisional if verdict else "start",
            "share of the gain": f"{share:.0%}" if gained and share is not None else "–",
            "cycle, ms" if found.get("in_turn") else "cycle alone, ms": f"{1e3 * rung['cycle_s']:.2f}" if rung["cycle_s"] else "–",
            f"tokens/s{at}": f"{tau / rung['cycle_s']:.1f}" if tau and rung["cycle_s"] else "–",
            "× floor": f"{rung['cycle_s'] / bottom:.2f}" if bottom and rung["cycle_s"] else "–",
            "prepared": prepared(rung, read),
        })  # fmt: skip
    for strategy, reason in {**found["unavailable"], **found["disagreed"], **found.get("failed", {})}.items():
        # as records have it from before a refusal was told as its sentence
        told = reason.removeprefix("ValueError: ").removesuffix(".")
        rows.append({"change": "not measured", "strategy": strategy, "verdict": told})
    return pd.DataFrame(rows).fillna("–").set_index("change")


def prepared(rung: dict[str, Any], read: set[tuple[float, int]]) -> str:
    """What compiling or capturing a rung's cycle took beside what earlier rungs had compiled: seconds, and the device
    memory that graphs and caches keep; readings of prompts in the first rung that has them, as the others share them.

    `read` holds the readings of earlier rungs, by seconds and bytes, and takes those of this one.
    """
    made = rung.get("prepared") or []
    if not made:
        return "–"
    kept, took = (
        sum(m.get(key, 0) for m in made for key in keys) for keys in (("bytes", "cache_bytes"), ("seconds",))
    )
    for m in made:
        # a record from before each reading was listed has their sums
        for seconds, size in m.get("readings") or [[m.get("reading_seconds", 0), m.get("reading_bytes", 0)]]:
            if (seconds, size) not in read:
                read.add((seconds, size))
                took, kept = took + seconds, kept + size
    return f"{took:.1f} s, {kept / 2**20:.0f} MiB"


def _ratio(verdict: Verdict | None) -> str:
    if verdict is None:
        return "–"
    if math.isnan(verdict.estimate):
        return "no pair was kept: the machine was busy"
    if not (verdict.low > 0 and math.isfinite(verdict.high)):
        return f"{verdict.estimate:.3f} (too few pairs for an interval)"
    return f"{verdict.estimate:.3f} [{verdict.low:.3f}, {verdict.high:.3f}]"


def ladder_sentence(found: dict[str, Any]) -> str:
    """What the ladder says of the best strategy against the first."""
    if found["verdict"] is None:
        if found.get("best", found["rungs"][0].get("strategy")) != found["rungs"][0].get("strategy"):
            return f"**{found['best']}** is the fastest so far; it was not compared with the first yet."
        judged = [rung["verdict"] for rung in found["rungs"] if rung["verdict"]]
        if all(verdict["estimate"] is None for verdict in judged):
            return "Nothing could be judged: other processes kept this machine so busy that every pair was dropped."
        return f"No change was measured to be faster than {found['rungs'][0]['strategy']}."
    verdict = verdict_from(found["verdict"])
    direct = f"**{found['best']}** against the official implementation's ways: {verdict}."
    if verdict.low <= 1 <= verdict.high:
        return f"{direct} The interval holds 1: on this machine the changes are not shown to matter."
    chain = math.prod(ladder.chain(found).values())
    outside = "" if verdict.low <= chain <= verdict.high else ", outside of that interval"
    return (
        f"{direct} That is {1 / verdict.estimate:.2f} times as fast, in whole decodes with their prefill; the ratios of the "
        f"rungs below it, which the shares are of, multiply to {chain:.3f}{outside}."
    )


def sizes_sentence(found: list[dict[str, Any]]) -> str:
    """Which tree size pays against plain decoding on this machine, if any was shown to."""
    best = best_size({"tree_sizes": found})
    if best is None:
        return "No tree size could be judged: none was measured, or every pair was dropped."
    verdict = verdict_from(best["verdict"])
    tau = f"τ {best['acceptance_length']:.2f}{', stated and not measured' if best.get('stated') else ''}{_decoded_by(best)}"
    first = "Best of the sizes measured: " if len(found) > 1 else "With "
    words = f"{first}**{best['total_tokens']} draft nodes** ({tau}), "
    time = f"{verdict.estimate:.3f} [{verdict.low:.3f}, {verdict.high:.3f}] of plain decoding's time"
    if verdict.high < 1:
        return f"{words}{time}: it pays."
    if verdict.low > 1:
        return f"{words}{time}: no tree of these sizes pays here."
    return f"{words}{time}: the interval holds 1, so it is not shown to pay."


def _decoded_by(row: dict[str, Any], nodes: bool = False) -> str:
    tree = f"; {row['total_tokens']} draft nodes" if nodes and "total_tokens" in row else ""
    return (
        f"{tree}; both decoded by `{row['strategy']}`, the prefill included" if row.get("strategy") else tree
    )


def batch_table(found: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a batch size."""
    rows = [
        {
            "batch": row["batch"],
            "EAGLE-3 tokens/s": f"{row['eagle_tokens_per_s']:.1f}",
            "plain tokens/s": f"{row['plain_tokens_per_s']:.1f}",
            "EAGLE-3 s": f"{median(row['eagle_s']):.2f}",
            "plain s": f"{median(row['plain_s']):.2f}",
            "time / plain's": "{1:.3f} [{0:.3f}, {2:.3f}]".format(
                *(math.inf if x is None else x for x in row["ratio"])
            ),
            "τ": f"{row['acceptance_length']:.2f}{' (stated)' if row.get('stated') else ''}",
            "rows as alone": row.get("as_alone", "not recorded"),
        }
        for row in found
    ]
    return pd.DataFrame(rows).set_index("batch")


def batch_sentence(found: list[dict[str, Any]]) -> str:
    """From which batch size on speculative decoding was not measured to be faster."""
    if not found:
        return "From which batch on speculation stops paying is not measured yet."
    at = throughput.crossing(found)
    stated = (
        found[0].get("stated")
        and f" (at {found[0]['acceptance_length']:g} tokens a cycle, stated and not measured)"
    )
    end = f"{stated or ''}{_decoded_by(found[0], nodes=True)}."
    if at is None:
        return f"Speculative decoding is faster at every batch size measured, up to {found[-1]['batch']}{end}"
    late = throughput.slower(found)
    if at == late:
        return f"From a batch of **{at}** on, speculative decoding is slower than plain decoding{end}"
    count = len(found[0]["eagle_s"])
    beside = f"shown to be faster than plain decoding, by {count} pairs each"
    more = f", and from **{late}** on it is slower" if late else ""
    if at == found[0]["batch"]:
        return f"At no batch size measured is speculative decoding {beside}{more}{end}"
    return f"From a batch of **{at}** on, speculative decoding is not {beside}{more}{end}"


def best_strategy(pair: Pair) -> str:
    """The fastest that needs no compiling, for sweeps that have no ladder at hand: each batch size is a step of its own,
    and would be compiled for itself."""
    graph = pair.device.type == "cuda"
    return "doubling,attention=tree_fused,runtime=cuda_graph" if graph else "doubling"


def quick_prompts(pair: Pair, count: int = 32, most: int = 112) -> list[Prompt]:
    """Held-out prompts of at most so many ids: with the answer they fit the smallest window of a captured cycle, so that
    each rung is prepared once. All of them where none is so short."""
    ready = profile_prompts(pair, get_prompts(pair, 200))
    return ([p for p in ready if len(p.ids) <= most] or ready)[:count]


def measure(
    pair: Pair,
    path: Path | None = None,
    *,
    iterations: int = 8,
    forks: int = 1,
    max_new_tokens: int = 48,
    ladder_tokens: int = 32,
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32),
    sizes: Sequence[int] | None = None,
    compiled: bool = False,
    acceptance: str | None = None,
    results_dir: Path | None = None,
) -> Record:
    """The whole "optimize" record of a pair; written to `path` (None: its place in data/results) after each part.

    Args: ladder_tokens: of each decode on the ladder, max_new_tokens: of all others; sizes: trees to set against plain
    decoding, None for all of `ladder.TREES`; acceptance: "measured" or "stated 3.0"; None: measured, and stated for a
    shape, whose weights are random: then a decode has as many cycles as its tokens take at that number, and only the
    ladder's own size of tree is set against plain decoding.
    """
    stated = stated_acceptance(pair, acceptance)
    prompts = quick_prompts(pair)
    quick = pair.device.type == "cuda"
    few = ladder_tokens if stated is None else math.ceil(ladder_tokens / stated)
    record = record_ladder(pair, {"stated_acceptance": stated})
    record["settings"] |= {
        "max_new_tokens": max_new_tokens, "ladder_tokens": few, "iterations": iterations, "forks": forks,
        "prompts": [p.id for p in prompts],
    }  # fmt: skip
    record["faithful"] = ladder.beside_forwards(pair, prompts) if quick else None

    def keep(name: str, found: Any) -> None:
        record[name] = found
        write(record, path or place("optimize", record))

    found = ladder.climb(
        pair, prompts, iterations=iterations, forks=forks, max_new_tokens=few, compiled=compiled, stated=stated,
        keep=lambda so_far: keep("ladder", so_far), results_dir=results_dir,
    )  # fmt: skip
    keep("ladder", found)
    keep(
        "operators",
        operators_of_any(pair, prompts, Decoding.of(1, found["best"]), top=MOST_KERNELS).model_dump(),
    )
    strategy = ladder.uncompiled(found["best"])
    even: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stated": stated}
    chosen = sizes or ((63,) if stated else tuple(ladder.TREES))
    keep(
        "tree_sizes",
        ladder.tree_sizes(pair, prompts, sizes=chosen, strategy=strategy, iterations=iterations, **even),
    )
    fastest = best_size(record)
    tree = fastest["total_tokens"] if fastest else 63
    # measured anew, as the fastest of several is chosen by its luck too; as many tokens as fit the window that the
    # ladder's cycles are prepared for
    longer = even | {"max_new_tokens": PLAIN_TOKENS} if quick else even
    # each prompt once: where it is measured, what is accepted differs from prompt to prompt more than anything else
    count = iterations if stated or not quick else max(iterations, len(prompts))
    # the tree that was the fastest in the measurement before comes first, then the ladder's own
    again = tuple(dict.fromkeys((tree, 63) if quick else (tree,)))
    # the seed: other orders than the sizes had
    options: dict[str, Any] = {"sizes": again, "iterations": count, "seed": 1}
    keep("against_plain", ladder.tree_sizes(pair, prompts, strategy=found["best"], **options, **longer))
    top_k, depth, total_tokens = ladder.TREES[tree]
    shape = {"top_k": top_k, "depth": depth, "total_tokens": total_tokens}
    keep(
        "batches",
        throughput.sweep(
            pair,
            prompts,
            batches=batches,
            strategy=best_strategy(pair),
            repeats=max(6, iterations),
            **shape,
            **even,
        ),
    )
    return record


app = typer.Typer(add_completion=False)


@app.command()
def main(
    device: str = "cuda",
    target: str = typer.Option("all", help="all, default, or a target such as shape:llama-3.1-8b"),
    draft: str = typer.Option("", help="a draft head's folder; empty is the one that belongs to the target"),
    iterations: int = typer.Option(8, help="pairs of each comparison"),
    forks: int = typer.Option(1, help="fresh processes a rung: 5 for verdicts that aren't provisional"),
    max_new_tokens: int = 48,
    batches: str = "1,2,4,8,16,32",
    compiled: bool = typer.Option(False, help="the rung runtime=compile, which takes minutes to prepare"),
    results_dir: Path = RESULTS,
) -> None:
    """Measure ladder, tree sizes and batches on this machine and write them to data/results/."""
    check_folder(results_dir)
    counts = [int(n) for n in batches.split(",")]
    for name in {"all": GPU_TARGETS, "default": ("",)}.get(target, (target,)):
        pair = load(name or None, draft or None, device=device)
        path = place("optimize", record_ladder(pair, {}), results_dir)
        record = measure(
            pair, path, iterations=iterations, forks=forks, max_new_tokens=max_new_tokens, batches=counts,
            compiled=compiled,
        )  # fmt: skip
        print(
            head(record),
            ladder_table(record).to_string(),
            ladder_sentence(record["ladder"]),
            sep="\n",
        )
        print(
            sizes_sentence(record["tree_sizes"]),
            batch_sentence(record["batches"]),
            remaining(record),
            sep="\n",
        )
        print(bars(record).to_string(), f"written: {path.name}", sep="\n")
        del pair


if __name__ == "__main__":
    app()
