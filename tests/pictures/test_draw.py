"""Pictures: what the DOT text says must be what the graph says, closed, folded and cut as asked; and it must be drawable."""

import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import Graph, Site
from fmr.errors import DrawError, IdError
from fmr.ids import spelled
from fmr.ops.fused import is_fused
from fmr.pictures.draw import ROLES, dot
from fmr.pictures.picture import View, picture
from tests.models import ZOO, build

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's program 'dot' is not on the PATH")
PATTERN = "transformer.h.0.attn/softmax#0"


# ---- reading DOT back


@dataclass
class Part:
    """A graph or a cluster of a DOT text: attributes, nodes, edges, and the clusters right inside."""

    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, dict[str, str]] = field(default_factory=dict)
    edges: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    parts: list["Part"] = field(default_factory=list)

    def walk(self) -> Iterator["Part"]:
        yield self
        for part in self.parts:
            yield from part.walk()


TOKEN = re.compile(r'\s*("(?:\\.|[^"\\])*"|->|[{}\[\]=]|[\w.+-]+|<)')


def tokens(text: str) -> Iterator[str]:
    place = 0
    while match := TOKEN.match(text, place):
        place = match.end()
        if match[1] == "<":
            begin, level = place - 1, 1
            while level:
                level += {"<": 1, ">": -1}.get(text[place], 0)
                place += 1
            yield text[begin:place]
        else:
            yield match[1]
    assert not text[place:].strip(), f"not DOT: {text[place : place + 60]!r}"


def plain(token: str) -> str:
    return unescape(re.sub(r"\\(.)", r"\1", token[1:-1], flags=re.DOTALL)) if token.startswith('"') else token


def read(text: str) -> Part:
    """The structure of a DOT text."""
    stream = list(tokens(text))[::-1]

    def take(expected: str | None = None) -> str:
        token = stream.pop()
        assert expected is None or token == expected, f"{token!r} where {expected!r} was expected"
        return token

    def attributes() -> dict[str, str]:
        found: dict[str, str] = {}
        if stream[-1] == "[":
            take("[")
            while stream[-1] != "]":
                name = take()
                take("=")
                found[name] = plain(take())
            take("]")
        return found

    def body(part: Part) -> Part:
        take("{")
        while stream[-1] != "}":
            statement(part, stream[-1] if stream[-1] == "{" else take())
        take("}")
        return part

    def statement(part: Part, word: str) -> None:
        if word == "subgraph":
            part.parts.append(body(Part(take())))
        elif word == "{":
            body(Part("ranks"))
        elif word == "graph":
            part.attributes |= attributes()
        elif stream[-1] == "->":
            take("->")
            part.edges.append((word, take(), attributes()))
        elif word not in ("node", "edge"):
            assert word not in part.nodes
            part.nodes[word] = attributes()
        else:
            attributes()

    take("digraph")
    return body(Part(plain(take())))


def caption(attributes: dict[str, str]) -> list[str]:
    """The lines of a label, without their markup."""
    lines = attributes["label"][1:-1].split("<BR/>")
    return [
        unescape(re.sub(r"<[^>]*>", "", line)).replace("\N{NO-BREAK SPACE}", " ").replace("\N{MULTIPLICATION SIGN}", "x")
        for line in lines
    ]


def boxes(part: Part) -> dict[str, dict[str, str]]:
    """Every box of a drawing, in the order of their numbers."""
    found = {name: node for each in part.walk() for name, node in each.nodes.items()}
    return dict(sorted(found.items(), key=lambda item: int(item[0].removeprefix("n"))))


def captions(part: Part) -> list[str]:
    return [caption(node)[0] for node in boxes(part).values()]


def drawn_edges(part: Part) -> list[tuple[str, str, dict[str, str]]]:
    return [edge for edge in part.edges if edge[2].get("style") != "invis"]


# ---- graphs


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.outer = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).relu())


