"""What a CUDA graph would record, checked without a GPU: it is the same cycle, on the same buffers, without the host.

The capture itself runs only where there is a CUDA GPU.
"""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from make import GOLDEN, forget, needs_gpu
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from eagle_lab import generate, generate_plain
from eagle_lab.decode import session as sessions
from eagle_lab.decode.batch import decode_batch
from eagle_lab.decode.session import Session
from eagle_lab.decode.strategy import Decoding, unavailable
from eagle_lab.decode.tree import TreeShape
from eagle_lab.models.cache import BOUND
from eagle_lab.runtime import prepare as runtime
from eagle_lab.runtime.prepare import RUNTIMES, fixed, prepare

SIZES = {"top_k": 4, "depth": 3, "total_tokens": 16}
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "item")


class NoHost(TorchDispatchMode):
    """Refuses operations whose result the host must see, or whose shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name.startswith(WAITS):
            raise AssertionError(f"waits for the host: {func}")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("an index by a mask has a shape that depends on values")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host(patch: pytest.MonkeyPatch):
    """No value may reach the host inside; on the CPU `tolist` reads memory without an operation, so it is taken away."""

    def refuse(self, *args):
        raise AssertionError("waits for the host: a value was read")

    with patch.context() as inside:
        for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            inside.setattr(torch.Tensor, name, refuse)
        with NoHost():
            yield


@pytest.fixture
def pair(tiny_pair):
    """The tiny pair without sessions of other tests."""
    tiny_pair.sessions.clear()
    yield tiny_pair
    tiny_pair.sessions.clear()


@pytest.fixture(scope="module")
def prompts():
    """Two golden prompts."""
    return [run["prompt"] for run in json.loads((GOLDEN / "golden.json").read_text())["cases"][0]["runs"]]


@pytest.mark.parametrize("attention", ["sdpa", "tree", "eager"])
def test_the_step_to_capture_repeats_on_its_buffers_with_eager_s_results(prepared, pair, prompts, attention):
    """Two prompts, one after the other, in one kept session; trees, paths and tokens are those of the eager runtime."""
    for prompt in (prompts[0], prompts[1], prompts[0]):
        seen = generate(pair, prompt, 24, strategy=f"cuda_graph,doubling,attention={attention}", **SIZES)
        usual = generate(pair, prompt, 24, **SIZES)
        assert seen.tokens == usual.tokens
        for one, other in zip(seen.cycles, usual.cycles, strict=True):
            assert (one.prefix, one.committed, one.bonus) == (other.prefix, other.committed, other.bonus)
            assert (one.tokens, one.parents) == (other.tokens, other.parents)
            assert one.scores == pytest.approx(other.scores, abs=1e-4)
    assert [len(idle) for idle in pair.sessions.values()] == [1]


def test_plain_decoding_repeats_on_its_buffers_too(prepared, pair, prompts):
    for prompt in prompts:
        assert (
            generate_plain(pair, prompt, 12, strategy="cuda_graph").tokens
            == generate_plain(pair, prompt, 12).tokens
        )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("attention", ["sdpa", "tree"])
def test_nothing_in_a_cycle_waits_for_the_host_or_leaves_its_place(
    prepared, pair, prompts, monkeypatch, attention, temperature
):
    """Also with sampling; and after every step each tensor of the state lies where it lay."""
    step, steps = Session.advance, []

    def guarded(self, *span):
        state = self.state
        tensors = [state.length, state.root, state.hidden, state.active, state.uniforms]
        tensors += [*state.target_cache.buffers.values(), *state.head_cache.buffers.values()]
        places = [t.data_ptr() for t in tensors]
        with no_host(monkeypatch):
            out = step(self)
        steps.append([t.data_ptr() for t in tensors] == places)
        return out

    monkeypatch.setattr(Session, "advance", guarded)
    options = {"temperature": temperature, "seed": 1, "top_p": 0.9, **SIZES}
    generate(pair, prompts[0], 12, strategy=f"cuda_graph,doubling,attention={attention}", **options)
    assert len(steps) > 3 and all(steps)


def test_the_guard_sees_a_mask_that_loops_on_the_host(prepared, pair, prompts, monkeypatch):
    step = Session.advance

    def guarded(self, *span):
        with no_host(monkeypatch):
            return step(self)

    monkeypatch.setattr(Session, "advance", guarded)
    monkeypatch.setattr("eagle_lab.decode.strategy.waits_for_host", lambda name: False)
    with pytest.raises(AssertionError, match="waits for the host"):
        generate(pair, prompts[0], 12, strategy="cuda_graph,mask=rebuild", **SIZES)
    some, numbers = torch.tensor([True, False, True]), torch.arange(3)
    with pytest.raises(AssertionError, match="depends on values"), no_host(monkeypatch):
        numbers[some]
    with pytest.raises(AssertionError, match="waits for the host"), no_host(monkeypatch):
        numbers.nonzero()
    with pytest.raises(AssertionError, match="waits for the host"), no_host(monkeypatch):
        assert numbers.sum() > 0


def test_the_window_grows_in_buckets(prepared, pair, prompts, monkeypatch):
    monkeypatch.setattr(sessions, "SMALLEST_WINDOW", 32)
    windows = []
    step = Session.advance
    monkeypatch.setattr(
        Session, "advance", lambda self, *span: windows.append(self.state.window) or step(self)
    )
    found = generate(pair, prompts[0], 90, strategy="cuda_graph,doubling", **SIZES)
    assert found.tokens == generate(pair, prompts[0], 90, strategy="doubling", **SIZES).tokens
    used = [window for window in windows if window is not None]
    assert used == sorted(used) and set(used) == {32, 64, 128}
    (idle,) = pair.sessions.values()
    assert idle[0].report()["windows"] == [32, 64, 128]


def test_only_windows_that_a_prompt_may_need_are_made_ready(prepared, pair, prompts, monkeypatch):
    monkeypatch.setattr(sessions, "SMALLEST_WINDOW", 32)
    long = (prompts[0] * 20)[:70]
    expected = [
        generate(pair, prompt, 8, strategy="doubling", **SIZES).tokens for prompt in (long, prompts[0])
    ]
    found = [generate(pair, long, 8, strategy="cuda_graph,doubling", **SIZES).tokens]
    ((idle,),) = pair.sessions.values()
    assert list(idle.steps) == [128]
    more = 128 - len(prompts[0]) - TreeShape(**SIZES).reach - TreeShape(**SIZES).width
    found.append(generate(pair, prompts[0], more, strategy="cuda_graph,doubling", **SIZES).tokens[:8])
    ((same,),) = pair.sessions.values()
    assert same is idle and sorted(idle.steps) == [32, 64, 128] and found == expected


def test_an_attention_whose_time_follows_the_text_has_no_use_for_many_windows():
    assert sessions.windows("sdpa", 8192) == [256, 512, 1024, 2048, 4096, 8192]
    assert sessions.windows("tree_fused", 8192) == [1024, 8192]
    assert sessions.windows("tree_fused", 1024) == [1024]
    assert sessions.windows("tree_fused", 512) == [512]


def test_two_streams_at_once_have_a_session_each(prepared, pair, prompts):
    from eagle_lab import stream

    options = {"strategy": "cuda_graph,doubling", "record": False, **SIZES}
    left, right = (stream(pair, prompt, 16, **options) for prompt in prompts)
    both = [next(left), next(right), *left, *right]
    alone = [list(stream(pair, prompt, 16, **options)) for prompt in prompts]
    assert both == [alone[0][0], alone[1][0], *alone[0][1:], *alone[1][1:]]
    assert [len(idle) for idle in pair.sessions.values()] == [2]


def test_runtimes_say_why_they_cannot_run():
    assert unavailable("runtime", "eager", "cpu") is None
    for name in ("cuda_graph", "compile+cuda_graph"):
        assert (
            unavailable("runtime", name, "cpu") == f"runtime={name} needs a CUDA GPU, but the device is cpu"
        )
    assert [fixed(name) for name in RUNTIMES] == [False, True, True, True]


@pytest.mark.skipif(
    unavailable("runtime", "compile", "cpu") is not None, reason=str(unavailable("runtime", "compile", "cpu"))
)
def test_a_step_that_cannot_be_compiled_whole_is_an_error():
    def step():
        return (
            torch.ones(3).tolist() and torch.from_numpy(__import__("numpy").ones(2)).nonzero().numpy().sum()
        )

    with pytest.raises(RuntimeError, match="runtime=compile: the cycle cannot be compiled"):
        prepare("compile", step, lambda: None, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(
    unavailable("runtime", "compile", "cpu") is not None, reason=str(unavailable("runtime", "compile", "cpu"))
)
def test_compiled_cycles_give_eager_s_tokens(pair, prompts):
    """The whole cycle in one trace; the second prompt finds it compiled."""
    for prompt in prompts:
        seen = generate(pair, prompt, 24, strategy="compile,doubling", **SIZES)
        assert seen.tokens == generate(pair, prompt, 24, **SIZES).tokens
    (idle,) = pair.sessions.values()
    assert len(idle) == 1 and idle[0].report()["seconds"] > 0


@pytest.fixture
def in_regions(prepared, pair, monkeypatch):
    """What compile+cuda_graph would record, its regions traced and made functional, but not turned into machine code."""
    compile, advance = torch.compile, Session.advance
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, **{**how, "backend": "aot_eager"}))

    def step(self, *span):
        with self.as_asked(), self.regional(), runtime.never_quietly_eager(), runtime.only_sizes_open():
            return advance(self, *span)

    monkeypatch.setattr(Session, "advance", step)
    torch._dynamo.reset()
    counters.clear()
    runtime._region.cache_clear()
    forget(pair.target.get_decoder())
    yield
    runtime._region.cache_clear()
    forget(pair.target.get_decoder())


def as_many(expected, found, bounds):
    """Whether so many graphs were compiled as torch 2.13 makes; another release guards some otherwise, within its bounds."""
    return found == expected if torch.__version__.startswith("2.13.") else found in bounds


@pytest.mark.parametrize("attention, most", [("tree", 12), ("tree,head=fp8", 12), ("sdpa", 16)])
def test_regions_compile_once_for_all_layers_and_steps(in_regions, pair, prompts, attention, most):
    strategy = f"compile+cuda_graph,doubling,attention={attention}"
    for prompt in prompts:
        seen = generate(pair, prompt, 24, strategy=strategy, **SIZES)
        usual = generate(pair, prompt, 24, strategy=f"attention={attention}", **SIZES)
        assert seen.tokens == usual.tokens == generate_plain(pair, prompt, len(usual.tokens)).tokens
        # a number between two of 8 bits is rounded to either, and moves other drafts up
        if "fp8" not in attention:
            assert [c.tokens for c in seen.cycles] == [c.tokens for c in usual.cycles]
    assert as_many(10, counters["stats"]["unique_graphs"], range(3, most + 1)) and not counters["graph_break"]
    assert not any(hasattr(layer.self_attn, BOUND) for layer in pair.target.get_decoder().layers)
    plain = generate_plain(pair, prompts[0], 12, strategy=strategy).tokens
    assert plain == generate_plain(pair, prompts[0], 12).tokens


def of_rows(pair, prompts, rows, strategy, plain=False, **sizes):
    """Tokens and cycles of a batch of so many unlike prompts, 16 tokens each."""
    several = [(prompts[n % 2] * 4)[n : n + len(prompts[n % 2])] for n in range(rows)]
    found = decode_batch(pair, several, Decoding.of(16, strategy, **{**SIZES, **sizes}), plain=plain)
    return [(row.tokens, row.cycles) for row in found]


@pytest.mark.slow
@pytest.mark.parametrize("attention, most", [("tree", 12), ("sdpa", 18)])
def test_regions_compile_once_for_all_batches(in_regions, pair, prompts, attention, most):
    """Cycles and tokens are eager's; plain decoding, whose one node is a size of its own, compiles once more; another
    tree compiles those regions alone that have its sizes in them."""
    strategy = f"compile+cuda_graph,doubling,attention={attention}"
    made = []
    for rows in (4, 2, 3, 17):  # as many as children of a node, and as nodes
        for plain in (False, True):
            assert of_rows(pair, prompts, rows, strategy, plain) == of_rows(
                pair, prompts, rows, "rebuild", plain
            )
        made.append(counters["stats"]["unique_graphs"])
    assert as_many(14, made[0], range(2 * most + 1)) and made == made[:1] * 4
    smaller = {"top_k": 3, "depth": 2, "total_tokens": 7}
    assert of_rows(pair, prompts, 4, strategy, **smaller) == of_rows(pair, prompts, 4, "rebuild", **smaller)
    more = counters["stats"]["unique_graphs"] - made[0]
    assert as_many(5, more, range(6)) and not counters["graph_break"]


@needs_gpu
@pytest.mark.parametrize("name", ["cuda_graph", "compile+cuda_graph"])
@pytest.mark.parametrize(
    "attention", ["sdpa", "tree", "tree_fused", "tree_fused,product=early", "tree_fused,head=fp8"]
)
def test_a_replayed_cycle_gives_eager_s_tokens(prompts, name, attention):
    from eagle_lab.models.pair import load

    if "early" in attention and name != "compile+cuda_graph":
        pytest.skip("product=early goes with runtime=compile+cuda_graph alone")

    on_gpu = load(GOLDEN / "target", GOLDEN / "draft_official", device="cuda", dtype="float32")
    for prompt in prompts:
        seen = generate(on_gpu, prompt, 24, strategy=f"{name},doubling,attention={attention}", **SIZES)
        assert seen.tokens == generate(on_gpu, prompt, 24, **SIZES).tokens
        plain = generate_plain(on_gpu, prompt, 24, strategy=f"{name},attention={attention}")
        assert plain.tokens == seen.tokens
    report = next(iter(on_gpu.sessions.values()))[0].report()
    assert report["seconds"] > 0 and report["bytes"] > 0
    assert (report["early_products"] > 0) == ("early" in attention)


@needs_gpu
@pytest.mark.parametrize("attention", ["sdpa", "tree_fused"])
def test_replayed_batches_give_eager_s_tokens_and_compile_once(prompts, attention):
    from eagle_lab.models.pair import load

    on_gpu = load(GOLDEN / "target", GOLDEN / "draft_official", device="cuda", dtype="float32")
    made = []
    for rows in (2, 3, 5):
        seen = of_rows(on_gpu, prompts, rows, f"compile+cuda_graph,doubling,attention={attention}")
        usual = of_rows(on_gpu, prompts, rows, "doubling")
        assert [tokens for tokens, _ in seen] == [tokens for tokens, _ in usual]
        made.append(counters["stats"]["unique_graphs"])
    assert made == made[:1] * 3


@needs_gpu
@pytest.mark.parametrize("attention", ["sdpa", "tree_fused", "tree_fused,product=early"])
def test_replays_repeat_bit_by_bit(prompts, attention):
    """Kernels that are launched early and read what is still being written would differ from time to time."""
    from eagle_lab.models.pair import load

    on_gpu = load(GOLDEN / "target", GOLDEN / "draft_official", device="cuda", dtype="float32")
    strategy = f"compile+cuda_graph,doubling,attention={attention}"
    first, *others = [generate(on_gpu, prompts[0], 48, strategy=strategy, **SIZES) for _ in range(20)]
    for other in others:
        assert [(c.tokens, c.scores) for c in other.cycles] == [(c.tokens, c.scores) for c in first.cycles]
