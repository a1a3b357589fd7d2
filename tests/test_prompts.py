import pytest

from eagle_lab.prompts import Prompt, encode, load_prompts, prepare


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
