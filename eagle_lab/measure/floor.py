"""The physical floor of a cycle: the bytes it must move and the arithmetic it must do, over what the machine can.

A lower bound, so only what can't be avoided is counted: every weight once a pass, keys and values, not activations.
The target is read once a cycle; of the head, the layer and the output matrix `depth` + 1 times and `fc` once. Each in
the bytes of its dtype or its quantization: a head in 8 bits where the floor is asked for inside `forward.asked`. The
bandwidth is a copy's (bytes read + bytes written). Where weights fit into the last-level cache, or where reading alone
is faster than copying, a measurement may come out below this floor: then the machine's memory isn't its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from eagle_lab.measure.records import Part
from eagle_lab.models.pair import Pair
from eagle_lab.models.targets import kv_sizes
from eagle_lab.runtime.clock import now
from eagle_lab.runtime.kernels.float8 import FLOAT8, rounded


@dataclass(frozen=True)
class Work:
    """Bytes that must be moved and floating-point operations that must be done (a multiply-add is two)."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def _read_once(parameters: Iterable[nn.Parameter], rows: int) -> Work:
    """Each distinct weight read once; each matrix multiplied by `rows` rows."""
    seen = {p.data_ptr(): p for p in parameters}.values()
    size = sum(p.numel() * p.element_size() for p in seen)
    return Work(size, sum(2 * rows * p.numel() for p in seen if p.dim() == 2))


def _attention(rows: int, window: int, heads: int, kv_heads: int, size: int, layers: int, width: int) -> Work:
    """Keys and values of `window` slots read, of `rows` slots written; scores and their mixture computed."""
    row = 2 * layers * kv_heads * size * width
    return Work((window + rows) * row, 4 * rows * window * heads * size * layers)


class Cost(Part):
    """The least that one part takes: bytes, operations, seconds by memory and by arithmetic, and the longer of the two."""

    bytes: int
    flops: int
    memory_s: float
    arithmetic_s: float
    seconds: float


class Floor(Part):
    """The floor of a cycle on one machine, after `prefix` tokens.

    bandwidth: bytes/s; rate: operations/s; target_rate: operations/s of a quantized target's products, None where they
    have the pair's dtype; parts: by stage, with "cycle", their sum, and "plain token".
    """

    prefix: int
    bandwidth: float
    rate: float
    threads: int
    parts: dict[str, Cost]
    target_rate: float | None = None

    @property
    def cycle(self) -> float:
        """Seconds of a whole cycle."""
        return self.parts["cycle"].seconds


class Experts(Part):
    """Why there is no floor: the target is a mixture of experts, by this setting of its config."""

    setting: str
    experts: int


def experts(pair: Pair) -> Experts | None:
    """The setting that makes the target a mixture of experts; None for a dense one.

    Which experts a forward reads depends on the text, so the floor would too.
    """
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if count := getattr(pair.config, name, None):
            return Experts(setting=name, experts=count)
    return None


def target_work(pair: Pair, rows: int, prefix: int) -> Work:
    """One forward of the target over `rows` tokens after `prefix` cached ones, logits of all rows included.

    Raises ValueError for a mixture of experts.
    """
    if sparse := experts(pair):
        raise ValueError(
            f"the floor is for dense targets, and this one has {sparse.setting}={sparse.experts}."
        )
    c, width = pair.config, pair.dtype.itemsize
    kv_heads, size = kv_sizes(c)
    table = pair.target.get_input_embeddings().weight
    out = pair.target.get_output_embeddings().weight
    tied = table.data_ptr() == out.data_ptr()
    # of an embedding table only the tokens' rows are read, unless it is the output matrix too
    kept = [p for p in pair.target.parameters() if tied or p.data_ptr() != table.data_ptr()]
    heads, layers = c.num_attention_heads, c.num_hidden_layers
    mixed = _attention(rows, prefix + rows, heads, kv_heads, size, layers, width)
    return _read_once(kept, rows) + Work(rows * table.shape[1] * width, 0) + mixed


def head_work(pair: Pair, rows: int, window: int) -> Work:
    """One pass of the head's layer over `rows` pairs that attend to `window` slots; neither `fc` nor the logits."""
    c, width = pair.head.config, pair.dtype.itemsize
    mixed = _attention(rows, window, c.num_attention_heads, c.num_key_value_heads, c.head_size, 1, width)
    return _read_once(pair.head.midlayer.parameters(), rows) + Work(rows * c.hidden_size * width, 0) + mixed


