"""Training: the same attention as decoding, bit-exact resumption, and a head that learns in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from make import GOLDEN
from safetensors.numpy import save_file
from torch.nn.functional import scaled_dot_product_attention

from eagle_lab.decode.generate import generate, generate_plain
from eagle_lab.measure.acceptance import acceptance
from eagle_lab.models.cache import GrowingCache
from eagle_lab.models.checkpoints import save_draft
from eagle_lab.models.draft import DraftHead
from eagle_lab.models.pair import load
from eagle_lab.train import train as module
from eagle_lab.train.corpus import read_texts, write_texts
from eagle_lab.train.new_head import new_head
from eagle_lab.train.packing import Reader, choose_vocabulary, pack
from eagle_lab.train.processes import Processes
from eagle_lab.train.text import Text, Texts, TextSettings
from eagle_lab.train.train import TrainSettings, row_order, train
from eagle_lab.train.ttt import asked, rollout, start_places, step_losses, total_loss

TARGET = GOLDEN / "target"
SMALL = {
    "batch": 4, "length": 64, "draft_vocab": 256, "ttt_steps": 3, "lr": 3e-3, "save_every": 3,
    "check_every": 4, "validation": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tiny_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    settings = TextSettings(batch=16, answer_tokens=40, greedy_share=1.0)
    write_texts(tiny_pair.target, None, 1500, settings, folder)
    return read_texts(folder, 1500)


def small(**changes):
    return TrainSettings(**{**SMALL, **changes})


def batch_of(pair, texts, length=64, rows=2):
    packed = pack(texts, length, seed=0)
    return Reader(pair.target, pair.head.config.taps, packed).read(list(range(rows)))


def test_attention_of_training_is_stepwise_decoding_with_a_cache(tiny_pair, texts):
    """Position by position, all seven steps: one query at a time against a cache that a draft leaves as it found it."""
    head, steps = tiny_pair.head, 7
    batch = batch_of(tiny_pair, texts.take(range(6)), length=128)
    chosen = asked(batch.answer, batch.document)
    trained = torch.stack(list(rollout(head, batch, steps)))
    checked = 0
    for row in range(len(batch.ids)):
        for name in batch.document[row].unique().tolist():
            if name < 0:
                continue
            span = (batch.document[row] == name).nonzero()[:, 0].tolist()
            cache = GrowingCache(
                head.config.num_key_value_heads, head.config.head_size, torch.float32, torch.device("cpu")
            )

            def attend(query, key, value, cache=cache):
                return scaled_dot_product_attention(query, *cache.update(key, value), enable_gqa=True)

            for t, at in enumerate(span[:-1]):
                g, cache.start = head.fuse(batch.taps[row, None, None, at]), t
                for i in range(steps):
                    if t + 1 + i >= len(span):
                        break
                    ids = batch.ids[row, None, None, span[t + 1 + i]]
                    g = head(ids, g, torch.tensor([[t + i]]), attend)
                    cache.start = t + 1 + i
                    if chosen[row, at]:
                        assert torch.allclose(trained[i, row, at], g[0, 0], atol=1e-4, rtol=1e-4), (row, t, i)
                        checked += 1
    assert checked > 200


def test_a_texts_neighbours_in_its_row_change_nothing(tiny_pair, texts):
    alone, together = (
        batch_of(tiny_pair, texts.take([0]), rows=1),
        batch_of(tiny_pair, texts.take([0, 1]), length=128, rows=1),
    )
    kept = (together.document[0] == 0).nonzero()[:, 0]
    count = len(kept)
    assert torch.equal(together.ids[0, kept], alone.ids[0, :count])
    assert torch.allclose(together.taps[0, kept], alone.taps[0, :count], atol=1e-4)
    assert torch.equal(together.top1[0, kept], alone.top1[0, :count])


def test_the_target_of_a_step_is_its_own_next_token(tiny_pair, texts):
    """Greedy text: the target's argmax at each place of an answer is the token that follows."""
    batch = batch_of(tiny_pair, texts.take(range(4)))
    place = asked(batch.answer, batch.document).flatten().nonzero()[:, 0]
    follows = batch.ids.flatten()[place + 2]
    assert (batch.top1.flatten()[place + 1] == follows).float().mean() > 0.99
    output = tiny_pair.target.get_output_embeddings().weight[vocabulary(tiny_pair)]
    losses = step_losses(tiny_pair.head, batch, start_places(batch, len(place)), 3, output)
    assert losses.total.isfinite().all()
    assert losses.inside[0].sum() > losses.inside[2].sum(), "later steps run out of text sooner"
    more = step_losses(tiny_pair.head, batch, start_places(batch, batch.ids.numel()), 3, output)
    assert torch.allclose(losses.total, more.total) and torch.equal(losses.counted, more.counted)
    assert losses.inside.shape[1] == len(place) < more.inside.shape[1], (
        "places that can't start count nowhere"
    )


