"""The bars of the optimizations on made-up numbers whose answers are known; none of them is a measurement."""

from __future__ import annotations

import pytest
from make import verdict

from eagle_lab.studies.optimize_bars import bars, head, kind, lossless, remaining, short
from eagle_lab.studies.optimize_records import prepared

GPU, CPU = {"gpu": {"name": "A GPU"}}, {"gpu": None, "cpu": {"name": "A CPU", "cores": 2}}


def made(target, first, best, floor_s=None, **more):
    """A record whose first and best cycles take so many seconds."""
    rungs = [{"strategy": name, "cycle_s": s, "cycles_s": [s] * 8} for name, s in (("a", first), ("b", best))]
    parts = {"parts": {"cycle": {"seconds": floor_s}}} if floor_s else {"missing": "no floor here"}
    ladder = {"rungs": rungs, "best": "b", "verdict": None, "floor": parts}
    settings = {"target": target, "dtype": "bfloat16", "stated_acceptance": more.pop("stated", None)}
    return {"settings": settings, "environment": GPU, "ladder": ladder, **more}


def held(record):
    return dict(zip(bars(record)["bar"], bars(record)["holds"], strict=True))


def test_the_bars_of_the_large_shape():
    size = {"total_tokens": 63, "acceptance_length": 3.0, "stated": True, "verdict": verdict(0.5, 0.4, 0.6)}
    size |= {"strategy": "b"}  # the best one's
    good = made(
        "shape:llama-3.1-8b",
        0.0482,
        0.010,
        0.007,
        faithful={"cycle_s": [0.0482] * 3, "forward_s": [0.0343] * 3},
        tree_sizes=[size],
        stated=3.0,
    )
    assert list(held(good).values()) == ["yes"] * 4
    told = bars(good)["measured"].to_list()
    assert told[0].startswith("+0%") and told[1].startswith("4.82×") and "stated and not measured" in told[3]
    assert "random weights" in head(good)
    # a size measured on another runtime than the best strategy's says nothing about it
    assert list(held(good | {"tree_sizes": [size | {"strategy": "a"}]}).values())[-1] == "not measured"
    other = [size | {"strategy": "a", "verdict": verdict(0.9, 0.8, 1.0)}]
    assert list(held(good | {"tree_sizes": other, "against_plain": [size]}).values())[-1] == "yes"
    # of two trees set against plain decoding by themselves the first was chosen beforehand; the other is told
    slower = size | {"total_tokens": 15, "verdict": verdict(0.8, 0.7, 0.9)}
    both = bars(good | {"against_plain": [slower, size]})
    assert both["holds"].to_list()[-1] == "no"
    assert "1.25× [1.11, 1.43], 15 draft nodes" in both["measured"].to_list()[-1]
    assert both["measured"].to_list()[-1].endswith("; 63 nodes: 2.00× [1.67, 2.50]")
    dropped = slower | {"verdict": verdict(None, None, None)}
    assert bars(good | {"against_plain": [dropped, size]})["measured"].to_list()[-1] == "not measured"
    # a host that launches a third slower for a while slows both, and changes nothing
    slower = {"cycle_s": [0.0482, 0.0643, 0.0482], "forward_s": [0.0343, 0.0457, 0.0343]}
    assert list(held(good | {"faithful": slower}).values()) == ["yes"] * 4
    # on a host that launches twice as fast the official cycle would have taken half
    slow = good | {"faithful": {"cycle_s": [0.0482] * 3, "forward_s": [0.0343 / 2] * 3}}
    assert list(held(slow).values()) == ["no", "yes", "yes", "yes"]
    assert (
        "the target's forward inside the official cycle took 29.3 ms, so of its own forwards that cycle is 1.65"
        in told[0]
    )
    assert told[2].endswith("; the aim of 1.25× is missed by 1.25 ms")
    # three cycles are too few for an interval, so nothing is told of one
    assert "in the interval" not in told[0]
    assert "minutes apart" in told[1]


def in_turn(first, best):
    """A record whose first and best cycles were timed in turn."""
    record = made("shape:llama-3.1-8b", 0.05, 0.01)
    record["ladder"]["in_turn"] = True
    for rung, times in zip(record["ladder"]["rungs"], (first, best), strict=True):
        rung["cycles_s"] = times
    return bars(record).iloc[1]


def test_cycles_in_turn_are_compared_pair_by_pair():
    """A host that slows down for a while slows both of a pair."""
    found = in_turn([0.04, 0.08, 0.05] * 4, [0.01, 0.02, 0.0125] * 4)
    assert found["measured"].startswith("4.00× [4.00, 4.00], cycles in turn") and found["holds"] == "yes"
    found = in_turn([0.034, 0.037] * 6, [0.01] * 12)
    assert found["measured"].endswith("the bar lies in the interval")


def test_an_interval_that_holds_the_bar_is_told():
    size = {"total_tokens": 63, "acceptance_length": 3.2, "strategy": "b", "verdict": verdict(0.6, 0.5, 0.7)}
    times = {"cycle_s": [0.06 + 0.0002 * n for n in range(20)], "forward_s": [0.03] * 20}
    found = bars(made("smollm2-135m", 0.065, 0.002, tree_sizes=[size], faithful=times))["measured"].to_list()
    assert ["in the interval" in words for words in found] == [False, False, False, True]
    assert found[2].endswith("; the aim of 1.5 ms is missed by 0.50 ms")
    times = {
        "cycle_s": [0.0505 + 0.0002 * n for n in range(20)],
        "forward_s": [0.03] * 20,
    }  # 1.75, and 1.72 is 15%
    faithful, *_ = bars(made("smollm2-135m", 0.065, 0.002, faithful=times))["measured"]
    assert faithful.startswith("-14%") and faithful.endswith("; 1.72 (-15%) lies in the interval")


