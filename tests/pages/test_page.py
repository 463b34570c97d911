"""A page shows the numbers of the run, takes any token, works in a browser by keyboard, and refuses what it cannot show."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import fmr
from fmr.pages.arrays import unpacked
from tests.models import build
from tests.pages.browser import Element, needs_browser, opened, parsed

PROMPT = "Junel Dunoth grew up in"


@cache
def facts() -> tuple[Any, Any, fmr.Run, Any]:
    model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
    run = fmr.run(model, **tokenizer(PROMPT, return_tensors="pt"))
    return model, tokenizer, run, fmr.locate(run)


@cache
def encoder_decoder() -> tuple[fmr.Run, Any]:
    model, args, kwargs = build("t5")
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


def test_the_last_row_of_the_lens_is_what_the_model_says() -> None:
    _, _, run, structure = facts()
    lens = data_of(fmr.page(run, structure, top=3))["passes"][0]["lens"]
    shares, words = run.output.logits.softmax(-1).topk(3)
    assert torch.equal(unpacked(lens["words"])[-1].long(), words)
    assert torch.allclose(unpacked(lens["shares"])[-1], shares)
    assert lens["rows"] == ["before 0", "0", "1", "2", "3"]


def test_words_that_a_value_promotes_are_those_of_the_vector_with_the_sign_of_its_coefficient() -> None:
    _, _, run, structure = facts()
    told = data_of(fmr.page(run, structure))["promoted"][2]
    keys, words, gains = (unpacked(told[name]) for name in ("keys", "words", "gains"))
    assert bool((keys < 0).any())
    assert bool((keys >= 0).any())
    empty = structure.read_out(torch.zeros(1, 128))
    for n in (0, len(keys) - 1):
        key = int(keys[n])
        vector = structure.mlps[2].memory(key)[1] if key >= 0 else -structure.mlps[2].memory(-1 - key)[1]
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
    fmr.page(run, structure, tmp_path / "page.html", tokens=tokenizer.convert_ids_to_tokens)
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


HOSTILE = ["</script><script>document.documentElement.dataset.error='ran'</script>", "\"'`<b>&amp;", "שלום", "a\nb\u2028", "", "\ud800"]


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


@needs_browser
def test_parts_are_named_for_who_does_not_see_them(tmp_path: Path) -> None:
    _, _, run, structure = facts()
    fmr.page(run, structure, tmp_path / "page.html")
    document = opened(tmp_path / "page.html")
    for part in document.every("section"):
        assert document.at(part.attributes["aria-labelledby"]).text
    for id in ("tokens", "layers", "heads", "lens", "pattern"):
        assert document.at(id).attributes["aria-label"]
    for id in ("tokens", "layers", "heads", "lens"):
        assert [one.attributes["aria-selected"] for one in document.at(id).every(tabindex="0")] == ["true"]
