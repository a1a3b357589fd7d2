import pytest

from eagle_lab.models.prompts import Prompt, brought, encode, load_prompts, prepare


def test_a_selection_mixes_the_categories():
    heldout = load_prompts("heldout")
    assert len(heldout) == 40
    assert len({p.category for p in heldout[:8]}) == 8


def test_train_and_heldout_share_nothing_and_make_all():
    train, heldout = ({p.id for p in load_prompts(name)} for name in ("train", "heldout"))
    assert not train & heldout
    assert train | heldout == {p.id for p in load_prompts("all")}


def test_a_category_and_ids_can_be_selected():
    assert {p.category for p in load_prompts("code")} == {"code"}
    assert [p.id for p in load_prompts("maths-02, code-01")] == ["maths-02", "code-01"]


@pytest.mark.parametrize("selection", ["holdout", "", "maths-02,nothing"])
def test_an_unknown_selection_lists_what_there_is(selection):
    with pytest.raises(ValueError, match="writing"):
        load_prompts(selection)


def test_ids_pass_without_a_tokenizer_and_text_does_not():
    assert prepare(None, [[1, 2, 3]])[0].ids == (1, 2, 3)
    with pytest.raises(ValueError, match="no tokenizer"):
        prepare(None, ["Hello."])
    with pytest.raises(ValueError, match="no prompts"):
        prepare(None, [])


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="empty"):
        encode(object(), "   ")


def test_encoded_prompts_are_kept():
    ready = Prompt("p", "own", "text", (4, 5))
    assert prepare(None, [ready]) == [ready]


def test_what_a_caller_brings_is_named_by_its_content():
    first, second = prepare(None, [[1, 2, 3], [4, 5]])
    assert first.id != second.id and prepare(None, [[9], [1, 2, 3]])[1].id == first.id
    assert brought([first, second]) == {first.id: "1 2 3", second.id: "4 5"}
    assert brought(load_prompts("maths")) == {}
    assert brought([Prompt("maths-01", "own", "not the kit's text", (7,))]) == {"maths-01": "7"}


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (5, "prompts is 5"),
        ([5], "hold 5, which is neither"),
        ([None], "hold None, which is neither"),
        (
            [Prompt("p", "own", "", (1,)), Prompt("p", "own", "", (2,))],
            "two different prompts have the id 'p'",
        ),
    ],
)
def test_what_is_no_prompt_is_one_sentence(prompts, words):
    with pytest.raises(ValueError, match=words):
        prepare(None, prompts)
