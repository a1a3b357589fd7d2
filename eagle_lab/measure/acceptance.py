"""How many tokens a draft head gets accepted: τ overall, by category, by depth in the tree and by size of the tree."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from eagle_lab.decode.generate import Cycle, generate
from eagle_lab.measure import old_records as records
from eagle_lab.models.pair import Pair, load
from eagle_lab.models.prompts import Prompt, prepare
from eagle_lab.train.replay import greedy_texts, replayed

SIZES = (63, 31, 15, 7)


def tau(cycles: Sequence[Cycle]) -> float:
    """Mean acceptance length: tokens committed a cycle, the bonus token counted (as the next cycle's root).

    Raises ValueError for none.
    """
    if not cycles:
        raise ValueError("τ needs at least one cycle; the prompts gave none.")
    return sum(len(cycle.committed) for cycle in cycles) / len(cycles)


def by_depth(cycles: Sequence[Cycle], depth: int) -> list[dict[str, float | int]]:
    """For each depth of the tree: the cycles that `reached` it (all shallower levels accepted) and the share `accepted`."""
    found: list[dict[str, float | int]] = []
    for level in range(1, depth + 2):
        reached = sum(len(c.committed) >= level for c in cycles)
        accepted = sum(len(c.committed) > level for c in cycles)
        found.append(
            {"depth": level, "reached": reached, "accepted": round(accepted / reached, 4) if reached else 0.0}
        )
    return found


def acceptance(
    pair: Pair,
    prompts: str | Sequence[str | Prompt | Sequence[int]] = "heldout",
    max_new_tokens: int = 128,
    top_k: int = 10,
    depth: int = 7,
    sizes: Sequence[int] = SIZES,
    replay: bool = False,
    strategy: str = "rebuild",
) -> dict[str, Any]:
    """Decode the prompts greedily and count what is accepted; the first of `sizes` is the tree that is reported in full.

    Args: prompts: as for `eagle_lab.models.prompts.prepare`; sizes: draft nodes of the trees, root not counted; replay: let
    the target write its text once and decode against that (see `eagle_lab.train.replay`), many times faster on a CPU;
    strategy: how to decode, which changes the time and nothing else.
    Returns: plain data: `tau`, `cycles`, `by_category`, `by_depth`, `by_prompt`, `by_tree_size`. τ of a group is over
    all its cycles together, so a prompt weighs by its length. Shows a progress bar.
    Raises ValueError where there is no size, and as `generate` does.
    """
    chosen = prepare(pair.tokenizer, prompts)
    if not sizes:
        raise ValueError("sizes is empty; give at least one number of draft nodes.")
    runs: dict[int, list[list[Cycle]]] = defaultdict(list)
    # the last cycle may commit up to depth + 1 tokens more than asked for, and look one further
    texts = greedy_texts(pair, [p.ids for p in chosen], max_new_tokens + depth + 3) if replay else []
    with tqdm(total=len(chosen) * len(sizes), unit="run", desc="acceptance") as bar:
        for number, prompt in enumerate(chosen):
            with replayed(pair, texts[number], len(prompt.ids)) if replay else nullcontext():
                for size in sizes:
                    tree = {"top_k": top_k, "depth": depth, "total_tokens": size}
                    done = generate(pair, prompt.ids, max_new_tokens, strategy=strategy, record=False, **tree)
                    runs[size].append(done.cycles)
                    bar.update()
    full = runs[sizes[0]]
    categories: dict[str, list[Cycle]] = defaultdict(list)
    for prompt, cycles in zip(chosen, full, strict=True):
        categories[prompt.category] += cycles
    every = [cycle for cycles in full for cycle in cycles]
    return {
        "tau": round(tau(every), 4),
        "cycles": len(every),
        "by_category": {name: round(tau(cycles), 4) for name, cycles in categories.items()},
        "by_depth": by_depth(every, depth),
        "by_prompt": {p.id: round(tau(cycles), 4) for p, cycles in zip(chosen, full, strict=True)},
        "by_tree_size": {str(n): round(tau([c for cycles in runs[n] for c in cycles]), 4) for n in sizes},
        "settings": {
            "max_new_tokens": max_new_tokens, "top_k": top_k, "depth": depth,
            "total_tokens": sizes[0], "prompts": len(chosen), "temperature": 0.0, "replay": replay, "strategy": strategy,
        },
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m eagle_lab.measure.acceptance`: measure a pair and print, or with --out write, what `acceptance` returns."""
    parser = argparse.ArgumentParser(prog="python -m eagle_lab.measure.acceptance", description=__doc__)
    parser.add_argument("--target", help="hub name or folder; the embedded default if left out")
    parser.add_argument("--draft", help="hub name or folder; the shipped head if left out")
    parser.add_argument("--device", help="cuda or cpu; the best one if left out")
    parser.add_argument(
        "--prompts", default="heldout", help="heldout, train, all, a category, or ids with commas"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="draft nodes of the trees")
    parser.add_argument(
        "--replay", action="store_true", help="decode against the target's text, written once"
    )
    parser.add_argument(
        "--strategy", default="rebuild", help="how to decode; doubling,runtime=cuda_graph is fast on a GPU"
    )
    parser.add_argument("--out", type=Path, help="write a record to this file")
    given = parser.parse_args(arguments)
    try:
        pair = load(given.target, given.draft, given.device)
        found = acceptance(
            pair,
            given.prompts,
            given.max_new_tokens,
            sizes=given.sizes,
            replay=given.replay,
            strategy=given.strategy,
        )
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    if given.out:
        record = records.new("acceptance", found["settings"], pair.device.type)
        records.write({**record, "acceptance": found}, given.out)
    print(f"τ = {found['tau']:.3f} over {found['cycles']} cycles of {found['settings']['prompts']} prompts")
    for title in ("by_category", "by_tree_size"):
        print(
            title.replace("_", " "), ", ".join(f"{name} {value:.2f}" for name, value in found[title].items())
        )
    print(
        "accepted where reached, by depth",
        ", ".join(f"{level['accepted']:.2f}" for level in found["by_depth"]),
    )


if __name__ == "__main__":
    main()
