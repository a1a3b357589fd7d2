"""Targets of every architecture, through transformers' own classes: greedy EAGLE-3 is greedy decoding, in float32."""

from __future__ import annotations

import pytest
import torch
from make import RANDOM_SIZES, random_target

from eagle_lab.decode.generate import generate, generate_plain
from eagle_lab.models.architecture import prove
from eagle_lab.models.checkpoints import save_draft
from eagle_lab.models.dialects import default_taps
from eagle_lab.models.draft import DraftConfig, DraftHead
from eagle_lab.models.pair import Pair, load
from eagle_lab.models.targets import cache_keyword, window_of

# A small vocabulary, so that a random head's trees often hold the right token and real paths are committed
VOCABULARY, HIDDEN, WINDOW = RANDOM_SIZES["vocab_size"], RANDOM_SIZES["hidden_size"], 12
PROMPT = [5, 1, 3, 12, 9, 11, 2, 8, 13, 4]
TREE = {"top_k": 8, "depth": 2, "total_tokens": 60}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

UNTIED = {"tie_word_embeddings": False}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 46,
    "short_factor": [1.0, 1.0, 1.1, 1.2], "long_factor": [1.5, 4.0, 16.0, 40.0],
}  # fmt: skip

# name: (model_type, settings, attention)
TARGETS = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "sdpa"),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}, "eager"),
    "qwen2": ("qwen2", {}, "sdpa"),
    "qwen2-half-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}, "sdpa"),
    "qwen3": ("qwen3", {}, "sdpa"),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, **MOE}, "sdpa"),
    "mistral": ("mistral", {"sliding_window": None}, "sdpa"),
    "mistral-sliding": ("mistral", {"sliding_window": WINDOW}, "sdpa"),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}, "sdpa"),
    "mixtral-sliding": ("mixtral", {"num_local_experts": 4, "sliding_window": WINDOW}, "eager"),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
                "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}, "eager"),
    # capped scores, scaled embeddings, norms around each block, layers without rotation, multipliers of every kind
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8,
               "initializer_range": 0.2, **UNTIED}, "eager"),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 3
               + ["full_attention"], **UNTIED}, "sdpa"),
    "olmo2": ("olmo2", {}, "sdpa"),
    "olmo3": ("olmo3", {"sliding_window": WINDOW}, "sdpa"),
    "granite": ("granite", {"attention_multiplier": 0.2, "logits_scaling": 4.0, "embedding_multiplier": 3.0,
                "residual_multiplier": 0.5}, "sdpa"),
    "cohere2": ("cohere2", {"sliding_window": WINDOW, "logit_scale": 1.0, **UNTIED}, "sdpa"),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0, 1, 1, 1]}, "sdpa"),
    "glm4": ("glm4", {}, "sdpa"),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}, "sdpa"),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                   "original_max_position_embeddings": 16}}, "sdpa"),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
                      "max_position_embeddings": 46}, "sdpa"),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 46}, "sdpa"),
    "ministral3": ("ministral3", {"sliding_window": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4,
                   "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.5}}, "sdpa"),
}  # fmt: skip
SLIDING = ["qwen2-half-sliding", "mistral-sliding", "mixtral-sliding", "gpt-oss", "gemma3"]


def make_target(name, **changes):
    kind, settings, attention = TARGETS[name]
    return random_target(kind, attention, **{**settings, **changes})


def make_head(layers, embedding):
    torch.manual_seed(11)
    config = DraftConfig(
        hidden_size=HIDDEN, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
        draft_vocab_size=12, taps=default_taps(layers), target_layers=layers,
    )  # fmt: skip
    head = DraftHead(config, embedding)
    head.set_vocabulary(torch.randperm(VOCABULARY)[:12])
    return head.eval().requires_grad_(False)


def make_pair(name, **changes):
    target = make_target(name, **changes)
    head = make_head(target.config.num_hidden_layers, target.get_input_embeddings())
    return Pair(target, head, None, torch.device("cpu"), torch.float32, name, "random")


@pytest.mark.parametrize("name", TARGETS)
def test_greedy_eagle_is_greedy_decoding(name):
    pair, strategy = make_pair(name), f"attention={TARGETS[name][2]}"
    plain = generate_plain(pair, PROMPT, 36, strategy=strategy).tokens
    eagle = generate(pair, PROMPT, 36, strategy=strategy, **TREE)
    assert eagle.tokens == plain
    assert eagle.acceptance_length > 1.2, "no draft was ever accepted, so committing was not tested"
    assert len(set(plain)) > 3
    prove(pair)  # what `load` asks before any decode
    # transformers' own loop, with its own masks and its own cache
    own = pair.target.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=36,
        do_sample=False,
    )
    assert own[0, len(PROMPT) :].tolist() == plain


