"""Configurations made tiny: every size of a class's default shrunk by rules, layers of every kind kept."""

import copy
import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from overrides import OVERRIDES
from transformers.configuration_utils import PreTrainedConfig

WIDTH, HEADS, KEY_VALUE_HEADS, HEAD_DIM, FEED_FORWARD, LAYERS, VOCABULARY, EXPERTS = 64, 4, 2, 16, 48, 2, 128, 4


def at_most(size: int) -> Callable[[int], int]:
    return lambda default: min(default, size)


EVERY, TINY, SMALL = {"tiny", "mid", "layers"}, {"tiny"}, {"tiny", "mid"}
"""The rungs of the ladder on which a rule applies; on the rung "default" none does."""

RULES: list[tuple[re.Pattern[str], Any, set[str]]] = [
    (re.compile(rf"^({names.strip().replace(' ', '|')})$"), size, rungs)
    for names, size, rungs in (
        (
            "num_hidden_layers n_layers? num_layers layers (encoder|decoder)(_num_hidden)?_layers "
            "num_(encoder|decoder)_layers encoder_n_layers decoder_num_layers "
            "(t2u|speech)_(en|de)coder_layers conf_num_hidden_layers num_hidden_layers_(text|vision) depth [lxr]_layers "
            "num_self_attends_per_block resampler_depth",
            at_most(LAYERS),
            EVERY,
        ),
        ("num_experts num_local_experts n_routed_experts moe_num_experts", at_most(EXPERTS), EVERY),
        (
            "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts topk_group n_group num_selected_experts "
            "zero_expert_num",
            at_most(2),
            EVERY,
        ),
        ("first_k_dense_replace num_dense_layers moe_layer_start_index", at_most(1), EVERY),
        ("(.*_)?vocab_size(_per_layer_input)?", at_most(VOCABULARY), SMALL),
        (
            "hidden_size d_model n_embd embed_dim emb_dim hidden_dim dim embedding_size word_embed_proj_dim projection_dim "
            "d_latents out_hidden_size encoder_hidden_size text_hidden_size vision_hidden_size text_embed_dim project_dim "
            "dim_model cross_hidden_size hidden_size_global image_text_hidden_size decoder_hidden_size audio_embed_dim "
            "d_embed input_embedding_size output_embedding_size entity_emb_size projector_hidden_size lru_width "
            "feature_size backbone_hidden_size pooler_output_size upsample_groups reassemble_hidden_size",
            WIDTH,
            TINY,
        ),
        ("hidden_size_per_layer_input laurel_rank", 16, TINY),
        (
            "intermediate_size (.*_)?ffn_dim d_ff dff dim_ff d_inner n_inner mlp_dim hidden_act_dim ffn_hidden_size "
            "(.*_)?intermediate_size feed_forward_size (en|de)coder_linear_units intermediate_size_mlp",
            FEED_FORWARD,
            TINY,
        ),
        (
            "(.*_)?num_attention_heads n_head n_heads num_heads (.*_)?attention_heads "
            "(cross_|decoder_|encoder_)num_attention_heads resampler_n_heads resampler_heads "
            "num_(self|cross)_attention_heads",
            at_most(HEADS),
            TINY,
        ),
        ("(.*_)?num_key_value_heads num_kv_heads", "key-value heads", TINY),
        (
            "(swa_|cross_|global_|attention_)?head_dim d_kv d_head kv_channels attention_head_size dim_head "
            "resampler_head_dim v_head_dim swa_v_head_dim index_head_dim resampler_dim_head dim_kv global_head_dim",
            at_most(HEAD_DIM),
            TINY,
        ),
        ("qk_(rope|nope)_head_dim", at_most(8), TINY),
        ("(q|kv|o)_lora_rank", at_most(32), TINY),
        ("index_n_heads", at_most(HEADS), TINY),
        ("linear_num_(key|value)_heads", at_most(HEADS), TINY),
        ("linear_(key|value)_head_dim linear_head_dim", at_most(HEAD_DIM), TINY),
        (
            "max_position_embeddings n_positions n_ctx max_seq_len max_(source|target)_positions "
            "max_(en|de)coder_position_embeddings",
            at_most(256),
            TINY,
        ),
        ("rotary_dim", at_most(HEAD_DIM // 2), TINY),
        ("index_topk", at_most(4), EVERY),
        ("num_queries", at_most(10), EVERY),
    )
]
"""Names of fields, the size or a function of the default, the rungs; the first rule that knows a name decides."""

TOKEN_ID = re.compile(r"(_token_id|_token_index|_token_idx|_token|_id|_index)$")
LAYER_COUNT = re.compile(
    r"^(num_hidden_layers|n_layers?|num_layers|layers|depth|encoder_layers|decoder_layers|num_layers_per_stack|num_blocks)$"
)
LAYER_LIST = re.compile(r"(index|indices|indexes|idxs|layer_ids|target_layers|_layers|out_features|hook_ids)$")
KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "block_types", "attn_layers", "mlp_layer_types")
DEPTHS = ("depths", "stage_num_blocks", "blocks_per_stage", "num_block_repeats")

Fields = dict[str, Any]


def tiny_config(cls: Any, rung: str = "tiny", ids: dict[str, int] | None = None, given: Fields | None = None) -> Any:
    """An instance of a configuration class, shrunk.

    ids: the token IDs given so far, one for each name in a model and its parts. given: what a parent's default sets.
    """
    ids, given = {} if ids is None else ids, dict(given or {})
    over = OVERRIDES.get(cls.model_type, {}).get("cfg_all" if rung == "default" else "cfg", {})
    try:
        default = cls(**given)
    except Exception:
        default = cls(**{**given, **over})
    if rung == "default":
        return cls(**{**given, **over}) if over else default
    fields, names = default.__dict__, sorted(field.name for field in dataclasses.fields(cls))
    layers, new = _layers(default, over, given, names)
    for name in names:
        value = fields.get(name)
        if name not in over and name not in new and value is not None and not isinstance(value, bool):
            new |= _shrunk(name, value, default, layers, rung, ids, given)
    if rung in SMALL:
        known = sorted({*names, *fields} - {"_name_or_path"})
        new |= {k: value for k in known if k not in over and (value := _token_id(k, fields.get(k), ids)) is not None}
    if rung == "tiny" and isinstance(fields.get("rope_parameters"), dict):
        new |= _rope(cls, fields)
    new |= {name: value for name, value in over.items() if not name.startswith("__")}
    return cls(**{**{name: value for name, value in given.items() if name not in new}, **new})


def _layers(default: Any, over: Fields, given: Fields, names: list[str]) -> tuple[int, Fields]:
    """The number of layers, and the lists of layers that fit it: as many as these lists need."""
    fields, new = default.__dict__, {}
    count = over.get("__layers__") or _layer_count(default)
    stacked = _stacked(fields)
    for name in names:
        value = fields.get(name)
        if LAYER_LIST.search(name) and _numbers(value) and max(value) >= count and stacked:
            new[name] = None
            count = min(max(count, len(value)), 8)
    for name in new:
        length = len(fields[name])
        new[name] = type(fields[name])(range(max(0, count - length), count))
    outs = fields.get("_out_indices")
    if outs and stacked and (given.get("out_indices") or given.get("out_features")):
        count = max(count, len(outs))
        new["out_indices"] = list(range(count - len(outs) + 1, count + 1))
        given.pop("out_features", None)
    return count, new


def _numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(one) is int for one in value)