class Tower(nn.Module):
    """Ops from no parameter, a chain of equal blocks, and one after it that differs."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([*(Block() for _ in range(layers)), Block(8)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        mask = (torch.arange(3)[:, None] >= torch.arange(3)).float().sum(-1, keepdim=True)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x) * mask, "hidden": (x,)}


@cache
def tower() -> Graph:
    return fmr.run(Tower(), torch.zeros(3, 4)).graph


@cache
def zoo(name: str) -> Graph:
    model, args, kwargs = build(name)
    return fmr.run(model, *args, **kwargs).graph


# ---- every op


@pytest.mark.parametrize("name", ["gpt2_eager", "bert", "cnn", "gru"])
def test_each_value_is_one_box_and_each_edge_one_arrow(name: str) -> None:
    graph, drawing = zoo(name), read(dot(zoo(name)))
    ids = {box: node["tooltip"].partition("\n")[0] for box, node in boxes(drawing).items() if caption(node)[0] != "output"}
    assert Counter(ids.values()) == Counter(str(node.id) for node in graph)
    arrows = Counter((ids[tail], ids[head]) for tail, head, _ in drawn_edges(drawing) if head in ids)
    assert arrows == Counter({(str(parent), str(node.id)) for node in graph for parent in node.parents})


def test_clusters_nest_as_module_calls_do() -> None:
    graph = zoo("gpt2_eager")
    scopes = {scope.path: scope for scope in graph.scopes}

    def check(part: Part, above: str | None) -> None:
        for inner in part.parts:
            shown = inner.attributes["tooltip"].partition(" (")[0]
            scope = scopes[shown if shown != "root" else ""]
            assert scope.parent == above
            name = scope.path.removeprefix(f"{above}." if above else "")
            assert caption(inner.attributes) == [f"{name} · {scope.kind}" if name else scope.kind]
            for node in inner.nodes.values():
                known = graph[node["tooltip"].partition("\n")[0]]
                assert known.id.is_source or known.scope == scope.path
            check(inner, scope.path)

    drawing = read(dot(graph))
    check(drawing, None)
    assert sum(1 for _ in drawing.walk()) - 1 == len(graph.scopes)
    assert [caption(node)[0] for node in drawing.nodes.values()] == ["input_ids", "attention_mask", "output"]


def test_boxes_say_op_and_shape_and_tooltips_all_the_rest() -> None:
    graph = zoo("gpt2_eager")
    node = next(node for node in boxes(read(dot(graph))).values() if node["tooltip"].startswith(PATTERN + "\n"))
    shape = graph[PATTERN].shape
    assert caption(node) == ["softmax#0", "x".join(map(str, shape))]
    lines = node["tooltip"].split("\n")
    assert lines[1] == f"float32 {list(shape)} on cpu"
    assert f"0 = {graph[PATTERN].parents[0]}" in lines
    assert "dim = -1" in lines
    assert lines[-1] == graph[PATTERN].where


def test_parameters_stand_in_the_module_that_reads_them_first_under_its_name_for_them() -> None:
    drawing = read(dot(zoo("gpt2_eager")))
    holder = next(part for part in drawing.walk() if part.attributes["tooltip"].startswith("transformer.h.1.attn.c_attn ("))
    assert {"weight", "bias"} <= set(captions(holder))


def test_each_kind_of_box_has_its_own_look_and_the_legend_has_those_that_are_there() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.func.vmap(lambda row: row * 2)(self.norm(x))
            return nn.functional.scaled_dot_product_attention(y[None], y[None], y[None])

    drawing = read(dot(fmr.run(Odd().eval(), torch.zeros(2, 4)).graph))
    looks = {
        caption(node)[0]: (node["shape"], node["style"], node["fillcolor"], node["peripheries"])
        for node in boxes(drawing).values()
    }
    kinds = ["x", "weight", "running_mean", "opaque#0", "scaled_dot_product_attention#0", "batch_norm#0"]
    assert len({looks[name] for name in kinds}) == len(kinds)
    legend = drawing.attributes["label"]
    for word in ("input", "parameter", "buffer", "op", "fused op", "opaque: its producer could not be seen", "output"):
        assert f">{word}<" in legend
    assert "module call, closed" not in legend


# ---- closed and folded


@pytest.mark.parametrize("depth", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_no_op_is_lost_and_arrows_run_forward(name: str, depth: int | None) -> None:
    graph = zoo(name)
    shown = picture(graph, View(depth=depth))
    inside = [node.id for box in shown.boxes if box.look != "output" for node in box.nodes]
    assert Counter(inside) == Counter(node.id for node in graph)
    at = {node.id: place for place, box in enumerate(shown.boxes) if box.look != "output" for node in box.nodes}
    edges = {(at[parent.id], at[node.id]) for node in graph for parent in node.parents}
    assert {edge for edge in shown.edges if shown.boxes[edge[1]].look != "output"} == {(a, b) for a, b in edges if a != b}
    assert not has_cycle(shown.edges)
    read(dot(graph, depth=depth))


def has_cycle(edges: tuple[tuple[int, int], ...]) -> bool:
    left = set(edges)
    while left:
        heads = {head for _, head in left}
        loose = {edge for edge in left if edge[0] not in heads}
        if not loose:
            return True
        left -= loose
    return False


def test_depth_closes_what_lies_deeper() -> None:
    assert captions(read(dot(tower(), depth=0))) == ["x", "Tower", "output"]
    closed = read(dot(tower(), depth=1))
    assert [caption(node) for node in boxes(closed).values() if "head" in caption(node)[0]] == [
        ["head", "Linear · 1 op", "→ 3x2"]
    ]
    assert not any(node["tooltip"].startswith("param:") for node in boxes(closed).values())
    assert len(captions(read(dot(tower(), depth=2, fold=False)))) > len(captions(closed))


def test_equal_neighbours_fold_and_their_ops_add_up() -> None:
    folded = read(dot(tower(), depth=1))
    assert ["blocks.0 … blocks.4  x 5", "Block · 4 ops each", "→ 3x4"] in [caption(node) for node in boxes(folded).values()]
    assert "blocks.5" in captions(folded)
    counts = [len(box.ops) for box in picture(tower(), View(depth=1)).boxes if box.look != "output"]
    assert sum(counts) == sum(not node.id.is_source for node in tower())
    assert [name for name in captions(read(dot(tower(), depth=1, fold=False))) if "blocks" in name] == [
        f"blocks.{i}" for i in range(6)
    ]


def test_a_fold_opens_where_the_picture_is_about_one_of_its_members() -> None:
    names = captions(read(dot(tower(), depth=1, around="blocks.2", hops=9)))
    assert "blocks.0 … blocks.1  x 2" in names
    assert "blocks.3 … blocks.4  x 2" in names
    assert {"inner", "relu#0", "outer", "add#0"} <= set(names)


def test_equal_calls_that_do_not_feed_each_other_stay_apart() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    assert captions(read(dot(fmr.run(Fork(), torch.zeros(1, 4)).graph, depth=1))) == ["x", "left", "right", "output"]


def test_ops_that_no_parameter_reaches_share_a_box_that_says_so() -> None:
    runs = [
        caption(node) for node in boxes(read(dot(tower(), depth=1))).values() if "without parameters" in caption(node)[0]
    ]
    assert runs == [["6 ops without parameters", "arange, getitem, ge, …", "→ 3x1"]]
    assert not any("without" in name for name in captions(read(dot(tower()))))


def test_a_closed_module_tells_what_is_opaque_in_it() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(lambda row: row * 2)(x)

    graph = fmr.run(nn.Sequential(Hidden(), nn.ReLU()), torch.zeros(2, 2)).graph
    assert ["0", "Hidden · 1 op", "1 opaque inside", "→ 2x2"] in [
        caption(node) for node in boxes(read(dot(graph, depth=1))).values()
    ]


def test_a_fused_op_that_is_written_out_is_a_frame_in_its_module() -> None:
    graph = zoo("gpt2")
    fused = next(node for node in graph if is_fused(node))
    drawing = read(dot(graph.unfused))
    holder = next(part for part in drawing.walk() if part.attributes["tooltip"].startswith(f"{fused.scope} ("))
    inner = next(part for part in holder.parts if "fused op, written out" in caption(part.attributes)[0])
    assert "matmul#0" in captions(inner)


# ---- around


def neighbourhood(graph: Graph, start: set[str], hops: int) -> set[str]:
    pairs = {(str(parent), str(node.id)) for node in graph for parent in node.parents}
    for _ in range(hops):
        start = start | {b for a, b in pairs if a in start} | {a for a, b in pairs if b in start}
    return start


def test_a_layer_is_drawn_with_its_next_neighbours_alone() -> None:
    graph = zoo("gpt2_eager")
    assert dot(graph, around="transformer.h.1") == dot(graph, around="transformer.h.1", hops=1)


@pytest.mark.parametrize("hops", [0, 1, 2, 4])
def test_around_shows_what_lies_within_so_many_edges(hops: int) -> None:
    graph = zoo("gpt2_eager")
    shown = picture(graph, View(around=PATTERN, hops=hops))
    kept = neighbourhood(graph, {PATTERN}, hops)
    assert {str(node.id) for box in shown.boxes for node in box.nodes} == kept
    whole = picture(graph, View())
    name = {place: str(box.nodes[0].id) for place, box in enumerate(whole.boxes) if box.look != "output"}
    cut = sum((name.get(a) in kept) != (name.get(b) in kept) for a, b in whole.edges)
    assert sum(box.hidden for box in shown.boxes) == cut


def test_around_a_module_call_keeps_all_of_it() -> None:
    graph, path = zoo("gpt2_eager"), "transformer.h.0.attn"
    shown = {str(node.id) for box in picture(graph, View(around=path, hops=0)).boxes for node in box.nodes}
    inside = {str(node.id) for node in graph.module(path).nodes}
    assert inside <= shown
    assert all(name.startswith(f"param:{path}.") for name in shown - inside)


def test_cut_edges_are_dashed_stubs() -> None:
    drawing = read(dot(zoo("gpt2_eager"), around=PATTERN, hops=1))
    stubs = {name for name, node in boxes(drawing).items() if re.fullmatch(r"… \d+ more", caption(node)[0])}
    dashed = [(tail, head) for tail, head, look in drawn_edges(drawing) if look.get("style") == "dashed"]
    assert stubs
    assert sorted(name for edge in dashed for name in edge if name in stubs) == sorted(stubs)
    assert ">… more beyond the cut<" in drawing.attributes["label"]


def test_what_around_names_may_be_a_node_a_site_a_module_call_or_a_value_in_a_fused_op() -> None:
    graph = zoo("gpt2_eager")
    expected = dot(graph, around=PATTERN)
    assert dot(graph, around=graph[PATTERN]) == dot(graph, around=Site(PATTERN, heads=1)) == expected
    assert dot(graph, around=graph.module("transformer.h.0")) == dot(graph, around="transformer.h.0")
    fused = zoo("gpt2")
    op = next(node for node in fused if is_fused(node))
    assert dot(fused, around=fused.inner(op)[0]) == dot(fused, around=op)


def test_around_opens_the_modules_that_hold_it() -> None:
    names = captions(read(dot(zoo("gpt2_eager"), depth=1, around=PATTERN, hops=1)))
    assert "softmax#0" in names


# ---- roles


def test_roles_colour_and_name_values_and_stand_in_the_legend() -> None:
    graph = zoo("gpt2_eager")
    roles = {PATTERN: "pattern", "transformer.h.0.attn/matmul#1": "z"}
    drawing = read(dot(graph, structure=roles))
    nodes = {caption(node)[0]: node for node in boxes(drawing).values()}
    assert caption(nodes["pattern"])[1] == "softmax#0"
    assert nodes["pattern"]["fillcolor"] != nodes["z"]["fillcolor"]
    assert ">pattern<" in drawing.attributes["label"]
    assert dot(graph, structure=SimpleNamespace(roles=roles)) == dot(graph, structure=roles)


def test_a_role_without_a_box_of_its_own_is_told_by_the_box_that_holds_it() -> None:
    closed = read(dot(zoo("gpt2_eager"), depth=3, structure={PATTERN: "pattern"}))
    assert [caption(node)[0] for node in boxes(closed).values() if "holds pattern" in caption(node)] == ["attn"]
    graph = zoo("gpt2")
    op = next(node for node in graph if is_fused(node))
    inner = graph.inner(op)[0].id
    fused = read(dot(graph, structure={inner: "transposed keys"}))
    assert [caption(node)[0] for node in boxes(fused).values() if "holds transposed keys" in caption(node)] == [
        op.id.rpartition("/")[2]
    ]


def test_a_role_has_one_colour_in_every_picture_of_a_structure() -> None:
    graph = zoo("gpt2_eager")
    structure = fmr.locate(graph)
    assert len(set(structure.roles.values())) <= len(ROLES) == len(set(ROLES))
    fills: dict[str, set[str]] = {}
    for around in ("transformer.h.0.attn", "transformer.h.1.mlp", "transformer.h.1"):
        for box in boxes(read(dot(graph, around=around, structure=structure))).values():
            if caption(box)[0] in structure.roles.values():
                fills.setdefault(caption(box)[0], set()).add(box["fillcolor"])
    assert set(fills) == {"q", "k", "v", "scores", "pattern", "z", "out", "pre", "post", "resid"}
    assert {len(found) for found in fills.values()} == {1}
    assert len(set.union(*fills.values())) == len(fills)


def test_heads_and_memories_stand_on_frames_and_on_closed_modules() -> None:
    graph = zoo("gpt2_eager")
    structure = fmr.locate(graph)
    opened = [part.attributes.get("label", "") for part in read(dot(graph, structure=structure)).walk()]
    assert sum("2 heads of 8" in label for label in opened) == sum("64 memories" in label for label in opened) == 2
    (folded,) = [
        caption(box) for box in boxes(read(dot(graph, depth=2, structure=structure))).values() if " x 2" in caption(box)[0]
    ]
    assert folded[-1] == "2 heads of 8, 64 memories"
    closed = [line for box in boxes(read(dot(graph, depth=1, structure=structure))).values() for line in caption(box)]
    assert "2 heads of 8 x 2, 64 memories x 2" in closed
    bare = SimpleNamespace(roles=structure.roles)
    assert "heads of" not in dot(graph, structure=bare)


def test_samples_of_the_legend_are_as_wide_as_their_words() -> None:
    legend = read(dot(tower(), structure={"input:args.0": "start"})).attributes["label"]
    assert re.search(r'<TD WIDTH="\d+"></TD></TR>', legend)


# ---- the text


def test_the_same_graph_gives_the_same_text() -> None:
    model, args, kwargs = build("bert")
    again = fmr.run(model, *args, **kwargs).graph
    for view in ({}, {"depth": 2}, {"around": "encoder.layer.0", "hops": 1}):
        assert dot(again, **view) == dot(zoo("bert"), **view)


def test_addresses_do_not_enter_the_text() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rand(2, generator=torch.Generator()) + x

    text = dot(fmr.run(Given(), torch.zeros(2)).graph)
    assert "Generator object" in text
    assert " at 0x" not in text


AWKWARD = [
    'say "hi"',
    "a:b",
    "<b>&amp;</b>",
    "back\\slash\\n",
    "two\nlines",
    "bell\x07",
    "\N{SNOWMAN}",
    "a/b#0",
    "x]; n0 -> n1",
]


def awkward() -> Graph:
    model = nn.Sequential()
    for name in AWKWARD:
        model.add_module(name, nn.Linear(2, 2))
    return fmr.run(model, torch.zeros(1, 2)).graph


@pytest.mark.parametrize("depth", [None, 1])
def test_names_may_hold_any_character(depth: int | None) -> None:
    drawing = read(dot(awkward(), depth=depth, fold=False))
    shown = [caption(part.attributes)[0].partition(" · ")[0] for part in drawing.parts[0].parts] or captions(drawing)[1:-1]
    assert shown == [spelled(name) for name in AWKWARD]
    if depth is None:
        ids = [node["tooltip"].partition("\nfloat32")[0] for node in boxes(drawing).values()]
        assert [f"{spelled(name)}/linear#0" for name in AWKWARD] == [name for name in ids[:-1] if "/linear#0" in name]


def test_saving_writes_the_text(tmp_path: Path) -> None:
    tower().save_dot(tmp_path / "tower.dot", depth=1)
    assert (tmp_path / "tower.dot").read_text(encoding="utf-8") == dot(tower(), depth=1)


@needs_dot
@pytest.mark.parametrize("make", [tower, awkward, lambda: zoo("cnn")])
def test_the_svg_is_xml_with_ids_in_its_tooltips(make: Callable[[], Graph], tmp_path: Path) -> None:
    graph = make()
    graph.save_svg(tmp_path / "graph.svg", structure={graph.nodes[-1].id: "last"})
    root = ElementTree.fromstring((tmp_path / "graph.svg").read_bytes())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    tips = {link.get("{http://www.w3.org/1999/xlink}title", "").partition("\nfloat32")[0] for link in root.iter()}
    assert {str(node.id).replace("\x07", "\\x07") for node in graph if node.kind == "float32"} <= tips


@needs_dot
def test_a_hundred_equal_layers_are_one_box(tmp_path: Path) -> None:
    graph = fmr.run(Tower(100), torch.zeros(3, 4), keep="none").graph
    graph.save_svg(tmp_path / "tall.svg", depth=1)
    assert "blocks.0 … blocks.99" in (tmp_path / "tall.svg").read_text(encoding="utf-8")


# ---- errors


def test_without_the_program_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DrawError) as error:
        tower().save_svg(tmp_path / "tower.svg")
    for words in (
        "apt-get install graphviz",
        "brew install graphviz",
        "conda install",
        "graph.save_dot(path) works without it",
    ):
        assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []
    tower().save_dot(tmp_path / "tower.dot")
    assert (tmp_path / "tower.dot").exists()


def test_an_unknown_place_names_its_neighbours() -> None:
    with pytest.raises(IdError, match=r"no value and no module call 'blocks\.9' .* Nearest that exist: .*blocks\."):
        dot(tower(), around="blocks.9")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": -1}, "depth=-1 is no depth. Expected 0 for one box"),
        ({"depth": "two"}, "depth='two' is no depth"),
        ({"hops": -2}, "hops=-2 is no distance. Expected 0"),
        ({"structure": 7}, "structure=7 names no roles. Expected what fmr.locate returns, or a mapping"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DrawError, match=re.escape(words)):
        dot(tower(), **options)
