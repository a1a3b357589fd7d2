"""Training: the same attention as decoding, bit-exact resumption, and a head that learns in seconds."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from eagle_lab import ROOT
from eagle_lab.decode.generate import Cycle
from eagle_lab.measure.acceptance import acceptance, by_depth, tau
from eagle_lab.measure.old_records import read
from eagle_lab.models.cache import GrowingCache
from eagle_lab.models.checkpoints import save_draft
from eagle_lab.models.pair import DEFAULT_DRAFT, load
from eagle_lab.report.charts.training import training_figure
from eagle_lab.train.card import card, grown, growth_words
from eagle_lab.train.make_draft import make_draft, ship, write_texts
from eagle_lab.train.new_head import new_head
from eagle_lab.train.packing import Reader, choose_vocabulary, pack
from eagle_lab.train.schedule import TrainSettings, learning_rate, row_order
from eagle_lab.train.text import Text, TextSettings
from eagle_lab.train.train import train
from eagle_lab.train.ttt import asked, rollout, step_losses

SMALL = {
    "batch": 4,
    "length": 64,
    "draft_vocab": 256,
    "ttt_steps": 3,
    "lr": 3e-3,
    "save_every": 3,
    "validation": 0.1,
}


@pytest.fixture(scope="module")
def texts(tiny_pair):
    return write_texts(
        tiny_pair.target, None, 1500, TextSettings(batch=16, answer_tokens=40, greedy_share=1.0)
    )


def small(**changes):
    return TrainSettings(**{**SMALL, **changes})


def batch_of(pair, texts, length=64, rows=2):
    packed = pack(texts, length, seed=0)
    return Reader(pair.target, pair.head.config.taps, packed, store=False).read(list(range(rows)))


def test_attention_of_training_is_stepwise_decoding_with_a_cache(tiny_pair, texts):
    """Position by position, all seven steps: one query at a time against a cache that a draft leaves as it found it."""
    head, steps = tiny_pair.head, 7
    batch = batch_of(tiny_pair, texts[:6], length=128)
    chosen = asked(batch)
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
        batch_of(tiny_pair, texts[:1], rows=1),
        batch_of(tiny_pair, texts[:2], length=128, rows=1),
    )
    kept = (together.document[0] == 0).nonzero()[:, 0]
    count = len(kept)
    assert torch.equal(together.ids[0, kept], alone.ids[0, :count])
    assert torch.allclose(together.taps[0, kept], alone.taps[0, :count], atol=1e-4)
    assert torch.equal(together.top1[0, kept], alone.top1[0, :count])


def test_the_target_of_a_step_is_its_own_next_token(tiny_pair, texts):
    """Greedy text: the target's argmax at each place of an answer is the token that follows."""
    batch = batch_of(tiny_pair, texts[:4])
    place = asked(batch).flatten().nonzero()[:, 0]
    follows = batch.ids.flatten()[place + 2]
    assert (batch.top1.flatten()[place + 1] == follows).float().mean() > 0.99
    losses = step_losses(
        tiny_pair.head, batch, 3, tiny_pair.target.get_output_embeddings().weight[vocabulary(tiny_pair)]
    )
    assert losses.loss.isfinite().all()
    assert losses.inside[0].sum() > losses.inside[2].sum(), "later steps run out of text sooner"


def vocabulary(pair):
    head = pair.head
    return head.target_ids(torch.arange(head.config.draft_vocab_size))


def test_loss_falls_and_acceptance_rises(tiny_pair, texts, tmp_path):
    settings = small(steps=50, ttt_steps=4, save_every=50, batch=8)
    prompts = [list(t.prompt) for t in texts[10:14]]
    found = {}
    for name, steps in (("before", 1), ("after", 50)):
        result = train(tiny_pair.target, texts, tmp_path / name, small(**{**vars(settings), "steps": steps}))
        save_draft(result.head, tmp_path / name / "head")
        pair = load(target_folder(), tmp_path / name / "head", device="cpu")
        found[name] = acceptance(pair, prompts, 32, top_k=4, depth=3, sizes=(16,))["tau"]
    losses = [entry["loss"] for entry in result.history]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert sum(e["accuracy"][0] for e in result.history[-5:]) > 5 * result.history[0]["accuracy"][0] + 0.25
    assert found["after"] > found["before"] + 0.1