def test_the_bars_of_the_small_target_and_what_was_not_measured():
    found = held(made("HuggingFaceTB/SmolLM2-135M-Instruct", 0.065, 0.0045))
    assert list(found.values()) == ["not measured", "yes", "no", "not measured"]
    none = made("HuggingFaceTB/SmolLM2-135M-Instruct", 0.065, None)
    assert set(held(none).values()) == {"not measured"}
    assert bars(made("another", 1, 1)).empty


def test_the_bars_of_a_cpu():
    here = made("x", 0.1, 0.09) | {"environment": CPU}
    here["ladder"]["verdict"] = verdict(0.9, 0.8, 0.95)
    size = {"total_tokens": 7, "acceptance_length": 2.0, "verdict": verdict(1.2, 1.1, 1.3)}
    assert list(held(here | {"tree_sizes": [size]}).values()) == ["yes", "no"]
    # the fastest of several is judged by the measurement that was made after it was chosen
    faster = size | {"verdict": verdict(0.8, 0.7, 0.9)}
    several = here | {"tree_sizes": [faster, size]}
    assert (
        bars(several)["measured"]
        .to_list()[-1]
        .endswith("plain decoding's time, by the same pairs the fastest of 2")
    )
    anew = several | {"against_plain": [size]}
    assert list(held(anew).values()) == ["yes", "no"]
    assert (
        "1.200 [1.10, 1.30] of plain decoding's time, measured anew as the fastest of 2"
        in bars(anew)["measured"].to_list()[-1]
    )
    here["ladder"]["verdict"] = verdict(1.2, 1.1, 1.3)
    assert list(held(here).values()) == ["no", "not measured"]


def test_where_the_remaining_time_is_told_by_kernels():
    found = {
        "cycles": 2, "busy_s": 0.004, "kernels": 10, "top": [],
        "top_kernels": [{"name": "void ns::gemm<float, 3>(int)", "calls": 4, "device_ms": 3.0}],
    }  # fmt: skip
    words = remaining(made("x", 0.01, 0.005, operators=found))
    assert "busy 2.00 of 5.00 ms" in words and "`gemm` 75% (2 a cycle)" in words
    assert "matrix products 1.50 ms, small kernels 0.50 ms. In the other 3.00 ms it waits:" in words
    assert "it waits" not in remaining(
        made("x", 0.01, 0.001, operators=found)
    )  # the profiled decode was slower
    products = remaining(made("x", 0.01, 0.005, 0.001, operators=found))
    assert (
        "The products take 1.50 times the floor of 1.00 ms: faster ones could save at most 0.50 ms"
        in products
    )
    assert [kind(k) for k in ("void cublasLt::splitKreduce_kernel", "whole_kernel", "merge_kernel", "triton_poi_0")] == [
        "matrix products", "attention", "choosing children", "small kernels",
    ]  # fmt: skip
    libraries = (
        "pytorch_flash::flash_fwd_splitkv_kernel<cutlass::bfloat16_t>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
    )
    assert {kind(k) for k in libraries} == {"attention"}
    assert "not been measured" in remaining(made("x", 1, 1))
    assert short("nvjet_tst_64x8") == "nvjet_tst_64x8" and len(short("k" * 99)) == 60


@pytest.mark.parametrize("low", [0.0, 0.3])
def test_an_interval_without_a_lower_end_is_left_out(low):
    size = {"total_tokens": 63, "acceptance_length": 3.0, "verdict": verdict(0.5, low, 0.6), "strategy": "b"}
    text = bars(made("smollm2-135m", 1, 1, tree_sizes=[size]))["measured"].to_list()[-1]
    assert text.startswith("2.00×") and ("[" in text) == (low > 0)


def test_whether_anything_was_lost_is_told_with_the_margin():
    record = made("x", 0.01, 0.005)
    assert "not recorded" in lossless(record)
    first, best = record["ladder"]["rungs"]
    best |= {"against_plain": "identical", "parted": [], "pairs_parted": 0, "pairs": 8}
    assert lossless(record).endswith("identical in 8.")
    first |= {
        "against_plain": "tie: logit margin 0.01, tolerance 2: a tie",
        "parted": [
            "tie: logit margin 0.2, tolerance 1: a tie",
            "tie: logit margin 0.03, tolerance 0.1: a tie",
        ],
        "pairs_parted": 1,
        "pairs": 8,
    }
    words = lossless(record)
    assert "identical in 15." in words and "the widest: tie: logit margin 0.2, tolerance 1" in words
    # of equally wide ones the same is told in every run, whatever the order of a set
    first["parted"] = [f"tie {n}: logit margin 0.5, tolerance 1: a tie" for n in range(9)]
    assert "the widest: tie 8" in lossless(record)


def test_what_a_capture_took_is_told_with_its_caches_and_readings():
    reading = {"reading_seconds": 0.5, "reading_bytes": 2**20, "cache_bytes": 2**20}
    made = [{"seconds": 1.5, "bytes": 2**21, **reading}, {"seconds": 1, "bytes": 0}]
    read = set()
    assert prepared({"prepared": made}, read) == "3.0 s, 4 MiB"
    # a later rung that shares the readings didn't make them
    assert prepared({"prepared": made}, read) == "2.5 s, 3 MiB"
    more = [{"seconds": 1.0, "bytes": 0, "readings": [[0.5, 2**20], [0.25, 2**21]]}]
    assert prepared({"prepared": more}, read) == "1.2 s, 2 MiB"
    assert prepared({}, read) == "–"
