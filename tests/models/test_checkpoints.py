"""Draft heads in the three published dialects: read, written, and refused with one clear sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from make import GOLDEN, random_head
from safetensors.torch import load_file, save_file

from eagle_lab.decode.generate import generate
from eagle_lab.models import dialects, weights
from eagle_lab.models.checkpoints import check_draft, load_draft, read_config, save_draft
from eagle_lab.models.draft import DraftHead, rope_frequencies
from eagle_lab.models.pair import Pair

PROMPT = [1, 124, 306, 281, 69, 192, 471, 312]
LAYERS, HIDDEN, VOCABULARY = 8, 64, 512
TAP_KEY = "eagle_aux_hidden_state_layer_ids"


def read(folder, embedding=None, output=None):
    return load_draft(folder, LAYERS, embedding or torch.nn.Embedding(VOCABULARY, HIDDEN), output)


def rewrite(folder, change):
    """Edit a folder's config.json by `change(dict)`."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def tap(folder, ids):
    """Name the tapped layers as the folder's dialect does."""
    nested = "speculators" not in folder.name
    rewrite(folder, lambda raw: raw.update({"eagle_config": {TAP_KEY: ids}} if nested else {TAP_KEY: ids}))


def retensor(folder, change):
    """Edit a folder's tensors by `change(dict)`, and forget their checksum."""
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")
    (folder / "SHA256SUMS").unlink(missing_ok=True)


@pytest.fixture
def saved(tiny_pair, tmp_path):
    """A function that writes the tiny head in a dialect to a new folder."""

    def save(dialect="official", **options):
        folder = tmp_path / f"{dialect}-{len(list(tmp_path.iterdir()))}"
        save_draft(tiny_pair.head, folder, dialect, target=GOLDEN / "target", **options)
        return folder

    return save


# --- the three dialects ---------------------------------------------------------------------------------------


def test_a_round_trip_through_all_dialects_decodes_bit_for_bit(tiny_pair, tmp_path):
    """official pickle → official → SpecForge → speculators → official: the same trees, scores included."""
    wanted = generate(tiny_pair, PROMPT, 40)
    head, seen = tiny_pair.head, set()
    for number, dialect in enumerate(["official", "official", "specforge", "speculators", "official"]):
        pickled = number == 0
        folder = tmp_path / str(number)
        save_draft(head, folder, dialect, pickled, GOLDEN / "target")
        raw = json.loads((folder / "config.json").read_text())
        assert dialects.recognise(raw) == dialect
        seen.add((raw["architectures"][0], (folder / "pytorch_model.bin").exists()))
        head = (
            load_draft(folder, LAYERS, tiny_pair.target.get_input_embeddings()).eval().requires_grad_(False)
        )
        for name, tensor in tiny_pair.head.state_dict().items():
            assert torch.equal(tensor, head.state_dict()[name]), name
        pair = Pair(tiny_pair.target, head, None, tiny_pair.device, tiny_pair.dtype, "tiny", dialect)
        found = generate(pair, PROMPT, 40)
        assert found.tokens == wanted.tokens
        assert found.cycles == wanted.cycles
    assert len(seen) == 4


def test_the_dialects_differ_in_layer_names_and_nesting(saved):
    names = {
        d: set(load_file(saved(d) / "model.safetensors")) for d in ("official", "specforge", "speculators")
    }
    assert names["official"] == names["specforge"]
    assert (
        "midlayer.mlp.up_proj.weight" in names["official"]
        and "layers.0.mlp.up_proj.weight" in names["speculators"]
    )
    raw = json.loads((saved("speculators") / "config.json").read_text())
    assert "hidden_size" not in raw and raw["transformer_layer_config"]["hidden_size"] == HIDDEN


@pytest.mark.parametrize(
    ("dialect", "given", "layers", "source", "taps"),
    [
        ("official", None, 8, "assumed", (2, 4, 5)),
        ("specforge", None, 32, "assumed", (2, 16, 29)),
        ("specforge", None, 36, "assumed", (2, 18, 33)),
        ("specforge", [1, 2, 6], 8, "outputs", (2, 3, 7)),
        ("specforge", [1, 15, 28], 32, "outputs", (2, 16, 29)),
        ("speculators", None, 8, "assumed", (2, 4, 5)),
        ("speculators", [1, 2, 6], 8, "inputs", (1, 2, 6)),
        ("speculators", [2, 16, 29], 32, "inputs", (2, 16, 29)),
    ],
)
def test_tapped_layers_and_where_they_come_from(saved, dialect, given, layers, source, taps):
    folder = saved(dialect)
    tap(folder, given)
    assert dialects.tap_source(json.loads((folder / "config.json").read_text())) == source
    assert read_config(folder, layers).taps == taps


