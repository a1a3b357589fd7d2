"""Pairs of whole decodes by engines outside this process, and comparisons of them: judged by their rule, faults kept."""

from __future__ import annotations

import shlex
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from make import GOLDEN, worktrees

from eagle_lab import ROOT
from eagle_lab.decode.generate import decode_plain
from eagle_lab.engines.arm import parse
from eagle_lab.engines.here import base_arm
from eagle_lab.engines.protocol import EngineFailed
from eagle_lab.measure.outside import Outside
from eagle_lab.measure.pairs import Fork, Plan
from eagle_lab.measure.records import read, write
from eagle_lab.models.pair import load
from eagle_lab.models.prompts import Prompt
from eagle_lab.verdict.agreement import ArmsDisagree, first_difference
from eagle_lab.verdict.compare import NothingMeasured, compare
from eagle_lab.verdict.record import ComparisonRecord
from eagle_lab.verdict.summary import summarise

IDS = [[1, 124, 306, 281, 69, 192], [1, 245, 323, 11, 5]]
PROMPTS = tuple(Prompt(f"p{n}", "own", "", tuple(ids)) for n, ids in enumerate(IDS))
TOKENS = 6
SMALL = {"iterations": 2, "forks": 1, "max_new_tokens": TOKENS, "progress": False, "prompts": IDS}

# answers from a table of texts, so that it needs nothing but the standard library
TABLE = """
import json, os, sys
channel = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)
texts, calls = {texts!r}, 0
for line in sys.stdin:
    asked = json.loads(line); ask = asked["ask"]
    if ask == "end": break
    if ask == "decode":
        calls += 1
        {before}
        tokens = texts.get(f"{{asked['prompt_ids']}}/{{asked['seed']}}") or texts[str(asked["prompt_ids"])]
        answer = {{"seconds": {seconds} * len(tokens), "first_token_seconds": 0.001, "tokens": tokens, "cycles": {cycles}}}
    else:
        answer = {{"hello": {{"protocol": 1, "engine": "table", "version": {version!r}}}, "load": {{"facts": {{"rows": 2}}}}}}[ask]
    channel.write(json.dumps(dict(answer, answer=ask)) + "\\n"); channel.flush()
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No pair is lost to what else this machine does."""
    monkeypatch.setattr("eagle_lab.measure.outside.foreign_load", lambda *_: 0.0)


@pytest.fixture
def table(tiny_pair, tmp_path):
    """The written arm of a worker that gives the texts of plain decoding, in so many seconds a token and in such cycles;
    `change` makes another text of one, and `before` is done before each decode."""
    plain = parse("plain").decoding(TOKENS)
    texts = {str(ids): decode_plain(tiny_pair, ids, plain).tokens for ids in IDS}

    def made(
        name="table",
        seconds=0.01,
        cycles=(2, 3),
        before="pass",
        change=lambda ids: ids,
        more=None,
        version="2",
    ):
        file = tmp_path / f"{name}.py"
        own = {key: change(list(ids)) for key, ids in texts.items()} | (more or {})
        file.write_text(
            TABLE.format(texts=own, seconds=seconds, cycles=list(cycles), before=before, version=version)
        )
        return f'command="{shlex.quote(sys.executable)} -S {file}"'

    return made


def other(ids):
    ids[3] = (ids[3] + 1) % 500
    return ids


def test_pairs_of_two_engines(tiny_pair, table):
    base = base_arm(tiny_pair)
    arms = (parse(table("one"), base), parse(table("two", seconds=0.02, cycles=(1, 1, 1, 1, 1)), base))
    plan = Plan(arms, PROMPTS, TOKENS, seed=3)
    with Outside(tiny_pair, plan) as outside:
        found = [m["sample"] for m in outside.messages(Fork(0, (0, 1, 2, 3)))]
        control = [m["sample"] for m in outside.messages(Fork(1, (0, 1), control=True))]
    assert [s.prompt for s in found] == ["p0", "p1", "p0", "p1"]
    assert all((s.baseline_s, s.candidate_s) == (pytest.approx(0.06), pytest.approx(0.12)) for s in found)
    assert found[0].counts[0].cycles == 2 and found[0].counts[1].committed == 5
    assert len({s.order for s in found}) == 2  # the coin
    assert all(s.control and s.baseline_s == s.candidate_s for s in control)


