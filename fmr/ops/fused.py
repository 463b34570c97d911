"""Fused operations, written out in plain tensor operations: what a kernel computes inside, step by step.

Each function takes the arguments of the op that it explains. They are traced like a model, which gives the inner
values their IDs, `...attn/scaled_dot_product_attention#0/softmax#0`, and run only when such a value is asked for.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmr.nodes import Node
from fmr.ops.einsum import einsum


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scores = q k^T * scale + mask; pattern = softmax(scores); z = pattern v. A fully masked row attends to nothing."""
    if enable_gqa and key.size(-3) != query.size(-3):
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
    if enable_gqa and value.size(-3) != query.size(-3):
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = query.matmul(key.transpose(-2, -1)).mul((query.size(-1) or 1) ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores.add(attn_mask)
    pattern = torch._safe_softmax(scores, -1)
    return F.dropout(pattern, dropout_p, dropout_p > 0.0).matmul(value)


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """torch's own function, entered instead of dispatched, so that its inner ops show: a copy that asks for no overrides."""
    own = F.multi_head_attention_forward
    entered = FunctionType(own.__code__, {**vars(F), "has_torch_function": lambda _: False}, own.__name__, own.__defaults__)
    result: tuple[Tensor, Tensor | None] = entered(*args, **kwargs)
    return result


def _native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The self-attention of `nn.MultiheadAttention` in inference: one projection for q, k and v, then each head."""
    batch, length, _ = query.shape
    joint = F.linear(query, qkv_weight, qkv_bias).view(batch, length, 3, num_heads, embed_dim // num_heads)
    q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
    scores = q.mul((embed_dim // num_heads) ** -0.5).matmul(k.transpose(-2, -1))
    if mask is not None:
        if mask_type == 1:
            mask = mask.view(batch, 1, 1, -1)
        scores = scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores.add(mask)
    pattern = torch._safe_softmax(scores, -1)
    z = pattern.matmul(v).transpose(1, 2).reshape(batch, length, embed_dim)
    weights = (pattern.mean(1) if average_attn_weights else pattern) if need_weights else None
    return F.linear(z, proj_weight, proj_bias), weights


def _transformer_encoder_layer_fwd(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """The whole of `nn.TransformerEncoderLayer` in inference: attention, add, norm, feed-forward, add, norm."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(src, norm_weight_1, norm_bias_1) if norm_first else src
    attention = (qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, True, mask_type)
    out, _ = _native_multi_head_attention(x, x, x, embed_dim, num_heads, *attention)
    resid_mid = src.add(out) if norm_first else norm(src.add(out), norm_weight_1, norm_bias_1)
    x = norm(resid_mid, norm_weight_2, norm_bias_2) if norm_first else resid_mid
    pre = F.linear(x, ffn_weight_1, ffn_bias_1)
    post = F.gelu(pre) if use_gelu else F.relu(pre)
    resid_post = resid_mid.add(F.linear(post, ffn_weight_2, ffn_bias_2))
    return resid_post if norm_first else norm(resid_post, norm_weight_2, norm_bias_2)


def _lerp(input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    """The way from one value to another, a share of it: how gated residuals are written in one op."""
    return input.add(end.sub(input).mul(weight))


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1.0) -> Tensor:
    """A value and the product of two others: a gate or a scale on what is added to a residual stream."""
    product = tensor1.mul(tensor2)
    return input.add(product if value == 1.0 else product.mul(value))


DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "multi_head_attention_forward": multi_head_attention_forward,
    "native_multi_head_attention": _native_multi_head_attention,
    "transformer_encoder_layer_fwd": _transformer_encoder_layer_fwd,
    "lerp": _lerp,
    "addcmul": _addcmul,
    "einsum": einsum,
}
"""The fused ops by canonical name."""


def is_fused(node: Node) -> bool:
    """Whether the op of a node has inner values that can be asked for."""
    return node.op in DECOMPOSITIONS and (node.op != "einsum" or len(node.parents) > 2)
