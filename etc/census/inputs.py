"""Inputs for one forward of any model: a few candidates for each argument that a forward may want, tried in turn."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from overrides import OVERRIDES
from shrink import VOCABULARY, WIDTH
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

LENGTH = 12
TRIES = 24

Inputs = dict[str, Any]
Makers = dict[str, list[Callable[..., Any]]]


def candidates(model: nn.Module, model_type: str) -> Iterator[Inputs]:
    """Inputs to try, richest first."""
    config, over = model.config, OVERRIDES.get(model_type, {})
    if over.get("inputs"):
        yield over["inputs"](config, makers(config, over.get("batch", 1)))
    known = inspect.signature(model.forward).parameters
    needed = [
        name
        for name, one in known.items()
        if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    ]
    main = getattr(model, "main_input_name", "input_ids")
    main = [main] if isinstance(main, str) else list(main)
    if hasattr(model, "get_image_features") and "pixel_values" in known and "input_ids" in known:
        yield from text_with_images(model, known)
    for batch in (2, 1):
        ways = makers(config, batch)
        for names in _sets(main, needed, known):
            names = list(dict.fromkeys(name for name in names if name in known)) + [
                name for name in ("bbox",) if name in known
            ]
            first = any(one in ("input_ids", "pixel_values", "input_features", "input_values") for one in main)
            if first and "decoder_input_ids" in known and config.is_encoder_decoder:
                names.append("decoder_input_ids")
            names = names or [name for name in known if name in ways][:1]
            missing = [name for name in names if name not in ways]
            if missing:
                raise LookupError(f"no generator for {missing}")
            for chosen in itertools.islice(itertools.product(*(ways[name] for name in names)), TRIES):
                yield {name: make() for name, make in zip(names, chosen, strict=True)}


def _sets(main: list[str], needed: list[str], known: Any) -> list[list[str]]:
    """Sets of arguments to try: the main one and what is needed, with text and pictures where there are both."""
    own = [name for name in main if name in known] if needed else main
    sets = [main + needed, needed + own]
    if "input_ids" in main + needed:
        sets.insert(0, sets[0] + [name for name in ("input_ids", "pixel_values") if name in known])
    return sets


def text_with_images(model: nn.Module, known: Any) -> Iterator[Inputs]:
    """A text with placeholders for as many tokens as `get_image_features` makes of an image."""
    config = model.config
    token = part(config, "image_token_id", "image_token_index", "media_placeholder_token_id")
    if token is None:
        return
    ways, wanted = makers(config, 1), inspect.signature(model.get_image_features).parameters
    pictures = [make() for make in ways["pixel_values"]] + [ways["pixel_values"][0]()[None]]
    for picture in pictures:
        options = {"pixel_values": picture}
        if "image_grid_thw" in wanted:
            options["image_grid_thw"] = ways["image_grid_thw"][0]()
        if "image_sizes" in wanted:
            options["image_sizes"] = torch.tensor([[picture.shape[-2], picture.shape[-1]]])
        for name in ("pixel_attention_mask", "spatial_shapes"):
            if name in wanted and wanted[name].default is inspect.Parameter.empty:
                options[name] = ways[name][0]()
        try:
            with torch.no_grad():
                out = model.get_image_features(**{name: value for name, value in options.items() if name in wanted})
        except Exception:
            continue  # another picture may fit
        length = _length(out)
        ids = [ways["input_ids"][0](1, 4), torch.full((1, length), token), ways["input_ids"][0](1, 6)]
        text = torch.cat(ids, 1)
        base = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        base |= {name: value for name, value in options.items() if name in known}
        if "mm_token_type_ids" in known:
            yield {**base, "mm_token_type_ids": (text == token).int()}
        if "token_type_ids" in known:
            yield {**base, "token_type_ids": (text == token).long()}
        yield base


def _length(out: Any) -> int:
    """How many tokens image features are."""
    if torch.is_tensor(out):
        return out.reshape(-1, out.shape[-1]).shape[0]
    features = out if isinstance(out, (list, tuple)) else getattr(out, "pooler_output", None)
    known = [one for one in flat(features) if torch.is_floating_point(one)]
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in known]).shape[0]


def flat(nest: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of outputs, in order; caches are left out."""
    if torch.is_tensor(nest):
        yield nest
    elif isinstance(nest, dict):
        for one in nest.values():
            yield from flat(one)
    elif isinstance(nest, (list, tuple)):
        for one in nest:
            yield from flat(one)


