"""How often the verdict errs: simulated designs at a seed, and many short runs on a machine with known delays planted.

A run is a short comparison of one program with itself, in which each cycle of the candidate takes a known share longer:
nothing, 1, 2 or 5%. The verdict over its processes should find that. Runs are taken on the machine as it is, and beside a
program that takes one core a share of the time. A share counted over R runs is itself uncertain by about
sqrt(p (1 - p) / R).
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
from pydantic import Field
from scipy import stats as scipy_stats

from eagle_lab.decode.strategy import Decoding
from eagle_lab.measure.pairs import Fork, Plan, fork_messages
from eagle_lab.measure.records import InstanceSample, Part, Record, append, made, read, write
from eagle_lab.measure.spans import Where
from eagle_lab.measure.worker import Workers, check_anew
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.instances import PlantedSettings, decoded, planted_plan
from eagle_lab.verdict.simulate import DESIGNS, SLICED, Design, Noise, simulate
from eagle_lab.verdict.stats import Decision, Verdict
from eagle_lab.verdict.summary import calm_cycle_s, cycle_noise, judge_kept

FEWEST = 500
USUAL = DESIGNS[0]  # two blocks, the difference of their means
ONE_FORK = next(d for d in DESIGNS if d.analysis == "signed-rank" and not d.process_bias)
BIASED = next(d for d in DESIGNS if d.analysis == "signed-rank" and d.process_bias)
FIVE_FORKS = next(d for d in DESIGNS if d.analysis == "forks t")
CYCLES_HERE = next(d for d in DESIGNS if d.order == "cycles" and d.forks == 1)
CYCLES = next(d for d in DESIGNS if d.order == "cycles" and d.forks > 1)

PLANTED = (0.0, 0.01, 0.02, 0.05)
LOADS = (0.0, 0.5)
BURST_S = 0.1  # the other program works and rests in turns that together last so long
A_RUN = 100  # iterations are numbered anew in each run, so that prompts and coins differ


def check_repetitions(repetitions: int) -> int:
    """The number itself, or ValueError where a share counted over so few would say nothing."""
    if repetitions < FEWEST:
        raise ValueError(
            f"repetitions is {repetitions}; fewer than {FEWEST} can't show a rate of half a percent."
        )
    return repetitions


class CalibrationSettings(PlantedSettings):
    """seconds: of a run, shared by its `forks` (1: in one process, over its instances). planted: each run has one of them."""

    seconds: float
    forks: int
    delta: float
    alpha: float


class Run(Part):
    """One short run.

    load: the share of the time for which another program took one core; planted: the share of `cycle_s` that each cycle of
    the candidate took longer.
    """

    number: int
    load: float
    planted: float
    seconds: float
    instances: list[InstanceSample]


class CalibrationRecord(Record):
    """Many short runs with planted delays."""

    schema_name: Literal["eagle_lab.calibration.v1"] = Field("eagle_lab.calibration.v1", alias="schema")
    settings: CalibrationSettings
    runs: list[Run] = []


@contextmanager
def beside(load: float) -> Iterator[None]:
    """Inside, another program takes one core for this share of the time, in bursts; none where it is 0."""
    if not load:
        yield
        return
    busy, rest = load * BURST_S, (1 - load) * BURST_S
    code = f"""
import time
while True:
    end = time.perf_counter() + {busy}
    while time.perf_counter() < end:
        pass
    time.sleep({rest})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def calibrate(
    pair: Pair,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    path: Path | None = None,
    *,
    runs: int = 10,
    seconds: float = 20.0,
    forks: int = 5,
    loads: Sequence[float] = LOADS,
    planted: Sequence[float] = PLANTED,
    where: Where | None = None,
    seed: int = 0,
    delta: float = 0.01,
    alpha: float = 0.05,
    on_run: Callable[[CalibrationRecord], object] | None = None,
) -> CalibrationRecord:
    """So many runs of each planted delay under each load, in turn.

    Args: path: the record, which grows with each run; one that is there is gone on with, if it was begun with the same
    settings. on_run: told of the record after each run. Raises ValueError for settings that differ, for a load that is no
    share, and as `planted_plan` and `check_anew` do.
    """
    if bad := [load for load in loads if not 0 <= load < 1]:
        raise ValueError(f"a load is a share of one core's time from 0 to below 1, not {bad[0]}.")
    plan, cycle_s = planted_plan(pair, prompts, decoding, where=where, seed=seed)
    if forks > 1:
        check_anew(pair, plan)
    settings = CalibrationSettings(
        **decoded(pair, decoding), seed=seed, planted=list(planted), where=plan.where, cycle_s=cycle_s, seconds=seconds,
        forks=forks, delta=delta, alpha=alpha,
    )  # fmt: skip
    record = CalibrationRecord(**made(pair.device.type), settings=settings)
    if path is not None:
        if path.exists():
            record = read(path, CalibrationRecord)
            if record.settings != settings.model_copy(update={"cycle_s": record.settings.cycle_s}):
                raise ValueError(f"{path} was begun with other settings; name another file, or move it away.")
        write(record, path)
    done = {(run.number, run.load, run.planted) for run in record.runs}
    with nullcontext() if forks == 1 else Workers(pair, plan) as workers:
        for number, load, share in product(range(runs), loads, planted):
            if (number, load, share) in done:
                continue
            delay_s = share * record.settings.cycle_s
            with beside(load):
                instances, took = _run(pair, plan, workers, number, seconds, forks, delay_s)
            run = Run(number=number, load=load, planted=share, seconds=took, instances=instances)
            if path is None:
                record.runs.append(run)
            else:
                append(record, path, "runs", run)
            if on_run:
                on_run(record)
    if path is not None:
        write(record, path)
    return record


