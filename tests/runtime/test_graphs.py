"""Recording a graph: nothing of Python's own accord may happen meanwhile."""

from __future__ import annotations

import gc

import pytest
import torch
from make import needs_gpu

from eagle_lab.runtime.graphs import no_collection, record


class Loop:
    """Something that only the collector frees; it says when."""

    def __init__(self, freed, held=None):
        self.me, self.freed, self.held = self, freed, held

    def __del__(self):
        self.freed.append(1)


def litter():
    """Enough new objects for the collector to run, if it may."""
    return [[] for _ in range(5 * gc.get_threshold()[0])]


@pytest.mark.parametrize("before", [True, False])
def test_nothing_is_collected_inside_and_the_collector_is_as_before(before):
    freed: list[int] = []
    gc.collect()
    try:
        if not before:
            gc.disable()
        with pytest.raises(KeyError), no_collection():
            Loop(freed)
            litter()
            assert not freed and not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == before
    finally:
        gc.enable()
    litter()
    assert freed  # it would have been


@needs_gpu
def test_an_old_graph_that_is_garbage_does_not_end_a_recording():
    device, freed = torch.device("cuda"), []
    x = torch.zeros(1, device=device)
    old, _ = record(lambda: x + 1, lambda: x + 1, device)
    Loop(freed, old)
    del old

    def step():
        y = x + 1
        litter()
        return y + 1

    graph, y = record(step, lambda: None, device)
    x.fill_(3)
    graph.replay()
    assert y.item() == 5
    litter()
    assert freed  # it was garbage all the time
