"""Configs of published heads: read with the taps that their own library reads, or refused by the key's name."""

from __future__ import annotations

import pytest

from eagle_lab.models import dialects

SPECFORGE = ["LlamaForCausalLMEagle3"]
TAPS = "eagle_aux_hidden_state_layer_ids"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 4096}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707,
        "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096}  # fmt: skip
MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}

# The heads among the 45 configs of SpecForge's repository (commit a6b6b02): layers of the target, the keys beside sizes
# that bear on the arithmetic, and the taps as inputs of layers, which is what SGLang captures for these numbers.
HEADS = {
    "deepseek-v2-lite": (27, {"rope_scaling": YARN, "rope_theta": 10000}, (2, 13, 24)),
    "deepseek-v3-671b": (61, {"eagle_config": {TAPS: [1, 29, 57], "use_aux_hidden_state": True}}, (2, 30, 58)),
    "gemma3-1b": (26, {"rope_theta": 1000000, "sliding_window": 512, "use_sliding_window": False}, (2, 13, 23)),
    "gpt-oss-120B": (36, {"eagle_config": {TAPS: [1, 17, 33]}}, (2, 18, 34)),
    "gpt-oss-20B": (24, {"eagle_config": {TAPS: [1, 11, 21]}}, (2, 12, 22)),
    "ling-flash-2.0": (32, {}, (2, 16, 29)),
    "llama3-70B": (80, {"rope_scaling": LLAMA3, "rope_theta": 5e5}, (2, 40, 77)),
    "llama3-8B": (32, {}, (2, 16, 29)),
    "llama4-scout-17B-16E": (48, {}, (2, 24, 45)),
    "longcat-flash": (28, {"rope_theta": 1e7}, (2, 14, 25)),
    "phi4": (40, {"model_type": "phi3", "rope_theta": 250000.0}, (2, 20, 37)),
    "qwen2-5-vl-7b": (28, {"rope_scaling": MROPE, "rope_theta": 1000000, "target_model_type": "qwen2_5_vl"}, (2, 14, 25)),
    "qwen2.5-0.5b": (24, {"rope_theta": 1e6, "sliding_window": 131072}, (2, 12, 21)),
    "qwen2.5-7b": (28, {"rope_theta": 1e6, "sliding_window": 131072}, (2, 14, 25)),
    "qwen2.5-vl-32b": (64, {"rope_scaling": MROPE, "rope_theta": 1000000, "pretraining_tp": 1}, (2, 32, 61)),
    "qwen3-235B-A22B": (94, {"eagle_config": {TAPS: [1, 46, 90]}, "rope_theta": 1e6}, (2, 47, 91)),
    "qwen3-30B-A3B-eagle3.1": (48, {"fc_norm": True, "norm_output": True, "rope_theta": 1e6}, (2, 24, 45)),
    "qwen3-30B-A3B": (48, {"rope_theta": 1e6}, (2, 24, 45)),
    "qwen3-32b": (64, {"rope_theta": 1000000}, (2, 32, 61)),
    "qwen3-4b": (36, {"rope_theta": 1000000}, (2, 18, 33)),
    "qwen3-8b": (36, {"rope_theta": 1000000}, (2, 18, 33)),
    "qwen3-coder-30B-A3B": (48, {"rope_theta": 1e6}, (2, 24, 45)),
    "qwen3-coder-480B-A35B": (62, {"rope_theta": 1000000}, (2, 31, 59)),
    "qwen3-coder-next": (48, {"rope_theta": 1e6}, (2, 24, 45)),
    "qwen3-next-80b-a3b": (48, {"decoder_sparse_step": 1, "rope_theta": 10000000}, (2, 24, 45)),
    "qwen3.5-35b-a3b": (40, {"decoder_sparse_step": 1, "rope_theta": 10000000}, (2, 20, 37)),
    "qwq-32B": (64, {"model_type": "qwen2", "rope_theta": 1e6, "sliding_window": 32768}, (2, 32, 61)),
}  # fmt: skip
# The others draft in another way; each is refused by the name of its class.
OTHERS = {
    "DSparkDraftModel": ["glm-5.2", "inkling", "kimi-k3", "qwen3-4b", "qwen3-8b", "qwen3.6-27b"],
    "DFlashDraftModel": [
        "lfm2.5-1.2b", "longcat-flash", "qwen2.5-0.5b", "qwen3-4b", "qwen3-8b", "qwen3.5-35b-a3b", "qwen3.5-4b",
        "qwen3.6-27b",
    ],
    "DominoDraftModel": ["qwen3-8b", "qwen3.5-4b", "qwen3.6-27b-full-attention"],
    "PEagleDraftModel": ["qwen3-8b"],
}  # fmt: skip