def test_lk_hybrid_is_what_the_paper_says(tiny_pair, texts):
    """λ·cross-entropy + (1 - λ)(1 - α) with λ = exp(-3 α), from the draft's and the target's probabilities themselves."""
    head, batch = tiny_pair.head, batch_of(tiny_pair, texts.take(range(4)))
    output = tiny_pair.target.get_output_embeddings().weight[vocabulary(tiny_pair)]
    places = start_places(batch, batch.ids.numel())
    plain, mixed = (
        step_losses(head, batch, places, 1, output, loss) for loss in ("cross_entropy", "lk_hybrid")
    )
    h = next(rollout(head, batch, 1)).flatten(0, 1)[places]
    drafted = head.logits(h).softmax(-1)
    wanted = (batch.final.flatten(0, 1) @ output.T).softmax(-1)[(places + 1).clamp(max=len(places) - 1)]
    counts = plain.inside[0] & head.t2d[batch.top1.roll(-1, 1).flatten()[places].clamp(min=0)]
    alpha = torch.minimum(drafted, wanted).sum(-1)[counts].mean()
    weight = (-3 * alpha).exp()
    assert counts.sum() == plain.counted[0] == mixed.counted[0]
    expected = weight * plain.total[0] / plain.counted[0] + (1 - weight) * (1 - alpha)
    assert torch.allclose(mixed.total[0] / mixed.counted[0], expected, atol=1e-5)


def vocabulary(pair):
    head = pair.head
    return head.target_ids(torch.arange(head.config.draft_vocab_size))


def test_loss_falls_and_acceptance_rises(tiny_pair, texts, tmp_path):
    prompts = [list(t.prompt) for t in texts.take(range(10, 14))]
    found = {}
    for steps in (1, 50):
        settings = small(steps=steps, ttt_steps=4, check_every=50, batch=8)
        result = train(tiny_pair.target, texts, tmp_path / str(steps), settings)
        pair = load(TARGET, result.draft, device="cpu", verbose=False)
        found[steps] = acceptance(pair, prompts, 32, top_k=4, depth=3, sizes=(16,)).tau
    losses = [entry.loss for entry in result.history]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert sum(e.accuracy[0] for e in result.history[-5:]) > 5 * result.history[0].accuracy[0] + 0.25
    assert found[50] > found[1] + 0.1


def plain(entries):
    return [entry.model_copy(update={"seconds": 0.0}) for entry in entries]


