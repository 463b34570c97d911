"""Autoencoders on disk: settings in JSON, numbers in safetensors; a folder of ours, and one that SAELens wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from analyzers.protocol import AnalyzerError
from fmr.disk.files import named, new_folder, opened, read_whole, seal, unseal, write_whole

CONFIG, TENSORS = "autoencoder.json", "autoencoder.safetensors"

Read = tuple[dict[str, Any], dict[str, Tensor]]
"""The settings of an autoencoder, and its parameters by name."""


def write_folder(folder: str | os.PathLike[str], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write settings and tensors to a folder, each file whole or not at all."""
    place = new_folder(folder)
    write_whole(place / TENSORS, save({name: one.cpu().contiguous() for name, one in tensors.items()}))
    write_whole(place / CONFIG, seal("autoencoder", dict(settings)))


def read_folder(folder: str | os.PathLike[str]) -> Read:
    """The settings and the tensors in a folder that `write_folder` wrote."""
    place = named(folder)
    data = read_whole(place / CONFIG, "a folder that SparseAutoencoder.save wrote")
    return unseal("autoencoder", data, str(place / CONFIG)), tensors_in(place / TENSORS)


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        with opened(path, "a file of tensors beside its settings") as file:
            return dict(load(file.read()))
    except SafetensorError as error:
        raise AnalyzerError(f"{path} is no file of tensors ({error}). Expected safetensors; save it again.") from error


# ---- SAELens

_SETTINGS, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_NAMES = {"W_enc": "encoder", "b_enc": "encoder_bias", "W_dec": "decoder", "b_dec": "bias", "threshold": "threshold"}
_KINDS = {"standard": "relu", "topk": "top-k", "jumprelu": "jumprelu"}


def read_saelens(folder: str | os.PathLike[str]) -> Read:
    """The settings and the tensors of an autoencoder that SAELens saved, in our words."""
    place = named(folder)
    told = _json(place / _SETTINGS)
    found = tensors_in(place / _WEIGHTS)
    kind, k = _kind(told, place)
    for name, plain in (("normalize_activations", ("none",)), ("reshape_activations", ("none", "hook_z"))):
        if told.get(name) not in (None, *plain):
            raise AnalyzerError(
                f"{place / _SETTINGS} says {name}={told[name]!r}: expected 'none', weights that read the values as they "
                "are. Fold it into the weights with SAELens, and save it again."
            )
    wanted = [name for name in _NAMES if name != "threshold" or kind == "jumprelu"]
    if missing := [name for name in wanted if name not in found]:
        raise AnalyzerError(f"{place / _WEIGHTS} has no {missing[0]!r}: it holds {', '.join(sorted(found))}.")
    if kind == "top-k" and told.get(
        "rescale_acts_by_decoder_norm"
    ):  # choices by length of what is added: so told by weights
        norms = found["W_dec"].norm(dim=1)
        found |= {"W_enc": found["W_enc"] * norms, "b_enc": found["b_enc"] * norms, "W_dec": found["W_dec"] / norms[:, None]}
    if (factor := found.get("scaling_factor")) is not None and bool((factor != 1).any()):
        raise AnalyzerError(f"{place / _WEIGHTS} has a scaling factor for each latent. Expected it folded into W_dec.")
    width, size = found["W_enc"].shape
    for name, own in (("d_in", width), ("d_sae", size)):
        if told.get(name, own) != own:
            raise AnalyzerError(
                f"{place / _SETTINGS} says {name}={told[name]!r}, and W_enc is {width} x {size}: expected {own}."
            )
    centered = bool(told.get("apply_b_dec_to_input", True))
    settings = {"width": width, "size": size, "kind": kind, "k": k, "centered": centered}
    return settings, {_NAMES[name]: found[name] for name in wanted}


def _kind(told: Mapping[str, Any], place: Path) -> tuple[str, int | None]:
    """How latents are chosen, and how many where that is fixed."""
    name = told.get("architecture", "standard")
    act = told.get("activation_fn_str", told.get("activation_fn")) or "relu"
    if name == "standard" and act == "topk":
        name = "topk"
    if name in _KINDS and act not in ("relu", name):
        raise AnalyzerError(
            f"{place / _SETTINGS} says that latents of {name!r} go through {act!r}: expected 'relu'; others are not known."
        )
    if name not in _KINDS:
        raise AnalyzerError(
            f"{place / _SETTINGS} is of the architecture {name!r}: expected {', '.join(map(repr, _KINDS))}. Others choose "
            "their latents in another way."
        )
    k = told.get("k", (told.get("activation_fn_kwargs") or {}).get("k"))
    if name == "topk" and not isinstance(k, int):
        raise AnalyzerError(f"{place / _SETTINGS} does not say how many latents are chosen: expected k.")
    return _KINDS[name], k if name == "topk" else None


def _json(path: Path) -> dict[str, Any]:
    """The settings in a file."""
    data = read_whole(path, f"a folder that SAELens wrote, with {_SETTINGS} and {_WEIGHTS}")
    try:
        return dict(json.loads(data))
    except ValueError as error:
        raise AnalyzerError(f"{path} is no JSON ({error}). Expected what SAELens wrote.") from error