@pytest.mark.parametrize("name", SLIDING)
def test_the_sliding_window_counts(name):
    """Without the window the same weights decode something else, so the test above does test it."""
    pair, strategy = make_pair(name), f"attention={TARGETS[name][2]}"
    assert pair.window == WINDOW and any(pair.sliding)
    with_window = generate_plain(pair, PROMPT, 36, strategy=strategy).tokens
    pair.window = None
    assert generate_plain(pair, PROMPT, 36, strategy=strategy).tokens != with_window


def test_which_layers_slide():
    def found(name):
        return window_of(make_target(name).config)

    assert found("llama") == (None, [False] * 7)
    assert found("qwen2") == (None, [False] * 7)
    assert found("qwen2-half-sliding") == (WINDOW, [False] * 3 + [True] * 4)
    assert found("mistral-sliding") == (WINDOW, [True] * 7)
    assert found("gpt-oss") == (WINDOW, [True, False, True, False, True, False, True])


def test_sampled_eagle_is_sampled_decoding_on_a_sliding_target():
    pair = make_pair("mistral-sliding")
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 4}
    assert (
        generate(pair, PROMPT, 40, **TREE, **options).tokens
        == generate_plain(pair, PROMPT, 40, **options).tokens
    )


@pytest.mark.parametrize(
    ("name", "attention", "words"),
    [
        ("gpt-oss", "sdpa", "GptOssForCausalLM has no attention=sdpa .* use the strategy attention=eager"),
        (
            "gpt-oss",
            "tree",
            "asks its attention for s_aux, which attention=tree would drop; use .* attention=eager",
        ),
        ("gemma2", "sdpa", "Gemma2ForCausalLM (has no attention=sdpa|asks its attention for softcap)"),
        ("gemma2", "tree", "asks its attention for softcap, which attention=tree would drop"),
        ("mistral-sliding", "tree", "sliding window of 12 tokens needs an attention that takes a mask"),
    ],
)
def test_attentions_that_would_drop_something_are_refused(name, attention, words):
    for decode in (generate, generate_plain):
        with pytest.raises(ValueError, match=words):
            decode(make_pair(name), PROMPT, 4, strategy=f"attention={attention}")


def test_a_window_that_no_text_reaches_leaves_every_attention_its_place():
    pair = make_pair("mistral", sliding_window=256)
    assert pair.window == 256
    wanted = generate(pair, PROMPT, 24, **TREE).tokens
    assert generate(pair, PROMPT, 24, strategy="attention=tree", **TREE).tokens == wanted


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_texts_end_where_the_rotation_of_all_keys_would_change(name):
    pair = make_pair(name)
    assert pair.context == 46 == len(PROMPT) + 36, "the test above decodes up to the border"
    wanted = generate_plain(pair, PROMPT, 36).tokens
    # trees stand beyond the border before the text does
    assert generate(pair, PROMPT, 36, top_k=4, depth=7, total_tokens=60).tokens == wanted
    with pytest.raises(ValueError, match="exceed the target's context of 46"):
        generate(pair, PROMPT, 37)


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt-oss"])
def test_saved_and_loaded_from_folders(name, tmp_path):
    pair, strategy = make_pair(name), f"attention={TARGETS[name][2]}"
    pair.target.save_pretrained(tmp_path / "target")
    save_draft(pair.head, tmp_path / "draft", "specforge")
    again = load(tmp_path / "target", tmp_path / "draft", device="cpu")
    wanted = generate(pair, PROMPT, 24, strategy=strategy, **TREE)
    assert generate(again, PROMPT, 24, strategy=strategy, **TREE).cycles == wanted.cycles
    assert type(again.target).__name__ in again.describe() and "specforge" in again.describe()


@pytest.mark.parametrize("mode", ["fewer", "more"])
def test_end_of_sequence_ids_in_lists(mode):
    pair = make_pair("qwen3")
    tokens = generate_plain(pair, PROMPT, 40).tokens
    stop = tokens[12]
    pair.target.generation_config.eos_token_id = [stop] if mode == "fewer" else [VOCABULARY - 1, stop]
    expected = tokens[: min(tokens.index(i) for i in pair.eos if i in tokens) + 1]
    assert generate_plain(pair, PROMPT, 40).tokens == expected
    assert generate(pair, PROMPT, 40, **TREE).tokens == expected


def test_a_cache_is_given_by_the_name_that_the_model_has_for_it():
    class Old(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None):
            return input_ids

    class New(torch.nn.Module):
        def forward(self, input_ids, cache=None, **kwargs):
            return input_ids

    assert [cache_keyword(model) for model in (Old(), New())] == ["past_key_values", "cache"]
