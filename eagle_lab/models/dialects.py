"""The three published dialects of a draft head's config.json, as a `DraftConfig` and back.

official: SafeAILab/EAGLE. specforge: SpecForge and SGLang. speculators: vllm-project/speculators. They differ in
where sizes stand, in what the tapped layers' numbers mean (inputs or outputs), and in the switches they have. A key
that changes the arithmetic in a way that `DraftHead` doesn't compute is refused by name, and so is an unknown key.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import GenerationConfig, PreTrainedConfig

from eagle_lab.models.draft import DraftConfig
from eagle_lab.runtime.checks import check, short

Raw = dict[str, Any]

DIALECTS = ("official", "specforge", "speculators")
# feed the normed state back: SGLang, vLLM and speculators by `norm_output`, SpecForge since 2026-09-15 (its pull request 879)
SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
SPECULATORS_VERSION = "0.9.0"  # whose form is written
TAP_KEY = "eagle_aux_hidden_state_layer_ids"
LAYER_KEYS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "hidden_act", "mlp_bias",
)  # fmt: skip

# What each type of RoPE must be told, and what it may be; types that depend on the text's length are not here.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
            "truncate",
        ),
    ),
}  # fmt: skip

# Keys whose other values would change the arithmetic: the one value that `DraftHead` computes.
FIXED: Raw = {
    "num_hidden_layers": 1, "use_sliding_window": False, "partial_rotary_factor": 1, "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False,
    "next_layer_regular": True, "eagle_decoder_type": "llama", "parallel_draft_step": 1,
    "parallel_draft_heads_num_layers": 1, "parallel_drafting": False, "logit_scale": 1,
    "use_rope": True, "is_causal": True,
}  # fmt: skip

_BOOKKEEPING = {
    *PreTrainedConfig().to_dict(), *GenerationConfig().to_dict(), "attention_dropout", "auto_map", "initializer_range",
    "max_window_layers", "pretraining_tp", "sliding_window", "target_model_type", "torch_dtype", "use_cache",
    "decoder_sparse_step", "has_no_defaults_at_init",
}  # fmt: skip
_LAYER = {
    *LAYER_KEYS, *FIXED, "attention_bias", "qkv_bias", "layer_types", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", *_BOOKKEEPING,
}  # fmt: skip
_HEAD = {"draft_vocab_size", "target_hidden_size", *SWITCHES}
_SPECULATORS = {
    "speculators_model_type", "speculators_version", "speculators_config", "transformer_layer_config",
    "tie_word_embeddings", "embed_requires_grad", TAP_KEY, *_HEAD, *FIXED, *_BOOKKEEPING,
}  # fmt: skip
_EAGLE = {TAP_KEY, *SWITCHES, *FIXED, "draft_vocab_size"}


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
            raise ValueError(
                f"the draft's config gives speculators_model_type as {kind!r}; an EAGLE-3 head's is 'eagle3'."
            )
        return "speculators"
    if architectures == ["LlamaForCausalLMEagle3"]:
        return "specforge"
    if architectures == ["LlamaForCausalLM"]:
        return "official"
    raise ValueError(
        f"the draft's architectures {architectures} are no known EAGLE-3 dialect; known are LlamaForCausalLM "
        "(official), LlamaForCausalLMEagle3 (SpecForge, SGLang), Eagle3Speculator and Eagle3DraftModel (speculators)."
    )


def tap_source(raw: Raw) -> Literal["assumed", "inputs", "outputs"]:
    """Where a config's taps come from: assumed as it names none, or layers' inputs or outputs as its dialect counts."""
    if recognise(raw) == "speculators":
        return "assumed" if raw.get(TAP_KEY) is None else "inputs"
    return "assumed" if (raw.get("eagle_config") or {}).get(TAP_KEY) is None else "outputs"


def read(raw: Raw, layers: int) -> DraftConfig:
    """The head that a config of any dialect describes, for a target of so many layers.

    Whether the biases that it allows and embeddings of its own exist, the weights say.
    Raises ValueError, one sentence that names the key, for a config that is incomplete, contradicts itself or describes
    what `DraftHead` doesn't compute.
    """
    dialect = recognise(raw)
    layer = _object(raw, "transformer_layer_config") if dialect == "speculators" else raw
    eagle = _object(raw, "eagle_config")
    if dialect == "speculators":
        if not layer:
            raise ValueError("the draft's config has no transformer_layer_config, which its dialect needs.")
        _refuse(raw, _SPECULATORS)
        _refuse(layer, _LAYER, "transformer_layer_config.")
    else:
        _refuse(raw, _LAYER | _HEAD | {"bias", "eagle_config", TAP_KEY})
        _refuse(eagle, _EAGLE, "eagle_config.")
    given = {name: layer[name] for name in LAYER_KEYS if layer.get(name) is not None}
    switches = {name: raw[name] if raw.get(name) is not None else eagle.get(name) for name in SWITCHES}
    given |= {name: value for name, value in switches.items() if value is not None}
    for name in ("draft_vocab_size", "target_hidden_size"):
        if raw.get(name) is not None:
            given[name] = raw[name]
    for name, source in (("draft_vocab_size", "vocab_size"), ("num_key_value_heads", "num_attention_heads")):
        if name not in given and source in given:
            given[name] = given[source]
    qk_norm = False
    if dialect == "speculators":  # its own reader makes a Qwen3 layer where none is named, with heads of 128
        kind = layer.get("model_type", "qwen3")
        if kind not in ("llama", "qwen3"):
            raise ValueError(
                f"the draft's config gives transformer_layer_config.model_type as {kind!r}; 'llama' and 'qwen3' are "
                "supported."
            )
        qk_norm = kind == "qwen3"
        if qk_norm:
            given.setdefault("head_dim", 128)
    found_rope, taps = rope(layer), _taps(raw, dialect, layers)
    try:
        return DraftConfig(
            **given, rope=found_rope, taps=taps, target_layers=layers, qk_norm=qk_norm, fc_bias=raw.get("bias") or False,
            attention_bias=layer.get("attention_bias") or layer.get("qkv_bias") or False,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"the draft's config is refused: {error}") from None


def _object(raw: Raw, name: str) -> Raw:
    found = raw.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"the draft's config gives {name} as {found!r}; it must be an object.")
    return found


def _refuse(config: Raw, known: set[str], where: str = "") -> None:
    """ValueError for a key whose value changes the arithmetic, or that is unknown and not off."""
    for key, value in config.items():
        if key not in known and value not in (None, False, 0, "", [], {}):
            raise ValueError(
                f"the draft's config has {where}{key} ({short(value)}), which is unknown here and may change what the "
                "head computes; it is not supported."
            )
        if key in FIXED and value is not None and value != FIXED[key]:
            raise ValueError(
                f"the draft's config gives {where}{key} as {short(value)}; only {FIXED[key]!r} is supported."
            )
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        raise ValueError(
            f"the draft's config gives {where}layer_types as {config['layer_types']!r}; only 'full_attention' is supported."
        )


def rope(config: Raw) -> Raw:
    """A transformers `rope_parameters` dict from any generation of config; an absent base means 10000.

    Raises ValueError for a type or a key that the head doesn't know.
    """
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    found = _object(config, key)
    if found and all(isinstance(value, dict) for value in found.values()):  # one set for each kind of layer
        found = found.get("full_attention") or {}
    found = {name: value for name, value in found.items() if value is not None}
    older = _object(config, "rope_scaling") if key == "rope_parameters" else {}
    if older and _scaling(older) != _scaling(found):  # transformers takes the older, others the newer
        raise ValueError(
            "the draft's config gives both rope_parameters and rope_scaling, and not the same; take one of them out."
        )
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == "mrope" or "mrope_section" in found:
        kind = "default"  # its three positions are one and the same for text
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"the draft's config gives {key}.rope_type as {kind!r}, which is not supported; supported are "
            f"{', '.join(ROPE_TYPES)}."
        )
    needed, allowed = ROPE_TYPES[kind]
    rest = {"rope_type", "type", "rope_theta", "mrope_section", "mrope_interleaved", "partial_rotary_factor"}
    _refuse(found, {*needed, *allowed, *rest}, f"{key}.")
    theta = found.get("rope_theta") or config.get("rope_theta") or 10000.0
    result: Raw = {"rope_type": kind, "rope_theta": _positive(theta, "rope_theta")}
    for name in needed:
        if name not in found:
            raise ValueError(f"the draft's config has no {key}.{name}, which RoPE of type {kind!r} needs.")
        _positive(found[name], f"{key}.{name}")
    return result | {name: found[name] for name in (*needed, *allowed) if name in found}


def _scaling(found: Raw) -> Raw:
    """What a set of RoPE's parameters says beside the base, under today's name of the type."""
    names = [name for name, value in found.items() if value is not None and name != "rope_theta"]
    return {"rope_type" if name == "type" else name: found[name] for name in names}


def _positive(value: object, name: str) -> float:
    return float(check(Annotated[float, Field(gt=0)], value, f"the draft's {name}"))


def _taps(raw: Raw, dialect: str, layers: int) -> tuple[int, ...]:
    nested, top = _object(raw, "eagle_config").get(TAP_KEY), raw.get(TAP_KEY)
    if dialect != "speculators" and top is not None:
        raise ValueError(
            f"the draft's config has {TAP_KEY} at the top level without being in the speculators dialect, so it is unclear "
            "whether they are inputs or outputs; move them into eagle_config if they are outputs."
        )
    ids, shift = (top, 0) if dialect == "speculators" else (nested, 1)  # an output is the next layer's input
    if ids is None:
        return default_taps(layers)
    if not ids or not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"the draft's {TAP_KEY} are {ids!r}; they must be a list of layer numbers.")
    if shift and layers >= 6 and tuple(ids) == default_taps(layers):
        raise ValueError(
            f"the draft's {TAP_KEY} are {ids}, the default taps of this target as layers' inputs, but in eagle_config they "
            f"are outputs; write {[i - 1 for i in ids]} if the default taps are meant."
        )
    if not all(0 <= i + shift <= layers for i in ids):
        kind = "outputs" if shift else "inputs"
        raise ValueError(
            f"the draft's {TAP_KEY} are {ids}; as {kind} of a target with {layers} layers they must be {-shift} to "
            f"{layers - shift}."
        )
    return tuple(i + shift for i in ids)


def _usual(config: DraftConfig) -> bool:
    """Whether the taps are those that a config without any means."""
    return config.target_layers >= 6 and config.taps == default_taps(config.target_layers)


def unsayable(config: DraftConfig, dialect: str) -> list[str]:
    """What of a head a dialect has no way to say."""
    sayable = {
        "official": {"fc_bias"},
        "specforge": {"fc_bias", "norm_before_fc", "fc_norm", "norm_output"},
        "speculators": {"attention_bias", "mlp_bias", "qk_norm", *SWITCHES},
    }[dialect]
    flags = ("attention_bias", "mlp_bias", "fc_bias", "qk_norm", *SWITCHES)
    found = [name for name in flags if getattr(config, name) and name not in sayable]
    if dialect == "official" and not _usual(config):
        found.append(f"taps {list(config.taps)}")
    if dialect == "speculators" and config.norm_before_fc and config.fc_norm:
        found.append("norm_before_fc together with fc_norm")
    return found


def write(config: DraftConfig, dialect: str, dtype: str, verifier: Raw | None = None) -> Raw:
    """A config.json of a dialect, for weights of a dtype.

    verifier: in the speculators dialect, the target's `name_or_path` and `architectures`.
    Raises ValueError for what the dialect can't say.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"dialect {dialect!r} is unknown; use one of {', '.join(DIALECTS)}.")
    if unsaid := unsayable(config, dialect):
        raise ValueError(
            f"the {dialect} dialect has no way to say {', '.join(unsaid)}; save the head in another."
        )
    scaling = {key: value for key, value in config.rope.items() if key != "rope_theta"}
    layer: Raw = {
        "model_type": "qwen3" if config.qk_norm else "llama",
        **{name: getattr(config, name) for name in LAYER_KEYS},
        "head_dim": config.head_size,
        "num_hidden_layers": 1,
        "attention_bias": config.attention_bias,
        "rope_theta": config.rope["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "tie_word_embeddings": False,
    }
    shared: Raw = {"draft_vocab_size": config.draft_vocab_size, "torch_dtype": dtype}
    if config.target_hidden_size:
        shared["target_hidden_size"] = config.target_hidden_size
    if dialect == "speculators":
        if verifier is None:
            raise ValueError(
                "the speculators dialect names the head's target; pass its hub name or folder as target."
            )
        return {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "speculators_version": SPECULATORS_VERSION,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {"proposal_type": "greedy", "speculative_tokens": 3, "accept_tolerance": 0.0, "verifier_accept_k": 1}
                ],
                "verifier": verifier,
            },
            **shared,
            **{name: getattr(config, name) for name in SWITCHES},
            TAP_KEY: list(config.taps),
            "tie_word_embeddings": False,
            "transformer_layer_config": layer,
        }  # fmt: skip
    found = {
        "architectures": ["LlamaForCausalLM" if dialect == "official" else "LlamaForCausalLMEagle3"],
        **layer,
        **shared,
        **{name: True for name in SWITCHES if getattr(config, name)},
    }
    if config.fc_bias:
        found["bias"] = True
    if dialect == "specforge" and not _usual(config):
        found["eagle_config"] = {"use_aux_hidden_state": True, TAP_KEY: [tap - 1 for tap in config.taps]}
        _taps(found, dialect, config.target_layers)  # numbers that would be refused when read
    return found
