"""For the interpreter of .venv-speculators: heads that this library makes and saves, and heads of ours that it loads.

python speculators_worker.py FOLDER TARGET. Writes FOLDER/theirs/NAME (a head) and NAME.pt (its inputs and logits);
loads each FOLDER/ours/NAME and writes its logits for the inputs in NAME.pt to NAME.logits.pt.
"""

import sys
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore")
from speculators import SpeculatorModel  # noqa: E402
from speculators.config import SpeculatorsConfig, VerifierConfig  # noqa: E402
from speculators.models.attention import create_float_mask  # noqa: E402
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig  # noqa: E402
from speculators.proposals.greedy import GreedyTokenProposalConfig  # noqa: E402
from transformers import LlamaConfig, Qwen3Config  # noqa: E402

STEPS, LENGTH, VOCABULARY, DRAFT_VOCABULARY, HIDDEN = 3, 24, 512, 256, 64
LAYER = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 160, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip
BASE = {"rope_type": "default", "rope_theta": 50000.0}


def rope(kind, **more):
    return {"layer": {"rope_parameters": {**BASE, "rope_type": kind, **more}}}


VARIANTS = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "norm_output": {"norm_output": True},
    "eagle31": {"fc_norm": True, "norm_output": True},
    "all_but_fc_norm": {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
    "qwen3": {"kind": Qwen3Config},
    "qwen3_eagle31": {"kind": Qwen3Config, "fc_norm": True, "norm_output": True},
    "full_vocabulary": {"draft_vocab_size": VOCABULARY},
    "tied": {"draft_vocab_size": VOCABULARY, "layer": {"tie_word_embeddings": True}},
    "five_taps": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3, 5, 7]},
    "last_tap": {"eagle_aux_hidden_state_layer_ids": [2, 4, 8]},
    "no_taps": {"eagle_aux_hidden_state_layer_ids": None},
    "attention_bias": {"layer": {"attention_bias": True}},
    "mlp_bias": {"layer": {"mlp_bias": True}},
    "default_rope": {"layer": {"rope_parameters": None}},
    "llama3_rope": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256
    ),
    "yarn_rope": rope("yarn", factor=4.0, original_max_position_embeddings=256),
    "linear_rope": rope("linear", factor=4.0),
    "bfloat16": {"dtype": torch.bfloat16},
    "shards": {"shard": "60KB"},
}


def make(target, layer=None, kind=LlamaConfig, dtype=torch.float32, shard=None, **settings):
    inner = kind(**{**LAYER, "rope_parameters": BASE, **(layer or {})})
    inner._attn_implementation = "eager"
    settings = {
        "draft_vocab_size": DRAFT_VOCABULARY, "eagle_aux_hidden_state_layer_ids": [2, 4, 5], **settings
    }  # fmt: skip
    about = SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained(target),
    )
    model = Eagle3DraftModel(
        Eagle3SpeculatorConfig(transformer_layer_config=inner, speculators_config=about, **settings)
    )
    seed = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = parameter.ndim > 1
            drawn = torch.randn(parameter.shape, generator=seed) * (0.15 if wide else 0.2)
            parameter.copy_(drawn + (1.0 if "norm" in name else 0.0))
        if model.use_draft_vocab:
            ids = torch.randperm(VOCABULARY, generator=seed)[:DRAFT_VOCABULARY].sort().values
            model.d2t.copy_(ids - torch.arange(DRAFT_VOCABULARY))
            model.t2d.zero_()
            model.t2d[ids] = True
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model, hidden, ids):
    """The logits of each step of training-time test, by the library's own forward."""
    found = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: found.append(output.clone()))
    model(hidden, ids, torch.zeros_like(ids), ttt_steps=STEPS)
    hook.remove()
    return found


def main(folder, target):
    for name, variant in VARIANTS.items():
        model = make(target, **variant)
        seed = torch.Generator().manual_seed(3)
        taps = len(model.config.eagle_aux_hidden_state_layer_ids or [0, 0, 0])
        dtype = variant.get("dtype", torch.float32)
        hidden = torch.randn(1, LENGTH, taps * HIDDEN, generator=seed).to(dtype)
        ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=seed)
        shard = {"max_shard_size": variant["shard"]} if "shard" in variant else {}
        model.save_pretrained(folder / "theirs" / name, **shard)
        record = {"hidden": hidden, "ids": ids, "logits": logits(model, hidden, ids)}
        torch.save(record, folder / "theirs" / f"{name}.pt")
    for file in sorted((folder / "ours").glob("*.pt")):
        record = torch.load(file)
        model = SpeculatorModel.from_pretrained(str(folder / "ours" / file.stem))
        # without a GPU its compiled attention needs a C++ compiler
        model.config.transformer_layer_config._attn_implementation = "eager"
        model._attn_impl, model._create_mask_fn = "eager", create_float_mask
        found = logits(model.eval().to(record["hidden"].dtype), record["hidden"], record["ids"])
        torch.save(found, file.with_suffix(".logits.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