def test_each_size_that_may_compile_is_decoded_before_it_is_timed(tiny_pair, table, monkeypatch):
    asked = []
    monkeypatch.setattr("eagle_lab.measure.outside.to_warm_up", lambda lengths, _: range(len(lengths)))
    real = Outside.decode

    def decode(self, arm, iteration, first=False):
        asked.append((arm, iteration, first))
        return real(self, arm, iteration, first)

    monkeypatch.setattr(Outside, "decode", decode)
    base = base_arm(tiny_pair)
    arms = (parse(table("one"), base), parse(table("two"), base))
    with Outside(tiny_pair, Plan(arms, PROMPTS, TOKENS)) as outside:
        outside.decode(0, 0)
        assert asked == [(0, 0, False), (0, 0, True)]
        list(outside.messages(Fork(0, (0, 1))))
        for arm in (0, 1):
            mine = [(iteration, first) for a, iteration, first in asked if a == arm]
            assert mine.index((1, True)) < mine.index((1, False))
            assert mine.count((0, True)) == mine.count((1, True)) == 1, "an engine that goes on is warm"
        asked.clear()
        list(outside.messages(Fork(1, (1,))))
        assert [first for _, _, first in asked].count(True) == 2, "a process begun anew is not"


def test_an_id_beyond_the_vocabulary_is_no_token(tiny_pair, table):
    base = base_arm(tiny_pair)
    arms = (parse(table("one", change=lambda ids: [10**6, *ids[1:]]), base), parse(table("two"), base))
    with (
        Outside(tiny_pair, Plan(arms, PROMPTS, TOKENS)) as outside,
        pytest.raises(EngineFailed, match="gave the id 1000000, but the target has 512 tokens"),
    ):
        outside.decode(0, 0)


def test_two_that_do_not_fit_are_loaded_in_turn(tiny_pair, table, monkeypatch):
    alive = []
    from eagle_lab.measure import outside as module

    real = module.opened

    def opened(pair, arm, *rest):
        alive.append(arm.command)
        return real(pair, arm, *rest)

    monkeypatch.setattr(module, "free_bytes", lambda *_, **__: 0)
    monkeypatch.setattr(module, "opened", opened)
    base = base_arm(tiny_pair)
    arms = (parse(table("one"), base), parse(table("two"), base))
    pair = replace(tiny_pair, needed_bytes=10)
    with Outside(pair, Plan(arms, PROMPTS, TOKENS)) as outside:
        assert outside.by_blocks
        found = [m["sample"] for m in outside.messages(Fork(0, (0, 1, 2)))]
    assert len(found) == 3 and len({s.order for s in found}) == 1
    assert len(alive) == 2  # each was started once for all its decodes


def test_a_comparison_of_engines_is_judged_by_time_per_token(tiny_pair, table, tmp_path):
    shorter = table("two", seconds=0.02, cycles=(1, 1), change=lambda ids: ids[:3])
    done = compare(tiny_pair, baseline=table("one"), candidate=shorter, results_dir=tmp_path, **SMALL)
    record = read(done.path, ComparisonRecord)
    assert (
        record.settings.rule == "time per token"
        and record.settings.outside
        and record.settings.pairs_of == "decodes"
    )
    assert done.verdict.estimate == pytest.approx(2.0)  # three tokens in as long as six
    assert [arm.engine for arm in record.arms] == ["table", "table"] and record.arms[0].facts == {"rows": 2}
    assert record.correctness.baseline is None and record.correctness.candidate.position == 3
    assert all(s.difference.position == 3 for s in record.samples)
    rows = {row.metric: row for row in summarise(record).rows}
    assert rows["mean_acceptance_length"].baseline[1] == pytest.approx(2.5)
    assert rows["TPOT"].baseline[1] == pytest.approx((60 - 1) / 5)
    found = summarise(record).factors
    assert (found.cycles[1], found.cycle_s[1]) == (
        pytest.approx(2.5),
        pytest.approx(1.0),
    )  # τ 2.5 and 1, 30 ms each


