"""Arms as text: what a text names, what it inherits, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_lab.decode.sampling import Sampling
from eagle_lab.decode.strategy import AXES, Strategy
from eagle_lab.decode.tree import TREES, TreeShape, pool_size
from eagle_lab.engines.arm import (
    ALIASES,
    CHAIN,
    KEYS,
    TAKES,
    Arm,
    of_values,
    parse,
    told,
    values,
    wants_tree,
    with_tree,
    written,
)

TEXT = (
    st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1)
    .map(str.strip)
    .filter(bool)
)
STRATEGIES = st.builds(Strategy, **{axis: st.sampled_from(list(names)) for axis, names in AXES.items()})


@st.composite
def shapes(draw, chain=False):
    top_k, depth = 1 if chain else draw(st.integers(1, 12)), draw(st.integers(1, 9))
    return TreeShape(top_k, depth, draw(st.integers(1, pool_size(top_k, depth))))


@st.composite
def arms(draw):
    flat = {
        "strategy": draw(STRATEGIES), "plain": draw(st.booleans()), "target": draw(TEXT), "dtype": draw(TEXT),
        "sampling": Sampling(draw(st.floats(0, 4)), draw(st.floats(0.1, 1)), draw(st.integers(0, 50))), "draft": draw(TEXT),
    }  # fmt: skip
    engine = draw(st.sampled_from([*TAKES]))
    more = {
        "eagle_lab": {
            "code": draw(st.just("") | TEXT),
            "python": draw(st.just("") | TEXT),
            "tensor_parallel_size": draw(st.integers(1, 4)),
            "quantization": draw(st.just("") | TEXT),
        },
        "official": {"code": draw(TEXT), "python": draw(st.just("") | TEXT)},
        "vllm": {"python": draw(TEXT), "quantization": draw(st.just("") | TEXT)},
        "openai": {"url": draw(st.integers(1, 65535).map("http://127.0.0.1:{}/v1".format))},
        None: {"command": draw(TEXT)},
    }[engine]
    shape = draw(shapes(chain=engine == "vllm"))
    return Arm(**flat, **more, shape=shape, engine=engine or "eagle_lab")


@given(arms(), arms())
def test_a_written_arm_parses_back_on_top_of_the_same_arm(arm, since):
    assert told(parse(written(arm, since), since)) == told(arm)
    assert told(parse(written(arm))) == told(arm)


@given(arms())
def test_an_arm_is_its_flat_values(arm):
    assert of_values(values(arm)) == arm
    assert tuple(values(arm)) == KEYS


@given(STRATEGIES)
def test_a_strategy_s_text_is_an_arm_s(strategy):
    assert parse(str(strategy), Arm(strategy)).strategy == strategy
    assert parse(str(strategy)) == Arm(strategy)
    # a strategy names all its axes
    assert parse(strategy, parse("doubling,runtime=compile,attention=tree")).strategy == strategy


@given(shapes().filter(lambda s: s.depth > 1))
def test_the_words_of_sglang_count_the_root_and_the_first_step(shape):
    text = (
        f"speculative_num_steps={shape.depth + 1},speculative_eagle_topk={shape.top_k},"
        f"speculative_num_draft_tokens={shape.total_tokens + 1}"
    )
    assert parse(text).shape == shape


def test_their_numbers_as_they_are_published():
    # 8 steps, 10 children and 64 tokens are the kit's 63 nodes of depth 7; vLLM's chain of 3 is what test_vllm.py finds equal
    assert parse("speculative_num_steps=8,speculative_eagle_topk=10,speculative_num_draft_tokens=64") == Arm()
    assert parse("num_speculative_tokens=3").shape == TreeShape(1, 2, 3)


@given(st.integers(2, 9), arms())
def test_a_chain_has_so_many_tokens_whatever_it_inherits(count, since):
    if not since.command and since.engine == "openai":
        return
    shape = parse(f"{CHAIN}={count}", since).shape
    assert (shape.top_k, shape.total_tokens, shape.depth) == (1, count, count - 1)


def test_the_candidate_inherits_what_it_does_not_name():
    baseline = parse("doubling,runtime=compile,total_tokens=31,depth=5,temperature=1")
    candidate = parse("incremental,top_p=0.9", baseline)
    assert candidate.strategy == Strategy("incremental", "compile")
    assert candidate.shape == TreeShape(10, 5, 31)
    assert candidate.sampling == Sampling(1.0, 0.9)


def test_the_two_folders_of_a_fork():
    baseline = parse("engine=official,code=EAGLE-before,python=.venv/bin/python")
    candidate = parse("code=EAGLE-after", baseline)
    assert (candidate.engine, candidate.code, candidate.python) == (
        "official",
        "EAGLE-after",
        ".venv/bin/python",
    )


def test_a_quantization_is_inherited_by_what_can_have_it():
    baseline = parse("doubling,runtime=compile,quantization=fp8")
    assert baseline.quantization == told(baseline)["quantization"] == "fp8"
    assert "quantization" not in told(Arm())
    assert parse("incremental", baseline).quantization == "fp8"
    assert parse("engine=vllm,plain", baseline).quantization == "fp8"
    assert parse("engine=official,code=x", baseline).quantization == ""
    assert written(parse("quantization=fp8"), Arm()) == "quantization=fp8"


def test_an_engine_of_its_own_takes_no_place_from_the_other():
    baseline = parse("engine=official,code=../EAGLE,python=x,total_tokens=31")
    candidate = parse("engine=eagle_lab", baseline)
    assert (candidate.code, candidate.python, candidate.shape.total_tokens) == ("", "", 31)
    assert parse('command="python my_worker.py"', baseline).engine == "eagle_lab"


def test_a_tree_key_ends_plain():
    plain = parse("plain", parse("total_tokens=31"))
    assert plain.plain and not parse("doubling", plain).plain
    assert parse("doubling", plain).shape.total_tokens == 31  # what came through the plain arm
    assert parse("runtime=compile", plain).plain
    assert written(Arm(), plain) == "total_tokens=63"


def test_values_with_commas_and_quotes():
    arm = parse('command="python worker.py --layers 1,2 \\"x\\"",plain')
    assert arm.command == 'python worker.py --layers 1,2 "x"' and arm.plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the arm is empty"),
        (3, "not int"),
        ("topk=3", "no key 'topk'; did you mean 'top_k'.*The keys: mask"),
        ("dubling", "did you mean 'doubling'"),
        ("depth=3,depth=4", "names depth twice"),
        ("speculative_num_steps=4,depth=3", "names depth twice"),
        (f"{CHAIN}=3,top_k=1", "names top_k twice"),
        (f"{CHAIN}=1", "shortest chain has 2"),
        ("total_tokens=many", "total_tokens is 'many'; it must be a whole number"),
        ("temperature=warm", "it must be a number"),
        ("temperature=-1", "temperature is -1.0; it must be at least 0"),
        ("plain,doubling", "plain decoding drafts nothing, so mask"),
        ("plain=yes", "plain takes no value"),
        ("engine=tgi", "engine is 'tgi'; it must be eagle_lab, official"),
        ("engine=official", "needs code=FOLDER"),
        ("engine=openai", "needs url=ADDRESS"),
        ("engine=openai,url=http://me:secret@host/v1", "may hold no password"),
        ("engine=openai,url=me:secret@host/v1", "may hold no password"),
        ("engine=openai,url=http://host/v1?api_key=secret", "may hold no password"),
        ("engine=openai,url=host/v1", "must begin with http:// or https://"),
        ("engine=openai,url=http://host/v1,top_k=3", "engine=openai takes no top_k; it takes temperature"),
        ("engine=vllm,runtime=eager", "engine=vllm takes no runtime"),
        ("engine=vllm", "drafts chains only"),
        ("engine=openai,url=http://host/v1,quantization=fp8", "engine=openai takes no quantization"),
        ("tensor_parallel_size=0", "tensor_parallel_size is 0; it must be at least 1"),
        ("engine=vllm,plain,tensor_parallel_size=2", "engine=vllm takes no tensor_parallel_size"),
        ('command="x', "can't be read: no closing quotation"),
        ('command=x,python=y', "a command takes no python"),
    ],
)  # fmt: skip
def test_bad_arms_are_refused_in_a_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_place_on_top_of_a_command_is_refused():
    with pytest.raises(ValueError, match="code goes with an engine"):
        parse("code=main", parse("command=x"))


def test_every_alias_leads_to_a_key():
    assert {key for key, _ in ALIASES.values()} <= set(KEYS)


@pytest.mark.parametrize(
    ("text", "wants", "made"),
    [
        ("total_tokens=auto", True, "top_k=2,depth=2,total_tokens=3"),
        ("doubling, total_tokens = auto ,temperature=1", True, "doubling,top_k=2,depth=2,total_tokens=3,temperature=1"),
        ('draft="total_tokens=auto,x"', False, None),
        ("xtotal_tokens=auto", False, None),
        ("total_tokens=31", False, None),
    ],
)  # fmt: skip
def test_a_tree_left_open(text, wants, made):
    assert wants_tree(text) == wants
    if wants:
        assert with_tree(text, TREES[3]) == made
        with pytest.raises(ValueError, match="measured by `compare` alone"):
            parse(text)
    assert not wants_tree(Arm())
