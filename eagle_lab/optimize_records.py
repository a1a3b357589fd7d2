"""The records of the optimizations: the ladder, the tree sizes and the batches of one machine, and what they say.

`python -m eagle_lab.optimize_records --device cuda` measures both targets on a GPU and writes
data/results/optimize-<machine>-<target>.json; the notebooks read them from there. It has not yet run on a GPU.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import typer

from eagle_lab import ladder, throughput
from eagle_lab.machine_records import GPU_TARGETS, RESULTS, get_prompts, place
from eagle_lab.models import Pair, load
from eagle_lab.profile import profile_prompts
from eagle_lab.records import Record, check_folder, new, write
from eagle_lab.stats import Verdict


def record_ladder(pair: Pair, found: dict[str, Any], **more: Any) -> Record:
    """A ladder, and what else was measured (tree_sizes, batches), as a record of kind "optimize"."""
    settings = {
        "target": pair.target_name,
        "draft": pair.draft_name,
        "dtype": str(pair.dtype).removeprefix("torch."),
    }
    return new("optimize", settings, str(pair.device)) | {"ladder": found} | more


def ladder_table(found: dict[str, Any]) -> pd.DataFrame:
    """One row a rung, then one for each that could not run here."""
    bottom = found["floor"].get("parts", {}).get("cycle", {}).get("seconds")
    rows = []
    for rung, share in zip(found["rungs"], ladder.shares(found["rungs"]), strict=True):
        verdict = Verdict.from_dict(rung["verdict"]) if rung["verdict"] else None
        ratio = _ratio(verdict)
        rows.append({
            "change": rung["change"], "strategy": rung["strategy"], "time / rung below": ratio,
            "verdict": verdict.decision.value if verdict else "start",
            "share of the gain": "–" if share is None else f"{share:.0%}",
            "cycle, ms": f"{1e3 * rung['cycle_s']:.2f}" if rung["cycle_s"] else "–",
            "tokens/s": f"{rung['tokens_per_s']:.1f}" if rung["tokens_per_s"] else "–",
            "× floor": f"{rung['cycle_s'] / bottom:.2f}" if bottom and rung["cycle_s"] else "–",
        })  # fmt: skip
    for strategy, reason in {**found["unavailable"], **found["disagreed"]}.items():
        rows.append({"change": "not measured", "strategy": strategy, "verdict": reason})
    return pd.DataFrame(rows).fillna("–").set_index("change")


def _ratio(verdict: Verdict | None) -> str:
    if verdict is None:
        return "–"
    if math.isnan(verdict.estimate):
        return "no pair was kept: the machine was busy"
    return f"{verdict.estimate:.3f} [{verdict.low:.3f}, {verdict.high:.3f}]"


def ladder_sentence(found: dict[str, Any]) -> str:
    """What the ladder says of the best strategy against the first."""
    if found["verdict"] is None:
        judged = [rung["verdict"] for rung in found["rungs"] if rung["verdict"]]
        if all(verdict["estimate"] is None for verdict in judged):
            return "Nothing could be judged: other processes kept this machine so busy that every pair was dropped."
        return f"No change was measured to be faster than {found['rungs'][0]['strategy']}."
    verdict = Verdict.from_dict(found["verdict"])
    direct = f"**{found['best']}** against the official implementation's ways: {verdict}."
    if verdict.low <= 1 <= verdict.high:
        return f"{direct} The interval holds 1: on this machine the changes are not shown to matter."
    return f"{direct} That is {1 / verdict.estimate:.2f} times as fast."


def sizes_sentence(found: list[dict[str, Any]]) -> str:
    """Which tree size pays against plain decoding on this machine, if any was shown to."""
    best = min(found, key=lambda row: row["verdict"]["estimate"])
    verdict = Verdict.from_dict(best["verdict"])
    head = f"Best of the sizes measured: **{best['total_tokens']} draft nodes** (τ {best['acceptance_length']:.2f}), "
    time = f"{verdict.estimate:.3f} [{verdict.low:.3f}, {verdict.high:.3f}] of plain decoding's time"
    if verdict.high < 1:
        return f"{head}{time}: it pays."
    if verdict.low > 1:
        return f"{head}{time}: no tree of these sizes pays here."
    return f"{head}{time}: the interval holds 1, so it is not shown to pay."


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
            "τ": f"{row['acceptance_length']:.2f}",
        }
        for row in found
    ]
    return pd.DataFrame(rows).set_index("batch")


def batch_sentence(found: list[dict[str, Any]]) -> str:
    """From which batch size on speculative decoding was not measured to be faster."""
    at = throughput.crossing(found)
    if at is None:
        return f"Speculative decoding is faster at every batch size measured, up to {found[-1]['batch']}."
    if at == found[0]["batch"]:
        return "Speculative decoding was not measured to be faster at any of these batch sizes."
    return (
        f"From a batch of **{at}** on, speculative decoding is not measured to be faster than plain decoding."
    )


def best_strategy(pair: Pair) -> str:
    """The top rung that goes with any batch on this device, for sweeps that have no ladder at hand."""
    graph = pair.device.type == "cuda"
    return "doubling,attention=tree,runtime=cuda_graph" if graph else "doubling"


app = typer.Typer(add_completion=False)


@app.command()
def main(
    device: str = "cuda",
    target: str = typer.Option("all", help="all, default, or a target such as shape:llama-3.1-8b"),
    draft: str = typer.Option("", help="a draft head's folder; empty is the one that belongs to the target"),
    iterations: int = typer.Option(20, help="pairs of each comparison"),
    forks: int = typer.Option(5, help="fresh processes to spread them over"),
    max_new_tokens: int = 48,
    batches: str = "1,2,4,8,16,32",
    compiled: bool = typer.Option(True, help="the rung runtime=compile, which takes minutes to prepare"),
    results_dir: Path = RESULTS,
) -> None:
    """Measure ladder, tree sizes and batches on this machine and write them to data/results/."""
    check_folder(results_dir)
    for name in {"all": GPU_TARGETS, "default": ("",)}.get(target, (target,)):
        pair = load(name or None, draft or None, device=device)
        prompts = profile_prompts(pair, get_prompts(pair, 32))
        found = ladder.climb(
            pair,
            prompts,
            iterations=iterations,
            forks=forks,
            max_new_tokens=max_new_tokens,
            compiled=compiled,
        )
        print(ladder_table(found).to_string(), ladder_sentence(found), sep="\n")
        best = found["best"]
        sizes = ladder.tree_sizes(
            pair, prompts, strategy=best, max_new_tokens=max_new_tokens, iterations=iterations
        )
        print(sizes_sentence(sizes))
        counts = [int(n) for n in batches.split(",")]
        grown = throughput.sweep(
            pair, prompts, batches=counts, strategy=best_strategy(pair), max_new_tokens=max_new_tokens
        )
        print(batch_sentence(grown))
        record = record_ladder(pair, found, tree_sizes=sizes, batches=grown)
        write(record, place("optimize", record, results_dir))
        print(f"written: {place('optimize', record, results_dir).name}")
        del pair


if __name__ == "__main__":
    app()
