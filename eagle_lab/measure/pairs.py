"""Taking pairs of latencies: warm-up, random order, fresh processes.

A pair is one prompt decoded by both arms, one directly after the other, in an order drawn by a fair coin that is
recorded. The clock is the host's, around a whole decode, with one synchronise before and one after; spans are off
unless an arm is there to measure them. A fork (JMH's word) is a fresh process: layout, allocator and clocks give
each process a bias that interleaving can't cancel, so a verdict rests on several.
Run as a module (`python -m eagle_lab.measure.pairs`) this file *is* such a process: it reads one pickled `Fork` from its
standard input and writes one JSON line a message to its standard output.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import cloudpickle
import torch

from eagle_lab import ROOT
from eagle_lab.decode.generate import generate, to_warm_up
from eagle_lab.decode.masks import MASK_BUILDERS
from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.environment import Cause, foreign_load, read_load, throttle_reasons
from eagle_lab.measure.records import PartCalls, Sample
from eagle_lab.models.pair import Pair, load
from eagle_lab.models.prompts import Prompt
from eagle_lab.models.targets import format_bytes, free_bytes
from eagle_lab.runtime.clock import Spans, no_span, now
from eagle_lab.verdict.mask_check import own as is_own

# A pair during which other processes took more than this share of all cores, or the GPU was held down, is dropped
# whole. Declared here, before any run, so that it can't be chosen to suit a result.
MAX_FOREIGN_LOAD = 0.25

PART = "tree_mask"  # the stage whose time is measured in the separate instrumented runs
PART_TOKENS = 16
ARMS: tuple[Literal["baseline"], Literal["candidate"]] = ("baseline", "candidate")

Message = dict[
    str, Any
]  # {"sample": Sample} with {"tokens": (…, …)} where the arms' differ, or {"part": PartCalls}
READ = {"sample": Sample.model_validate, "part": PartCalls.model_validate}


class WorkerDied(RuntimeError):
    """A fresh process ended before its work was done."""

    def __init__(self, fork: int, exit_code: int, last_words: str) -> None:
        super().__init__(f"fork {fork} ended with exit code {exit_code}: {last_words or 'it said nothing'}")
        self.fork, self.exit_code, self.last_words = fork, exit_code, last_words


@dataclass(frozen=True)
class Plan:
    """What is decoded in every pair; `spans` turns the instrumentation of the (baseline, candidate) arm on."""

    baseline: str
    candidate: str
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    seed: int = 0
    sizes: dict[str, int] = field(default_factory=dict)  # top_k, depth, total_tokens
    sampling: dict[str, float] = field(default_factory=dict)  # temperature, top_p, top_k_sampling
    spans: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Fork:
    """The share of one process: `iterations` are the numbers of its pairs; a control decodes the baseline twice."""

    number: int
    iterations: tuple[int, ...]
    control: bool = False


def run_arm(pair: Pair, plan: Plan, arm: int, prompt: Prompt, seed: int) -> tuple[float, list[int], int]:
    """Decode a prompt by arm 0 (baseline) or 1 (candidate); → seconds, new tokens, number of cycles."""
    strategy = (plan.baseline, plan.candidate)[arm]
    span = Spans(pair.device) if plan.spans[arm] else no_span
    options: dict[str, Any] = {**plan.sizes, **plan.sampling, "seed": seed, "record": False, "span": span}
    start = now(pair.device)
    done = generate(pair, prompt.ids, plan.max_new_tokens, strategy=strategy, **options)
    return (now(pair.device) - start) / 1e9, done.tokens, len(done.cycles)


def pairs(
    run_baseline: Callable[[Any], Any],
    run_candidate: Callable[[Any], Any],
    items: Sequence[Any],
    iterations: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_sample: Callable[[tuple[float, float]], None] | None = None,
    warmup: int | Sequence[int] = 1,
) -> list[tuple[float, float]]:
    """Pairs of seconds of any two functions of an item, each pair in random order, after `warmup` unmeasured ones: so
    many, or those of the items in these places.

    The general form of what `fork_messages` does for two decodes: the profile's what-ifs and the microbenchmarks use it.
    """
    coin = random.Random(seed)
    runs = (run_baseline, run_candidate)
    found = []
    before = range(-warmup, 0) if isinstance(warmup, int) else warmup
    for number, at in [*((-1, at) for at in before), *((n, n) for n in range(iterations))]:
        item = items[at % len(items)]
        took = [0.0, 0.0]
        for arm in coin.sample((0, 1), 2):
            start = now(device)
            runs[arm](item)
            took[arm] = (now(device) - start) / 1e9
        if number >= 0:
            found.append((took[0], took[1]))
            if on_sample:
                on_sample(found[-1])
    return found


def take_pair(pair: Pair, plan: Plan, fork: Fork, iteration: int) -> Message:
    """One pair as a sample for the record; where the arms' tokens differ it has both under "tokens"."""
    if fork.control:
        plan = replace(plan, candidate=plan.baseline, spans=(plan.spans[0], plan.spans[0]))
    prompt = plan.prompts[iteration % len(plan.prompts)]
    seed = plan.seed + iteration  # both arms draw the same numbers
    coin = random.Random(f"{plan.seed}/{fork.number}/{iteration}/{fork.control}")
    order = coin.sample((0, 1), 2)
    before, throttled = read_load(), set(throttle_reasons(pair.device))
    results: dict[int, tuple[float, list[int], int]] = {}
    for arm in order:
        results[arm] = run_arm(pair, plan, arm, prompt, seed)
    throttled |= set(throttle_reasons(pair.device))
    load_share = foreign_load(before, read_load())
    causes = sorted(throttled | ({Cause.FOREIGN_LOAD} if load_share > MAX_FOREIGN_LOAD else set()))
    sample = Sample(
        fork=fork.number,
        iteration=iteration,
        prompt=prompt.id,
        control=fork.control,
        order="baseline first" if order[0] == 0 else "candidate first",
        baseline_s=results[0][0],
        candidate_s=results[1][0],
        new_tokens=len(results[0][1]),
        cycles=results[0][2],
        foreign_load=round(load_share, 3),
        dropped=tuple(causes),
    )
    tokens = (results[0][1], results[1][1])
    return {"sample": sample} if tokens[0] == tokens[1] else {"sample": sample, "tokens": tokens}