def test_other_taps_survive_where_a_dialect_can_say_them(tiny_pair, tmp_path):
    head = DraftHead(replace(tiny_pair.head.config, taps=(0, 3, 8)), tiny_pair.head.embedding)
    with pytest.warns(UserWarning, match="vLLM reads them as inputs, one layer lower"):
        save_draft(head, tmp_path / "specforge", "specforge")
    save_draft(head, tmp_path / "speculators", "speculators", target=GOLDEN / "target")
    for dialect in ("specforge", "speculators"):
        assert read_config(tmp_path / dialect, 8).taps == (0, 3, 8)
    with pytest.raises(ValueError, match=r"official dialect has no way to say taps \[0, 3, 8\]"):
        save_draft(head, tmp_path / "official", "official")
    assert not (tmp_path / "official").exists()


def test_taps_that_look_like_another_targets_defaults_are_written(tiny_pair, tmp_path):
    """(2, 6, 9) are the defaults of 12 layers: a head of an 8-layer target that has them must say so."""
    with pytest.warns(UserWarning):
        save_draft(
            DraftHead(replace(tiny_pair.head.config, taps=(2, 3, 4)), None), tmp_path / "d", "specforge"
        )
    assert read_config(tmp_path / "d", 8).taps == (2, 3, 4)


def test_taps_at_the_top_level_outside_speculators_are_not_guessed(saved):
    folder = saved("specforge")
    rewrite(folder, lambda raw: raw.update({TAP_KEY: [2, 4, 5]}))
    with pytest.raises(ValueError, match="unclear whether they are inputs or outputs"):
        read_config(folder, 8)


def test_outputs_that_are_the_default_inputs_are_the_other_convention(tiny_pair, tmp_path, saved):
    """vLLM reads eagle_config's numbers as inputs: there [2, 4, 5] are the default taps, for SGLang 3, 5, 6."""
    folder = saved("specforge")
    tap(folder, [2, 4, 5])
    with pytest.raises(ValueError, match=r"\[2, 4, 5\], the default taps .* write \[1, 3, 4\]"):
        read_config(folder, 8)
    assert read_config(folder, 12).taps == (3, 5, 6)  # no defaults of this target
    head = DraftHead(replace(tiny_pair.head.config, taps=(3, 5, 6)), None)
    with pytest.raises(ValueError, match="the default taps"):
        save_draft(head, tmp_path / "no", "specforge")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("dialect", "taps", "message"),
    [
        ("speculators", [1, 4, 9], r"\[1, 4, 9\]; as inputs of a target with 8 layers they must be 0 to 8"),
        ("specforge", [4, 6, 8], r"\[4, 6, 8\]; as outputs of a target with 8 layers they must be -1 to 7"),
        ("speculators", "all", "must be a list"),
        ("specforge", [], "must be a list"),
        ("speculators", [True], "must be a list"),
    ],
)
def test_impossible_taps(saved, dialect, taps, message):
    folder = saved(dialect)
    tap(folder, taps)
    with pytest.raises(ValueError, match=f"{TAP_KEY} are .*{message}|{message}"):
        read_config(folder, 8)


@pytest.mark.parametrize("dialect", ["specforge", "speculators"])
def test_the_last_layers_output_as_a_tap(tiny_pair, tmp_path, saved, dialect):
    """Number 8 of 8 layers: what the final norm reads."""
    folder = saved(dialect)
    tap(folder, [2, 4, 8] if dialect == "speculators" else [1, 3, 7])
    target = tiny_pair.target
    head = load_draft(folder, LAYERS, target.get_input_embeddings()).requires_grad_(False).eval()
    assert head.config.taps == (2, 4, 8)
    pair = Pair(target, head, None, tiny_pair.device, tiny_pair.dtype, "tiny", dialect)
    normed = []
    hook = target.get_decoder().norm.register_forward_pre_hook(lambda module, args: normed.append(args[0]))
    found = generate(pair, PROMPT, 12)
    hook.remove()
    assert torch.equal(pair.tapped[8], normed[-1])
    assert found.tokens == generate(tiny_pair, PROMPT, 12).tokens


