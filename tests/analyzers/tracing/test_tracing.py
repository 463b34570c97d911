"""Causal tracing: each cell is a run made by hand with hooks, what must be equal is, and facts are recalled at subjects."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, CausalTracing, Traces
from analyzers.tracing.cells import KINDS, ROLES
from analyzers.tracing.facts import continued, fact_of, span
from fmr.zoo import world
from tests.models import build

matplotlib.use("Agg")

PROMPT, SUBJECT, ANSWER = "The mother tongue of Velin dal Millwick is", "Velin dal Millwick", "Tashkar"
PLACES = [5, 6, 7]


@pytest.fixture(scope="module")
def traces(loaded: tuple[nn.Module, Any]) -> Traces:
    return CausalTracing(*loaded, kinds=KINDS, window=2).run(PROMPT, SUBJECT, progress=False)


# ---- by hand


def noise_of(seed: int, width: float, samples: int = 3, units: int = 128) -> Tensor:
    """What is added to the embedding of the subject's three tokens."""
    return width * torch.randn(2, samples, 3, units, generator=torch.Generator().manual_seed(seed))[0]


class ByHand:
    """Runs of the facts model with plain hooks: noise on the embedding, outputs of modules exchanged at positions."""

    def __init__(self, model: nn.Module, ids: Tensor, noise: Tensor) -> None:
        self.model, self.ids, self.noise = model, ids.expand(len(noise), -1), noise
        self.names = [f"transformer.h.{n}{part}" for n in range(4) for part in ("", ".attn", ".mlp")]
        self.clean, _ = self.kept(ids.expand(len(noise), -1), noised=False)
        self.corrupted, self.logits = self.kept(self.ids, noised=True)

    def kept(self, ids: Tensor, noised: bool) -> tuple[dict[str, Tensor], Tensor]:
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            return lambda module, args, output: found.update({name: first(output)})

        with ExitStack() as stack:
            for name in self.names:
                stack.callback(self.model.get_submodule(name).register_forward_hook(keep(name)).remove)
            if noised:
                stack.callback(self.on_embedding().remove)
            return found, self.model(ids).logits

    def on_embedding(self) -> Any:
        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, PLACES] += self.noise
            return output

        return self.model.get_submodule("transformer.wte").register_forward_hook(add)

    def restored(self, put: Mapping[str, tuple[dict[str, Tensor], list[int]]]) -> Tensor:
        """The logits of the corrupted run in which modules give what they gave in other runs, at positions."""

        def exchange(source: Tensor, places: list[int]) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                made = first(output).clone()
                made[:, places] = source[:, places]
                return (made, *output[1:]) if isinstance(output, tuple) else made

            return hook

        with ExitStack() as stack:
            stack.callback(self.on_embedding().remove)
            for name, (values, places) in put.items():
                hook = exchange(values[name], places)
                stack.callback(self.model.get_submodule(name).register_forward_hook(hook).remove)
            return self.model(self.ids).logits


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture(scope="module")
def hand(loaded: tuple[nn.Module, Any]) -> Iterator[ByHand]:
    model, tokenizer = loaded
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        width = 3 * float(model.get_submodule("transformer.wte")(ids)[0, PLACES].std())
        yield ByHand(model, ids, noise_of(0, width))