def part_calls(pair: Pair, plan: Plan, fork: Fork) -> Iterator[PartCalls]:
    """Instrumented runs, apart from the pairs: seconds of each call of the part, by arm, over a short decode."""
    short = replace(plan, max_new_tokens=min(PART_TOKENS, plan.max_new_tokens))
    prompt = plan.prompts[fork.number % len(plan.prompts)]
    coin = random.Random(f"{plan.seed}/{fork.number}/part")
    for arm in coin.sample((0, 1), 2):
        spans = Spans(pair.device)
        strategy = (plan.baseline, plan.candidate)[arm]
        options: dict[str, Any] = {
            **plan.sizes,
            **plan.sampling,
            "seed": plan.seed,
            "record": False,
            "span": spans,
        }
        cycles = len(generate(pair, prompt.ids, short.max_new_tokens, strategy=strategy, **options).cycles)
        # on a GPU a host builder waits inside its span and a device builder runs after it: the longer of the two counts
        calls = [max(s.host, s.device or 0) / 1e9 for s in spans.read() if s.name == PART]
        yield PartCalls(
            fork=fork.number, arm=ARMS[arm], prompt=prompt.id, cycles=cycles, calls_s=tuple(calls)
        )


def warm_up(pair: Pair, plan: Plan, fork: Fork) -> None:
    """Decode the fork's first prompt by both arms, unmeasured, and one for each machine that its pairs will need."""
    own = [plan.prompts[iteration % len(plan.prompts)] for iteration in fork.iterations or (0,)]
    arms = (plan.baseline, plan.candidate)
    for at in to_warm_up(
        [len(p.ids) for p in own], [Decoding.of(plan.max_new_tokens, arm, **plan.sizes) for arm in arms]
    ):
        for arm in (0, 1):
            run_arm(pair, plan, arm, own[at], plan.seed)


def fork_messages(pair: Pair, plan: Plan, fork: Fork) -> Iterator[Message]:
    """Each pair as {"sample": …}, then the instrumented runs as {"part": …}; the arms must be warm."""
    for iteration in fork.iterations:
        yield take_pair(pair, plan, fork, iteration)
    if not fork.control:
        for part in part_calls(pair, plan, fork):
            yield {"part": part}


def why_not_anew(pair: Pair) -> str | None:
    """Why a fresh process can't have this very pair, in a sentence without its full stop; None where it can."""
    if not pair.origin:
        return "this pair was put together by hand, not by eagle_lab.load, so a fresh process can't load it"
    if pair.origin.get("tp_plan") is not None:
        return "a tensor-parallel target lives in the processes of torchrun, so a fresh process can't load it"
    if pair.device.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps for later is free for another
    free = free_bytes(pair.device, every=pair.origin.get("device_map") is not None)
    if pair.needed_bytes > free:
        told = f"beside this one, {pair.device} has {format_bytes(free)} free and it needs {format_bytes(pair.needed_bytes)}"
        return f"there is no memory for the pair that a fresh process loads: {told}"
    return None


def process_messages(pair: Pair, plan: Plan, fork: Fork) -> Iterator[Message]:
    """The messages of `fork_messages`, from a fresh process that loads the pair anew; the first is {"process": id}.

    Raises WorkerDied where the process ends early; what it had finished has been yielded by then; ValueError for a
    pair that was put together by hand.
    """
    if not pair.origin:
        raise ValueError(
            "a pair that was put together by hand can't be loaded by a fresh process; use forks=1."
        )
    own = {name: build for name, build in MASK_BUILDERS.items() if is_own(build)}
    work = (pair.origin, own, plan, fork)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    # not a pipe: a full pipe would stop the process in the middle of a pair
    words = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "eagle_lab.measure.pairs"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        env=environment,
    )
    finished = False
    try:
        assert process.stdin and process.stdout
        yield {"process": process.pid}
        try:
            process.stdin.write(cloudpickle.dumps(work))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once: said below
        for line in process.stdout:
            if not line.endswith(b"\n"):
                break  # killed in the middle of a message
            message = json.loads(line)
            finished = finished or "end" in message
            if not finished:
                yield {name: READ.get(name, lambda x: x)(value) for name, value in message.items()}
        code = process.wait()
        words.seek(0)
        said = words.read().decode(errors="replace").strip().splitlines()
        if not finished or code:
            raise WorkerDied(fork.number, code, said[-1] if said else "")
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, words):
            if stream:
                stream.close()


def main() -> None:
    """The fresh process itself."""
    origin, builders, plan, fork = cloudpickle.load(sys.stdin.buffer)
    # JSON lines own the standard output; whatever else prints goes to the standard error
    out, sys.stdout = sys.stdout, sys.stderr
    MASK_BUILDERS.update(builders)
    pair = load(**origin)
    warm_up(pair, plan, fork)
    for message in fork_messages(pair, plan, fork):
        print(json.dumps(message, default=lambda part: part.model_dump(mode="json")), file=out, flush=True)
    print(json.dumps({"end": True}), file=out, flush=True)


if __name__ == "__main__":
    main()
