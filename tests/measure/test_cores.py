"""What of a machine a process may use, and how much of that other programs took."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from eagle_lab.measure import cores
from eagle_lab.measure.cores import LoadReading, foreign_load, read_load

LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")


@pytest.fixture
def one_core():
    """This process on one of its cores; whatever else runs there is foreign."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})
    yield min(every)
    os.sched_setaffinity(0, every)


def burn(core, stop):
    os.sched_setaffinity(0, {core})
    while time.time() < stop:
        pass


def work(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


@LINUX
def test_own_work_is_not_foreign_and_a_program_on_our_core_is(one_core):
    assert cores.usable_cores() <= 1 and cores.affinity() == {one_core}
    other = multiprocessing.get_context("fork").Process(target=burn, args=(one_core, time.time() + 60))
    other.start()
    try:
        before = read_load()
        work(0.5)
        beside = foreign_load(before, read_load())
    finally:
        other.kill()
        other.join()
    # it has half of the one core; on a larger machine that would be nothing of all cores
    assert beside > 0.3
    before, until = read_load(), time.process_time()
    work(0.3)
    after = read_load()
    assert after.own - before.own > 0.25 and after.busy >= before.busy and time.process_time() > until


def reading(at, busy, own, group=None, cores=2, usable=2.0):
    return LoadReading(at, busy, own, group, cores, usable)


def test_foreign_load_is_the_share_of_our_cores_that_others_took():
    # 10 s on two cores: 12 s busy, of them 7 s own, so others had 5 of 20
    assert foreign_load(reading(0, 100, 10), reading(10, 112, 17)) == 0.25
    assert foreign_load(reading(0, 100, 10), reading(10, 110, 20)) == 0
    assert foreign_load(reading(5, 0, 0), reading(5, 1, 0)) == 0


def test_under_a_quota_only_what_is_missing_of_it_counts():
    # 2 of 64 cores' time is ours: others may have 60 of them, and then still nothing is missing
    quota = {"cores": 64, "usable": 2.0}
    start = reading(0, 0, 0, 0.0, **quota)
    assert foreign_load(start, reading(10, 620, 20, 20.0, **quota)) == 0
    # with 63 others one core is left for our two
    assert foreign_load(start, reading(10, 640, 10, 10.0, **quota)) == 0.5
    # a neighbour in the same container takes half of the quota, though the machine is idle
    assert foreign_load(start, reading(10, 20, 10, 20.0, **quota)) == 0.5


def test_a_quota_below_the_cores_is_what_can_be_used(monkeypatch):
    monkeypatch.setattr(cores, "affinity", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(cores.cgroups, "quota", lambda: 1.5)
    assert cores.usable_cores() == 1.5
    monkeypatch.setattr(cores.cgroups, "quota", lambda: 8.0)
    assert cores.usable_cores() == 4