def _stacked(fields: Fields) -> int | None:
    """The number of layers of a default that has one stack; None for one in stages."""
    if isinstance(fields.get("depths"), (list, tuple)):
        return None
    return next((v for name, v in fields.items() if LAYER_COUNT.match(name) and isinstance(v, int)), None)


def _layer_count(default: Any) -> int:
    """The fewest layers that still show every kind of layer of the default, at most 8."""
    fields = default.__dict__
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    own = next((fields[name] for name in KINDS_OF_LAYERS if fields.get(name)), None)
    derived = next(
        (v for name in ("layers_block_type", "layer_types") if name not in fields and (v := _ask(default, name))), None
    )
    if not any(isinstance(fields.get(name), int) for name in names) or not (own or derived):
        return LAYERS
    kinds = [fields[name] for name in ("layer_types", "mlp_layer_types", "layers_block_type") if fields.get(name)]
    kinds = [[str(kind) for kind in one] for one in (*kinds, *([derived] if derived else []))]
    enough = (count for count in range(LAYERS, 9) if all(set(one[:count]) == set(one) for one in kinds))
    return min(next(enough, 8), len(own or derived))


def _ask(config: Any, name: str) -> Any:
    """An attribute that may be computed and fail."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _shrunk(name: str, value: Any, default: Any, layers: int, rung: str, ids: dict[str, int], given: Fields) -> Fields:
    """The field as it is in a tiny configuration; nothing where it stays as it is."""
    fields = default.__dict__
    if isinstance(value, PreTrainedConfig):
        own = given.get(name)
        inner = {key: value.__dict__[key] for key in own} if isinstance(own, dict) else _set_by_parent(value)
        return {name: tiny_config(type(value), rung, ids, inner)}
    if isinstance(value, (list, tuple)):
        stacked = _stacked(fields)
        if name in DEPTHS:
            return {name: type(value)(min(one, 2) if type(one) is int else one for one in value)}
        if (
            stacked
            and stacked > 2
            and len(value) == stacked
            and layers < stacked
            and not isinstance(value[0], (list, tuple))
        ):
            return {name: type(value)(value[:layers])}
    if isinstance(value, int):
        return _shrunk_number(name, value, fields, layers, rung)
    return {}


def _shrunk_number(name: str, value: int, fields: Fields, layers: int, rung: str) -> Fields:
    listed = any(
        isinstance(fields.get(k), (list, tuple)) for k in ("num_heads", "num_attention_heads", "depths", "embed_dim")
    )
    rule = next((size for names, size, rungs in RULES if rung in rungs and names.match(name)), None)
    if rule is None:
        patch = fields.get("patch_size")
        if rung == "tiny" and name == "image_size" and not listed and isinstance(patch, int):
            return {name: min(value, 4 * patch)}
        return {}
    if listed and (rule == WIDTH or "heads" in name):
        return {}
    if rule == "key-value heads":
        counts = (
            fields[k] for k in ("num_attention_heads", "n_head", "num_heads", "n_heads") if isinstance(fields.get(k), int)
        )
        heads = next(counts, value)
        rule = 1 if value == 1 else min(HEADS, heads) if value >= heads else KEY_VALUE_HEADS
    if (LAYER_COUNT.match(name) or name.endswith("num_hidden_layers")) and value >= layers:
        return {name: layers}
    return {name: rule(value) if callable(rule) else rule}


def _token_id(name: str, value: Any, ids: dict[str, int]) -> Any:
    """An ID inside the small vocabulary for one that is not; the same for the same name in all parts of a model."""
    if not TOKEN_ID.search(name):
        return None
    if type(value) is int and value >= 100:
        return ids.setdefault(name.replace("index", "id"), 100 + len(ids) % 28)
    if _numbers(value) and max(value) >= 100:
        return type(value)([ids.setdefault(name, 100 + len(ids) % 28)])
    return None


def _rope(cls: Any, fields: Fields) -> Fields:
    """The rotary sections of a small head, where they are listed or the code reads them."""
    old = fields["rope_parameters"]
    new = copy.deepcopy(old)
    for part in (new, *(one for one in new.values() if isinstance(one, dict))):
        if "rope_type" in part and "mrope_section" not in part and _reads_sections(cls):
            part["mrope_section"] = [16, 24, 24]
        for key in ("mrope_section", "xdrope_section"):
            section = part.get(key)
            if isinstance(section, (list, tuple)):
                half = HEAD_DIM // 2
                if sum(section) * 2 != fields.get("head_dim"):
                    half = int(half * part.get("partial_rotary_factor", 1.0))
                sizes = [max(1, size * half // sum(section)) for size in section]
                sizes[0] += half - sum(sizes)
                part[key] = sizes
    return {"rope_parameters": new} if new != old else {}


def _reads_sections(cls: Any) -> bool:
    """Whether the modeling code of a family reads mrope_section, whose default does not fit a small head."""
    home = pathlib.Path(str(sys.modules[cls.__module__].__file__)).parent
    code = (path.read_text() for path in home.glob("modeling_*.py"))
    return cls.__name__.endswith(("TextConfig", "TalkerConfig")) and any("mrope_section" in text for text in code)


def _set_by_parent(inner: Any) -> Fields:
    """The fields of a part's configuration that differ from its class's defaults."""
    try:
        base = type(inner)()
    except Exception:
        return {}
    skipped = ("transformers_version", "id2label", "label2id")
    found = {}
    for field in dataclasses.fields(type(inner)):
        name, value = field.name, inner.__dict__.get(field.name)
        if isinstance(value, PreTrainedConfig) or name in skipped or name.startswith("_"):
            continue
        if value != base.__dict__.get(name):
            found[name] = value
    outs = inner.__dict__.get("_out_indices")
    if outs and outs != base.__dict__.get("_out_indices"):
        found["out_indices"] = list(outs)
    return found
