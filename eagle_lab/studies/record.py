"""All records of one machine: what `python -m eagle_lab record` measures and writes to data/results/."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from eagle_lab.decode.strategy import Decoding, parse
from eagle_lab.decode.tree import TREES
from eagle_lab.measure.records import RESULTS, Part, R, Record, check_folder, made, record_path, write
from eagle_lab.measure.spans import Where
from eagle_lab.models.pair import Pair, load
from eagle_lab.models.prompts import Prompt
from eagle_lab.studies import ladder as ladder_study
from eagle_lab.studies import scaling, seed, sweep
from eagle_lab.studies.ladder import Ladder, TreeSize, fastest_tree
from eagle_lab.studies.operators import Operators, operators_of_any
from eagle_lab.studies.profile import ProfileRecord, get_prompts, profile, stated_acceptance, stated_by_nodes
from eagle_lab.studies.scaling import Batch
from eagle_lab.studies.whatif import check_whatif, whatif

WHATIFS: tuple[tuple[str, Where], ...] = (("tree_mask", "host"), ("draft", "host"), ("target", "host"))
# whose records are kept; "" is the embedded default
GPU_TARGETS = ("", "shape:llama-3.2-1b", "shape:llama-3.1-8b")
DEVICE_WHATIFS: tuple[tuple[str, Where], ...] = (("draft", "device"), ("target", "device"))
LADDER_TOKENS = 32  # of a decode on the ladder
PLAIN_TOKENS = 64  # of the best strategy against plain decoding
MOST_KERNELS = 40  # nearly all of a cycle's, by name


class OptimizeSettings(Part):
    """What was optimized; None: that part was not measured.

    max_new_tokens: of each decode, ladder_tokens: of those on the ladder; iterations: the ladder's instances, and timed
    pairs of what is set against plain decoding; forks: processes.
    """

    target: str
    draft: str
    dtype: str
    stated_acceptance: float | None
    max_new_tokens: int | None = None
    ladder_tokens: int | None = None
    iterations: int | None = None
    forks: int | None = None
    prompts: list[str] = []


class OptimizeRecord(Record):
    """Optimizations of one target on one machine: the ladder, the best strategy's operators, tree sizes, batches.

    tree_sizes: against plain decoding, without a compiler; against_plain: the best strategy's, measured again with the
    tree that was the fastest there first, as the fastest of several is partly lucky.
    """

    schema_name: Literal["eagle_lab.optimize.v3"] = Field("eagle_lab.optimize.v3", alias="schema")
    settings: OptimizeSettings
    ladder: Ladder | None = None
    operators: Operators | None = None
    tree_sizes: list[TreeSize] = []
    against_plain: list[TreeSize] = []
    batches: list[Batch] = []

    @property
    def acceptance_length(self) -> float | None:
        """τ of the ladder's tree, one number for all rungs: the stated one, else the one over the most prompts, where
        the tree was set against plain decoding, else that of the cycles in turn; None where nothing was measured."""
        if self.settings.stated_acceptance or self.ladder is None:
            return self.settings.stated_acceptance
        nodes = self.ladder.total_tokens
        rows = [row for row in (*self.against_plain, *self.tree_sizes) if row.total_tokens == nodes]
        return rows[0].acceptance_length if rows else self.ladder.acceptance_length


def full_profile(
    pair: Pair,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    whatifs: Sequence[tuple[str | None, Where]] = (),
    iterations: int = 8,
    whatif_tokens: int = 12,
    delay_ms: float = 0.0,
    trace: str | Path | None = None,
    **settings: Any,
) -> ProfileRecord:
    """A profile, what torch.profiler sees, and a what-if for each (stage, where); settings as for `profile`.

    A stage that is None is chosen (see `whatif.check_whatif`). Raises ValueError for a what-if that the strategy or the
    device can't have, before anything is measured.
    """
    asked = [
        (check_whatif(pair, decoding.strategy, stage, where, iterations, delay_ms), where)
        for stage, where in whatifs
    ]
    record = profile(pair, prompts, decoding, **settings)
    record.operators = operators_of_any(pair, prompts, decoding, trace=trace)
    record.whatif = [
        whatif(
            pair, prompts, record, stage=stage, where=where, delay_ms=delay_ms, iterations=iterations,
            max_new_tokens=whatif_tokens, seed=record.settings.seed,
        )
        for stage, where in asked
    ]  # fmt: skip
    return record


def machine_profile(pair: Pair, max_new_tokens: int = 50) -> ProfileRecord:
    """The profile that is kept of a machine, with all its what-ifs."""
    # A CPU's cycle takes ten times a GPU's, so it gets fewer of them: about three minutes in all. With random weights
    # nearly every token is a cycle of its own, so fewer decodes hold as many cycles.
    quick, stated = pair.device.type == "cuda", stated_acceptance(pair)
    return full_profile(
        pair,
        get_prompts(pair, 4 if quick and not stated else 3),
        Decoding.of(max_new_tokens, "rebuild"),
        whatifs=(*WHATIFS, *DEVICE_WHATIFS) if quick else WHATIFS,
        iterations=20,
        whatif_tokens=(8 if stated else 16) if quick else 12,
        repeats=2 if quick and not stated else 1,
    )


def best_strategy(pair: Pair) -> str:
    """The fastest of the pair's device for batches, where no ladder has found one."""
    graph = pair.device.type == "cuda"
    return "cuda,attention=tree_fused,runtime=compile+cuda_graph" if graph else "doubling"


