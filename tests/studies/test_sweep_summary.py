"""What a sweep says, on samples whose truth is known."""

from __future__ import annotations

import pytest
from make import LAWS, SWEPT, make_sweep

from eagle_lab.studies import sweep_summary as summary
from eagle_lab.studies.sweep import Cell, Missing


def test_growth_orders_are_recovered_and_their_intervals_cover():
    covered = 0
    for seed in range(40):
        record = make_sweep({name: LAWS[name] for name in ("rebuild", "square", "flat")}, seed=seed)
        for name, order in (("rebuild", 1), ("square", 2), ("flat", 0)):
            low, at, high = summary.growth(record, name)
            assert abs(at - order) < 0.02
            covered += low <= order <= high
    assert 105 <= covered <= 119  # of 120 at 95%: 114, give or take
    assert summary.growth(make_sweep(LAWS, gaps=[("flat", s) for s in SWEPT[3:]]), "flat") is None


def test_crossovers_are_recovered_with_their_intervals():
    record = make_sweep(LAWS)
    flat = summary.crossover(record, "flat")
    assert flat.low < 100 < flat.high and flat.high - flat.low < 10
    everywhere, nowhere = summary.crossover(record, "walk"), summary.crossover(record, "never")
    assert everywhere.low == everywhere.high == 0
    assert nowhere.low == nowhere.high == float("inf") == summary.crossover(record, "square").low
    # no difference anywhere: the interval has to say that nothing is known
    assert summary.crossover(record, "same").high == float("inf")
    holed = make_sweep(LAWS, gaps=[("flat", 127)])
    assert 80 < summary.crossover(holed, "flat").size < 120 and summary.ratio(holed, "flat", 127) is None


def test_each_time_has_its_own_floor():
    record, bytes_s = make_sweep(LAWS, graph_call_s=2e-6), (64 * 64 + 8 * 63) / 1e10
    assert summary.floor_s(record, 63) == pytest.approx(1e-6 + bytes_s)
    assert summary.floor_s(record, 63, 32) == pytest.approx(1e-6 + 32 * bytes_s)
    assert summary.floor_s(record, 63, 1, "graph_s") == pytest.approx(2e-6 + bytes_s)
    assert summary.floor_s(record, 63, 1, "host_s") is None
    assert summary.floor_s(make_sweep(LAWS), 63, 1, "graph_s") is None


def test_memory_is_over_the_masks_own_bytes():
    record = make_sweep(LAWS, gaps=[("flat", 15)])
    assert summary.memory(record, "walk", 63) == 1 and summary.memory(record, "flat", 15) is None


def test_each_reason_is_told_once_with_its_builders():
    why, host = Missing(reason="failed", error="boom"), Missing(reason="host_loop")
    record = make_sweep({"rebuild": LAWS["rebuild"]}, gaps=[("rebuild", 15)])
    record.cells += [Cell(builder="flat", size=15, batch=1, missing=why)]
    record.cells += [Cell(builder="flat", size=63, batch=b, graph_missing=host) for b in (1, 32)]
    assert summary.gaps(record) == [
        summary.Gap(("rebuild", "flat"), why, False, ((15, 1),)),
        summary.Gap(("flat",), host, True, ((63, 1), (63, 32))),
    ]
