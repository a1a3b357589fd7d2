"""The three published dialects of a draft head's config.json, as the fields of `DraftConfig` and back.

official: SafeAILab/EAGLE. specforge: SpecForge and SGLang. speculators: vllm-project/speculators. They differ in
where sizes stand, in what the tapped layers' numbers mean (inputs or outputs), and in the switches they have. What
would change the arithmetic and is not implemented here is refused by name, never ignored.
"""

from __future__ import annotations

import math
from typing import Any

from transformers.activations import ACT2FN

Raw = dict[str, Any]

DIALECTS = ("official", "specforge", "speculators")
SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")  # of the speculators dialect
TAP_KEY = "eagle_aux_hidden_state_layer_ids"
# what each type of RoPE needs to be told; the types that are not here depend on the sequence's length
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def default_taps(layers: int) -> tuple[int, int, int]:
    """The layers whose inputs EAGLE-3 taps in a target of so many layers: 2, n // 2, n - 3.

    Raises ValueError below 6 layers.
    """
    if layers < 6:
        raise ValueError(
            f"the target has {layers} layers; three different taps (2, n // 2, n - 3) need at least 6."
        )
    return 2, layers // 2, layers - 3


def recognise(raw: Raw) -> str:
    """The dialect of a config; ValueError where it is none of the three."""
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(
            f"the draft's config gives architectures as {architectures!r}; it must be a list of names."
        )
    kind = raw.get("speculators_model_type")
    if kind is not None or {"Eagle3Speculator", "Eagle3DraftModel"} & set(architectures):
        if kind not in (None, "eagle3"):
            raise ValueError(f"the draft is a speculator of type {kind!r}, not an EAGLE-3 head.")
        return "speculators"
    if any("Eagle3" in name for name in architectures):
        return "specforge"
    if architectures == ["LlamaForCausalLM"]:
        return "official"
    raise ValueError(
        f"the draft's architectures {architectures} are no known EAGLE-3 dialect; known are LlamaForCausalLM "
        "(official), LlamaForCausalLMEagle3 (SpecForge, SGLang), Eagle3Speculator and Eagle3DraftModel (speculators)."
    )


