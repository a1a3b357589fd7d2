"""For the interpreter of .venv-specforge: heads that this library makes and saves, and heads of ours that it loads.

python specforge_worker.py FOLDER TARGET. Writes FOLDER/theirs/NAME (a head) and NAME.pt (its inputs and logits);
loads each FOLDER/ours/NAME and writes its logits for the inputs in NAME.pt to NAME.logits.pt.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"
warnings.filterwarnings("ignore")
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from specforge.export.checkpoint_io import apply_legacy_rope_scaling  # noqa: E402
from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig  # noqa: E402
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

STEPS, LENGTH, VOCABULARY, DRAFT_VOCABULARY, HIDDEN = 3, 24, 512, 256, 64
SETTINGS = {
    "architectures": ["LlamaForCausalLMEagle3"], "vocab_size": VOCABULARY, "draft_vocab_size": DRAFT_VOCABULARY,
    "hidden_size": HIDDEN, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 1024, "pad_token_id": 0,
    "tie_word_embeddings": False, "rope_theta": 50000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}
YARN["original_max_position_embeddings"] = 256
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 256
# embeddings: whether they are saved with the head, as its exporter for transformers does and that for SGLang doesn't
VARIANTS = {
    "plain": {"embeddings": True},
    "without_embeddings": {},
    "full_vocabulary": {"draft_vocab_size": VOCABULARY},
    "eagle31": {"fc_norm": True, "norm_output": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "taps": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 6], "use_aux_hidden_state": True}},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "llama3_rope": {"rope_scaling": LLAMA3},
    "yarn_rope": {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "yarn_rope_two_scales": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707}},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "wider_target": {"hidden_size": 32, "head_dim": 8, "target_hidden_size": HIDDEN, "embeddings": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


def make(dtype=torch.float32, **settings):
    model = LlamaForCausalLMEagle3(LlamaConfig(**{**SETTINGS, **settings}))
    seed = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = parameter.ndim > 1
            drawn = torch.randn(parameter.shape, generator=seed) * (0.15 if wide else 0.2)
            parameter.copy_(drawn + (1.0 if "norm" in name else 0.0))
        if model.draft_vocab_size != VOCABULARY:
            ids = torch.randperm(VOCABULARY, generator=seed)[:DRAFT_VOCABULARY].sort().values
            model.d2t.copy_(ids - torch.arange(DRAFT_VOCABULARY))
            model.t2d.zero_()
            model.t2d[ids] = True
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model, hidden, ids):
    """The logits of each step of training-time test, by the library's own layers in the order of its training loop."""
    visible = torch.ones(ids.shape, dtype=torch.bool)
    mask = model.prepare_decoder_attention_mask(visible, hidden, 1, ids.shape[1], 0)
    positions = torch.arange(ids.shape[1])[None]
    h, cache, found = model.project_hidden_states(hidden), [[], []], []
    for step in range(STEPS):
        shifted = torch.cat((ids[:, step:], ids.new_zeros(1, step)), 1)
        embedded = model.embed_input_ids(shifted).to(h.dtype)
        h = model.backbone(embedded, h, cache, mask, positions, None, True)
        found.append(model.compute_logits(h))
    return found


def main(folder, target):
    for name, variant in VARIANTS.items():
        settings = dict(variant)
        embeddings = settings.pop("embeddings", False)
        model = make(**settings)
        if not embeddings:
            with torch.no_grad():
                model.load_embedding(target)
        seed = torch.Generator().manual_seed(3)
        dtype = variant.get("dtype", torch.float32)
        hidden = torch.randn(1, LENGTH, 3 * HIDDEN, generator=seed).to(dtype)
        ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=seed)
        state = {key: t for key, t in model.state_dict().items() if embeddings or "embed" not in key}
        model.save_pretrained(folder / "theirs" / name, state_dict=state)
        apply_legacy_rope_scaling(str(folder / "theirs" / name))
        record = {"hidden": hidden, "ids": ids, "logits": logits(model, hidden, ids)}
        torch.save(record, folder / "theirs" / f"{name}.pt")
    for file in sorted((folder / "ours").glob("*.pt")):
        record = torch.load(file)
        head = folder / "ours" / file.stem
        # not from_pretrained: under transformers 5 it leaves its RoPE tables as raw memory, for heads of its own too
        model = AutoDraftModel.from_config(AutoDraftModelConfig.from_file(str(head / "config.json")))
        state = load_file(head / "model.safetensors")
        borrowed = {"embed_tokens.weight"} - state.keys()
        identity = {"d2t", "t2d"} - state.keys() if model.draft_vocab_size == VOCABULARY else set()
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert set(missing) == borrowed | identity and not unexpected, (missing, unexpected)
        if borrowed:
            with torch.no_grad():
                model.load_embedding(target)
        torch.save(logits(model.eval(), record["hidden"], record["ids"]), file.with_suffix(".logits.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