# --- RoPE ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "base", "kind"),
    [
        ({}, 10000.0, "default"),
        ({"rope_theta": 500000}, 500000.0, "default"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, "default"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, 7.0, "default"),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            9.0,
            "linear",
        ),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e5, "linear"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 3.0}}},
            3.0,
            "default",
        ),
        ({"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default"}}, 10000.0, "default"),
    ],
)
def test_rope_base_and_scaling(saved, config, base, kind):
    folder = saved()

    def change(raw):
        for key in ("rope_theta", "rope_scaling"):
            raw.pop(key, None)
        raw.update(config)

    rewrite(folder, change)
    found = read_config(folder, 8).rope
    assert (found["rope_theta"], found["rope_type"]) == (base, kind)


def test_the_base_changes_the_angles_and_scaling_too(saved):
    plain = rope_frequencies(read_config(saved(), 8))[0]
    folder = saved()
    rewrite(folder, lambda raw: raw.update(rope_theta=500000.0))
    assert not torch.allclose(plain, rope_frequencies(read_config(folder, 8))[0])
    rewrite(
        folder,
        lambda raw: raw.update(rope_theta=10000.0, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    )
    assert torch.allclose(plain / 4, rope_frequencies(read_config(folder, 8))[0])


@pytest.mark.parametrize("dialect", ["official", "specforge", "speculators"])
def test_rope_scaling_survives_a_round_trip(tiny_pair, tmp_path, dialect):
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    head = DraftHead(replace(tiny_pair.head.config, rope=llama3), tiny_pair.head.embedding)
    save_draft(head, tmp_path / "d", dialect, target=GOLDEN / "target")
    found = read_config(tmp_path / "d", 8)
    assert found.rope == llama3
    assert torch.equal(rope_frequencies(found)[0], rope_frequencies(head.config)[0])


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "nonsense"])
def test_rope_types_that_are_not_supported(saved, kind):
    folder = saved()
    rewrite(folder, lambda raw: raw.update(rope_scaling={"rope_type": kind, "factor": 2.0}))
    with pytest.raises(ValueError, match=f"rope_scaling.rope_type as '{kind}', which is not"):
        read_config(folder, 8)


def test_a_heads_position_limit_is_no_cap(tiny_pair, tmp_path):
    """A limit of 16 positions, and decoding far past it: the trees are those of the unlimited head."""
    config = replace(tiny_pair.head.config, max_position_embeddings=16)
    head = DraftHead(config, tiny_pair.target.get_input_embeddings())
    head.load_state_dict(tiny_pair.head.state_dict())
    save_draft(head, tmp_path / "d")
    limited = load_draft(tmp_path / "d", LAYERS, tiny_pair.target.get_input_embeddings()).requires_grad_(
        False
    )
    assert limited.config.max_position_embeddings == 16
    pair = Pair(tiny_pair.target, limited, None, tiny_pair.device, tiny_pair.dtype, "tiny", "limited")
    assert generate(pair, PROMPT, 30).cycles == generate(tiny_pair, PROMPT, 30).cycles


# --- switches, embeddings, vocabulary --------------------------------------------------------------------------


def same_function(one, other):
    """Whether two heads compute the same h, logits and ids for the same inputs."""
    ids, taps = torch.randint(0, VOCABULARY, (1, 5)), torch.randn(1, 5, 3 * one.config.tap_size)
    positions = torch.arange(5)[None]

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        found = [
            (h := head(ids, head.fuse(taps), positions, attend), head.logits(h)) for head in (one, other)
        ]
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "switches",
    [
        {"norm_before_residual": True},
        {"norm_before_fc": True},
        {"fc_norm": True},
        {"norm_output": True},
        {"attention_bias": True, "mlp_bias": True},
        {"qk_norm": True},
        {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True, "head_dim": 32},
    ],
    ids=lambda s: "+".join(s),
)
def test_the_speculators_switches(tmp_path, switches):
    head = random_head(**switches)
    save_draft(head, tmp_path / "on", "speculators", target=GOLDEN / "target")
    again = read(tmp_path / "on", head.embedding)
    assert all(getattr(again.config, name) == value for name, value in switches.items())
    assert same_function(head, again)
    with pytest.raises(ValueError, match="has no way to say"):
        save_draft(head, tmp_path / "no", "official")
    switched = random_head(**{name: value for name, value in switches.items() if name == "head_dim"})
    switched.load_state_dict(head.state_dict(), strict=False)
    assert not same_function(head, switched), "the switch must change something, or this test checks nothing"