def _run(
    pair: Pair, plan: Plan, workers: Workers | None, number: int, seconds: float, forks: int, delay_s: float
) -> tuple[list[InstanceSample], float]:
    begun, instances = perf_counter(), []
    for n in range(forks):
        left = max(0.0, seconds - (perf_counter() - begun)) / (forks - n)
        first = number * A_RUN + n * A_RUN // forks
        # equal arms are a control, which has no part to time
        work = tuple(range(first, first + A_RUN // forks))
        fork = Fork(n, work, control=True, seconds=left, delays_s=(0.0, 0.0, delay_s))
        for message in fork_messages(pair, plan, fork) if workers is None else workers.messages(fork):
            if "instance" in message:
                instances.append(message["instance"])
    return instances, round(perf_counter() - begun, 3)


@dataclass(frozen=True)
class Found:
    """What one run said; truth: the ratio that the planted seconds made of the cycles as this run found them."""

    planted: float
    truth: float
    verdict: Verdict

    @property
    def covers(self) -> bool:
        """Whether the interval holds the truth."""
        return self.verdict.low <= self.truth <= self.verdict.high

    @property
    def told(self) -> bool:
        """Whether the interval excludes 1 on the side of what was planted; on either, where that is nothing."""
        return self.verdict.low > 1 or (not self.planted and self.verdict.high < 1)


def found(run: Run, settings: CalibrationSettings) -> Found | None:
    """The verdict by the kit's own rule; None for a run without two instances or processes."""
    kept = [i for i in run.instances if i.seconds and not i.dropped]
    if len({i.fork for i in kept} if settings.forks > 1 else kept) < 2:
        return None
    truth = 1 + run.planted * settings.cycle_s / calm_cycle_s(kept)
    return Found(run.planted, truth, judge_kept(kept, settings.delta, settings.alpha))


def findings(record: CalibrationRecord, load: float | None = None) -> list[Found]:
    """What each run said, of those under one load where it is given."""
    runs = [run for run in record.runs if load in (None, run.load)]
    return [f for run in runs if (f := found(run, record.settings))]


@dataclass(frozen=True)
class Rate:
    """Counts over the runs under one load with one planted delay.

    ratio, truth: means over runs; half_width: the median of the intervals', on the log scale; adopted, reverted: runs with
    that verdict; foreign_load: the median share of the cores that other programs took.
    """

    planted: float
    load: float
    runs: int
    ratio: float
    truth: float
    half_width: float
    covered: int
    told: int
    adopted: int
    reverted: int
    foreign_load: float

    def share(self, count: int) -> tuple[float, float, float]:
        """A count as a share of the runs, with its exact 95% interval (Clopper and Pearson): low, share, high."""
        ends = scipy_stats.binomtest(count, self.runs).proportion_ci(method="exact")
        return float(ends.low), count / self.runs, float(ends.high)


def rates(record: CalibrationRecord) -> list[Rate]:
    """A row for each load and planted delay."""
    rows, loads = [], dict.fromkeys(run.load for run in record.runs)
    each = {load: findings(record, load) for load in loads}
    for load, planted in product(loads, record.settings.planted):
        runs = [run for run in record.runs if (run.load, run.planted) == (load, planted)]
        here = [f for f in each[load] if f.planted == planted]
        if not here:
            continue
        verdicts = [f.verdict for f in here]
        widths = [math.log(v.high / v.low) / 2 for v in verdicts]
        decisions = [v.decision for v in verdicts]
        foreign = float(np.median([i.foreign_load for run in runs for i in run.instances]))
        rows.append(
            Rate(
                planted, load, len(here), math.exp(float(np.mean([math.log(v.estimate) for v in verdicts]))),
                float(np.mean([f.truth for f in here])), float(np.median(widths)), sum(f.covers for f in here),
                sum(f.told for f in here), decisions.count(Decision.ADOPT), decisions.count(Decision.REVERT), foreign,
            )
        )  # fmt: skip
    return rows


def design_of(record: CalibrationRecord) -> Design:
    """The design of a record's runs, to be simulated: as many processes, instances and stretches."""
    kept = [i for run in record.runs for i in run.instances if i.seconds]
    stretches = max(1, round(float(np.median([len(i.seconds) for i in kept]))))
    each = len(kept) / max(1, len(record.runs)) / record.settings.forks
    bias = CYCLES.process_bias if record.settings.forks > 1 else 0.0
    order = "slices" if all(i.slices for i in kept) else "cycles"
    return Design(
        "as the runs", order, "instances t", record.settings.forks, max(1, round(each)), bias, stretches
    )


def simulated(record: CalibrationRecord, repetitions: int = 4000) -> dict:
    """`simulate` of the record's own design; the noise of a cycle is that of its runs without a load, the rest assumed."""
    quiet = [i for run in record.runs if not run.load for i in run.instances if i.seconds]
    design = design_of(record)
    noise = SLICED if design.order == "slices" else Noise()
    if quiet:
        noise = replace(noise, cycle=cycle_noise(quiet))
    effects, s = tuple(p for p in record.settings.planted if p), record.settings
    return simulate(design, effects, repetitions, noise=noise, delta=s.delta, alpha=s.alpha)
