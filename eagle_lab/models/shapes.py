"""Pairs of published sizes with random weights: true for how long a forward takes, not for what it accepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from eagle_lab.models.dialects import default_taps
from eagle_lab.models.draft import DraftConfig, DraftHead

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

# target: transformers' configuration; draft: fields of DraftConfig. Source: the models' published config.json files.
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "llama-3.1-8b": {
        "target": {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072, "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False,
        },
        "draft": {
            "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 128256, "draft_vocab_size": 32000, "rms_norm_eps": 1e-5,
        },
    },
    "llama-3.2-1b": {
        "target": {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072, "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
            "tie_word_embeddings": True,
        },
        "draft": {
            "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 128256, "draft_vocab_size": 32000, "rms_norm_eps": 1e-5,
        },
    },
    "smollm2-135m": {
        "target": {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
        "draft": {
            "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
            "vocab_size": 49152, "draft_vocab_size": 8192, "rms_norm_eps": 1e-5,
        },
    },
    "tiny": {
        "target": {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
        "draft": {
            "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 512, "draft_vocab_size": 256, "rms_norm_eps": 1e-5,
        },
    },
}  # fmt: skip


def shape_config(name: str) -> Any:
    """The target configuration of a shape; ValueError lists the shapes."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is unknown; known: {', '.join(SHAPES)}.")
    return AutoConfig.for_model(**SHAPES[name]["target"])


def draft_config(name: str) -> DraftConfig:
    """The head's configuration of a shape."""
    layers = shape_config(name).num_hidden_layers
    return DraftConfig(taps=default_taps(layers), target_layers=layers, **SHAPES[name]["draft"])


def build_shape(
    name: str, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[nn.Module, DraftHead]:
    """A target and a head of a shape with random weights made on the device; the caller's random state is kept.

    Both never end by themselves: there is no end-of-sequence id.
    """
    config = shape_config(name)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device(device):
            target = AutoModelForCausalLM.from_config(config, dtype=dtype)
            head = DraftHead(draft_config(name), target.get_input_embeddings())
    head = head.to(device=device, dtype=dtype)
    c = head.config
    head.set_vocabulary(torch.arange(c.draft_vocab_size) * (c.vocab_size // c.draft_vocab_size))
    target.config.eos_token_id = None
    target.generation_config.eos_token_id = None
    return target.eval().requires_grad_(False), head.eval().requires_grad_(False)
