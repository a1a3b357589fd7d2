"""What tests of several folders make: trees, records of made-up numbers, and where the golden files lie."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaModel

from eagle_lab.measure.records import InstanceSample, PartCalls, Sample
from eagle_lab.runtime.layers import KEPT
from eagle_lab.verdict.record import ComparisonRecord

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"  # a tiny target, its head in three dialects, and what they decode
ENVIRONMENT = {
    "cpu": {"name": "A CPU", "cores": 2, "torch_threads": 2, "load_1min": 0.0, "governor": None, "memory_bytes": 1},
    "gpu": None, "platform": "Linux", "python": "3.11", "versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef",
    "dirty": False,
}  # fmt: skip
SNAPSHOTS = TESTS / "snapshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome on this machine, so no page was looked at"
)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch finds none here"
)


RANDOM_SIZES = {
    "vocab_size": 14, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def random_target(kind: str, attention: str = "eager", **settings: object) -> torch.nn.Module:
    """A tiny target of one of transformers' model types, random in every weight, float32."""
    config = AutoConfig.for_model(kind, **{**RANDOM_SIZES, **settings})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    for parameter in model.parameters():  # norms at one, biases and sinks at zero: let them count
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def shaped(draws: np.ndarray, reach: int) -> torch.Tensor:
    """Parents from uniform draws float [..., n]: each within `reach` nodes before its child; 1 is a chain."""
    first = np.arange(draws.shape[-1])
    low = np.maximum(0, first + 1 - reach)
    return torch.from_numpy((low + (draws * (first + 1 - low))).astype(np.int64))


