"""Spans record what happened, in order; a planted delay is as long as asked for, and in the stage asked for."""

from __future__ import annotations

import time

import pytest
import torch
from make import needs_gpu

from eagle_lab.measure.spans import Delayed, Spans, SynchronisedSpans, device_spin, spin
from eagle_lab.runtime.clock import no_span, now


@pytest.mark.parametrize("kind", [Spans, SynchronisedSpans])
def test_spans_record_names_order_and_lengths(kind):
    spans = kind("cpu")
    with spans("first"):
        spin(2_000_000)
    with spans("second"):
        spin(1_000_000)
    first, second = spans.read()
    assert (first.name, second.name) == ("first", "second")
    assert first.host >= 2_000_000 and second.host >= 1_000_000
    assert second.start >= first.start + first.host
    assert first.device is None and first.device_start is None


def test_spin_is_at_least_as_long_as_asked_for():
    start = time.perf_counter_ns()
    spin(3_000_000)
    assert time.perf_counter_ns() - start >= 3_000_000


def test_now_is_in_nanoseconds_and_goes_forward():
    first = now("cpu")
    spin(1_000_000)
    assert now("cpu") - first >= 1_000_000


def test_a_delay_is_in_its_stage_only_and_seen_by_the_inner_span():
    inner = Spans("cpu")
    span = Delayed(inner, "slow", 5_000_000)
    for name in ("fast", "slow", "slow"):
        with span(name):
            pass
    fast, *slow = inner.read()
    assert fast.host < 5_000_000
    assert all(record.host >= 5_000_000 for record in slow)
    assert span.calls == 2
    assert span.waited >= 10_000_000


def test_a_delay_without_recording_and_of_nothing():
    span = Delayed(no_span, "slow", 0)
    with span("slow"):
        pass
    assert span.calls == 1 and span.waited < 5_000_000


def test_a_delay_leaves_an_exception_alone():
    span = Delayed(Spans("cpu"), "slow", 0)
    with pytest.raises(KeyError), span("slow"):
        raise KeyError("x")


def test_a_negative_delay_is_refused():
    with pytest.raises(ValueError, match="0 or more"):
        Delayed(no_span, "slow", -1)


def test_a_device_delay_needs_a_device():
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        device_spin("cpu")


@needs_gpu
def test_spans_time_the_device_and_a_device_delay_is_as_long_as_asked_for():
    wait = device_spin("cuda")
    spans = Spans("cuda")
    span = Delayed(spans, "slow", 4_000_000, wait)
    for name in ("fast", "slow"):
        with span(name):
            torch.ones(8, device="cuda")
    fast, slow = spans.read()
    assert fast.device < 2_000_000
    assert slow.device == pytest.approx(4_000_000, rel=0.1)
    assert slow.host < 2_000_000  # the host goes ahead
