"""Writing in place, committing a path, growing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_lab.models.cache import GrowingCache, KeyValueCache, text_bytes

CPU = torch.device("cpu")


def filled(rows: int, capacity: int = 12) -> KeyValueCache:
    """Two layers whose slot s of row r holds 100 r + s (keys) and its negative (values)."""
    cache = KeyValueCache([CPU, CPU], rows, 3, capacity, 4, torch.float32)
    number = 100.0 * torch.arange(rows)[:, None] + torch.arange(capacity)
    for layer in range(2):
        whole = number[:, None, :, None].expand(rows, 3, capacity, 4)
        cache.set_slots(torch.arange(capacity).expand(rows, -1), capacity, 0)
        cache.update(whole, -whole, layer)
    return cache


def test_update_writes_at_the_slots_and_returns_the_window():
    for rows in (1, 2):
        cache = filled(rows)
        slots = torch.tensor([[5, 2], [7, 3]])[:rows]
        new = torch.full((rows, 3, 2, 4), -1.0)
        cache.set_slots(slots, 8, 0)
        keys, values = cache.update(new, 2 * new, 1)
        assert keys.shape == values.shape == (rows, 3, 8, 4)
        for row in range(rows):
            expected = 100.0 * row + torch.arange(8)
            expected[slots[row]] = -1.0
            assert torch.equal(keys[row, 0, :, 0], expected)
            assert torch.equal(cache.buffers[CPU][0, 0, row, 0, :, 0], 100.0 * row + torch.arange(12))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.data())
def test_commit_reads_all_rows_before_it_writes_any(rows, data):
    """Overlapping source and target slots, which a path along the first nodes gives, are safe."""
    source = data.draw(
        st.lists(st.lists(st.integers(0, 11), min_size=4, max_size=4), min_size=rows, max_size=rows)
    )
    starts = data.draw(st.lists(st.integers(0, 8), min_size=rows, max_size=rows))
    target = torch.tensor(starts)[:, None] + torch.arange(4)
    cache = filled(rows)
    cache.commit(torch.tensor(source), target)
    for row in range(rows):
        expected = 100.0 * row + torch.arange(12)
        expected[target[row]] = 100.0 * row + torch.tensor(source[row], dtype=torch.float32)
        for layer in range(2):
            assert torch.equal(cache.buffers[CPU][0, layer, row, 1, :, 2], expected)
            assert torch.equal(cache.buffers[CPU][1, layer, row, 1, :, 2], -expected)


def test_a_row_shares_the_memory_of_its_batch():
    cache = filled(3)
    one = cache.row(1)
    one.set_slots(torch.tensor([[4]]), 6, 0)
    keys, _ = one.update(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4), 0)
    assert torch.equal(keys[0, 0, :, 0], torch.tensor([100.0, 101, 102, 103, 0, 105]))
    assert cache.buffers[CPU][0, 0, 1, 0, 4, 0] == 0
    assert cache.buffers[CPU][0, 0, 0, 0, 4, 0] == 4


def test_growing_cache_drops_what_follows_the_start():
    cache = GrowingCache(2, 4, torch.float32, CPU)
    for start, new, expected in [
        (0, [1, 2, 3], [1, 2, 3]),
        (3, [4, 5], [1, 2, 3, 4, 5]),
        (2, [9], [1, 2, 9]),
    ]:
        cache.set_slots(torch.zeros(1, len(new), dtype=torch.int64), 99, start)
        rows = torch.tensor(new, dtype=torch.float32)[None, None, :, None].expand(1, 2, -1, 4)
        keys, values = cache.update(rows, -rows)
        assert keys[0, 1, :, 3].tolist() == expected
        assert values[0, 1, :, 3].tolist() == [-x for x in expected]
    assert cache.bytes() == 2 * 2 * 3 * 4 * 4


def test_what_a_text_needs_covers_its_keys_and_values_and_grows_in_line(tiny_pair):
    def told(slots, **options):
        return text_bytes(tiny_pair.config, tiny_pair.head.config, tiny_pair.dtype, slots, **options)

    for slots in (100, 5000):
        caches = (tiny_pair.new_cache(1, slots), tiny_pair.new_head_cache(1, slots))
        assert told(slots) > sum(cache.bytes() for cache in caches)
    assert told(40_000) - told(20_000) == 2 * (told(30_000) - told(20_000))
    assert told(5000, rows=3) - told(5000) == 2 * sum(cache.bytes() for cache in caches)
    assert (
        told(5000, attention="eager") > told(5000) > text_bytes(tiny_pair.config, None, tiny_pair.dtype, 5000)
    )
    assert tiny_pair.facts.context_bytes == told(tiny_pair.context)
    assert "a text of 1024 tokens needs" in tiny_pair.describe()