def test_nvidias_place_for_the_switches(tmp_path):
    head = random_head()
    save_draft(head, tmp_path / "d", "specforge")
    rewrite(tmp_path / "d", lambda raw: raw.update(eagle_config={"norm_before_residual": True}))
    assert read_config(tmp_path / "d", 8).norm_before_residual


def test_fc_bias_of_the_official_dialect(tmp_path):
    head = random_head(fc_bias=True)
    save_draft(head, tmp_path / "d", "official")
    assert same_function(head, read(tmp_path / "d", head.embedding))
    rewrite(tmp_path / "d", lambda raw: raw.pop("bias"))
    with pytest.raises(ValueError, match=r"unexpected fc\.bias"):
        read(tmp_path / "d")


def test_biases_that_a_config_claims_and_no_official_head_has(saved):
    folder = saved("specforge")
    rewrite(folder, lambda raw: raw.update(attention_bias=True, bias=True))
    config = read_config(folder, 8)
    assert not config.attention_bias and not config.fc_bias
    read(folder)


@pytest.mark.parametrize("dialect", ["official", "specforge", "speculators"])
def test_a_narrower_head_with_its_own_embeddings(tmp_path, dialect):
    """The 70B head's case: target_hidden_size differs and embed_tokens comes with the head."""
    head = random_head(target_hidden_size=80, own_embeddings=True)
    save_draft(head, tmp_path / "d", dialect, target=GOLDEN / "target")
    config = check_draft(tmp_path / "d", LAYERS, 80, VOCABULARY)
    assert (config.tap_size, config.hidden_size, config.own_embeddings) == (80, HIDDEN, True)
    again = load_draft(tmp_path / "d", LAYERS, torch.nn.Embedding(VOCABULARY, 80))
    assert again.embedding is again.embed_tokens and same_function(head, again)
    retensor(tmp_path / "d", lambda found: found.pop("embed_tokens.weight"))
    with pytest.raises(ValueError, match="no embeddings of its own"):
        check_draft(tmp_path / "d", LAYERS, 80, VOCABULARY)


@pytest.mark.parametrize("size", [None, VOCABULARY])
def test_no_draft_vocabulary(tmp_path, size):
    head = random_head(draft_vocab_size=VOCABULARY)
    save_draft(head, tmp_path / "d", "specforge")
    rewrite(tmp_path / "d", lambda raw: raw.update(draft_vocab_size=size))
    again = read(tmp_path / "d", head.embedding)
    assert not again.config.mapped and same_function(head, again)
    ids = torch.tensor([3, 500])
    assert torch.equal(again.target_ids(ids), ids)


def test_identity_maps_are_allowed_and_others_are_not(tmp_path):
    head = random_head(draft_vocab_size=VOCABULARY)
    save_draft(head, tmp_path / "d", "specforge")
    maps = {
        "d2t": torch.zeros(VOCABULARY, dtype=torch.int64),
        "t2d": torch.ones(VOCABULARY, dtype=torch.bool),
    }
    retensor(tmp_path / "d", lambda found: found.update(maps))
    assert same_function(head, read(tmp_path / "d", head.embedding))
    retensor(tmp_path / "d", lambda found: found["d2t"].__setitem__(3, 1))
    with pytest.raises(ValueError, match="d2t is not the identity"):
        read(tmp_path / "d")


