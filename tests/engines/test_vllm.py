"""vLLM itself with heads of ours: a chain of the shipped head has the kit's own cycles and accepted drafts."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from make import interpreter

import eagle_lab
from eagle_lab.decode.sampling import Sampling
from eagle_lab.engines.arm import parse
from eagle_lab.engines.here import base_arm
from eagle_lab.engines.opened import opened
from eagle_lab.engines.protocol import EngineFailed
from eagle_lab.measure import outside
from eagle_lab.models.draft import DraftHead
from eagle_lab.models.pair import Pair
from eagle_lab.models.prompts import Prompt
from eagle_lab.models.targets import embedded_target
from eagle_lab.verdict.agreement import ArmsDisagree, drawn

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
    """The default pair in float32, and three of the kit's prompts."""
    interpreter("vllm")
    pair = eagle_lab.load(dtype="float32", device="cpu", verbose=False)
    return pair, [eagle_lab.encode(pair.tokenizer, p.text) for p in eagle_lab.load_prompts()[:3]]


def as_an_arm(pair, prompts, text):
    """The same of vLLM as an arm of a comparison."""
    arm = parse(f"engine=vllm,python={interpreter('vllm')},{text}", base_arm(pair))
    with opened(pair, arm, 400) as engine:
        assert engine.engine == "vllm" and engine.version
        found = [engine.decode(Prompt("p", "own", "", tuple(ids)), TOKENS, None, True) for ids in prompts]
    assert all(0 < d.first_token_seconds < d.seconds for d in found)
    return found


def test_a_chain_of_the_shipped_head(shipped):
    ours = by_us(*shipped)
    found = as_an_arm(*shipped, f"num_speculative_tokens={DRAFTED}")
    assert [(list(d.tokens), d.counts[0], d.counts[1] - d.counts[0]) for d in found] == ours
    assert all(len(d.cycles) == d.counts[0] for d in found)
    assert min(accepted for _, _, accepted in ours) > 0  # else nothing was compared but plain decoding


def test_what_it_samples_fits_the_target(shipped):
    """It draws by numbers of its own. Each token is held against the target's distribution at its place."""
    pair, prompts = shipped
    chosen = f"engine=vllm,python={interpreter('vllm')},plain,temperature=1"
    with opened(pair, parse(chosen, base_arm(pair)), 400) as engine:
        asked = [(Prompt("p", "own", "", tuple(ids)), seed) for ids in prompts for seed in (1, 2)]
        decodes = [(prompt, engine.decode(prompt, TOKENS, seed, True)) for prompt, seed in asked]
    assert drawn(pair, decodes, Sampling(1.0)).fit
    assert not drawn(pair, decodes, Sampling(0.6)).fit, "another temperature is seen"


def test_a_chain_that_samples_otherwise_is_refused(shipped, tmp_path, monkeypatch):
    """On a CPU vLLM 0.32.0 leaves the temperatures of a chain's rows uninitialized: `_expand_kernel_impl` of
    vllm/utils/cpu_triton_utils.py writes them to a copy. A version without that fault passes the check."""
    monkeypatch.setattr(outside, "foreign_load", lambda *_: 0.0)
    candidate = f"engine=vllm,python={interpreter('vllm')},num_speculative_tokens={DRAFTED}"
    with pytest.raises(ArmsDisagree, match=r"vllm does not sample from the target's distribution"):
        eagle_lab.compare(
            shipped[0], baseline="plain", candidate=candidate, iterations=2, forks=1, max_new_tokens=TOKENS,
            temperature=1.0, results_dir=tmp_path, progress=False,
        )  # fmt: skip
    assert not list(tmp_path.glob("*.json"))


def test_a_comparison_with_it(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "foreign_load", lambda *_: 0.0)
    candidate = f"engine=vllm,python={interpreter('vllm')}"  # plain, as the baseline is
    done = eagle_lab.compare(
        shipped[0], baseline="plain", candidate=candidate, iterations=2, forks=1, max_new_tokens=16,
        results_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert done.record.settings.rule == "time per token" and done.verdict.pairs == 2
    assert done.record.correctness.candidate is None  # the text of plain decoding
    assert not any(sample.difference or sample.counts[1] for sample in done.record.samples)


def test_a_quantized_target_is_another_one(shipped, tmp_path, monkeypatch):
    """Its weights in eight bits give other texts, which are told and not refused."""
    monkeypatch.setattr(outside, "foreign_load", lambda *_: 0.0)
    candidate = f"engine=vllm,python={interpreter('vllm')},quantization=int8_per_channel_weight_only"
    asked = {"iterations": 3, "forks": 1, "max_new_tokens": 24, "results_dir": tmp_path, "progress": False}
    with pytest.raises(EngineFailed, match="float32 is not supported for quantization") as refused:
        eagle_lab.compare(shipped[0], baseline="plain", candidate=candidate, **asked)
    assert "pydantic" not in str(refused.value).splitlines()[0]
    done = eagle_lab.compare(shipped[0], baseline="plain", candidate=candidate + ",dtype=bfloat16", **asked)
    assert done.record.settings.rule == "time per token" and done.verdict.pairs == 3
    assert not done.record.correctness.unchecked
    parted = [sample.difference for sample in done.record.samples]
    assert all(where.margin > 0 and where.tolerance is None for where in parted if where)
    assert any(parted) and all(where is None or where.position > 2 for where in parted)


@pytest.mark.parametrize("alone", [False, True], ids=["as a draft", "as the model itself"])
def test_the_shipped_head_in_the_dialect_of_speculators(shipped, tmp_path, alone):
    pair, prompts = shipped
    eagle_lab.save_draft(pair.head, tmp_path / "head", "speculators", target=embedded_target())
    target = None if alone else embedded_target()
    assert by_vllm(tmp_path, target, tmp_path / "head", prompts[1:2]) == by_us(pair, prompts[1:2])


def test_a_head_of_eagle31_with_a_qwen3_layer(shipped, tmp_path):
    """The shipped head, which has norms on taps and output, with norms on queries and keys too, of weights that leave it
    something to accept."""
    pair, prompts = shipped
    assert pair.head.config.fc_norm and pair.head.config.norm_output
    config = replace(pair.head.config, qk_norm=True)
    head = DraftHead(config, pair.head.embedding).requires_grad_(False)
    missing, unexpected = head.load_state_dict(pair.head.state_dict(), strict=False)
    assert len(missing) == 2 and not unexpected
    head.midlayer.self_attn.q_norm.weight.fill_(1.5)
    head.midlayer.self_attn.k_norm.weight.fill_(1.5)
    other = Pair(pair.target, head, pair.tokenizer, pair.device, pair.dtype, "target", "head")
    ours = by_us(other, prompts[1:2])
    assert all(accepted > 0 for _, _, accepted in ours)
    eagle_lab.save_draft(head, tmp_path / "head", "speculators", target=embedded_target())
    assert by_vllm(tmp_path, embedded_target(), tmp_path / "head", prompts[1:2]) == ours
