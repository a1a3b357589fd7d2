"""A new draft head for a target, and what it may take over from the target before training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eagle_lab.models.dialects import default_taps
from eagle_lab.models.draft import DraftConfig, DraftHead


def new_head(
    target: nn.Module,
    vocabulary: Tensor,
    warm_start: bool,
    seed: int,
    mlp: int | None = None,
    norms: bool = False,
    tap_size: float = 1.0,
) -> DraftHead:
    """A head for the target in float32 with the draft vocabulary [size]; initialised by the seed.

    `mlp`: width of its MLP, the target's where None. `norms`: EAGLE-3.1's, one on each tap, and the state fed on after the
    last norm (arXiv 2605.09992); `tap_size` is then the RMS of the target's states at the highest tap. A warm start takes
    from the target what has the same shape and the same work: the output rows and the last norm; its last layer's MLP as
    far as it reaches, norms and attention (over the half that reads g); `fc` begins as the highest tap alone.
    """
    c = target.config.get_text_config()
    rope = dict(getattr(c, "rope_parameters", None) or {"rope_type": "default", "rope_theta": c.rope_theta})
    config = DraftConfig(
        hidden_size=c.hidden_size, intermediate_size=mlp or c.intermediate_size, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=getattr(c, "head_dim", None), vocab_size=c.vocab_size,
        draft_vocab_size=len(vocabulary), taps=default_taps(c.num_hidden_layers), target_layers=c.num_hidden_layers,
        rms_norm_eps=c.rms_norm_eps, hidden_act=c.hidden_act, rope=rope, max_position_embeddings=c.max_position_embeddings,
        fc_norm=norms, norm_output=norms,
    )  # fmt: skip
    embedding = target.get_input_embeddings()
    head = DraftHead(config, embedding)
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    if warm_start:
        _warm(head, target, vocabulary, tap_size)
    head = head.to(embedding.weight.device)
    if config.mapped:
        head.set_vocabulary(vocabulary)
    return head


@torch.no_grad()
def _warm(head: DraftHead, target: nn.Module, vocabulary: Tensor, tap_size: float) -> None:
    decoder, size = target.get_decoder(), head.config.hidden_size
    layer, mine = decoder.layers[-1], head.midlayer
    head.lm_head.weight.copy_(target.get_output_embeddings().weight[vocabulary.to(target.device)])
    head.norm.weight.copy_(decoder.norm.weight)
    head.fc.weight[:, -size:] += torch.eye(size)
    width = min(head.config.intermediate_size, layer.mlp.gate_proj.out_features)
    for name in ("gate_proj", "up_proj"):
        getattr(mine.mlp, name).weight[:width].copy_(getattr(layer.mlp, name).weight[:width])
    mine.mlp.down_proj.weight.zero_()  # what is wider than the target's begins by adding nothing
    mine.mlp.down_proj.weight[:, :width].copy_(layer.mlp.down_proj.weight[:, :width])
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(mine.self_attn, name).weight[:, size:].copy_(getattr(layer.self_attn, name).weight)
    mine.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight)
    mine.post_attention_layernorm.weight.copy_(layer.post_attention_layernorm.weight)
    mine.hidden_norm.weight.copy_(layer.input_layernorm.weight)
    if head.config.norm_output:
        # the states that are fed on have the last norm's size: taps come to it, and so does what is added to them
        size_after = head.norm.weight.square().mean().sqrt()
        head.fc_norm[-1].weight.fill_(size_after)
        for part in (mine.self_attn.o_proj, mine.mlp.down_proj):
            part.weight.mul_(size_after / tap_size)