def part(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that a configuration has, or, breadth first, its parts."""
    waiting = [config]
    while waiting:
        one = waiting.pop(0)
        for name in names:
            value = one.__dict__.get(one.attribute_map.get(name, name))
            if value is not None and not isinstance(value, PreTrainedConfig):
                return value
        waiting += [value for value in one.__dict__.values() if isinstance(value, PreTrainedConfig)]
    return default


def number(value: Any, default: int) -> int:
    """A size as one number, where it may be listed for each dimension or absent."""
    value = value if value is not None else default
    if isinstance(value, dict):
        return int(value.get("height", 32))
    return int(value[0] if isinstance(value, (list, tuple)) and value else value)


def _text(config: Any) -> Any:
    """The configuration of the part that reads text."""
    for options in ({}, {"decoder": True}):
        try:
            found = config.get_text_config(**options)
        except Exception:
            found = None
        if found is not None:
            return found
    return config


def makers(config: Any, batch: int) -> Makers:
    """For each argument of a forward the ways to make one."""
    return _tokens(config, batch) | _pictures(config, batch) | _sounds(config, batch) | _series(config, batch)


def randoms(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def _tokens(config: Any, batch: int) -> Makers:
    limit = max(min(part(_text(config), "vocab_size", default=VOCABULARY) or VOCABULARY, 90), 8)
    width = number(part(config, "hidden_size", "d_model"), WIDTH)
    books = number(part(config, "num_codebooks", "num_quantizers"), 8)
    bins = number(part(config, "n_mel_bins"), 80)

    def ids(rows: int = batch, length: int = LENGTH) -> Tensor:
        return torch.randint(5, limit, (rows, length))

    def hidden(length: int = LENGTH) -> Callable[[], Tensor]:
        return lambda: torch.randn(batch, length, width)

    return {
        "input_ids": [ids],
        "decoder_input_ids": [ids],
        "qformer_input_ids": [ids],
        "inputs": [ids],
        "attention_mask": [lambda: torch.ones(batch, LENGTH, dtype=torch.long)],
        "inputs_embeds": [hidden()],
        "context": [hidden()],
        "text_features": [hidden()],
        "input_embeds": [hidden()],
        "encoder_hidden_states": [hidden()],
        "context_hidden_states": [hidden()],
        "action_embeds": [hidden(8)],
        "noise_embeds": [hidden(8)],
        "query_embeds": [hidden(8)],
        "lang_ids": [lambda: torch.zeros(batch, dtype=torch.long)],
        "task_inputs": [lambda: torch.randint(5, limit, (batch, 77))],
        "audio_codes": [lambda: torch.randint(0, 50, (batch, books, LENGTH))],
        "audio_input_ids": [lambda: torch.randint(0, 50, (batch, LENGTH, bins))],
        "bbox": [lambda: torch.tensor([[[i, i, i + 5, i + 7] for i in range(LENGTH)]] * batch)],
        "interpolate_pos_encoding": [lambda: True],
    }


def _pictures(config: Any, batch: int) -> Makers:
    image = part(config, "image_size", "resolution", "pretrain_image_size")
    size = min(number(image, 64), 384)
    wide = int(image[1]) if isinstance(image, (list, tuple)) and len(image) == 2 else size
    channels = number(part(config, "num_channels", "in_channels", "in_chans"), 3)
    channels = channels if channels in (1, 2, 3, 4, 9) else 3
    patch, depth = number(part(config, "patch_size"), 16), number(part(config, "temporal_patch_size"), 1)
    merge = number(part(config, "spatial_merge_size", "merge_size"), 2)
    frames = number(part(config, "num_frames", "tubelet_size"), 4)
    width = number(part(config, "hidden_size", "d_model"), WIDTH)
    tiles = number(part(config, "max_num_tiles"), 4)
    cells, dots = 4 * merge * merge, channels * patch * patch

    def grid() -> Tensor:
        return torch.tensor([[1, 2 * merge, 2 * merge]] * batch)

    def places() -> Tensor:
        return torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1)

    def patches() -> Tensor:
        return torch.cat([torch.randint(1, 5, (batch, 8, 2)).float(), torch.randn(batch, 8, dots)], -1)

    return {
        "pixel_values": [
            randoms(batch, channels, size, wide),
            randoms(batch, 3, 64, 64),
            randoms(batch, 3, 224, 224),
            randoms(batch, frames, channels, size, size),
            randoms(batch * cells, dots * depth),
            randoms(batch, 16, dots),
        ],
        "pixel_mask": [
            lambda: torch.ones(batch, size, size, dtype=torch.long),
            lambda: torch.ones(batch, 64, 64, dtype=torch.long),
        ],
        "pixel_values_videos": [randoms(batch, frames, channels, size, size)],
        "image": [randoms(batch, channels, size, wide)],
        "hidden_states": [
            randoms(batch, LENGTH, width),
            randoms(batch * cells, dots * depth),
            randoms(batch * cells, width),
        ],
        "hidden_state": [randoms(batch, width, 16)],
        "grid_thw": [grid],
        "image_grid_thw": [grid],
        "target_sizes": [lambda: torch.tensor([[4, 4]] * batch)],
        "spatial_shapes": [lambda: torch.tensor([[4, 4]] * batch)],
        "merge_sizes": [lambda: torch.tensor([1] * batch)],
        "pixel_position_ids": [lambda: places().reshape(1, 16, 2).repeat(batch, 1, 1)],
        "pixel_attention_mask": [lambda: torch.ones(batch, 16, dtype=torch.long)],
        "aspect_ratio_ids": [lambda: torch.ones(batch, 1, dtype=torch.long)],
        "aspect_ratio_mask": [lambda: torch.ones(batch, 1, tiles, dtype=torch.long)],
        "vision_features": [lambda: [torch.randn(batch, width, 8, 8)]],
        "patch_embeds": [randoms(batch, 4, 4, width)],
        "num_patches": [lambda: 16],
        "flattened_patches": [patches],
        "visual_feats": [randoms(batch, 5, number(part(config, "visual_feat_dim"), 64))],
        "visual_pos": [lambda: torch.rand(batch, 5, 4)],
    }


MELS = ("num_mel_bins", "n_mels", "feature_size", "input_feat_size", "feature_projection_input_dim", "input_dim")
MELS_AGAIN = (
    "num_mel_bins", "n_mels", "input_feat_size", "feature_projection_input_dim", "input_dim", "feature_size", "input_size",
)  # fmt: skip


def _sounds(config: Any, batch: int) -> Makers:
    mel = number(part(config, *MELS), 80)
    listed = [value for name in MELS_AGAIN if isinstance(value := part(config, name), int)]
    mels = list(dict.fromkeys([mel, *listed, 80, 128]))
    time = 2 * number(part(config, "max_source_positions"), 64)

    shapes = [shape for m in mels for shape in ((m, time), (time, m), (48, m), (m, 64))]
    return {
        "input_features": [randoms(batch, *shape) for shape in shapes],
        "input_features_mask": [
            lambda: torch.ones(batch, time, dtype=torch.long),
            lambda: torch.ones(batch, 48, dtype=torch.long),
        ],
        "audio_mel": [randoms(batch, 48, mels[0])],
        "audio_mel_mask": [lambda: torch.zeros(batch, 48, dtype=torch.bool)],
        "mask": [lambda: torch.ones(batch, 48, dtype=torch.bool)],
        "mel_spectrogram": [randoms(batch, 80, 32)],
        "spectrogram": [randoms(batch, 20, mel)],
        "input_values": [
            randoms(batch, 4000),
            randoms(batch, 1, 4000),
            randoms(batch, number(part(config, "max_length"), 128), mel),
            randoms(batch, 1, 16000),
            *_tokens(config, batch)["input_ids"],
        ],
    }


def _series(config: Any, batch: int) -> Makers:
    past, future = number(part(config, "context_length"), 32), number(part(config, "prediction_length"), 8)
    lags = max(part(config, "lags_sequence", default=[0]))
    features = max(1, part(config, "num_time_features", default=1))
    inner = number(part(config, "num_input_channels", "input_size"), 1)
    states, actions = number(part(config, "state_dim"), 17), number(part(config, "act_dim"), 4)

    return {
        "past_values": [randoms(batch, past, inner), randoms(batch, past + lags), randoms(batch, 64)],
        "past_time_features": [randoms(batch, past + lags, features)],
        "past_observed_mask": [lambda: torch.ones(batch, past + lags)],
        "past_values_padding": [lambda: torch.zeros(batch, 64)],
        "future_time_features": [randoms(batch, future, features)],
        "future_values": [randoms(batch, future)],
        "freq": [lambda: torch.zeros(batch, 1, dtype=torch.long)],
        "states": [randoms(batch, LENGTH, states)],
        "actions": [randoms(batch, LENGTH, actions)],
        "rewards": [randoms(batch, LENGTH, 1)],
        "returns_to_go": [randoms(batch, LENGTH, 1)],
        "timesteps": [lambda: torch.arange(LENGTH)[None].repeat(batch, 1)],
    }
