"""The trained models that ship: each loads, alone and exactly, does what its card says, and says what is wrong otherwise."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fmr
from fmr.zoo import measure, shelf, tasks, trained, world

TOYS = ["superposition", "superposition-geometry", "superposition-phases"]
OURS = ["digits-cnn", "digits-mlp", "equality-mlp", "facts", "gru", *TOYS]
GOALS = {
    "digits-cnn": {"test": 0.97},
    "digits-mlp": {"test": 0.97},
    "equality-mlp": {"accuracy": 0.99},
    "facts": {"facts": 0.99, "paraphrases": 0.95, "induction": 0.9, "ioi": 0.95},
    "gru": {"accuracy": 0.99},
    "superposition": {"always there": 0.8, "rarest": 0.9},
    "superposition-geometry": {"always there": 0.75, "rarest": 0.45},
    "superposition-phases": {"rarest": 0.9},
}
INPUTS: dict[str, Any] = {
    "digits-cnn": lambda: torch.rand(2, 1, 8, 8),
    "digits-mlp": lambda: torch.rand(2, 1, 8, 8),
    "equality-mlp": lambda: tasks.equality(2, seed=0).inputs,
    "facts": lambda: torch.randint(3, 300, (2, 9)),
    "gru": lambda: tasks.sequences(2, seed=0).inputs,
    **{name: lambda name=name: tasks.features(tasks.toys(name), 2, seed=0) for name in TOYS},
}


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The zoo's data in a folder that a test may damage."""
    shutil.copytree(shelf.DATA, tmp_path / "data")
    monkeypatch.setattr(shelf, "DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def facts() -> fmr.zoo.Trained:
    return fmr.zoo.load("facts")


def error(name: str, **config: Any) -> str:
    with pytest.raises(fmr.ZooError) as raised:
        fmr.zoo.load(name, **config)
    return str(raised.value)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


# ---- what is there


def test_the_names() -> None:
    assert fmr.zoo.names() == sorted([*OURS, "efficientnet", "minilm", "smollm2"])


@pytest.mark.parametrize("name", OURS)
def test_a_model_is_ready_to_use(name: str) -> None:
    found = fmr.zoo.load(name)
    model, tokenizer = found
    assert model is found.model
    assert tokenizer is found.tokenizer
    assert not any(module.training for module in model.modules())
    assert all(value.requires_grad and value.dtype == torch.float32 for value in model.parameters())
    assert found.card["name"] == name
    assert found.card["parameters"] == sum(value.numel() for value in model.parameters())
    assert (Path(__file__).parents[2] / found.card["script"]).exists()


@pytest.mark.parametrize("name", OURS)
def test_loading_twice_gives_the_same_bits_and_draws_nothing(name: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = fmr.zoo.load(name).model, fmr.zoo.load(name).model
    assert torch.equal(before, torch.get_rng_state())
    assert first is not second
    assert all(torch.equal(value, state(second)[key]) for key, value in state(first).items())
    inputs = INPUTS[name]()
    assert torch.equal(_logits(first, inputs), _logits(second, inputs))


def _logits(model: nn.Module, inputs: Any) -> torch.Tensor:
    out = model(inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("name", OURS)
def test_it_does_what_its_card_says(name: str) -> None:
    found = fmr.zoo.load(name)
    reached = found.card["metrics"]
    again = measure(name, *found, seed=2024)
    assert again == pytest.approx(reached, abs=0.02)
    assert all(min(reached[what], again[what]) >= goal for what, goal in GOALS[name].items()), again


def test_it_prints(facts: fmr.zoo.Trained) -> None:
    assert repr(facts).splitlines() == [
        "facts: GPT2LMHeadModel, 867,456 parameters",
        "  knows      960 facts about 240 people of a made-up world, each in several phrasings; "
        "who receives what another gives; to continue what is repeated",
        "  reached    " + ", ".join(f"{key} {value:.4f}" for key, value in facts.card["metrics"].items()),
        "  made by    etc/train/facts.py, seed 0",
        "  tokenizer  515 tokens",
    ]


def test_all_of_it_is_small() -> None:
    assert sum(path.stat().st_size for path in shelf.DATA.rglob("*")) < 5_000_000


def test_looking_at_the_zoo_loads_no_heavy_library() -> None:
    code = "import sys, fmr; fmr.zoo.names(); fmr.zoo.load('gru'); print({'transformers', 'sklearn'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- tracked by fmr


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_language_model_is_found_to_have_four_attentions(attention: str) -> None:
    model, tokenizer = fmr.zoo.load("facts", attn_implementation=attention)
    run = fmr.run(model, **tokenizer(world.facts()[0].prompt, return_tensors="pt"))
    found = fmr.locate(run).attention
    assert [block.n_heads for block in found] == [4] * 4
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("name", OURS)
def test_a_model_is_tracked_without_changing_its_output(name: str) -> None:
    model, _ = fmr.zoo.load(name)
    inputs = INPUTS[name]()
    plain = _logits(model, inputs)
    run = fmr.run(model, inputs)
    assert torch.equal(plain, run.output if isinstance(run.output, torch.Tensor) else run.output.logits)


def test_what_the_hidden_layers_of_the_mlp_pass_on_is_called_relu() -> None:
    run = fmr.run(fmr.zoo.load("equality-mlp").model, tasks.equality(5, seed=0).inputs)
    assert torch.equal(run["/relu#1"], run["hidden.1/linear#0"].relu())


# ---- the tokenizer


def test_text_goes_through_the_tokenizer_and_back(facts: fmr.zoo.Trained) -> None:
    tokenizer = facts.tokenizer
    for text in [fact.prompt for fact in world.facts()[:40]] + [gift.prompt for gift in world.ioi(40, seed=5)]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert len(ids) == 1 + len(text.split())
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_knows_every_word_and_gives_what_the_model_takes(facts: fmr.zoo.Trained) -> None:
    assert facts.tokenizer.convert_tokens_to_ids(list(world.words())) == list(range(3, 3 + len(world.words())))
    batch = facts.tokenizer(["Nora plays the", "Nora"], return_tensors="pt", padding=True)
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert facts.tokenizer("unheard")["input_ids"] == [1, facts.tokenizer.unk_token_id]
    assert facts.model(**batch).logits.shape == (2, 4, len(facts.tokenizer))


def test_transformers_loads_the_folder_by_itself(facts: fmr.zoo.Trained) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(shelf.DATA / "facts")("Nora plays the", return_tensors="pt")
    theirs = AutoModelForCausalLM.from_pretrained(shelf.DATA / "facts").eval()
    assert torch.equal(theirs(**ids).logits, facts.model(**ids).logits)


# ---- the world and the tasks


def test_the_weights_were_trained_on_this_world(facts: fmr.zoo.Trained) -> None:
    assert facts.card["world"] == world.fingerprint()


def test_the_world_has_what_its_users_need() -> None:
    names = [subject.split() for subject in world.subjects()]
    assert len({tuple(name) for name in names}) == len(names) >= 200
    assert {len(name) for name in names} == {2, 3}
    taught, held = world.facts(), world.facts(taught=False)
    key = {(fact.subject, fact.relation, fact.phrasing) for fact in taught}
    assert not key & {(fact.subject, fact.relation, fact.phrasing) for fact in held}
    assert len(taught) == len(held) == len(names) * len(world.relations()) * 3
    assert all(fact.answer in world.relations()[fact.relation] and fact.subject in fact.prompt for fact in taught + held)


def test_fresh_gifts_are_between_people_that_training_never_paired() -> None:
    fresh, trained = ({(g.giver, g.answer) for g in world.ioi(3000, seed=1, trained=t)} for t in (False, True))
    assert not fresh & trained
    for gift in world.ioi(100, seed=2):
        words = gift.prompt.split()
        assert (words.count(gift.giver), words.count(gift.answer)) == (2, 1)
        assert len(gift.fresh.split()) == len(words)
        assert not {gift.giver, gift.answer} & set(gift.fresh.split())


def test_repeats_say_the_same_different_words_twice() -> None:
    for text in world.repeats(20, length=7, seed=1):
        words = text.split()
        assert words[:7] == words[7:]
        assert len(set(words)) == 7


def test_the_same_seed_gives_the_same_data() -> None:
    for make in (tasks.equality, tasks.sequences, world.ioi, lambda n, seed: world.repeats(n, 5, seed)):
        first, again, other = (str(list(make(30, seed=seed))) for seed in (1, 1, 2))
        assert first == again != other


def test_the_classifiers_tasks_are_what_they_say() -> None:
    task = tasks.equality(2000, seed=4)
    first, second, third, fourth = task.inputs.view(-1, 4, 4).unbind(1)
    assert torch.equal(task.left, (first == second).all(1))
    assert torch.equal(task.right, (third == fourth).all(1))
    assert 0.45 < task.labels.float().mean() < 0.55
    symbols, labels = tasks.sequences(2000, seed=4)
    assert torch.equal(labels.bool(), symbols[:, 0] == symbols[:, -1])
    assert 0.45 < labels.float().mean() < 0.55
    assert len(tasks.digits().train.labels) + len(tasks.digits().test.labels) == 1797


# ---- what can go wrong


def test_an_unknown_name_lists_those_that_exist() -> None:
    have = "digits-cnn, digits-mlp, efficientnet, equality-mlp, facts, gru, minilm, smollm2, superposition, "
    have += "superposition-geometry, superposition-phases"
    assert error("fakts") == f"The zoo has no 'fakts'. It has: {have}. Nearest that exist: facts."
    with pytest.raises(fmr.ZooError, match=r"no measure for 'minilm'\. It has: facts, equality-mlp"):
        measure("minilm", nn.Identity())


def test_settings_for_a_model_that_takes_none() -> None:
    assert error("gru", width=3) == "gru is no model of transformers and takes no width. Load it with its name alone."


@pytest.mark.parametrize("name", OURS)
def test_a_flipped_bit_is_noticed(name: str, copy: Path) -> None:
    file = copy / name / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert error(name).startswith(
        f"{name}/model.safetensors of the zoo is damaged: its {len(data):,} bytes have the digest "
    )
    assert error(name).endswith("Install fmr again, or run the model's training script.")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "card.json"])
def test_a_truncated_file_is_noticed(file: str, copy: Path) -> None:
    path = copy / "gru" / file
    path.write_bytes(path.read_bytes()[:-40])
    assert f"gru/{file} of the zoo is damaged: " in error("gru")


def test_weights_of_another_model_are_refused(copy: Path) -> None:
    for file in ("config.json", "card.json"):
        shutil.copy(copy / "digits-mlp" / file, copy / "gru" / file)
    assert "the digest" in error("gru")
    _reseal(copy / "gru")
    assert "embedding.weight should be absent and is [8, 32], and 10 more do not fit" in error("gru")
    shutil.copy(copy / "equality-mlp" / "model.safetensors", copy / "digits-mlp" / "model.safetensors")
    _reseal(copy / "digits-mlp")
    assert "hidden.0.bias should be [64] and is [16], and 7 more do not fit" in error("digits-mlp")


def _reseal(folder: Path) -> None:
    """Make the card agree with the weights beside it."""
    card = json.loads((folder / "card.json").read_text())
    card["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "card.json").write_text(json.dumps(card))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "find_spec", lambda name: None)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("name", ["minilm", "facts"])
def test_a_missing_package_is_named_with_its_remedy(name: str) -> None:
    want = f"The zoo's {name} needs the package transformers, which is not installed: pip install 'fmr[demo]'"
    assert error(name) == want


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"n_head": 2},
            "facts was trained with n_head=4, and with n_head=2 its weights mean something else. Expected settings",
        ),
        ({"n_layer": 3}, "facts was trained with n_layer=4"),
        ({"n_heads": 2}, "The configuration of facts has no 'n_heads'. Nearest that exist: n_head"),
        ({"attn_implementation": "nope"}, "facts cannot be loaded with attn_implementation='nope'; transformers says: "),
    ],
)
def test_a_setting_that_contradicts_the_weights_is_refused(config: dict[str, Any], words: str) -> None:
    assert words in error("facts", **config)


def test_what_is_no_name_is_told_the_names() -> None:
    with pytest.raises(fmr.errors.ZooError, match=r"fmr.zoo.load got NoneType, expected the name of a model: digits-cnn, "):
        fmr.zoo.load(None)  # type: ignore[arg-type]
