"""What a target's class asks of attention and cache, the proof at load, and targets that are refused in one sentence."""

from __future__ import annotations

import shutil

import pytest
import torch
from make import GOLDEN
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from eagle_lab.models import architecture
from eagle_lab.models.architecture import Asks, observe, prove
from eagle_lab.models.pair import load
from eagle_lab.models.shapes import build_shape

CPU = torch.device("cpu")
DRAFT = GOLDEN / "draft_official"  # for 8 layers, hidden 64, vocabulary 512
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MOE = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
ROUTED = {
    "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1,
    "moe_intermediate_size": 24,
}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_expand": 2, "mamba_d_head": 16, "mamba_n_heads": 8, "mamba_d_ssm": 128}
HALVES = ["sliding_attention", "full_attention"] * 4

# model_type: (settings, what the sentence says)
REFUSED = {
    "gemma4_text": ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0,
                     "global_head_dim": 32, "layer_types": HALVES}, "head_dim of their own|unlike key and value sizes"),
    "gemma3n_text": ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 2,
                      "layer_types": HALVES, "activation_sparsity_pattern": [0.0] * 8, "laurel_rank": 4},
                     "layers that share their keys and values"),
    "deepseek_v3": ({**LATENT, **ROUTED}, "latent keys and values"),
    "deepseek_v2": ({**LATENT, **ROUTED}, "latent keys and values"),
    "qwen3_next": ({**LINEAR, **MOE}, "layers of kind 'linear_attention'"),
    "qwen3_5_text": (LINEAR, "layers of kind 'linear_attention'"),
    "falcon_h1": (MAMBA, "layers of kind 'hybrid'|asks its cache for"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 4}, "layers of kind 'conv'"),
    "llama4_text": ({"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 64}, "chunked_attention"),
    "recurrent_gemma": ({"lru_width": 64}, "layers of kind 'recurrent'|layers of kind 'linear_attention'|can't be decoded"),
    "mamba": ({}, "."),
    "gpt2": ({}, "doesn't keep its decoder layers as `layers`"),
    "bloom": ({}, "max_position_embeddings|as `layers`"),
    "mpt": ({}, "max_position_embeddings|as `layers`"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 64}, "can't be decoded here|other logits"),
}  # fmt: skip


def saved(kind, folder, settings):
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) < 3e6, "too large for a test"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", REFUSED)
def test_targets_that_are_refused_in_one_sentence(kind, tmp_path):
    settings, words = REFUSED[kind]
    saved(kind, tmp_path / "target", settings)
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path / "target", DRAFT, device="cpu")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(("the target", "target"))
    assert "Error:" not in str(caught.value) or "can't be decoded here" in str(caught.value)


def test_what_a_class_asks():
    def asked(kind, **settings):
        config = AutoConfig.for_model(kind, **{**SIZES, **settings})
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        before = model.config._attn_implementation
        found = observe(model)
        assert model.config._attn_implementation == before
        return found

    assert asked("llama") == Asks(frozenset(), True)
    assert asked("gemma2").extras == {"softcap", "sliding_window"}
    assert asked("gpt_oss", num_local_experts=2, num_experts_per_tok=1).extras == {"s_aux", "sliding_window"}
    assert not asked("diffllama").interface, "its attention is code of its own"


def test_which_attention_drops_what():
    asks = Asks(frozenset({"softcap", "sliding_window", "position_bias"}), True)
    assert asks.lost_by("eager") == []
    assert asks.lost_by("sdpa") == asks.lost_by("tree") == ["position_bias", "softcap"]
    assert Asks(frozenset({"sliding_window"}), True).lost_by("tree_fused") == []


def test_an_attention_that_is_code_of_its_own_takes_no_other(tmp_path):
    pair = load(saved("diffllama", tmp_path / "t", {}), DRAFT, device="cpu")
    with pytest.raises(ValueError, match="attention code of its own, so attention=tree can't"):
        pair.check_attention("tree")
    pair.check_attention("sdpa")


def test_a_target_with_capped_scores_is_loaded_with_its_own_attention(tmp_path):
    pair = load(saved("gemma2", tmp_path / "t", {}), DRAFT, device="cpu")
    assert (pair.facts.attention, pair.facts.lost_by_tree) == ("eager", ("softcap",))
    assert "eager: the target asks for softcap, which tree would drop" in pair.describe()