def cycle_work(pair: Pair, top_k: int, depth: int, total_tokens: int, prefix: int) -> dict[str, Work]:
    """What one cycle must do, by stage ("select", "draft", "target", "commit"), `prefix` tokens before the root."""
    head, nodes, path = pair.head, total_tokens + 1, depth + 2
    logits = [*head.lm_head.parameters(), *head.norm.parameters()]
    draft = Work(0, 0)
    for step in range(depth):
        draft += head_work(pair, top_k, prefix + (step + 1) * top_k) + _read_once(logits, top_k)
    c, width = pair.config, pair.dtype.itemsize
    kv_heads, size = kv_sizes(c)
    moved = 2 * path * 2 * c.num_hidden_layers * kv_heads * size * width  # read and written
    commit = _read_once(head.fc.parameters(), path) + head_work(pair, path, prefix + path) + Work(moved, 0)
    return {
        "select": _read_once(logits, 1),  # the logits after the last committed token
        "draft": draft,
        "target": target_work(pair, nodes, prefix),
        "commit": commit,
    }


def copy_bandwidth(device: torch.device | str, megabytes: int | None = None, repeats: int = 8) -> float:
    """Bytes/s of a copy within the device's memory, read and write both counted; the best of `repeats`."""
    device = torch.device(device)
    count = (megabytes or (2048 if device.type == "cuda" else 256)) * 2**20
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * count / _least_s(partial(target.copy_, source), device, repeats)


def arithmetic_rate(
    device: torch.device | str, dtype: torch.dtype, size: int | None = None, repeats: int = 8
) -> float:
    """Operations/s of a square matrix product in the decode's dtype, or in FLOAT8; the best of `repeats`."""
    device = torch.device(device)
    n = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32) for _ in range(2))
    if dtype == FLOAT8:
        left, right, unit = rounded(a)[0], rounded(b)[0], torch.ones((), device=device)
        product = partial(
            torch._scaled_mm, left, right.t(), unit, unit, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        left, right = a.to(dtype), b.to(dtype)
        product = partial(torch.mm, left, right, out=left @ right)
    return 2 * n**3 / _least_s(product, device, repeats)


def _least_s(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = now(device)
        run()
        times.append(now(device) - start)
    return min(times) / 1e9


def floor(pair: Pair, top_k: int, depth: int, total_tokens: int, prefix: int) -> Floor | Experts:
    """The floor of a cycle and of a plain token, with this machine's rates measured now; Experts where there is none."""
    found = floors(pair, top_k, depth, total_tokens, [prefix])
    return found if isinstance(found, Experts) else found[0]


def floors(
    pair: Pair, top_k: int, depth: int, total_tokens: int, prefixes: Sequence[int]
) -> list[Floor] | Experts:
    """`floor` after each of some prefixes, in tokens, all by the same rates."""
    if sparse := experts(pair):
        return sparse
    bandwidth, rate = copy_bandwidth(pair.device), arithmetic_rate(pair.device, pair.dtype)
    own = arithmetic_rate(pair.device, FLOAT8) if pair.quantization else None
    of_target, found = own or rate, []
    for prefix in prefixes:
        work = cycle_work(pair, top_k, depth, total_tokens, prefix)
        parts = {n: cost_of(w, bandwidth, of_target if n == "target" else rate) for n, w in work.items()}
        each = [cost.model_dump() for cost in parts.values()]
        # one stage needs the result of the one before, so their floors add up
        parts["cycle"] = Cost(**{key: sum(cost[key] for cost in each) for key in Cost.model_fields})
        parts["plain token"] = cost_of(target_work(pair, 1, prefix), bandwidth, of_target)
        found.append(
            Floor(
                prefix=prefix, bandwidth=bandwidth, rate=rate, threads=torch.get_num_threads(), parts=parts, target_rate=own
            )
        )  # fmt: skip
    return found


def cost_of(work: Work, bandwidth: float, rate: float) -> Cost:
    """What some work takes at a bandwidth in bytes/s and an arithmetic rate in operations/s."""
    memory, arithmetic = work.bytes / bandwidth, work.flops / rate
    return Cost(
        bytes=work.bytes, flops=work.flops, memory_s=memory, arithmetic_s=arithmetic, seconds=max(memory, arithmetic)
    )  # fmt: skip