def put_by_hand(hand: ByHand, kind: str, layer: int, places: list[int]) -> dict[str, Any]:
    """What a cell exchanges, by the definition of its kind; windows of two layers are this one and the one before."""
    if kind.startswith("state"):
        held = {"without mlp": ".mlp", "without attention": ".attn"}.get(kind.removeprefix("state ").strip())
        later = {f"transformer.h.{n}{held}": (hand.corrupted, places) for n in range(layer + 1, 4)} if held else {}
        return {f"transformer.h.{layer}": (hand.clean, places), **later}
    part = {"attention": ".attn", "mlp": ".mlp"}[kind]
    return {f"transformer.h.{n}{part}": (hand.clean, places) for n in range(max(0, layer - 1), layer + 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_is_a_run_made_by_hand_with_hooks(
    loaded: tuple[nn.Module, Any], traces: Traces, hand: ByHand, kind: str
) -> None:
    answer = loaded[1].convert_tokens_to_ids(ANSWER)
    before = hand.logits[:, -1].softmax(-1)[:, answer].mean()
    assert traces.corrupted == pytest.approx([float(before)], abs=1e-6)
    for layer, column, places in ((0, 7, [7]), (1, 8, [8]), (2, 5, [5]), (3, 8, [8]), (0, 9, PLACES), (2, 9, PLACES)):
        with torch.no_grad():
            logits = hand.restored(put_by_hand(hand, kind, layer, places))
        expected = logits[:, -1].softmax(-1)[:, answer].mean() - before
        assert traces.effects[kind][layer, column] == pytest.approx(float(expected), abs=2e-6)


# ---- what must be equal


def test_the_last_state_at_the_last_token_is_the_whole_effect_and_others_there_are_none(traces: Traces) -> None:
    states = traces.effects["state"]
    assert states[-1, -2] == pytest.approx(traces.total_effect, abs=1e-6)
    np.testing.assert_allclose(np.delete(states[-1], -2), 0, atol=1e-6)
    np.testing.assert_allclose(states[:, :5], 0, atol=1e-6)  # before the subject nothing is corrupted
    assert traces.columns[5:] == ("Velin*", "dal*", "Millwick*", "is", "all of the subject")


def test_without_noise_nothing_is_lost(loaded: tuple[nn.Module, Any]) -> None:
    found = CausalTracing(*loaded, noise=0.0).run(PROMPT, SUBJECT, progress=False)
    assert found.total_effect == pytest.approx(0, abs=1e-6)
    assert all(np.abs(effects).max() < 1e-6 for effects in found.effects.values())


def test_severed_states_differ_from_states_where_later_memories_use_them(traces: Traces) -> None:
    whole, severed = traces.effects["state"], traces.effects["state without mlp"]
    np.testing.assert_allclose(whole[-1], severed[-1], atol=1e-6)  # behind the last layer nothing is held
    assert np.abs(whole - severed).max() > 0.05


def test_a_run_again_gives_the_same_numbers_and_another_seed_others(loaded: tuple[nn.Module, Any]) -> None:
    tracing = CausalTracing(*loaded, kinds="state")
    one, again, other = (tracing.run(PROMPT, SUBJECT, seed=seed, progress=False) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.effects["state"], again.effects["state"])
    np.testing.assert_array_equal(one.low["state"], again.low["state"])
    assert np.abs(one.effects["state"] - other.effects["state"]).max() > 1e-3


def test_swapped_subjects_are_a_patch_from_clean_to_swapped_prompts(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    swaps = [name for name in world.subjects() if len(name.split()) == 3][:3]
    found = CausalTracing(model, tokenizer, kinds="state", swaps=swaps, samples=3).run(PROMPT, SUBJECT, progress=False)
    others = [PROMPT.replace(SUBJECT, name) for name in swaps if name != SUBJECT]
    inputs = tokenizer(others, return_tensors="pt")
    answer = tokenizer.convert_tokens_to_ids(ANSWER)
    with torch.no_grad():
        before = model(**inputs).logits[:, -1].softmax(-1)[:, answer].mean()
        clean = fmr.run(model, **tokenizer(PROMPT, return_tensors="pt"))
        site = fmr.Site("transformer.h.0", positions=7)
        run = fmr.run(model, **inputs, edits={site: fmr.edits.Interchange(clean)})
    assert found.corrupted == pytest.approx([float(before)], abs=1e-6)
    expected = run.output.logits[:, -1].softmax(-1)[:, answer].mean() - before
    assert found.effects["state"][0, 7] == pytest.approx(float(expected), abs=2e-6)
    assert np.isnan(found.noise).all()


def test_an_answer_of_several_tokens_has_the_product_of_their_probabilities(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    found = CausalTracing(model, tokenizer, kinds="state", samples=2).run(PROMPT, SUBJECT, "Tashkar speaks", progress=False)
    ids = tokenizer(f"{PROMPT} Tashkar speaks", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = model(ids).logits[0, -3:-1].softmax(-1)
    assert found.clean == pytest.approx([float(said[0, ids[0, -2]] * said[1, ids[0, -1]])], rel=1e-4)
    assert found.effects["state"].shape == (4, 10)  # tokens of the answer are no columns
    assert found.facts == (f"{PROMPT!r} -> 'Tashkar speaks'",)


def test_any_architecture_is_traced_from_token_ids() -> None:
    model, args, kwargs = build("llama")
    ids = (args[0] if args else kwargs["input_ids"])[:1]
    found = CausalTracing(model, kinds=("state", "mlp")).run(ids, [1, 2], progress=False)
    assert found.effects["state"].shape[1] == ids.shape[1] + 1
    assert found.effects["state"][-1, ids.shape[1] - 1] == pytest.approx(found.total_effect, abs=1e-6)


# ---- many facts


def facts() -> list[world.Fact]:
    return world.facts()[::131]


@pytest.mark.long
def test_facts_are_recalled_at_the_last_token_of_the_subject_in_early_layers(loaded: tuple[nn.Module, Any]) -> None:
    asked = [fact for fact in world.facts() if fact.phrasing < 3][::120]
    found = CausalTracing(*loaded).over(asked, progress=False).result()
    assert found.columns == ROLES
    assert found.total_effect > 0.8
    assert found.strongest("state", found.subject) == (0, "last subject token")
    assert found.strongest("mlp", found.subject) == (0, "last subject token")
    assert found.strongest("attention") == (1, "last token")
    place, layer = ROLES.index("last subject token"), 0
    assert found.low["state"][layer, place] > 0.1 > max(found.control.values())


def test_facts_in_shards_are_facts_in_one_pass(loaded: tuple[nn.Module, Any]) -> None:
    asked = facts()[:4]
    whole = CausalTracing(*loaded, kinds="state").over(asked, progress=False).result()
    parts = [CausalTracing(*loaded, kinds="state").over(asked[at : at + 2], progress=False) for at in (0, 2)]
    merged = parts[0].merge(parts[1]).result()
    np.testing.assert_array_equal(whole.effects["state"], merged.effects["state"])
    np.testing.assert_array_equal(whole.high["state"], merged.high["state"])
    assert whole.facts == merged.facts
    with pytest.raises(AnalyzerError, match=r"merge of {'kinds': \('state',\), .* expected another CausalTracing of these"):
        parts[0].merge(CausalTracing(*loaded))


def test_facts_that_the_model_does_not_know_are_skipped_and_counted(loaded: tuple[nn.Module, Any]) -> None:
    tracing = CausalTracing(*loaded, kinds="state").update({"prompt": PROMPT, "subject": SUBJECT, "answer": "Runic"})
    with pytest.raises(AnalyzerError, match=rf"1 fact had another answer than .* which is '{ANSWER}' after '{PROMPT}'"):
        tracing.result()
    known = tracing.update((PROMPT, SUBJECT)).result()
    assert "1 skipped" in repr(known)
    assert "the model says" not in repr(known)
    with pytest.raises(AnalyzerError, match=r"No fact has been traced yet. Call update"):
        CausalTracing(*loaded).result()


def test_an_answer_that_the_model_does_not_give_is_traced_and_told(loaded: tuple[nn.Module, Any], tmp_path: Path) -> None:
    found = CausalTracing(*loaded, kinds="state", samples=1).run(PROMPT, SUBJECT, "Runic", progress=False)
    told = f"the model says '{ANSWER}' first, not this answer: expected answer=None or '{ANSWER}' to trace what it knows"
    assert told in repr(found)
    found.save(tmp_path / "traces.safetensors")
    assert told in repr(Traces.load(tmp_path / "traces.safetensors"))


# ---- results


def test_a_result_prints_tables_draws_and_is_frozen(traces: Traces) -> None:
    table, figure = traces.table(), traces.plot()
    assert list(table.columns) == ["kind", "layer", "column", "effect", "low", "high", "share"]
    assert len(table) == 5 * 4 * 10
    assert (table["low"] <= table["effect"] + 1e-9).all()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][5:8] == ["Velin*", "dal*", "Millwick*"]
    assert [axis.get_title() for axis in figure.axes[:5]] == [
        "state", "attention, 2 layers", "mlp, 2 layers", "state without attention", "state without mlp"]  # fmt: skip
    assert repr(traces).startswith(f"Traces of {PROMPT!r} -> 'Tashkar': p(answer) 0.999 clean, ")
    assert "from another corrupted run" in repr(traces)
    with pytest.raises(FrozenInstanceError):
        traces.seed = 1  # type: ignore[misc]
    with pytest.raises(AnalyzerError, match=r"kind='z' was not traced. Expected one of 'state', 'attention'"):
        traces.plot(kind="z")
    with pytest.raises(AnalyzerError, match=r"columns=\['Paris'\]: expected some of '<bos>', 'The'"):
        traces.strongest("state", ["Paris"])


def test_a_result_comes_back_from_its_file(traces: Traces, tmp_path: Path) -> None:
    traces.save(tmp_path / "traces.safetensors")
    again = Traces.load(tmp_path / "traces.safetensors")
    assert repr(again) == repr(traces)
    assert again.table().equals(traces.table())


# ---- subjects in texts


def test_a_subject_is_found_by_its_characters(loaded: tuple[nn.Module, Any]) -> None:
    assert span(PROMPT, SUBJECT, loaded[1]) == (5, 6, 7)
    assert span(PROMPT, "Millwick", loaded[1]) == (7,)
    assert fact_of(PROMPT, SUBJECT, ANSWER, loaded[1]).answer == (loaded[1].convert_tokens_to_ids(ANSWER),)
    assert continued("北京是", "中国") == "北京是中国"


class Letters:
    """A tokenizer of pairs of letters that does not tell where they are, and begins with a token that is no text."""

    def __init__(self, lossy: bool = False) -> None:
        self.lossy = lossy

    def __call__(self, text: str) -> dict[str, list[int]]:
        pairs = [text[at : at + 2] for at in range(0, len(text), 2)]
        return {"input_ids": [0, *(ord(one[0]) * 256 + ord(one[1:] or "\0") for one in pairs)]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        text = "".join(chr(one // 256) + chr(one % 256) for one in ids if one).replace("\0", "")
        return text.lower() if self.lossy else text


def test_a_subject_is_found_without_offsets_too() -> None:
    assert span("the Kremlin is", "Kremlin", Letters()) == (3, 4, 5, 6)
    with pytest.raises(AnalyzerError, match=r"does not tell which characters its tokens are, and makes 'the kremlin is' of"):
        span("the Kremlin is", "Kremlin", Letters(lossy=True))


# ---- bad input


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "not there": ((PROMPT, "Junel Dunoth"), r"The subject 'Junel Dunoth' is 0 times in .* Expected it as it stands there"),
    "twice": (("Velin and Velin speaks", "Velin"), r"The subject 'Velin' is 2 times in .* Expected it once."),
    "no places": (([[1, 2, 3]], [7]), r"subject=\[7\]: expected a part of the text, or positions of it from 0 to 2."),
    "ids and text": (([[1, 2, 3]], "Velin"), r"The prompt is token ids, the subject 'Velin'"),
    "two prompts": (([[1, 2], [3, 4]], [0]), r"Token ids have shape \(2, 2\) of torch.int64, expected those of one prompt"),
    "unknown": ((PROMPT, SUBJECT, "Brigosst"), r"The answer 'Brigosst' is no token of this tokenizer, .* '<unk>' for it."),
    "no answer": ((PROMPT, SUBJECT, ""), r"The answer '' has no token. Expected a word"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(loaded: tuple[nn.Module, Any], name: str) -> None:
    args, message = BAD[name]
    with pytest.raises(AnalyzerError, match=message):
        CausalTracing(*loaded).run(*args, progress=False)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "kinds": ({"kinds": ("z",)}, r"kinds=\('z',\): expected some of 'state', 'attention', 'mlp'"),
    "samples": ({"samples": 0}, r"samples=0: expected a number, 1 or more."),
    "noise": ({"noise": -1.0}, r"noise=-1.0: expected a number, 0 or more."),
    "both": ({"noise": 1.0, "swaps": ["a"]}, r"expected a list of other subjects, or noise, not both."),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_mean_nothing_are_refused(loaded: tuple[nn.Module, Any], name: str) -> None:
    settings, message = SETTINGS[name]
    with pytest.raises(AnalyzerError, match=message):
        CausalTracing(*loaded, **settings)


def test_what_cannot_be_traced_is_said(loaded: tuple[nn.Module, Any]) -> None:
    with pytest.raises(AnalyzerError, match=r"is text, and there is no tokenizer. Pass one behind the model."):
        CausalTracing(loaded[0]).run(PROMPT, SUBJECT)
    with pytest.raises(AnalyzerError, match=r"No swap of 1 has 3 tokens like 'Velin dal Millwick'"):
        CausalTracing(*loaded, swaps=["Junel Dunoth"]).run(PROMPT, SUBJECT)
    with pytest.raises(AnalyzerError, match=r"A fact is str 'Velin', expected prompt, subject and answer: a tuple"):
        CausalTracing(*loaded).update("Velin")
    plain = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).eval()
    plain.forward = lambda input_ids: SimpleNamespace(logits=plain[1](plain[0](input_ids)))  # type: ignore[method-assign]
    with pytest.raises(AnalyzerError, match=r"found no layers with a residual stream in Sequential"):
        CausalTracing(plain).run([1, 2, 3], [1])