def rope(config: Raw) -> Raw:
    """A transformers `rope_parameters` dict from any generation of config; an absent base means 10000.

    Raises ValueError for a type or a partial rotation that the head doesn't know.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ValueError(f"the draft's config gives its RoPE scaling as {found!r}; it must be an object.")
    if found and all(isinstance(value, dict) for value in found.values()):  # one set for each kind of layer
        found = found.get("full_attention") or {}
    found = dict(found)  # a copy: what follows takes things out
    kind = found.pop("type", None)
    found["rope_type"] = found.get("rope_type") or kind or "default"
    if found["rope_type"] == "mrope" or found.pop("mrope_section", None):
        found["rope_type"] = "default"  # its three positions are one and the same for text
    theta = found.get("rope_theta") or config.get("rope_theta")
    found["rope_theta"] = _positive({"rope_theta": theta}, "rope_theta", 10000.0)
    if found["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"the draft's RoPE type {found['rope_type']!r} is not supported; supported are {', '.join(ROPE_TYPES)}."
        )
    for name in ROPE_TYPES[found["rope_type"]]:
        _positive(found, name)
    share = found.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        raise ValueError(
            f"the draft rotates only {share:g} of each head (partial_rotary_factor); that is not supported."
        )
    return found


def _refuse(raw: Raw, config: Raw) -> None:
    """ValueError for settings that change the arithmetic in a way that `DraftHead` does not compute."""
    eagle = raw.get("eagle_config") or {}
    count = config.get("num_hidden_layers", 1)
    sliding = config.get("use_sliding_window") or "sliding_attention" in str(config.get("layer_types"))
    experts = next(
        (key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)), None
    )
    checks = [
        (count != 1, f"has {count!r} layers; an EAGLE-3 head has one"),
        (bool(sliding), "attends through a sliding window"),
        (config.get("model_type") == "qwen3", "has a Qwen3 layer, which normalises queries and keys"),
        (bool(experts), f"is a mixture of experts ({experts})"),
        (bool(raw.get("quantization_config")), "is quantised (quantization_config)"),
        (eagle.get("use_aux_hidden_state") is False, "reads no tapped layers (use_aux_hidden_state)"),
        (bool(raw.get("parallel_drafting")), "drafts in parallel (parallel_drafting)"),
        (raw.get("logit_scale", 1.0) != 1.0, "scales its logits (logit_scale)"),
    ]
    for wrong, what in checks:
        if wrong:
            raise ValueError(f"the draft head {what}; that is not supported.")


def _taps(raw: Raw, dialect: str, layers: int) -> tuple[int, ...]:
    nested = (raw.get("eagle_config") or {}).get(TAP_KEY)
    top = raw.get(TAP_KEY)
    if dialect != "speculators" and top is not None and nested is None:
        raise ValueError(
            f"the draft's config has {TAP_KEY} at the top level without being in the speculators dialect, so it is unclear "
            "whether they are inputs or outputs; move them into eagle_config if they are outputs."
        )
    ids, shift = (top, 0) if dialect == "speculators" else (nested, 1)  # an output is the next layer's input
    if ids is None:
        return default_taps(layers)
    if (
        not isinstance(ids, list)
        or not ids
        or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    ):
        raise ValueError(f"the draft's {TAP_KEY} are {ids!r}; they must be a list of layer numbers.")
    taps = tuple(i + shift for i in ids)
    if not all(0 <= tap < layers for tap in taps):
        raise ValueError(
            f"the draft taps the inputs of layers {list(taps)}, but the target's layers are 0 to {layers - 1}."
        )
    return taps


def read(raw: Raw, layers: int) -> Raw:
    """Fields of `DraftConfig` from a config of any dialect, for a target of so many layers.

    The three biases are what the config allows; whether they exist, the weights say.
    Raises ValueError, one sentence, for a config that is incomplete or contradicts itself.
    """
    dialect = recognise(raw)
    config = raw.get("transformer_layer_config") if dialect == "speculators" else raw
    if not isinstance(config, dict):
        raise ValueError(
            "the draft's config has no transformer_layer_config, which the speculators dialect needs."
        )
    if not isinstance(raw.get("eagle_config") or {}, dict):
        raise ValueError(
            f"the draft's config gives eagle_config as {raw['eagle_config']!r}; it must be an object."
        )
    _refuse(raw, config)
    eagle = raw.get("eagle_config") or {}
    found: Raw = {}
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        found[name] = _size(config, name)
    found["num_key_value_heads"] = _size(config, "num_key_value_heads", found["num_attention_heads"])
    found["draft_vocab_size"] = _size(raw, "draft_vocab_size", found["vocab_size"])
    found["head_dim"] = _size(config, "head_dim", 0) or None
    found["target_hidden_size"] = _size(raw, "target_hidden_size", 0) or None
    found["max_position_embeddings"] = _size(config, "max_position_embeddings", 2048)
    found["rms_norm_eps"] = _positive(config, "rms_norm_eps", 1e-6)
    found["hidden_act"] = config.get("hidden_act") or "silu"
    if not isinstance(found["hidden_act"], str) or found["hidden_act"] not in ACT2FN:
        raise ValueError(
            f"the draft's config gives hidden_act as {found['hidden_act']!r}, which transformers does not know."
        )
    found["rope"] = rope(config)
    found["taps"] = _taps(raw, dialect, layers)
    found["attention_bias"] = bool(config.get("attention_bias") or config.get("qkv_bias"))
    found["mlp_bias"] = bool(config.get("mlp_bias"))
    found["fc_bias"] = bool(raw.get("bias"))
    for name in SWITCHES:
        found[name] = bool(raw.get(name, eagle.get(name, False)))
    heads, shared = found["num_attention_heads"], found["num_key_value_heads"]
    if heads % shared or (found["head_dim"] is None and found["hidden_size"] % heads):
        raise ValueError(
            f"the draft's {heads} attention heads fit neither {shared} kv heads nor its hidden size."
        )
    return found


def _size(config: Raw, name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"the draft's config gives {name} as {value!r}; it must be a positive whole number.")
    return value


def _positive(config: Raw, name: str, default: float | None = None) -> float:
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"the draft's config gives {name} as {value!r}; it must be a positive number.")
    return float(value)


def write(fields: Raw, dialect: str, dtype: str) -> Raw:
    """A config.json of a dialect from the fields of a `DraftConfig`; ValueError for what the dialect can't say."""
    if dialect not in DIALECTS:
        raise ValueError(f"dialect {dialect!r} is unknown; use one of {', '.join(DIALECTS)}.")
    taps = tuple(fields["taps"])
    usual = len(taps) == 3 and taps[2] >= 3 and taps == default_taps(taps[2] + 3)
    only = {
        "official": ["bias"],
        "specforge": ["bias"],
        "speculators": ["attention_bias", "mlp_bias", *SWITCHES],
    }[dialect]
    unsayable = [
        name for name in (*SWITCHES, "attention_bias", "mlp_bias") if fields[name] and name not in only
    ]
    unsayable += ["fc_bias"] if fields["fc_bias"] and "bias" not in only else []
    unsayable += [f"taps {list(taps)}"] if dialect == "official" and not usual else []
    if unsayable:
        raise ValueError(
            f"the {dialect} dialect has no way to say {', '.join(unsayable)}; save the head in another."
        )
    scaling = {key: value for key, value in fields["rope"].items() if key != "rope_theta"}
    layer: Raw = {
        "model_type": "llama",
        **{
            k: fields[k]
            for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        },
        "head_dim": fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"],
        "num_hidden_layers": 1,
        **{k: fields[k] for k in ("vocab_size", "rms_norm_eps", "hidden_act", "max_position_embeddings")},
        "attention_bias": fields["attention_bias"],
        "mlp_bias": fields["mlp_bias"],
        "rope_theta": fields["rope"]["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "tie_word_embeddings": False,
    }
    shared: Raw = {"draft_vocab_size": fields["draft_vocab_size"], "torch_dtype": dtype}
    if fields["target_hidden_size"]:
        shared["target_hidden_size"] = fields["target_hidden_size"]
    if dialect == "speculators":
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            **shared,
            **{name: fields[name] for name in SWITCHES},
            TAP_KEY: list(taps),
            "transformer_layer_config": layer,
        }
    found = {
        "architectures": ["LlamaForCausalLM" if dialect == "official" else "LlamaForCausalLMEagle3"],
        **layer,
        **shared,
    }
    if fields["fc_bias"]:
        found["bias"] = True
    if dialect == "specforge" and not usual:
        found["eagle_config"] = {"use_aux_hidden_state": True, TAP_KEY: [tap - 1 for tap in taps]}
    return found
