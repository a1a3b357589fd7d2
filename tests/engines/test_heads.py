"""Heads among libraries: those that `speculators` and `specforge` save compute the same here, and ours there.

Each library runs in an environment of its own (`make engines`), by a worker that knows nothing of the kit. What is
compared are the logits of three steps of training-time test: the head reads its own output, as while drafting.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from make import GOLDEN, interpreter, random_head

from eagle_lab.models.checkpoints import load_draft, save_draft
from eagle_lab.models.draft import DraftHead
from eagle_lab.train.ttt import Batch, rollout

HERE = Path(__file__).parent
STEPS, LENGTH, VOCABULARY = 3, 24, 512
ROPES = {
    "llama3_rope": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
    "yarn_rope": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 256,
                  "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "linear_rope": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0},
}  # fmt: skip
OURS = {
    "speculators": {
        "plain": {},
        "norm_before_residual": {"norm_before_residual": True},
        "norm_before_fc": {"norm_before_fc": True},
        "norm_output": {"norm_output": True},
        "eagle31": {"fc_norm": True, "norm_output": True},
        "all_but_fc_norm": {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
        "qwen3": {"qk_norm": True},
        "qwen3_eagle31": {"qk_norm": True, "fc_norm": True, "norm_output": True},
        "full_vocabulary": {"draft_vocab_size": VOCABULARY},
        "five_taps": {"taps": (0, 1, 3, 5, 7)},
        "last_tap": {"taps": (2, 4, 8)},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "wider_heads": {"head_dim": 32},
        **{name: {"rope": rope} for name, rope in ROPES.items()},
    },
    "specforge": {
        "plain": {},
        "fc_norm": {"fc_norm": True},
        "full_vocabulary": {"draft_vocab_size": VOCABULARY},
        "taps": {"taps": (2, 3, 7)},
        "wider_target": {"hidden_size": 32, "target_hidden_size": 64, "own_embeddings": True},
        **{name: {"rope": rope} for name, rope in ROPES.items()},
    },
}
# speculators makes all of these; specforge makes Llama layers of three taps alone
THEIRS = {
    "speculators": [
        "plain", "norm_before_residual", "norm_before_fc", "norm_output", "eagle31", "all_but_fc_norm", "qwen3",
        "qwen3_eagle31", "full_vocabulary", "tied", "five_taps", "last_tap", "no_taps", "attention_bias", "mlp_bias",
        "default_rope", "llama3_rope", "yarn_rope", "linear_rope", "bfloat16", "shards",
    ],
    "specforge": [
        "plain", "without_embeddings", "full_vocabulary", "fc_norm", "taps", "attention_bias", "mlp_bias", "llama3_rope",
        "yarn_rope", "yarn_rope_two_scales", "linear_rope", "wider_target", "bfloat16",
    ],
}  # fmt: skip
CASES = [(library, name) for library in THEIRS for name in THEIRS[library]]


@pytest.fixture(scope="module")
def embedding(tiny_pair):
    return tiny_pair.target.get_input_embeddings()


def borrowing(embedding, **changes):
    """A random head whose embeddings are the target's, unless it has its own."""
    head = random_head(**changes)
    if head.config.own_embeddings:
        return head
    shared = DraftHead(head.config, embedding)
    shared.load_state_dict(head.state_dict())
    return shared


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory, embedding):
    """A function of a library: our heads saved for it, its worker run once; → the folder with what both wrote."""
    done: dict[str, Path] = {}

    def exchange(library):
        python = interpreter(library)
        if library not in done:
            folder = tmp_path_factory.mktemp(library)
            (folder / "theirs").mkdir()
            (folder / "ours").mkdir()
            for name, changes in OURS[library].items():
                # speculators' dialect brings the embeddings, so they may be anybody's
                head = random_head(**changes) if library == "speculators" else borrowing(embedding, **changes)
                save_draft(head, folder / "ours" / name, library, target=GOLDEN / "target")
                width = len(head.config.taps) * head.config.tap_size
                torch.save(
                    {
                        "hidden": torch.randn(1, LENGTH, width),
                        "ids": torch.randint(0, VOCABULARY, (1, LENGTH)),
                    },
                    folder / "ours" / f"{name}.pt",
                )
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
            command = [python, HERE / f"{library}_worker.py", folder, GOLDEN / "target"]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
            assert ran.returncode == 0, ran.stderr[-3000:]
            done[library] = folder
        return done[library]

    return exchange


@torch.no_grad()
def our_logits(head, record):
    """The logits of each step by the kit's own training-time test, whose step i reads the token i places further on."""
    ids = record["ids"].roll(1, 1)
    row = torch.arange(LENGTH)[None]
    nothing = SimpleNamespace(answer=None, final=None, top1=None)
    batch = Batch(
        ids=ids, document=torch.zeros_like(ids), positions=row, taps=record["hidden"], **vars(nothing)
    )
    return [head.logits(h) for h in rollout(head, batch, STEPS)]


def largest_errors(found, wanted):
    """Of each step, over the places whose tokens lie inside the row; in standard deviations of the logits."""
    return [
        float((a.float() - b.float())[:, : LENGTH - step].abs().max() / b.float().std())
        for step, (a, b) in enumerate(zip(found, wanted, strict=True))
    ]


def theirs(folder, name, embedding):
    record = torch.load(folder / "theirs" / f"{name}.pt")
    head = load_draft(folder / "theirs" / name, 8, embedding).to(record["hidden"].dtype).requires_grad_(False)
    return head, record


@pytest.mark.parametrize(("library", "name"), CASES)
def test_a_head_of_theirs_computes_the_same_here(exchanged, embedding, library, name):
    folder = exchanged(library)
    head, record = theirs(folder, name, embedding)
    bound = 0.2 if record["hidden"].dtype == torch.bfloat16 else 1e-5
    assert max(largest_errors(our_logits(head, record), record["logits"])) < bound


@pytest.mark.parametrize("name", ["eagle31", "norm_output"])
def test_specforge_feeds_the_state_back_before_its_norm(exchanged, embedding, name):
    """Up to 0.2.0; SGLang, vLLM and speculators feed it back normed, and so do we: step 0 is equal, later ones aren't."""
    head, record = theirs(exchanged("specforge"), name, embedding)
    assert head.config.norm_output
    errors = largest_errors(our_logits(head, record), record["logits"])
    assert errors[0] < 1e-5 and min(errors[1:]) > 1e-2
    unlike = DraftHead(replace(head.config, norm_output=False), embedding)
    unlike.load_state_dict(head.state_dict())
    assert max(largest_errors(our_logits(unlike, record), record["logits"])) < 1e-5


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in OURS for name in OURS[library]])
def test_a_head_of_ours_computes_the_same_there(exchanged, embedding, library, name):
    folder = exchanged(library)
    record = torch.load(folder / "ours" / f"{name}.pt")
    head = load_draft(folder / "ours" / name, 8, embedding).requires_grad_(False)
    wanted = torch.load(folder / "ours" / f"{name}.logits.pt")
    assert max(largest_errors(our_logits(head, record), wanted)) < 1e-5