def test_a_head_without_lm_head_borrows_the_targets(tmp_path):
    """SGLang's rule for heads with no draft vocabulary of their own."""
    head = random_head(draft_vocab_size=VOCABULARY)
    save_draft(head, tmp_path / "d", "specforge")
    rewrite(tmp_path / "d", lambda raw: raw.update(draft_vocab_size=None))
    retensor(tmp_path / "d", lambda found: found.pop("lm_head.weight"))
    output = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    again = read(tmp_path / "d", output=output)
    assert torch.equal(again.lm_head.weight, output.weight)
    with pytest.raises(ValueError, match="the target has none of shape"):
        read(tmp_path / "d", output=torch.nn.Linear(80, VOCABULARY))


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "no known EAGLE-3 dialect"),
        ({"architectures": None}, "no known EAGLE-3 dialect"),
        ({"speculators_model_type": "eagle"}, "speculators_model_type as 'eagle'"),
        ({"architectures": ["Eagle3Speculator"]}, "no transformer_layer_config"),
        ({"num_hidden_layers": 2}, "num_hidden_layers as 2; only 1 is supported"),
        ({"use_sliding_window": True}, "use_sliding_window as True; only False"),
        ({"layer_types": ["sliding_attention"]}, "layer_types as .*only 'full_attention'"),
        ({"num_experts": 8}, r"num_experts \(8\), which is unknown here"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .* unknown here"),
        ({"target_layer_ids": [1, 3, 6]}, r"target_layer_ids \(\[1, 3, 6\]\), which is unknown"),
        ({"eagle_config": {"target_layer_ids": [1, 3, 6]}}, r"eagle_config\.target_layer_ids .* unknown"),
        ({"num_aux_hidden_states": 3}, "num_aux_hidden_states .* unknown"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping .* unknown"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "bend": 3}},
            r"rope_scaling\.bend .* unknown",
        ),
        ({"eagle_config": {"use_aux_hidden_state": False}}, r"eagle_config\.use_aux_hidden_state as False"),
        ({"eagle_config": {"use_last_layernorm": False}}, r"eagle_config\.use_last_layernorm as False"),
        ({"parallel_drafting": True}, "parallel_drafting as True"),
        ({"logit_scale": 0.5}, "logit_scale as 0.5; only 1 is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor as 0.5"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"architectures": [5]}, "must be a list of names"),
        ({"eagle_config": [1]}, "eagle_config as .* must be an object"),
        ({"rope_theta": "high"}, "rope_theta is 'high'; it must be a number"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "both rope_parameters and rope_scaling, and not the same",
        ),
        ({"use_rope": False}, "use_rope as False; only True is supported"),
        ({"rope_theta": -5}, "rope_theta is -5; it must be above 0"),
        ({"rope_scaling": [1]}, "rope_scaling as .* must be an object"),
        ({"rope_scaling": {"type": "linear"}}, r"no rope_scaling\.factor, which RoPE of type .linear. needs"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no rope_scaling.low_freq_factor"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"hidden_act": "strange"}, "hidden_act is 'strange', which transformers does not know"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
        ({"norm_output": "yes"}, "norm_output is 'yes'; it must be True or False"),
        ({"num_key_value_heads": 3}, "fits neither"),
        ({"draft_vocab_size": 128}, r"lm_head.weight has shape \[256, 64\] instead of \[128, 64\]"),
        ({"intermediate_size": 161}, "mlp.down_proj.weight has shape"),
    ],
    ids=str,
)
def test_configs_that_are_refused(saved, changes, message):
    folder = saved("official")
    rewrite(folder, lambda raw: raw.update(changes))
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("midlayer.hidden_norm.weight"), r"missing midlayer\.hidden_norm\.weight"),
        (lambda t: t.update(surplus=t.pop("norm.weight")), r"missing norm\.weight; unexpected surplus"),
        (lambda t: t.pop("lm_head.weight"), r"missing lm_head\.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda t: t.update({"midlayer.self_attn.q_norm.weight": torch.ones(16)}),
            r"unexpected .*q_norm\.weight",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(65)}),
            r"norm\.weight has shape \[65\] instead of \[64\]",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(64, dtype=torch.int64)}),
            r"norm\.weight is int64 instead of",
        ),
        (lambda t: t.update(d2t=t["d2t"].float()), "d2t is float32 instead of int64 or int32"),
        (lambda t: t.pop("d2t"), "missing d2t"),
        (lambda t: t["d2t"].__setitem__(1, t["d2t"][0] - 1), "d2t leads to the same id twice"),
        (lambda t: t.update(t2d=t["t2d"].to(torch.uint8)), "t2d is uint8 instead of bool"),
        (lambda t: t["d2t"].__setitem__(0, 10**6), "d2t leads outside"),
        (lambda t: t["t2d"].logical_not_(), "contradict each other"),
        (lambda t: t["fc.weight"].__setitem__((0, 0), float("nan")), r"fc\.weight holds NaN"),
        (lambda t: t["fc.weight"].__setitem__((0, 0), float("inf")), r"fc\.weight holds NaN or infinity"),
        (lambda t: t.update({"layers.0.hidden_norm.weight": t["norm.weight"].clone()}), "same layer twice"),
    ],
)
def test_every_tensor_is_accounted_for(saved, change, message):
    folder = saved("official")
    retensor(folder, change)
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(d2t=t["d2t"].int()),
        lambda t: t.pop("t2d"),
        lambda t: (t.pop("t2d"), t.update(d2t=t["d2t"].int())),
    ],
)
def test_vocabularies_as_published_heads_hold_them(saved, tiny_pair, change):
    """d2t in 32 bits, and no t2d where d2t says the same."""
    folder = saved("specforge")
    retensor(folder, change)
    head = read(folder)
    assert torch.equal(head.d2t, tiny_pair.head.d2t) and head.d2t.dtype == torch.int64
    assert torch.equal(head.t2d, tiny_pair.head.t2d)