def test_arms_of_another_dtype_are_told_where_they_part_and_by_which_margin(tiny_pair, tmp_path):
    half = load(tiny_pair.target_name, tiny_pair.draft_name, device="cpu", dtype="bfloat16", verbose=False)
    plain = parse("plain").decoding(48)
    wanted = []
    for ids in IDS:
        left, right = (decode_plain(pair, ids, plain).tokens for pair in (tiny_pair, half))
        at = first_difference(left, right)
        with torch.inference_mode():
            logits = tiny_pair.target(torch.tensor([ids + left[:at]])).logits[0, -1]
        wanted.append((at, left[at], right[at], float(logits[left[at]] - logits[right[at]])))
    assert all(0 < margin < 0.5 for *_, margin in wanted)
    options = {"baseline": "plain", "candidate": "dtype=bfloat16", "results_dir": tmp_path, **SMALL}
    done = compare(tiny_pair, **options | {"iterations": 3, "max_new_tokens": 48})
    record = read(done.path, ComparisonRecord)
    checked = record.correctness
    assert record.settings.rule == "time per token" and not checked.unchecked and checked.baseline is None
    found = [checked.candidate, *(sample.difference for sample in record.samples)]
    for where, (*place, margin) in zip(found, [wanted[n] for n in (0, 0, 1, 0)], strict=True):
        assert [where.position, where.left, where.right] == place
        assert where.margin == pytest.approx(margin, abs=1e-4) and where.tolerance is None
    told = summarise(record).agreement
    assert (told.iterations, told.same, told.prompts, told.prompts_same) == (3, 0, 2, 0)
    record.samples[1] = record.samples[1].model_copy(update={"difference": None})
    told = summarise(record).agreement
    assert (told.iterations, told.same, told.prompts, told.prompts_same) == (3, 1, 2, 1)


def test_pairs_of_another_engine_are_not_mixed_in(tiny_pair, table, tmp_path):
    options = {"baseline": table("one"), "results_dir": tmp_path, **SMALL}
    done = compare(tiny_pair, candidate=table("two"), **options)
    begun = {"samples": done.record.samples[:1], "finished": None, "verdict": None}
    write(done.record.model_copy(update=begun), done.path)
    before = done.path.read_bytes()
    with pytest.raises(ValueError, match="its candidate was table 2, and is table 3 now"):
        compare(tiny_pair, candidate=table("two", version="3"), resume=done.path, **options)
    assert done.path.read_bytes() == before, "the record is as it was"
    again = compare(tiny_pair, candidate=table("two"), resume=done.path, **options)
    assert len(again.record.samples) == 2 and [e.event for e in again.record.events] == ["resumed"]


def test_an_engine_that_draws_by_its_own_numbers_is_held_against_the_distribution(
    tiny_pair, table, tmp_path, monkeypatch
):
    # what this kit drew by numbers that the engine isn't asked to use, and what is drawn of another distribution
    monkeypatch.setattr("eagle_lab.verdict.compare.DRAWS", 60)
    drawn = {
        heat: {
            f"{IDS[n % 2]}/{n}": decode_plain(
                tiny_pair, IDS[n % 2], parse(f"temperature={heat}").decoding(TOKENS, 1000 + n)
            ).tokens
            for n in range(10)
        }
        for heat in (1, 4)
    }
    right, wrong = (table(f"heat{heat}", more=texts) for heat, texts in drawn.items())
    options = {"baseline": right, "temperature": 1.0, "results_dir": tmp_path, **SMALL}
    done = compare(tiny_pair, candidate="top_k=1,depth=1,total_tokens=2", **options)
    checked = read(done.path, ComparisonRecord).correctness
    assert done.record.settings.rule == "time per token" and not checked.unchecked
    assert [(arm, found.tokens, found.p_value > 1e-4) for arm, found in checked.draws.items()] == [
        ("baseline", 60, True), ("candidate", 60, True)
    ]  # fmt: skip
    for candidate in (wrong, table("greedy")):
        with pytest.raises(
            ArmsDisagree, match="does not sample from the target's distribution: so do 60 tokens"
        ):
            compare(tiny_pair, candidate=candidate, **options)