def target_folder():
    from pathlib import Path

    return Path(__file__).parents[1] / "golden" / "target"


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_bit_exactly(tiny_pair, texts, tmp_path, optimizer):
    settings = small(steps=8, optimizer=optimizer)
    whole = train(tiny_pair.target, texts, tmp_path / "whole", settings)

    def kill(step, folder):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(tiny_pair.target, texts, tmp_path / "killed", settings, on_save=kill)
    torch.manual_seed(99)  # another process starts with other random numbers
    resumed = train(tiny_pair.target, texts, tmp_path / "killed", settings)
    for name, tensor in whole.head.state_dict().items():
        assert torch.equal(tensor, resumed.head.state_dict()[name]), name
    plain = [{k: v for k, v in e.items() if k != "seconds"} for e in whole.history]
    assert plain == [{k: v for k, v in e.items() if k != "seconds"} for e in resumed.history]
    kept = [
        torch.load(tmp_path / n / "state.pt", weights_only=True)["optimizers"] for n in ("whole", "killed")
    ]
    for one, other in zip(kept[0], kept[1], strict=True):
        for key, state in one["state"].items():
            for name, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][key][name])), (
                    key,
                    name,
                )
    assert whole.validation == resumed.validation


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own():
    settings = small(seed=3)
    seen = [n for step in range(5) for n in row_order(10, step, settings)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert row_order(10, 2, settings) == seen[8:12], "the step alone says the rows"


def test_packing_keeps_every_token():
    texts = [Text((1, 2), tuple(range(10, 10 + n))) for n in (5, 9, 30, 3)]
    packed = pack(texts, 24, seed=1)
    for i, text in enumerate(texts):
        place = packed["document"] == i
        assert packed["ids"][place].tolist() == [*text.prompt, *text.answer][:24]
        assert packed["answer"][place].sum() == min(len(text.answer), 22)
        assert packed["positions"][place].tolist() == list(range(int(place.sum())))


def test_vocabulary_is_the_most_frequent_of_the_answers_sorted():
    found = choose_vocabulary([Text((7, 7, 7, 7), (9, 9, 3, 3, 3, 20))], 32, 3)
    assert found.tolist() == [3, 9, 20]
    with pytest.raises(ValueError, match="larger than the target's of 32"):
        choose_vocabulary([Text((1,), (2,))], 32, 33)


def test_learning_rate_warms_up_and_falls():
    settings = small(lr=1.0e-2)
    rates = [learning_rate(x / 100, settings) for x in range(101)]
    assert (
        rates[0] < 1e-4 and max(rates) == pytest.approx(1e-2, rel=0.01) and rates[-1] == pytest.approx(2e-4)
    )


def test_bad_inputs_are_one_sentence(tiny_pair, texts, tmp_path):
    train(tiny_pair.target, texts, tmp_path / "run", small(steps=1))
    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        train(tiny_pair.target, texts, tmp_path / "run", small(steps=1, lr=1e-3))
    with pytest.raises(ValueError, match="resume is off"):
        train(tiny_pair.target, texts, tmp_path / "run", small(steps=1), resume=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no training run"):
        train(tiny_pair.target, texts, tmp_path / "full", small())
    with pytest.raises(ValueError, match="no texts with answers"):
        train(tiny_pair.target, [], tmp_path / "none", small())
    with pytest.raises(ValueError, match="steps is 0"):
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


def test_acceptance_counts():
    cycles = [Cycle(0, (1, 2, 3), 4), Cycle(3, (4,), 5), Cycle(4, (5, 6), 7)]
    assert tau(cycles) == 2.0
    levels = by_depth(cycles, 2)
    assert [(d["reached"], d["accepted"]) for d in levels] == [(3, round(2 / 3, 4)), (2, 0.5), (1, 0.0)]
    with pytest.raises(ValueError, match="at least one cycle"):
        tau([])


def test_replay_counts_what_decoding_counts(tiny_pair):
    prompts = [[1, 124, 306, 281, 69, 192, 471, 312], [1, 7, 9], [1, 400, 33, 12]]
    options = {"max_new_tokens": 40, "top_k": 4, "depth": 3, "sizes": (16, 7)}
    decoded, replayed = (acceptance(tiny_pair, prompts, replay=replay, **options) for replay in (False, True))
    assert decoded.pop("settings") != replayed.pop("settings")
    assert decoded == replayed
    assert "forward" not in vars(tiny_pair.target), "the target is itself again"


def test_one_call_from_target_to_record(tmp_path):
    settings = small(steps=4, ttt_steps=2, save_every=4)
    written = TextSettings(batch=16, answer_tokens=30, greedy_share=1.0)
    prompts = [[1, 124, 306], [1, 7, 9]]
    record, result = make_draft(
        target_folder(), tmp_path, 600, written, settings, "cpu", prompts, 16, (16, 7), [0.5]
    )
    assert (
        len(record["growth"]) == 2
        and record["growth"][0]["answer_tokens"] < record["growth"][1]["answer_tokens"]
    )
    assert record["kind"] == "training" and len(result.history) == 4
    assert set(record["acceptance"]["by_tree_size"]) == {"16", "7"}
    assert json.loads((tmp_path / "record.json").read_text()) == record
    again, _ = make_draft(target_folder(), tmp_path, 600, written, settings, "cpu", prompts, 16, (16, 7))
    assert again["acceptance"] == record["acceptance"], "a finished run is taken as it is"
    ship(tmp_path, tmp_path / "shipped", tmp_path / "train.json")
    assert load(
        target_folder(), tmp_path / "shipped", device="cpu", verbose=False
    ).head.config.draft_vocab_size
    text = (tmp_path / "shipped" / "README.md").read_text()
    assert f"τ = **{record['acceptance']['tau']:.2f}**" in text and record["command"] in text
    assert "--replay" in text and "was not measured for this head" in text, "the second run had no growth"
    assert f"| {record['validation'][-1]['step']} |" in text


def test_the_shipped_card_is_what_its_records_say():
    """Also how τ grew with the text, from the run on a part of it."""
    record, smaller = (
        read(ROOT / "data" / "results" / f"{name}.json") for name in ("train-h100", "train-growth-h100")
    )
    text = (DEFAULT_DRAFT / "README.md").read_text()
    assert text == card(record, DEFAULT_DRAFT.name, smaller)
    rows = grown(record, smaller)
    assert len(rows) == 3 and [row["answer_tokens"] for row in rows] == sorted(
        row["answer_tokens"] for row in rows
    )
    assert rows[-1]["tau"] == record["acceptance"]["tau"] and "would still help" in text
    assert "was not measured" in growth_words(rows[-1:])
    assert "hardly help" in growth_words([rows[-1], rows[-1]])
    # the part was trained as the whole was: the same text settings, learning rate and passes over it
    assert smaller["settings"]["text"] == record["settings"]["text"]
    alike = ("ttt_steps", "batch", "length", "lr", "optimizer", "draft_vocab", "seed")
    assert all(
        smaller["settings"]["training"][name] == record["settings"]["training"][name] for name in alike
    )
    passes = [r["history"][-1]["step"] / r["settings"]["answer_tokens"] for r in (record, smaller)]
    assert passes[0] == pytest.approx(passes[1], rel=0.01)


def test_the_chart_has_a_line_for_each_draft_step():
    history = [{"step": i, "loss": 9.0 - i / 10, "accuracy": [i / 50, i / 80]} for i in range(1, 41)]
    figure = training_figure(history)
    assert [trace.name for trace in figure.data] == ["loss", "draft step 1", "draft step 2"]
    with pytest.raises(ValueError, match="history is empty"):
        training_figure([])