def test_a_head_for_another_target(saved):
    folder = saved()
    check_draft(folder, 8, 64, 512)
    with pytest.raises(ValueError, match=r"vocabulary \(512\) is not the target's \(1024\)"):
        check_draft(folder, 8, 64, 1024)
    with pytest.raises(ValueError, match="hidden states of size 64, but the target's are of size 128"):
        check_draft(folder, 8, 128, 512)
    with pytest.raises(ValueError, match="the target has 5 layers"):
        check_draft(folder, 5, 64, 512)


# --- files from strangers --------------------------------------------------------------------------------------


class Hostile:
    """Runs a command when unpickled by a careless reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_not_executed(saved, tmp_path, zipped):
    folder, trace = saved("official", pickled=True), tmp_path / "executed"
    found = {**torch.load(folder / "pytorch_model.bin", weights_only=True), "evil": Hostile(trace)}
    if zipped:
        torch.save(found, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(found))
    with pytest.raises(ValueError, match="holds more than tensors, and is not loaded"):
        read(folder)
    assert not trace.exists()
    with (folder / "pytorch_model.bin").open(
        "rb"
    ) as file:  # the trap itself works, so the assertion above can fail
        torch.load(file, weights_only=False) if zipped else pickle.load(file)
    assert trace.exists()


def test_a_pickle_of_something_else(saved):
    folder = saved("official", pickled=True)
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="plain dict of named tensors"):
        read(folder)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_cut_off_files(saved, pickled, kept):
    folder = saved("official", pickled=pickled)
    (folder / "SHA256SUMS").unlink()
    path = folder / ("pytorch_model.bin" if pickled else "model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match="cut off or damaged|is damaged"):
        read(folder)


def flip(path, place, bit=6):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("form", ["{sum} *{name}", "{sum}  ./{name}", "{big}  {name}"])
def test_a_checksum_counts_in_every_form_that_sha256sum_writes(saved, form):
    folder = saved("official")
    right = weights.digest(folder / "model.safetensors")
    for digest, holds in ((right, True), (right[::-1], False)):
        line = form.format(sum=digest, big=digest.upper(), name="model.safetensors")
        (folder / "SHA256SUMS").write_text(line + "\n")
        if holds:
            read(folder)
        else:
            with pytest.raises(ValueError, match="does not match SHA256SUMS"):
                read(folder)


def test_flipped_bits_are_found_by_the_checksum(saved):
    """Anywhere in the file, and in the data, where the safetensors format itself can't show it."""
    folder = saved("official")
    path = folder / "model.safetensors"
    pristine = path.read_bytes()
    for place in range(0, len(pristine), len(pristine) // 23):
        flip(path, place)
        with pytest.raises(
            ValueError, match="does not match SHA256SUMS|cut off or damaged|does not fit its config"
        ):
            read(folder)
        path.write_bytes(pristine)
    read(folder)


def test_flipped_bits_in_a_header_are_found_without_a_checksum(saved):
    folder = saved("official")
    (folder / "SHA256SUMS").unlink()
    path = folder / "model.safetensors"
    pristine = path.read_bytes()
    size = int.from_bytes(pristine[:8], "little")
    found = 0
    for place in range(0, 8 + size, 41):
        flip(path, place)
        try:
            read(folder)
        except ValueError as error:
            assert "\n" not in str(error)
            found += 1
        path.write_bytes(pristine)
    # what gets through is padding and the free-form metadata, which says nothing about tensors
    assert found >= 0.9 * len(range(0, 8 + size, 41))


def test_flipped_bits_in_a_pickle_are_found_by_its_crc(saved):
    folder = saved("official", pickled=True)
    (folder / "SHA256SUMS").unlink()
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as file:
        big = max(file.infolist(), key=lambda i: i.file_size)
    flip(path, big.header_offset + big.file_size // 2)
    torch.load(path, weights_only=True)  # torch itself does not notice
    with pytest.raises(ValueError, match="checksum of its part .* is wrong"):
        read(folder)


def test_a_hub_download_is_held_to_the_name_of_its_blob(saved, tmp_path):
    folder = saved("official")
    (folder / "SHA256SUMS").unlink()
    path = folder / "model.safetensors"
    blob = tmp_path / "blobs" / weights.digest(path)
    blob.parent.mkdir()
    shutil.move(path, blob)
    path.symlink_to(blob)
    read(folder)
    flip(blob, blob.stat().st_size - 5, bit=0)
    with pytest.raises(ValueError, match="does not match the hub's checksum"):
        read(folder)


def test_swapped_files(saved, tmp_path):
    folder = saved("official")
    shutil.copy(GOLDEN / "target" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match="missing .*unexpected"):
        read(folder)
    one, other = saved("official"), tmp_path / "other"
    save_draft(random_head(), other)
    shutil.copy(other / "model.safetensors", one / "model.safetensors")
    with pytest.raises(ValueError, match="instead of"):
        read(one)
    # the same shapes: only the checksum can tell
    same = saved("official")
    retensor(same, lambda found: found["fc.weight"].mul_(2))
    target = saved("official")
    shutil.copy(same / "model.safetensors", target / "model.safetensors")
    with pytest.raises(ValueError, match="does not match SHA256SUMS"):
        read(target)
    (target / "model.safetensors").write_text("<html>404</html>")
    (target / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="not a safetensors file"):
        read(target)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "\x00\xff", "[" * 100000])