def test_a_fork_s_folders_must_give_the_same_text(tiny_pair, tmp_path, monkeypatch):
    plain = parse("plain").decoding(TOKENS)
    texts = {str(ids): decode_plain(tiny_pair, ids, plain).tokens for ids in IDS}

    def folder(name, shift):
        place = tmp_path / name / "eagle" / "model"
        place.mkdir(parents=True)
        for package in (place, place.parent):
            (package / "__init__.py").touch()
        (place / "ea_model.py").write_text(
            textwrap.dedent(f"""
            import torch
            class EaModel:
                texts = {texts}
                @classmethod
                def from_pretrained(cls, base_model_path, ea_model_path, total_token, depth, top_k, torch_dtype, device_map):
                    self = cls()
                    self.tokenizer = type("T", (), {{"eos_token_id": None}})
                    return self
                def eval(self): return self
                def ea_generate(self, ids, **_):
                    for token in self.texts[str(ids[0].tolist())]:
                        ids = torch.cat((ids, torch.tensor([[(token + {shift}) % 512]])), 1)
                        yield ids
        """)
        )
        return tmp_path / name

    before, after, wrong = folder("before", 0), folder("after", 0), folder("wrong", 1)
    options = {"baseline": f"engine=official,code={before}", "results_dir": tmp_path, **SMALL}
    done = compare(tiny_pair, candidate=f"code={after}", **options)
    assert done.record.settings.rule == "same text" and not any(s.difference for s in done.record.samples)
    with pytest.raises(ArmsDisagree, match="official and plain decoding decode different tokens"):
        compare(tiny_pair, candidate=f"code={wrong}", **options)
    # both of another dtype than the pair's, whose arithmetic then judges neither: they are held against each other
    options["baseline"] += ",dtype=bfloat16"
    done = compare(tiny_pair, candidate=f"code={after}", **options)
    assert done.record.settings.rule == "same text" and done.record.correctness.baseline is None
    with pytest.raises(
        ArmsDisagree, match=r"the two arms decode .*: new token 0: \d+ and \d+, logit margin [\d.]+\.$"
    ):
        compare(tiny_pair, candidate=f"code={wrong}", **options)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this checkout has no git history")
def test_a_revision_against_this_folder(tiny_pair, tmp_path):
    tree = "rebuild,total_tokens=15,depth=4,code=HEAD"
    done = compare(tiny_pair, baseline=tree, candidate=f"code={ROOT}", results_dir=tmp_path, **SMALL)
    assert done.record.settings.rule == "same text" and len(done.record.samples) == 2
    assert not any(sample.difference for sample in done.record.samples)
    before, now = (arm.facts for arm in done.record.arms)
    assert before["commit"] == now["commit"] and len(now["commit"]) == 40 and not before["dirty"]


def test_finished_pairs_of_an_engine_that_dies_are_kept(tiny_pair, table, tmp_path):
    # one decode warms up, one is checked, and one is timed before it dies
    dying = table("dies", before="if calls == 4: sys.stderr.write('out of memory'); os._exit(9)")
    options = {"baseline": table("one"), "candidate": dying, "results_dir": tmp_path, **SMALL}
    done = compare(tiny_pair, **options)
    assert len(done.record.samples) == 1
    (event,) = done.record.events
    assert "ended at 'decode' with exit code 9" in event.said and "out of memory" in event.said
    first = table("first", before="if calls == 3: os._exit(9)")
    with pytest.raises(NothingMeasured, match="ended at 'decode' with exit code 9"):
        compare(tiny_pair, **options | {"candidate": first})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"candidate": "command=/nowhere/worker"}, EngineFailed, "can't start: /nowhere/worker"),
        ({"candidate": f"engine=official,code={GOLDEN}"}, EngineFailed, "no checkout of SafeAILab/EAGLE"),
        ({"candidate": "engine=eagle_lab,code=main", "pairs_of": "cycles"}, ValueError, "can't be stopped inside a decode"),
        ({"candidate": "engine=eagle_lab,code=main", "spans": (True, False)}, ValueError, "can't be instrumented"),
        ({"candidate": "plain", "draft": 1}, TypeError, "draft"),
    ],
)  # fmt: skip
def test_what_cannot_begin_is_said_and_leaves_nothing(tiny_pair, table, tmp_path, options, error, message):
    options = options | {"baseline": table()}
    with pytest.raises(error, match=message):
        compare(tiny_pair, results_dir=tmp_path / "results", **SMALL | options)
    assert not list((tmp_path / "results").glob("*.json"))
    assert "eagle_lab-" not in str(worktrees())
