"""The layer table: parameters as the model has them, operations as torch counts them, on any device."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fmr
from fmr.pictures.captions import TIMES
from tests.models import build
from tests.small import Fn


def counted(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops()


def on_meta(nest: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda item: item.to("meta") if isinstance(item, Tensor) else item, nest)


def table(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return fmr.run(model, *args, **kwargs).graph.table()


# ---- operations


@pytest.mark.parametrize("name", ["gpt2_eager", "mamba", "gru", "cnn", "in_place", "cross_attention"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    model, args, kwargs = build(name)
    root = table(model, *args, **kwargs)[""]
    assert root.complete
    assert root.flops == counted(model, *args, **kwargs) > 0


@pytest.mark.parametrize("name", ["vit", "t5", "transformer", "attention", "encoder", "lstm", "gru", "cnn"])
def test_fused_kernels_count_as_the_products_that_torch_runs_where_it_has_no_such_kernel(name: str) -> None:
    model, args, kwargs = build(name)
    here = table(model, *args, **kwargs)[""]
    model, args, kwargs = model.to("meta"), on_meta(args), on_meta(kwargs)
    assert here.flops == counted(model, *args, **kwargs) > 0
    assert table(model, *args, **kwargs)[""].flops == here.flops


def test_the_same_model_has_the_same_operations_whatever_its_attention() -> None:
    flops = {table(model, *args, **kwargs)[""].flops for model, args, kwargs in map(build, ("gpt2", "gpt2_eager"))}
    assert len(flops) == 1


def test_each_call_has_the_operations_of_its_module() -> None:
    model, args, kwargs = build("gpt2_eager")
    with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
        model(*args, **kwargs)
    theirs = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    ours = {layer.path: layer.flops for layer in table(model, *args, **kwargs)}
    kind = type(model).__name__
    assert {path: flops for path, flops in ours.items() if flops} == {
        path.removeprefix(kind).lstrip("."): flops for path, flops in theirs.items() if path != "Global" and flops
    }


def test_mixed_precision_counts_like_single() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = table(model, x)[""]
    assert half.flops == table(model, x)[""].flops == 2 * 2 * (4 * 8 + 8 * 3)


def test_what_cannot_be_counted_is_marked_and_not_guessed() -> None:
    scripted = torch.jit.script(nn.Linear(4, 4))
    layers = table(nn.Sequential(nn.Linear(4, 4), scripted), torch.randn(2, 4))
    assert [layer.complete for layer in layers] == [False, True, False]
    assert layers[""].flops == layers["0"].flops == 64
    assert repr(layers).splitlines()[1].split()[-3:] == ["64+", "32", "B"]
    assert repr(layers).endswith("+ and what could not be counted, as in scripted code")


# ---- parameters


@pytest.mark.parametrize("name", ["gpt2", "bert", "cnn", "mamba", "t5"])
def test_the_root_reads_each_parameter_once(name: str) -> None:
    model, args, kwargs = build(name)
    assert table(model, *args, **kwargs)[""].params == sum(parameter.numel() for parameter in model.parameters())


def test_tied_weights_count_where_they_are_read_and_once_above() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head, self.unused = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.Linear(4, 4)
            self.head.weight = self.tokens.weight

        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(self.head(self.tokens(x)), -1)

    layers = table(Tied(), torch.tensor([[1, 2]]))
    assert [(layer.path, layer.params, layer.own) for layer in layers] == [("", 40, 0), ("tokens", 40, 40), ("head", 40, 40)]


def test_a_module_called_again_has_a_row_for_each_call_and_its_parameters_once() -> None:
    cell = nn.Linear(4, 4)
    layers = table(Fn(lambda self, x: self.cell(self.cell(x)), cell=cell), torch.randn(2, 4))
    assert [(layer.path, layer.params, layer.flops) for layer in layers] == [
        ("", 20, 128),
        ("cell", 20, 64),
        ("cell@1", 20, 64),
    ]


# ---- the table


def test_it_prints_a_row_a_call_indented_by_depth() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU()), nn.Linear(8, 300))
    layers = table(model, torch.randn(2, 4))
    assert repr(layers).replace(TIMES, "x").splitlines() == [
        "module  kind        output  params    own    flops    size",
        "(root)  Sequential  2x300    2,740      0  9.728 k  2.4 kB",
        "  0     Linear      2x8         40     40      128    64 B",
        "  1     Sequential  2x8          0      0        0    64 B",
        "    0   ReLU        2x8          0      0        0    64 B",
        "  2     Linear      2x300    2,700  2,700    9.6 k  2.4 kB",
    ]
    assert layers._repr_html_().startswith("<pre>module")


def test_depth_leaves_out_what_lies_deeper_and_changes_no_number() -> None:
    model, args, kwargs = build("gpt2")
    graph = fmr.run(model, *args, **kwargs).graph
    shallow = graph.table(depth=1)
    assert [layer.path for layer in shallow] == ["", "transformer", "lm_head"]
    assert all(layer == graph.table()[layer.path] for layer in shallow)


def test_the_frame_has_a_row_a_call_by_its_path() -> None:
    model, args, kwargs = build("gpt2")
    layers = table(model, *args, **kwargs)
    frame = layers.frame()
    assert list(frame.columns) == ["kind", "output", "params", "own", "flops", "complete", "nbytes"]
    assert frame.loc["transformer.h.0.mlp", "params"] == layers["transformer.h.0.mlp"].params
    assert len(frame) == len(layers)


def test_a_path_that_is_not_there_offers_the_nearest() -> None:
    layers = table(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    assert layers[0].path == ""
    with pytest.raises(fmr.IdError, match=r"The table has no module call '0\.0'\."):
        layers["0.0"]


def test_a_nest_and_a_call_without_output_have_rows() -> None:
    model = Fn(
        lambda self, x: (self.none(x), self.pair(x))[1],
        none=Fn(lambda self, x: None),
        pair=Fn(lambda self, x: {"a": x + 1, "b": (x.argmax(), x * 2)}),
    )
    layers = table(model, torch.randn(2, 4))
    assert layers["none"].output == ()
    assert [node.op for node in layers["pair"].output] == ["add", "argmax", "mul"]
    assert "2x4, scalar int64 and 1 more" in repr(layers).replace(TIMES, "x")


def test_printing_needs_no_pandas() -> None:
    made = "repr(fmr.run(torch.nn.Linear(2, 2), torch.ones(1, 2)).graph.table())"
    code = f"import sys, torch, fmr; {made}; print('pandas' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "False"