def test_a_broken_config(saved, content):
    folder = saved("official")
    (folder / "config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match="not valid JSON|not a JSON object"):
        read(folder)


def test_missing_files(saved, tmp_path):
    folder = saved("official")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds none of"):
        read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read(folder)


def sharded(folder, name="model-2.safetensors"):
    """Split a folder's tensors into two shards, the second listed under `name`."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "SHA256SUMS").unlink()
    first = dict(list(found.items())[:4])
    save_file(first, folder / "model-1.safetensors")
    save_file({k: v for k, v in found.items() if k not in first}, folder / "model-2.safetensors")
    listed = {key: ("model-1.safetensors" if key in first else name) for key in found}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def test_shards(saved, tiny_pair):
    folder = saved("official")
    sharded(folder)
    found = read(folder).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in tiny_pair.head.state_dict().items())


@pytest.mark.parametrize(
    "name",
    ["../model-2.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:\\b", "", 7, "~/../x", "./../x"],
)
def test_paths_never_leave_the_folder(saved, name):
    folder = saved("official")
    sharded(folder, name)
    shutil.copy(folder / "model-2.safetensors", folder.parent / "model-2.safetensors")
    with pytest.raises(ValueError, match="lies outside its folder"):
        read(folder)


def test_a_listed_shard_that_is_missing(saved):
    folder = saved("official")
    sharded(folder, "model-3.safetensors")
    with pytest.raises(FileNotFoundError, match="though the checkpoint lists it"):
        read(folder)


def test_whoever_can_read_the_config_can_read_the_weights(saved):
    folder = saved()
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_saving_removes_an_older_kind_of_file(tiny_pair, tmp_path):
    save_draft(random_head(), tmp_path / "d")
    save_draft(tiny_pair.head, tmp_path / "d", pickled=True)
    assert torch.equal(read(tmp_path / "d").fc.weight, tiny_pair.head.fc.weight)
    for name in ("model", "model/below"):
        (tmp_path / "model").write_text("a file")
        with pytest.raises(ValueError, match=rf"can't be saved in .*{name} \(.*\); name another folder"):
            save_draft(tiny_pair.head, tmp_path / name)
    with pytest.raises(ValueError, match="dialect 'sglang' is unknown"):
        save_draft(tiny_pair.head, tmp_path / "e", "sglang")