def same_state(one, other):
    """Two states on disk, bit for bit; times aside."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return set(one) == set(other) and all(same_state(one[k], other[k]) for k in one if k != "seconds")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_state, one, other))
    return one == other


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_bit_exactly(tiny_pair, texts, tmp_path, optimizer):
    settings = small(steps=8, optimizer=optimizer)
    whole = train(tiny_pair.target, texts, tmp_path / "whole", settings, judge=float_of)

    def kill(step):
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        train(tiny_pair.target, texts, tmp_path / "killed", settings, judge=float_of, on_save=kill)
    torch.manual_seed(99)  # another process starts with other random numbers
    resumed = train(tiny_pair.target, texts, tmp_path / "killed", settings, judge=float_of)
    assert plain(whole.history) == plain(resumed.history) and len(whole.history) == 8
    assert whole.checks == resumed.checks and len(whole.checks) == 2
    states = [torch.load(tmp_path / n / "state.pt", weights_only=True) for n in ("whole", "killed")]
    assert same_state(*states)
    drafts = [(r.draft / "model.safetensors").read_bytes() for r in (whole, resumed)]
    assert drafts[0] == drafts[1]


def float_of(head):
    """A judge that likes whatever it sees first: a number of the weights that falls along the run."""
    return -float(head.lm_head.weight.detach().double().square().sum())


def test_the_clock_stops_a_run_that_then_goes_on_exactly(tiny_pair, texts, tmp_path, monkeypatch):
    settings = small(steps=13, save_every=100, check_every=6)
    whole = train(tiny_pair.target, texts, tmp_path / "whole", settings)
    part = train(tiny_pair.target, texts, tmp_path / "stopped", settings, until=0.0)
    assert part.left == 7, "it looks at the clock where it reads what the device made"
    rest = train(tiny_pair.target, texts, tmp_path / "stopped", settings)
    assert rest.left == 0 and plain(rest.history) == plain(whole.history) and rest.checks == whole.checks
    states = [torch.load(tmp_path / n / "state.pt", weights_only=True) for n in ("whole", "stopped")]
    assert same_state(*states)


def test_the_judge_chooses_the_checkpoint(tiny_pair, texts, tmp_path):
    marks = iter([1.0, 3.0, 2.0])
    heads = []

    def judge(head):
        heads.append(head.fc.weight.detach().half().clone())
        return next(marks)

    result = train(tiny_pair.target, texts, tmp_path, small(steps=12), judge=judge)
    assert result.chosen == 8 and [c.tau for c in result.checks] == [1.0, 3.0, 2.0]
    chosen = load(TARGET, result.draft, device="cpu", dtype="float32", verbose=False).head.fc.weight
    assert torch.equal(chosen, heads[1].float()) and not torch.equal(heads[1], heads[2])


WORKER = """
import sys, torch
torch.set_num_threads(1)
from eagle_lab.models.targets import load_target
from eagle_lab.train.corpus import read_texts
from eagle_lab.train.processes import join
from eagle_lab.train.train import TrainSettings, train
target, texts, out = sys.argv[1:4]
processes, device = join(torch.device("cpu"))
settings = TrainSettings(steps=6, batch=4, length=64, draft_vocab=256, ttt_steps=3, lr=3e-3, check_every=3, seed=0)
model = load_target(target, device, torch.float32)
until = 0.0 if out.endswith("stopped") else float("inf")
for _ in range(2 if until == 0.0 else 1):
    result = train(model, read_texts(texts, 1500), out, settings, None, until, processes)
if processes.count > 1:
    torch.distributed.destroy_process_group()