def config(**keys):
    """A SpecForge config of small sizes with the keys that a file adds, as its exporter writes the rest."""
    return {
        "architectures": SPECFORGE, "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64,
        "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "draft_vocab_size": 256, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0, "attention_bias": False,
        "max_window_layers": 28, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "transformers_version": "4.53.0", "rope_scaling": None, "sliding_window": None,
        **keys,
    }  # fmt: skip


def test_all_of_them_are_here():
    assert len(HEADS) + sum(map(len, OTHERS.values())) == 45


@pytest.mark.parametrize("name", HEADS)
def test_a_heads_config_is_read(name):
    layers, keys, taps = HEADS[name]
    found = dialects.read(config(**keys), layers)
    assert found.taps == taps
    assert dialects.tap_source(config(**keys)) == ("outputs" if "eagle_config" in keys else "assumed")
    assert found.rope["rope_theta"] == keys.get("rope_theta", 10000.0)
    kind = (keys.get("rope_scaling") or {}).get("rope_type", "default")
    assert found.rope["rope_type"] == kind and set(found.rope) >= set(keys.get("rope_scaling") or {}) - set(
        MROPE
    )
    on = {key for key in dialects.SWITCHES if getattr(found, key)}
    assert on == {key for key in keys if key in dialects.SWITCHES}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_way_to_draft_is_refused_by_its_class(kind):
    with pytest.raises(ValueError, match=rf"architectures \['{kind}'\] are no known EAGLE-3 dialect"):
        dialects.read(config(architectures=[kind], num_hidden_layers=5), 36)


def test_a_config_of_speculators_with_every_key_that_it_writes():
    layer = {**config(), "mlp_bias": False, "head_dim": 16, "pretraining_tp": 1}
    layer["rope_parameters"] = {"rope_type": "default", "rope_theta": 50000.0}
    del layer["architectures"], layer["draft_vocab_size"]
    raw = {
        "architectures": ["Eagle3DraftModel"], "auto_map": {"": "config.Eagle3SpeculatorConfig"}, "draft_vocab_size": 256,
        "dtype": "float32", TAPS: [2, 4, 8], "embed_requires_grad": False, "fc_norm": True, "norm_before_fc": False,
        "norm_before_residual": False, "norm_output": True, "speculators_config": {"algorithm": "eagle3"},
        "speculators_model_type": "eagle3", "speculators_version": "0.9.0", "target_hidden_size": None,
        "tie_word_embeddings": False, "transformer_layer_config": layer, "transformers_version": "5.19.0",
    }  # fmt: skip
    found = dialects.read(raw, 8)
    assert (found.taps, found.fc_norm, found.norm_output, found.qk_norm) == ((2, 4, 8), True, True, False)
    layer["model_type"] = "qwen3"
    assert dialects.read(raw, 8).qk_norm
    del layer["model_type"], layer["head_dim"]  # its reader makes Qwen3's, with heads of 128
    found = dialects.read(raw, 8)
    assert found.qk_norm and found.head_size == 128
    layer["model_type"] = "mistral"
    with pytest.raises(ValueError, match=r"transformer_layer_config\.model_type as 'mistral'"):
        dialects.read(raw, 8)
    layer |= {"model_type": "llama", "num_experts": 4}
    with pytest.raises(ValueError, match=r"transformer_layer_config\.num_experts \(4\), which is unknown"):
        dialects.read(raw, 8)
    del layer["num_experts"]
    with pytest.raises(ValueError, match=r"eagle_config .* unknown"):
        dialects.read({**raw, "eagle_config": {TAPS: [1, 3, 7]}}, 8)


def test_configs_as_other_trainers_write_them():
    """NVIDIA's keys for what every EAGLE-3 head does; another value of one would change the arithmetic."""
    usual = {
        "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True,
        "use_mtp_layernorm": False, "next_layer_regular": True, "parallel_draft_step": 1, TAPS: [1, 2, 6],
    }  # fmt: skip
    assert dialects.read(config(eagle_config=usual), 8).taps == (2, 3, 7)
    for key in set(usual) - {TAPS}:
        other = 2 if key == "parallel_draft_step" else not usual[key]
        with pytest.raises(ValueError, match=rf"eagle_config\.{key} as {other}; only {usual[key]} is"):
            dialects.read(config(eagle_config={**usual, key: other}), 8)
