import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from eagle_lab.models.prompts import SPLITS, Prompt, brought, encode, load_prompts, prepare, token_ids


def test_a_selection_mixes_the_categories():
    heldout = load_prompts("heldout")
    assert len(heldout) == 168
    assert len({p.category for p in heldout[:8]}) == 8
    # figures of the first 40 stay comparable: five of each category, from before there were more
    assert all(int(p.id[-2:]) <= 9 for p in heldout[:40]) and all(int(p.id[-2:]) >= 14 for p in heldout[40:])
    talks = [p for p in heldout if isinstance(p.text, tuple)]
    assert len(talks) == 24 and {len(p.text) for p in talks} == {3}


def test_the_splits_share_nothing_and_make_all():
    splits = [[p.id for p in load_prompts(name)] for name in SPLITS]
    assert sorted(sum(splits, [])) == sorted(p.id for p in load_prompts("all"))


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


class Chat:
    """A tokenizer that shows what it was given."""

    chat_template = "yes"

    def apply_chat_template(self, turns, add_generation_prompt, return_dict):
        return [len(turn["content"]) + (100 if turn["role"] == "assistant" else 0) for turn in turns]


def test_a_conversation_takes_turns():
    assert encode(Chat(), ("one", "answer", "a")) == [3, 106, 1] and encode(Chat(), "one") == [3]
    talk = prepare(Chat(), [Prompt("talk", "own", ("one", "answer", "a"))])[0]
    assert talk.ids == (3, 106, 1) and brought([talk]) == {"talk": "3 106 1"}
    with pytest.raises(ValueError, match="has 2 turns; it must end with the user's"):
        encode(Chat(), ("one", "answer"))
    with pytest.raises(ValueError, match="must be one text, or the turns"):
        encode(Chat(), ("one", 2, "a"))


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


@pytest.mark.parametrize(
    "form",
    [
        [5, 9, 77], (5, 9, 77), torch.tensor([5, 9, 77]), torch.tensor([[5, 9, 77]]), np.array([5, 9, 77]), [[5, 9, 77]],
        range(5, 8), [torch.tensor(5), np.int64(9), 77], list(np.array([5, 9, 77])), list(torch.tensor([5, 9, 77])),
        BatchEncoding({"input_ids": torch.tensor([[5, 9, 77]])}),
        {"input_ids": [5, 9, 77], "attention_mask": [1, 1, 1]}, [torch.tensor([5, 9, 77])],
    ],
    ids=str,
)  # fmt: skip
def test_forms_of_one_prompt(form):
    wanted = [5, 6, 7] if isinstance(form, range) else [5, 9, 77]
    assert token_ids(form) == wanted and list(prepare(None, [form])[0].ids) == wanted


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (torch.tensor([[1, 2], [3, 4]]), "are 2 prompts"),
        ([[1, 2], [3]], "are 2 prompts"),
        (np.zeros((3, 2), dtype=int), "are 3 prompts"),
        (torch.tensor([1.0, 2.0]), "holds 1.0, which is not a token id"),
        ([1, True], "holds True, which is not a token id"),
        ([1, "a"], "holds 'a', which is not a token id"),
        ([1, [2, 3]], r"holds \[2, 3\], which is not a token id"),
        ({"ids": [1, 2]}, "it must be a list of token ids"),
        ({0: 5, 1: 9}, "it must be a list of token ids"),
        ({5, 9, 77}, "it must be a list of token ids"),  # it has no order
        ({"input_ids": [0, 5, 9], "attention_mask": [0, 1, 1]}, "is padded"),  # the pads would be read as text
        (BatchEncoding({"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])}), "is padded"),
    ],
    ids=str,
)  # fmt: skip
def test_forms_of_no_one_prompt_are_one_sentence(form, words):
    with pytest.raises(ValueError, match=words):
        token_ids(form)
    with pytest.raises(ValueError, match=words):
        prepare(None, [form])


def test_a_text_is_no_list_of_ids():
    with pytest.raises(ValueError, match="`encode` makes one of a text"):
        token_ids("Hello.")