def quick_prompts(pair: Pair) -> list[Prompt]:
    """32 held-out prompts of at most 112 ids; of any length where none is so short.

    With the answer they fit the smallest window of a captured cycle, so that each rung is prepared once.
    """
    ready = get_prompts(pair, 200)
    return ([p for p in ready if len(p.ids) <= 112] or ready)[:32]


def new_ladder(pair: Pair, stated: float | None, **settings: Any) -> OptimizeRecord:
    """A record of a pair on this machine in which nothing is measured yet."""
    found = OptimizeSettings(**pair.names, stated_acceptance=stated, **settings)
    return OptimizeRecord(**made(str(pair.device)), settings=found)


def machine_ladder(
    pair: Pair,
    folder: Path = RESULTS,
    *,
    iterations: int = 8,
    forks: int = 1,
    max_new_tokens: int = 48,
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32),
    compiled: bool = False,
) -> OptimizeRecord:
    """The ladder that is kept of a machine, with tree sizes and batches; written to `folder` after each part.

    Where weights are random, the acceptance is stated: then a decode has as many cycles as its tokens take at that number,
    and only the ladder's own tree is set against plain decoding.
    """
    stated = stated_acceptance(pair)
    prompts = quick_prompts(pair)
    quick = pair.device.type == "cuda"
    few = LADDER_TOKENS if stated is None else math.ceil(LADDER_TOKENS / stated)
    record = new_ladder(
        pair, stated, max_new_tokens=max_new_tokens, ladder_tokens=few, iterations=iterations, forks=forks,
        prompts=[p.id for p in prompts],
    )  # fmt: skip

    def keep(so_far: Ladder | None = None) -> None:
        record.ladder = so_far or record.ladder
        write(record, record_path(record, folder))

    record.ladder = found = ladder_study.climb(
        pair, prompts, iterations=iterations, forks=forks, max_new_tokens=few, compiled=compiled, stated=stated, keep=keep,
    )  # fmt: skip
    if not found.in_turn:
        return record  # which rung is the best isn't known, and the rest would be measured with it
    best = Decoding.of(max_new_tokens, found.best)
    record.operators = operators_of_any(pair, prompts, best, top=MOST_KERNELS)
    keep()
    even: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stated": stated}
    sizes = (63,) if stated else tuple(TREES)
    strategy = ladder_study.uncompiled(found.best)
    record.tree_sizes = ladder_study.tree_sizes(
        pair, prompts, sizes=sizes, strategy=strategy, iterations=iterations, forks=forks, **even
    )
    keep()
    fastest = fastest_tree(record.tree_sizes)
    tree = fastest.total_tokens if fastest else 63
    # as many tokens as fit the window that the ladder's cycles are prepared for
    longer = even | {"max_new_tokens": PLAIN_TOKENS} if quick else even
    # each prompt once: where it is measured, what is accepted differs from prompt to prompt more than anything else
    count = iterations if stated or not quick else max(iterations, len(prompts))
    again = tuple(dict.fromkeys((tree, 63) if quick else (tree,)))
    record.against_plain = ladder_study.tree_sizes(  # by another seed, in other orders than the sizes had
        pair, prompts, sizes=again, strategy=found.best, iterations=count, forks=forks, seed=1, **longer
    )
    keep()
    by_nodes = stated_by_nodes(stated) if stated else None
    # what is stated is of trees as wide and deep as the largest
    trees = {n: replace(TREES[63], total_tokens=n) for n in by_nodes} if by_nodes else TREES
    decodings = [
        replace(best, strategy=parse(ladder_study.of_batches(found.best)), shape=trees[nodes])
        for nodes in sorted(trees, reverse=True)
        if nodes <= tree
    ]
    record.batches = scaling.sweep(
        pair, prompts, decodings, batches=batches, repeats=max(6, iterations), forks=forks, stated=by_nodes
    )
    keep()
    return record


def each_target(
    measure: Callable[[Pair], R],
    device: str,
    target: str = "all",
    draft: str | None = None,
    folder: Path = RESULTS,
) -> list[R]:
    """Measure each target on this machine, and write its record to `folder`; → the records.

    target: "all" of `GPU_TARGETS`, "default" (the embedded one), or one by its name. Raises ValueError for a folder that
    can't be written, before any work.
    """
    check_folder(folder)
    found = []
    for name in {"all": GPU_TARGETS, "default": ("",)}.get(target, (target,)):
        found.append(measure(load(name or None, draft or None, device=device)))
        write(found[-1], record_path(found[-1], folder))
    return found


def record(device: str, target: str = "all", folder: Path = RESULTS) -> None:
    """All records of this machine, with the usual settings of each kind, one after the other."""
    each_target(machine_profile, device, target, folder=folder)
    each_target(lambda pair: machine_ladder(pair, folder), device, target, folder=folder)
    each_target(seed.redo, device, target, folder=folder)
    sweep.record_machine(device, folder=folder)