def test_a_context_that_a_rotation_cuts_short_is_told(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    pair = load(saved("llama", tmp_path / "t", {"rope_parameters": rope}), DRAFT, device="cpu")
    assert (pair.context, pair.facts.context, pair.facts.full_context) == (64, 64, 256)
    assert "context 64 of 256: a longer text's rotation changes" in pair.describe()


# --- the proof ---------------------------------------------------------------------------------------------------


def wrong_mask(pair, monkeypatch):
    monkeypatch.setattr(pair, "masks", lambda bias, positions, cache: torch.zeros_like(bias))


def wrong_positions(pair, monkeypatch):
    forward = pair.target.forward

    def shifted(*args, position_ids=None, **named):
        if position_ids is not None and named.get("use_cache"):
            position_ids = torch.arange(position_ids.shape[1])[None]
        return forward(*args, position_ids=position_ids, **named)

    monkeypatch.setattr(pair.target, "forward", shifted)


def wrong_slots(pair, monkeypatch):
    new_cache = pair.new_cache

    def stuck(batch, capacity):
        cache = new_cache(batch, capacity)
        cache.set_slots = lambda slots, window, start: type(cache).set_slots(cache, slots * 0, window, start)
        return cache

    monkeypatch.setattr(pair, "new_cache", stuck)


def all_rows(pair, monkeypatch):
    """A class that gives the logits of all rows whatever it is asked for: a padded prompt's last is no token's."""
    forward = pair.target.forward
    monkeypatch.setattr(pair.target, "forward", lambda *a, logits_to_keep=0, **named: forward(*a, **named))


@pytest.mark.parametrize("fault", [wrong_mask, wrong_positions, wrong_slots, all_rows])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_proof_sees_a_decode_that_is_not_the_targets_own(fault, dtype, monkeypatch):
    pair = load(GOLDEN / "target", DRAFT, device="cpu", dtype=dtype)
    prove(pair)
    fault(pair, monkeypatch)
    with pytest.raises(
        ValueError, match="gives other logits over a cached prefix and a tree .* of their size"
    ):
        prove(pair)


def test_the_proof_sees_a_window_that_is_left_out(monkeypatch, tmp_path):
    pair = load(saved("mistral", tmp_path / "t", {"sliding_window": 64}), DRAFT, device="cpu")
    monkeypatch.setattr(pair, "masks", lambda bias, positions, cache: bias)
    with pytest.raises(ValueError, match="gives other logits"):
        prove(pair)
    assert pair.window == pair.config.sliding_window == 64, "the short window is taken back"


STRAY = "sliding_window of 64 tokens, which its class \\(LlamaForCausalLM\\) doesn't heed: .* take sliding_window out of"


def test_a_window_that_the_class_does_not_heed(tmp_path):
    """Llama's forward ignores it, and transformers' generate drops keys by it: whose text would be right?"""
    with pytest.raises(ValueError, match=STRAY):
        load(saved("llama", tmp_path / "t", {"sliding_window": 64}), DRAFT, device="cpu")
    pair = load(saved("llama", tmp_path / "u", {"sliding_window": 256}), DRAFT, device="cpu")
    assert pair.window is None and pair.facts.window is None, "no text is longer than 256 tokens"
    pair.check_attention("tree")


def test_a_window_in_layers_that_the_config_calls_full(tmp_path):
    """Mixtral's class gives the window to all layers, Gemma 3's to none of these."""
    full = {"sliding_window": 64, "layer_types": ["full_attention"] * 8}
    with pytest.raises(ValueError, match="gives other logits"):
        load(saved("mixtral", tmp_path / "t", {**full, "num_local_experts": 2}), DRAFT, device="cpu")
    assert load(saved("gemma3_text", tmp_path / "u", full), DRAFT, device="cpu").window is None


@pytest.mark.parametrize("window", [0, 1])
def test_a_window_in_which_nothing_can_be_seen(tmp_path, window):
    with pytest.raises(ValueError, match=f"a sliding_window of {window} tokens; it must be at least 2"):
        load(saved("mistral", tmp_path / "t", {"sliding_window": window}), DRAFT, device="cpu")


def test_whatever_a_class_raises_is_one_sentence(tiny_pair, monkeypatch):
    def broken(*_, **__):
        raise KeyError("a\nlong story")

    monkeypatch.setattr(tiny_pair.target, "forward", broken)
    for check in (lambda: prove(tiny_pair), lambda: observe(tiny_pair.target)):
        with pytest.raises(
            ValueError, match=r"the target \(LlamaForCausalLM\) can't be decoded here: KeyError"
        ) as caught:
            check()
        assert "\n" not in str(caught.value)
    assert tiny_pair.target.config._attn_implementation == "sdpa"


def test_random_shapes_hold_it_too():
    target, _ = build_shape("tiny", CPU, torch.float32, 0)
    assert observe(target) == Asks(frozenset(), True)
    assert architecture.LIMITS[torch.float32] < 0.01


# --- numbers that aren't finite ----------------------------------------------------------------------------------


def copied(name, folder, key, factor, dtype=torch.float32):
    shutil.copytree(GOLDEN / name, folder)
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    if (folder / "model.safetensors").exists():
        weights = load_file(folder / "model.safetensors")
        weights[key] = (weights[key].float() * factor).to(dtype)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
        weights[key] = (weights[key].float() * factor).to(dtype)
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_weights_that_a_cast_makes_infinite_are_refused(tmp_path):
    key = "model.layers.3.mlp.down_proj.weight"
    target = copied("target", tmp_path / "t", key, 1e8)
    with pytest.raises(
        ValueError, match=rf"the target's weight {key} isn't finite in float16; load with .*bfloat16"
    ):
        load(target, DRAFT, device="cpu", dtype="float16")
    load(target, DRAFT, device="cpu", dtype="bfloat16")
    key = "midlayer.mlp.down_proj.weight"
    draft = copied("draft_official", tmp_path / "d", key, 1e8, torch.bfloat16)
    with pytest.raises(ValueError, match=rf"the draft head's weight {key} isn't finite in float16"):
        load(GOLDEN / "target", draft, device="cpu", dtype="float16")
    load(GOLDEN / "target", draft, device="cpu", dtype="bfloat16")


def test_logits_that_leave_the_range_are_refused_at_load(tmp_path):
    target = copied("target", tmp_path / "t", "model.layers.2.mlp.down_proj.weight", 20000.0)
    load(target, DRAFT, device="cpu", dtype="float32")
    with pytest.raises(
        ValueError, match="the target's logits aren't finite in float16: its numbers leave the range"
    ):
        load(target, DRAFT, device="cpu", dtype="float16")
