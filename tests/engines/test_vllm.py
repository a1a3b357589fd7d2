"""vLLM itself with heads of ours: a chain of the shipped head has the kit's own cycles and accepted drafts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from make import GOLDEN, interpreter, random_head

import eagle_lab
from eagle_lab.models.draft import DraftHead
from eagle_lab.models.pair import DEFAULT_DRAFT, Pair
from eagle_lab.models.targets import embedded_target

WORKER = Path(__file__).parent / "vllm_worker.py"
TOKENS, DRAFTED = 48, 3
pytestmark = pytest.mark.slow


def by_vllm(folder, target, head, prompts):
    """Each prompt's tokens, cycles and accepted drafts."""
    job = {
        "target": target and str(target), "head": str(head), "drafted": DRAFTED, "tokens": TOKENS, "prompts": prompts
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [interpreter("vllm"), WORKER, folder / "job.json", folder / "result.json"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [
        (r["tokens"], r["cycles"], r["accepted"]) for r in json.loads((folder / "result.json").read_text())
    ]


def by_us(pair, prompts):
    """The same of the kit's own chain, whose last cycle may commit more than is asked for."""
    found = []
    for ids in prompts:
        got = eagle_lab.generate(pair, ids, TOKENS, top_k=1, depth=DRAFTED - 1, total_tokens=DRAFTED)
        committed = [len(cycle.committed) for cycle in got.cycles]
        found.append((got.tokens, len(committed), sum(committed) - len(committed)))
    return found


@pytest.fixture(scope="module")
def shipped():
    """The default pair in float32, six of the kit's prompts, and what the kit makes of them."""
    interpreter("vllm")
    pair = eagle_lab.load(dtype="float32", device="cpu", verbose=False)
    prompts = [eagle_lab.encode(pair.tokenizer, p.text) for p in eagle_lab.load_prompts()[:6]]
    return pair, prompts, by_us(pair, prompts)


def test_a_chain_of_the_shipped_head(shipped, tmp_path):
    _, prompts, ours = shipped
    assert by_vllm(tmp_path, embedded_target(), DEFAULT_DRAFT, prompts) == ours
    assert min(accepted for _, _, accepted in ours) > 0  # else nothing was compared but plain decoding


@pytest.mark.parametrize("alone", [False, True], ids=["as a draft", "as the model itself"])
def test_the_shipped_head_in_the_dialect_of_speculators(shipped, tmp_path, alone):
    pair, prompts, ours = shipped
    eagle_lab.save_draft(pair.head, tmp_path / "head", "speculators", target=embedded_target())
    target = None if alone else embedded_target()
    assert by_vllm(tmp_path, target, tmp_path / "head", prompts[:2]) == ours[:2]


def test_a_head_of_eagle31_with_a_qwen3_layer(tiny_pair, tmp_path):
    """Of random weights, so it accepts next to nothing; what it drafts is compared by the library that made the form."""
    python = interpreter("vllm")
    assert python.exists()
    head = random_head(qk_norm=True, fc_norm=True, norm_output=True)
    shared = DraftHead(head.config, tiny_pair.target.get_input_embeddings())
    shared.load_state_dict(head.state_dict())
    pair = Pair(
        tiny_pair.target, shared.requires_grad_(False), None, torch.device("cpu"), torch.float32, "t", "d"
    )
    eagle_lab.save_draft(shared, tmp_path / "head", "speculators", target=GOLDEN / "target")
    prompts = [[1, 124, 306, 281, 69, 192, 471, 312]]
    assert by_vllm(tmp_path, GOLDEN / "target", tmp_path / "head", prompts) == by_us(pair, prompts)