"""


def test_two_processes_train_as_one(tiny_pair, texts, tmp_path):
    """DDP over gloo: the same loss and weights as one process, up to the order of sums, and the same when resumed."""
    folder = tmp_path / "texts"
    folder.mkdir()
    save_file(dict(vars(texts)), folder / "random-00-00000.safetensors", {"asked": str(len(texts))})
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    path = os.pathsep.join(filter(None, (str(TARGET.parents[2]), os.environ.get("PYTHONPATH"))))
    both = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for start, name in (([sys.executable], "one"), (both, "two")):
        done = subprocess.run(
            [*start, str(script), str(TARGET), str(folder), str(tmp_path / name)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / n / "state.pt", weights_only=True) for n in ("one", "two"))
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    for name, tensor in one["head"].items():
        assert torch.allclose(tensor.float(), two["head"][name].float(), atol=2e-4), name


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own():
    settings = small(seed=3)
    seen = [n for step in range(5) for n in row_order(10, step, settings)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert row_order(10, 2, settings) == seen[8:12], "the step alone says the rows"


def test_packing_keeps_every_token():
    texts = [Text((1, 2), tuple(range(10, 10 + n))) for n in (5, 9, 30, 3)]
    packed = pack(Texts.of(texts), 24, seed=1)
    for i, text in enumerate(texts):
        place = packed["document"] == i
        assert packed["ids"][place].tolist() == [*text.prompt, *text.answer][:24]
        assert packed["answer"][place].sum() == min(len(text.answer), 22)
        assert packed["positions"][place].tolist() == list(range(int(place.sum())))


def test_vocabulary_is_the_most_frequent_of_the_answers_sorted():
    found = choose_vocabulary(Texts.of([Text((7, 7, 7, 7), (9, 9, 3, 3, 3, 20))]), 32, 3)
    assert found.tolist() == [3, 9, 20]
    with pytest.raises(ValueError, match="larger than the target's of 32"):
        choose_vocabulary(Texts.of([Text((1,), (2,))]), 32, 33)


def test_learning_rate_warms_up_and_falls(tiny_pair, texts, tmp_path):
    result = train(
        tiny_pair.target, texts, tmp_path, small(steps=20, warmup=0.1, ttt_steps=1, check_every=20)
    )
    rates = [step.lr for step in result.history]
    assert rates[0] < rates[1] < rates[2] == max(rates) == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(module.LOWEST * 3e-3, rel=0.5)


def test_bad_inputs_are_one_sentence(tiny_pair, texts, tmp_path):
    train(tiny_pair.target, texts, tmp_path / "run", small(steps=1))
    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        train(tiny_pair.target, texts, tmp_path / "run", small(steps=1, lr=1e-3))
    with pytest.raises(ValueError, match=r"other settings \(texts\)"):
        train(tiny_pair.target, texts.take(range(20)), tmp_path / "run", small(steps=1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no training run"):
        train(tiny_pair.target, texts, tmp_path / "full", small())
    with pytest.raises(ValueError, match="no texts with answers"):
        train(tiny_pair.target, Texts.of([]), tmp_path / "none", small())
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        train(tiny_pair.target, texts, tmp_path / "none", small(), processes=Processes(0, 3))
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        small(steps=0)
    with pytest.raises(ValueError, match="'adamw' or 'muon'"):
        small(optimizer="sgd")


def test_too_few_layers_for_three_taps(tiny_pair, texts, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shallow = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, vocab_size=512
        )
    )
    with pytest.raises(ValueError, match="at least 6"):
        train(shallow, texts, tmp_path / "run", small())


def test_the_head_keeps_the_targets_rope_base(tiny_pair, tmp_path):
    head = new_head(tiny_pair.target, torch.arange(0, 512, 2), warm_start=True, seed=0)
    save_draft(head, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    base = raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"]
    assert base == 50000.0 and raw["draft_vocab_size"] == 256


def test_a_wider_mlp_begins_as_the_targets(tiny_pair):
    """What is wider than the target's MLP adds nothing at first."""
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    width = tiny_pair.config.intermediate_size
    outs = [
        new_head(tiny_pair.target, torch.arange(256), True, 0, mlp).midlayer.mlp(x)
        for mlp in (None, 2 * width)
    ]
    assert torch.allclose(*outs, atol=1e-6)
    narrow = new_head(tiny_pair.target, torch.arange(256), True, 0, width // 2)
    assert narrow.midlayer.mlp.down_proj.weight.shape == (64, width // 2)


def test_a_qwen3_layer_learns(tiny_pair, texts, tmp_path):
    """Norms on queries and keys: trained, written in the dialect that can say them, read, and decoded with."""
    usual = new_head(tiny_pair.target, vocabulary(tiny_pair), warm_start=True, seed=0)
    head = DraftHead(replace(usual.config, qk_norm=True), usual.embedding)
    head.load_state_dict(usual.state_dict(), strict=False)
    batch = batch_of(tiny_pair, texts.take(range(8)), rows=4)
    places = start_places(batch, batch.ids.numel())
    output = tiny_pair.target.get_output_embeddings().weight[vocabulary(tiny_pair)]
    steps = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        found = step_losses(head, batch, places, 3, output)
        loss = total_loss(found.total, found.counted)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name in ("q_norm", "k_norm"):
        assert not torch.equal(getattr(head.midlayer.self_attn, name).weight, torch.ones(16)), (
            "it never moved"
        )
    save_draft(head, tmp_path / "d", "speculators", target=TARGET)
    pair = load(TARGET, tmp_path / "d", device="cpu", dtype="float32", verbose=False)
    assert pair.facts.switches == ("qk_norm",) and "qk_norm" in pair.describe()
    prompt = [1, 124, 306, 281, 69, 192, 471, 312]
    assert generate(pair, prompt, 12).tokens == generate_plain(pair, prompt, 12).tokens
    with pytest.raises(ValueError, match="no way to say qk_norm"):
        save_draft(head, tmp_path / "no")
