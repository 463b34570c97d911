"""What the attention modules of a model say of their heads: the truth beside the values.

Names of attributes and of projections are known here, in the harness, and nowhere in fmr.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

HEADS = "num_heads num_attention_heads n_heads n_head nhead num_attn_heads heads num_head attention_heads".split()
KEY_VALUE_HEADS = "num_key_value_heads num_kv_heads n_kv_heads kv_n_heads".split()
GROUPS = "num_key_value_groups num_heads_per_kv".split()
SIZE = "qk_head_dim head_dim attention_head_size key_value_proj_dim d_head dim_head head_size d_kv d_k dim_per_head".split()
QUERY = "q_proj query q_lin q Wq query_proj wq linear_q to_q q_linear q_b_proj project_q query_layer".split()
KEY = "k_proj key k_lin k Wk key_proj wk linear_k to_k k_linear project_k key_layer".split()
FUSED = "qkv qkv_proj c_attn query_key_value in_proj Wqkv qkv_linear att_proj to_qkv".split()


class Shape(NamedTuple):
    """The shape of the heads of an attention module; None for what it does not say."""

    n_heads: int | None
    n_kv_heads: int | None
    head_dim: int | None


def shape_of(model: nn.Module, scope: str) -> Shape:
    """The shape of the heads as the module that holds an attention says it, else one of the two around that one."""
    for module in around(model, scope):
        number, size = _said(module, HEADS), _said(module, SIZE)
        q, k = _width(module, QUERY), _width(module, KEY)
        number = number or (q // size if q and size and q % size == 0 else None)
        if number is not None:
            size = size or (q // number if q and q % number == 0 else None)
            return Shape(number, _kv_heads(module, number, size, k), size)
    return Shape(None, None, None)


def around(model: nn.Module, scope: str) -> Iterator[nn.Module]:
    """The module of a scope and the two around it, without the root."""
    parts = re.sub(r"@\d+", "", scope).split(".")
    known = dict(model.named_modules())
    paths = (".".join(parts[:size]) for size in range(len(parts), max(0, len(parts) - 3), -1))
    return (known[path] for path in paths if path and path in known)


def is_attention(model: nn.Module, scope: str) -> bool:
    """Whether the module of a scope, or one of the two around it, is called attention."""
    return any(re.search("att(ention|n)", type(module).__name__, re.I) for module in around(model, scope))


def _said(module: nn.Module, names: list[str]) -> int | None:
    """What a module says of itself, else its configuration."""
    for one in (module, getattr(module, "config", None)):
        found = next((value for name in names if type(value := _value(one, name)) is int), None)
        if found is not None:
            return found
    return None


def _value(one: Any, name: str) -> Any:
    try:
        return getattr(one, name, None)
    except Exception:
        return None  # some configurations refuse to answer for all of their parts at once


def _width(module: nn.Module, names: list[str]) -> int | None:
    """The width of a projection that a module has for itself."""
    found = next((child for name in names if (child := getattr(module, name, None)) is not None), None)
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    return weight.shape[1] if type(found).__name__ == "Conv1D" else weight.shape[0]


def _kv_heads(module: nn.Module, number: int, size: int | None, k: int | None) -> int | None:
    """The key-value heads: the width of the keys over that of a head, else what the module says."""
    if k and size and k % size == 0:
        return k // size
    own, groups = _said(module, KEY_VALUE_HEADS), _said(module, GROUPS)
    if own is not None or groups is not None:
        return own if own is not None else number // groups
    fused = _width(module, FUSED)
    return number if fused and size and fused == 3 * number * size else None
