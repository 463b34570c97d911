"""FLOPs of kernels for which torch has no formula, or one on GPUs alone: 2 for a multiplication with an addition."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count


def _attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """A kernel for which torch has a formula on GPUs alone."""
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


def _recurrent(given: Any, weight: Any, hidden: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """One layer and direction: both of its matrices for each token."""
    return int(2 * prod(given[:-1]) * (prod(weight) + prod(hidden)))


def _recurrent_backward(*args: Any, **named: Any) -> int:
    return 2 * _recurrent(*args, **named)


def _recurrent_layers(given: Any, weights: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """All layers and directions: every matrix for each token."""
    return int(2 * prod(given[:-1]) * sum(prod(one) for one in weights if len(one) > 1))


def _recurrent_layers_backward(*args: Any, **named: Any) -> int:
    return 2 * _recurrent_layers(*args, **named)


def _lengths(given: Tensor) -> list[int]:
    """How many tokens each example has, in a tensor of (examples, positions, units) or in a nested one."""
    if given.is_nested:
        return [int(one.shape[0]) for one in given.unbind()]
    return [given.shape[1]] * given.shape[0]


def _heads(query: Tensor, key: Tensor, value: Tensor, width: int, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Four projections and two products of an attention that is one kernel."""
    queries, keys = _lengths(query), _lengths(key)
    projected = 2 * width * width * (2 * sum(queries) + 2 * sum(keys))
    return projected + sum(4 * width * a * b for a, b in zip(queries, keys, strict=True))


def _layer(given: Tensor, width: int, *rest: Any, out_val: Any = None, **named: Any) -> int:
    """A layer of an encoder that is one kernel: its attention, and the two projections of its memory."""
    memory = sum(one.numel() for one in rest if isinstance(one, Tensor) and one.dim() == 2)  # with those of the attention
    inner = memory - 4 * width * width
    return _heads(given, given, given, width) + 2 * inner * sum(_lengths(given))


_heads._get_raw = _layer._get_raw = True  # type: ignore[attr-defined]  # they are given tensors where others get shapes

FORMULAS = {
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
    torch.ops.aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    torch.ops.aten._cudnn_rnn: _recurrent_layers,
    torch.ops.aten._cudnn_rnn_backward: _recurrent_layers_backward,
    torch.ops.aten._native_multi_head_attention: _heads,
    torch.ops.aten._transformer_encoder_layer_fwd: _layer,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