def special(nodes: int) -> dict[str, torch.Tensor]:
    """The extreme shapes of `nodes` draft nodes."""
    return {
        "chain": torch.arange(nodes),
        "star": torch.zeros(nodes, dtype=torch.int64),
        "comb": torch.arange(nodes) // 2 * 2,
        "binary": torch.arange(nodes) // 2,
        "broom": torch.arange(nodes).clamp(max=nodes // 2),
    }


def parents_first(parents: list[int]) -> bool:
    """Whether each node's parent comes before it."""
    return all(0 <= parent <= node for node, parent in enumerate(parents))


def expansion(
    rng: np.random.Generator, top_k: int, depth: int, ties: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and candidate parents [1, pool] of an expansion, recorded in decoding's order."""
    step = (lambda n: -rng.integers(0, 2, n).astype(float)) if ties else (lambda n: -rng.exponential(1.0, n))
    scores, parents = [step(top_k)], [np.full(top_k, -1)]
    frontier, value = np.arange(top_k), scores[0]
    for level in range(depth):
        children = (value[:, None] + step(top_k * top_k).reshape(top_k, top_k)).ravel()
        scores.append(children)
        parents.append(frontier.repeat(top_k))
        best = np.argsort(-children, kind="stable")[:top_k]
        frontier, value = best + top_k + level * top_k**2, children[best]
    return torch.tensor(np.concatenate(scores))[None], torch.tensor(np.concatenate(parents))[None]


def make_record(ratio=0.9, forks=5, per_fork=4, call=(0.0002, 0.0001), noise=0.002, **changes):
    """A comparison of 1 s runs with 20 mask calls each, whose candidate takes `ratio` of the baseline's time; `changes`
    are of its settings."""
    coin = random.Random(1)
    samples = [
        Sample(
            fork=fork, iteration=fork * per_fork + i, prompt="p", control=False, order="baseline first",
            baseline_s=1.0 + coin.gauss(0, noise), candidate_s=ratio * (1.0 + coin.gauss(0, noise)),
            new_tokens=50, cycles=20, foreign_load=0.0,
        )
        for fork in range(forks) for i in range(per_fork)
    ]  # fmt: skip
    parts = [
        PartCalls(
            fork=fork, arm=arm, prompt="p", cycles=20, calls_s=[seconds * (1 + 0.01 * coin.random()) for _ in range(20)]
        )
        for fork in range(forks)
        for arm, seconds in zip(("baseline", "candidate"), call, strict=True)
    ]  # fmt: skip
    settings = {
        "baseline": "rebuild", "candidate": "other", "iterations": forks * per_fork, "forks": forks, "control_forks": 0,
        "delta": 0.01, "target": "t", "draft": "d", "embedded": False, "device": "cpu", "dtype": "float32", "prompts": ["p"],
        "max_new_tokens": 50, "total_tokens": 63, "depth": 7, "top_k": 10, "seed": 0, "max_foreign_load": 0.25,
    }  # fmt: skip
    return ComparisonRecord(
        created="2026-01-01T00:00:00+00:00", command="make it", environment=ENVIRONMENT, samples=samples, parts=parts,
        settings={**settings, **changes},
        correctness={"random_trees": 100, "prompt": "p", "tokens": 50, "baseline": None, "candidate": None},
    )  # fmt: skip


def make_instances(ratio=0.9, forks=5, per_fork=3, stretches=12, between=0.002, noise=0.004, **changes):
    """`make_record` with cycles of 50 ms in turn, whose candidate takes `ratio` of the baseline's time; each session has a
    bias of its own."""
    found = make_record(ratio, forks, per_fork, pairs_of="cycles", **changes)
    rng = np.random.default_rng(1)
    for fork, n in itertools.product(range(forks), range(per_fork)):
        shift = rng.normal(0, between, 3) + np.log([1, 1, ratio]) + rng.normal(0, noise, (stretches, 3))
        found.instances.append(
            InstanceSample(
                fork=fork, iteration=fork * per_fork + n, prompt=f"p{n}", made=rng.permutation(3).tolist(),
                first_s=[0.1] * 3, seconds=(0.05 * np.exp(shift)).tolist(),
                order=[rng.permutation(3).tolist() for _ in range(stretches)], tokens=[2] * stretches, foreign_load=0.0,
            )
        )  # fmt: skip
    return found


def control(record, count, ratio=1.0, **changes):
    """A/A samples made of the record's first ones, all of one fork."""
    first = record.samples[:count]
    update = {"fork": 9, "control": True, **changes}
    return [s.model_copy(update={**update, "candidate_s": s.baseline_s * ratio}) for s in first]


def verdict(estimate, low, high):
    """A verdict's JSON values with the numbers that matter here."""
    return {
        "decision": "ADOPT", "estimate": estimate, "low": low, "high": high, "equivalence": [low, high], "method": "",
        "pairs": 9, "forks": 1, "delta": 0.01, "alpha": 0.05, "provisional": True, "reasons": [],
    }  # fmt: skip


SWEPT = [15, 31, 63, 127, 255, 511, 1023]
LAWS = {
    "rebuild": lambda n: 3e-6 * n,
    "square": lambda n: 3e-6 * n * (n / 200),  # slower from 200 on
    "flat": lambda n: 3e-4,  # faster from 100 on
    "walk": lambda n: 1e-6 * n,  # always faster
    "never": lambda n: 4e-6 * n,
    "same": lambda n: 3e-6 * n,
}


def make_sweep(laws, noise=0.02, device="cpu", gaps=(), graph_us=None, seed=0, **floor):
    """A sweep whose builders follow `laws`, seconds by size, with log-normal noise.

    gaps: (builder, size) without a time; graph_us: microseconds inside a graph by (builder, size).
    """
    from eagle_lab.studies.sweep import Cell, Floor, Missing, SweepRecord, SweepSettings

    rng = np.random.default_rng(seed)

    def draw(law, size):
        return (law(size) * np.exp(rng.normal(0, noise, 40))).tolist()

    cells = []
    for size, (name, law) in itertools.product(SWEPT, laws.items()):
        cell = {"builder": name, "size": size, "batch": 1}
        if (name, size) in gaps:
            cells.append(Cell(**cell, missing=Missing(reason="failed", error="boom")))
            continue
        inside = (graph_us or {}).get((name, size))
        cell |= {
            "baseline_s": draw(laws["rebuild"], size),
            "seconds": draw(law, size),
            "peak_bytes": (size + 1) ** 2,
        }
        cells.append(Cell(**cell, graph_s=[] if inside is None else [inside * 1e-6] * 12))
    gpu = (
        {"name": "A GPU", "memory_bytes": 1, "multiprocessors": 1, "cuda": "13"} if device == "cuda" else None
    )
    settings = SweepSettings(
        device=device, builders=list(laws), sizes=SWEPT, batches=[1], batch_size=63, iterations=40, trees=8, seed=0, threads=1
    )  # fmt: skip
    return SweepRecord(
        created="2026-01-01T00:00:00Z", command="x", environment=ENVIRONMENT | {"gpu": gpu}, settings=settings,
        floor=Floor(call_s=1e-6, bytes_per_s=1e10, **floor), cells=cells,
    )  # fmt: skip


def forget(decoder: torch.nn.Module) -> None:
    """Drop what `runtime.layers` compiled for a model and keeps with it."""
    for place in (*decoder.modules(), sys.modules[type(decoder).__module__]):
        vars(place).pop(KEPT, None)


def random_pair(kind: str = "llama", context: int = 512, **settings):
    """A pair of random weights: a target of one of transformers' model types, seven small layers, and a head for it.

    A target of two layers has a head that reads all there is: the inputs of both and of the final norm.
    """
    from eagle_lab.models.dialects import default_taps
    from eagle_lab.models.draft import DraftConfig, DraftHead
    from eagle_lab.models.pair import Pair

    settings = {"vocab_size": 64, "max_position_embeddings": context, **settings}
    attention = "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
    target = random_target(kind, attention, **settings)
    layers = settings.get("num_hidden_layers", 7)
    taps = (0, 1, 2) if layers == 2 else default_taps(layers)
    head_config = DraftConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        draft_vocab_size=64, taps=taps, target_layers=layers,
    )  # fmt: skip
    head = DraftHead(head_config, target.get_input_embeddings()).eval().requires_grad_(False)
    return Pair(target, head, None, torch.device("cpu"), torch.float32, kind, "random")


def interpreter(engine):
    """The Python of another engine's or library's environment; skips the test where that isn't made."""
    folder = TESTS.parent / f".venv-{engine}"
    if not (folder / ".ready").exists():
        pytest.skip(f"there is no .venv-{engine} here; `make engines-{engine}` makes it")
    return folder / "bin" / "python"


def random_head(**changes):
    """A head for the golden target with random weights and embeddings of no target; changes: of its configuration."""
    from eagle_lab.models.draft import DraftConfig, DraftHead

    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "draft_vocab_size": 128, "taps": (2, 4, 5), "target_layers": 8,
    }  # fmt: skip
    torch.manual_seed(3)
    config = DraftConfig(**{**sizes, **changes})
    head = DraftHead(config, torch.nn.Embedding(config.vocab_size, config.hidden_size))
    if config.mapped:
        head.set_vocabulary(torch.randperm(config.vocab_size)[: config.draft_vocab_size])
    for name, weight in head.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return head.requires_grad_(False)


def byte_tokenizer():
    """A fast tokenizer whose tokens are single bytes, in GPT-2's letters: a character beyond ASCII is several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def small_decoder():
    """A Llama of two layers with random weights, the same each time."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaModel(config).eval().requires_grad_(False)


def output(decoder):
    """What it makes of twelve ids, float32 [1, 12, 32]."""
    with torch.no_grad():
        return decoder(input_ids=torch.arange(12)[None], use_cache=False).last_hidden_state


def interpreted(folder, code, *arguments):
    """The end of a process that runs code with Triton's interpreter, beside the test files of a folder.

    A process of its own: Triton reads the variable when a kernel is defined.
    """
    paths = os.pathsep.join([str(folder), str(TESTS), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def skip_where_it_cannot_loop(done):
    """Skip a test whose kernel loops as often as a tensor says, where an older Triton's interpreter can't under this numpy.

    done: as `interpreted` gives it.
    """
    old = tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 9)
    if old and "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter can't loop as often as a tensor says, under this numpy")


def worktrees(checkout=TESTS.parent):
    """A line for each worktree of a checkout, as git lists them."""
    command = ["git", "-C", str(checkout), "worktree", "list"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def alive(process):
    """Whether a process runs, by its number; one that has ended and is still listed doesn't."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
