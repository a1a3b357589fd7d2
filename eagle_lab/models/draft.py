"""The EAGLE-3 draft head: one decoder layer that reads the target's hidden states.

Source: Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time
Test" (arXiv 2503.01840), section 3. The attention is passed in as a function, so that training and decoding
run the same network with different ways to keep keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle_lab.runtime.checks import Field, settings

Count = Annotated[int, Field(ge=1)]

# attend(query [B, heads, T, d], key [B, kv_heads, T, d], value [B, kv_heads, T, d]) -> [B, heads, T, d]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@settings
class DraftConfig:
    """Sizes and switches of a draft head; every switch is a field of a published dialect.

    `taps` are the target layers whose *input* is read, in transformers' numbering (0 = embedding output,
    `target_layers` = the last layer's output, before the final norm). `rope` is a transformers `rope_parameters` dict;
    without a base it means 10000, not the target's. `qk_norm`: the layer is Qwen3's, with norms on queries and keys.
    Raises ValueError, one sentence, for sizes that are impossible.
    """

    hidden_size: Count
    intermediate_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    vocab_size: Count
    draft_vocab_size: Count
    taps: tuple[int, ...]
    target_layers: Count
    head_dim: Count | None = None
    target_hidden_size: Count | None = None
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    hidden_act: str = "silu"
    rope: dict[str, Any] = Field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_position_embeddings: Count = 2048  # what a scaled RoPE is defined against; never a cap on positions
    attention_bias: bool = False
    mlp_bias: bool = False
    fc_bias: bool = False
    own_embeddings: bool = False
    qk_norm: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, which transformers does not know.")
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared or (self.head_dim is None and self.hidden_size % heads):
            raise ValueError(
                f"num_attention_heads is {heads}, which fits neither num_key_value_heads ({shared}) nor hidden_size "
                f"({self.hidden_size})."
            )

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def tap_size(self) -> int:
        """Size of one tapped hidden state of the target."""
        return self.target_hidden_size or self.hidden_size

    @property
    def mapped(self) -> bool:
        """Whether the draft vocabulary is a subset of the target's (needs `d2t` and `t2d`)."""
        return self.draft_vocab_size != self.vocab_size


def listen(layers: nn.ModuleList, taps: Iterable[int], heard: dict[int, Tensor]) -> list[RemovableHandle]:
    """Keep the hidden states [B, T, H] at the taps of every forward of a target's layers; → what takes the hooks away."""

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        heard[len(layers)] = output[0] if isinstance(output, tuple) else output

    return [
        layers[-1].register_forward_hook(after)
        if index == len(layers)
        else layers[index].register_forward_pre_hook(before(index), with_kwargs=True)
        for index in dict.fromkeys(taps)
    ]


def rope_frequencies(config: DraftConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [head_size / 2] in float32 and the scale of cos and sin, by transformers' own rules."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, **config.rope}
    rotary = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads, head_dim=config.head_size,
        max_position_embeddings=config.max_position_embeddings, rope_parameters=rope,
    ))  # fmt: skip
    return rotary.inv_freq.float(), float(rotary.attention_scaling)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, heads, T, d] by cos and sin [B, 1, T, d], halves rotated as Llama does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Attention(nn.Module):
    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.size = c.head_size
        wide = 2 * c.hidden_size
        self.q_proj = nn.Linear(wide, c.num_attention_heads * self.size, bias=c.attention_bias)
        self.k_proj = nn.Linear(wide, c.num_key_value_heads * self.size, bias=c.attention_bias)
        self.v_proj = nn.Linear(wide, c.num_key_value_heads * self.size, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * self.size, c.hidden_size, bias=c.attention_bias)
        self.q_norm = nn.RMSNorm(self.size, eps=c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(self.size, eps=c.rms_norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        rows, count, _ = x.shape

        def heads(y: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
            y = y.view(rows, count, -1, self.size)
            return (y if norm is None else norm(y)).transpose(1, 2)

        query = rotate(heads(self.q_proj(x), self.q_norm), cos, sin)
        key = rotate(heads(self.k_proj(x), self.k_norm), cos, sin)
        mixed = attend(query, key, heads(self.v_proj(x)))
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, count, -1))


class _Mlp(nn.Module):
    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.act = ACT2FN[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.norm_before_residual = c.norm_before_residual
        self.self_attn = _Attention(c)
        self.mlp = _Mlp(c)
        self.hidden_norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)

    def forward(self, embedded: Tensor, g: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        normed = self.hidden_norm(g)
        residual = normed if self.norm_before_residual else g
        x = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
        x = residual + self.self_attn(x, cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftHead(nn.Module):
    """The draft head. Its `state_dict` has exactly the tensor names of the official dialect.

    `embedding` is the target's input embedding unless the head has its own; it is held outside the module
    tree, so it is neither saved nor trained with the head.
    """

    inverse_frequencies: Tensor
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: DraftConfig, embedding: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.taps) * config.tap_size, config.hidden_size, bias=config.fc_bias)
        self.midlayer = _Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        if config.own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(len(config.taps) * config.tap_size, eps=config.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                nn.RMSNorm(config.tap_size, eps=config.rms_norm_eps) for _ in config.taps
            )
        if config.mapped:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        inverse, self.rope_scale = rope_frequencies(config)
        self.register_buffer("inverse_frequencies", inverse, persistent=False)
        object.__setattr__(self, "embedding", self.embed_tokens if config.own_embeddings else embedding)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # RoPE angles at position 4096 need all 24 bits: a cast to half precision must not reach the frequencies
        kept = self.inverse_frequencies
        super()._apply(fn, recurse)
        self.inverse_frequencies = kept.to(self.inverse_frequencies.device)
        return self

    def fuse(self, taps: Tensor) -> Tensor:
        """The target's tapped hidden states [B, T, taps * tap_size] → g [B, T, H] (equation 1 of the paper)."""
        if self.config.norm_before_fc:
            taps = self.input_norm(taps)
        if self.config.fc_norm:
            parts = taps.split(self.config.tap_size, dim=-1)
            taps = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(taps)

    def forward(self, ids: Tensor, g: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """One pass over pairs (g_t, x_{t+1}).

        Args: ids int64 [B, T] (target ids), g [B, T, H] (fused taps, or the head's own earlier output),
        positions int64 [B, T], attend: see `Attend`.
        Returns: h [B, T, H], which the next draft step reads in place of g: before the final norm, after it with
        `norm_output`.
        """
        angles = positions[:, None, :, None] * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos = (angles.cos() * self.rope_scale).to(g.dtype)
        sin = (angles.sin() * self.rope_scale).to(g.dtype)
        h = self.midlayer(self.embedding(ids).to(g.dtype), g, cos, sin, attend)
        return self.norm(h) if self.config.norm_output else h

    def logits(self, h: Tensor) -> Tensor:
        """Draft logits [B, T, draft_vocab_size] of h [B, T, H]."""
        return self.lm_head(h if self.config.norm_output else self.norm(h))

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Target token ids of draft ids, int64 [...] → int64 [...]."""
        return draft_ids + self.d2t[draft_ids] if self.config.mapped else draft_ids

    def set_vocabulary(self, target_ids: Tensor) -> None:
        """Make the sorted target ids [draft_vocab_size] the draft vocabulary."""
        ids = target_ids.to(torch.int64).sort().values.to(self.d2t.device)
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self.t2d.zero_()
        self.t2d[ids] = True
