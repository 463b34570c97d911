"""Edits that cannot be made: one clear error each, and nothing is left behind."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import fmr
from fmr import EditError, FmrError, IdError, Site, TrackError, edits
from tests.models import build
from tests.residue import model_state, random_state, torch_state
from tests.small import Fn

H = "transformer.h.0"
PATTERN = "transformer.h.0.attn/softmax#0"


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, Tensor, fmr.Run]:
    model, _, kwargs = build("gpt2_eager")
    ids = kwargs["input_ids"]
    short = fmr.run(model, ids[:, :4])
    assert short.graph is not None  # by which an error knows what is near
    return model, ids, short


@pytest.mark.parametrize(
    ("site", "edit", "message"),
    [
        (
            "transformer.h.0.attn/softmax#3",
            edits.Zero(),
            r"never fired\. No pass reached .*Nearest that exist: " + PATTERN,
        ),
        (
            "transfomer.h.0.mlp",
            edits.Zero(),
            r"never fired\. .*No module of that path .*Nearest that exist: transformer\.h\.0\.mlp",
        ),
        (
            f"{H}.attn/scaled_dot_product_attention#0/softmax#0",
            edits.Zero(),
            r"never fired\. .*Nearest that exist: " + PATTERN,
        ),
        ("input:past_key_values", edits.Zero(), r"never fired\. No pass reached .*With optional=True it need not fire"),
        (Site(H, positions=9), edits.Zero(), r"positions=9\) never fired at 9: it had 6 positions\."),
        (Site(H, positions=[1, 9, -7]), edits.Zero(), r"never fired at 9, -7: it had 6 positions\."),
        (Site(H, positions=[[1], [6]]), edits.Zero(), r"never fired at 6: it had 6 positions\."),
        (
            Site(PATTERN, heads=9),
            edits.Zero(),
            r"selects heads=9, but .* has shape \(2, 2, 6, 6\): expected indices below 2",
        ),
        (Site(H, examples=2), edits.Zero(), r"selects examples=2, .*expected indices below 2 along examples"),
        (Site(H, units=16), edits.Zero(), r"selects units=16, .*expected indices below 16 along units"),
        (Site(H, examples=2, positions=9), edits.Zero(), r"selects examples=2, .*expected indices below 2 along examples"),
        (Site(H, positions=[[0], [1], [2]]), edits.Zero(), r"has 3 rows of positions, but 'transformer.h.0' has 2 examples"),
        (Site(H, positions=[[0, 9]]), edits.Zero(), r"has 1 rows of positions, but 'transformer.h.0' has 2 examples"),
        (Site(H, heads=0), edits.Zero(), r"selects heads, but .* has shape \(2, 6, 16\) with axes .*Pass layout="),
        (
            Site(H, positions=slice(6, None)),
            edits.Zero(),
            r"never fired: it selects nothing of what there was, .* 6 positions",
        ),
        (Site(H, positions=[]), edits.Zero(), r"never fired: it selects nothing .*Expected indices within these"),
        (
            Site(PATTERN, heads=slice(2, 4)),
            edits.Zero(),
            r"never fired: it selects nothing of what there was, 2 examples, 2 heads",
        ),
        (Site(PATTERN, heads=0, n_heads=4), edits.Zero(), r"means a value of 4 heads, but .* has shape \(2, 2, 6, 6\)"),
        (
            H,
            torch.zeros(128),
            r"is a tensor of shape \(128,\), expected one of fmr.edits: edits.Replace\(tensor\) puts it there",
        ),
        (
            H,
            edits.Interchange(torch.ones(2, 6, 16)),
            r"is a tensor of shape \(2, 6, 16\), which the model was given as its inputs and raised RuntimeError: .*Replace",
        ),
        (Site(H, passes=3), edits.Zero(), r"never fired: the run had 1 pass, none of them 3"),
        (Site(H, passes=-1), edits.Zero(), r"counts passes from the last, which no run knows before it ends\. Count from 0"),
        (Site(H, passes=slice(-2, None)), edits.Zero(), r"counts passes from the last"),
        (
            H,
            edits.Interchange("short"),
            r"The source of Interchange\('short'\) .* is str, expected a run, or inputs of the model.*gives a name its run",
        ),
        (H, lambda v, c: v[0], r"returned torch.float32 \(6, 16\) on cpu, expected torch.float32 \(2, 6, 16\)"),
        (H, lambda v, c: v.double(), r"returned torch.float64 \(2, 6, 16\) on cpu, expected torch.float32"),
        (
            H,
            lambda v, c: v.mul_(2),
            r"wrote into the value that it was given. Expected a new tensor: begin with value.clone",
        ),
        (Site(H, units=0), lambda v, c: v.zero_(), r"wrote into the value that it was given"),
        (H, lambda v, c: None, r"returned NoneType, expected a tensor of shape \(2, 6, 16\)"),
        (H, edits.Add("a"), r"Add\(addend='a'\) at .*: expected a number or a tensor"),
        (H, edits.Add([1.0, 2.0]), r"Add at .* brings shape \(2,\), expected one that broadcasts to \(2, 6, 16\)"),
        (H, edits.Replace(torch.ones(16, dtype=torch.half)), r"Replace at .* brings torch.float16, expected torch.float32"),
        (H, edits.Mean(torch.ones(2, 6, 8)), r"Mean at .* brings shape \(1, 6, 8\), expected one that broadcasts"),
        ("input:input_ids", edits.Scale(0.5), r"Scale\(factor=0\.5\) at .* holds torch.int64: expected whole numbers"),
        ("input:input_ids", edits.Noise(0.5), r"Noise\(.*holds torch.int64: expected a value with fractions"),
        ("input:input_ids", edits.Mean(), r"Mean\(.*holds torch.int64: expected a value with fractions"),
        (f"{H}.mlp.c_fc/addmm#0", edits.Skip(), r"Skip at .*expected the path of a module"),
        (f"{H}.attn", edits.Zero(), r"returned 2 tensors, expected one\. Name one of them: 'transformer.h.0.attn:0'"),
        ("/opaque#0", edits.Zero(), r"cannot be edited: expected the ID of an op or a source, or the path of a module"),
        (H, edits.OnGradient(edits.Zero()), r"No gradient flows back through .*Expected a run with grad=True"),
    ],
)
def test_an_edit_that_cannot_be_made_is_one_clear_error(site: Any, edit: Any, message: str, made: Any) -> None:
    model, ids, _ = made
    before = torch_state(), model_state(model), random_state(), copy.deepcopy(model.state_dict())
    for keep in ((), "all"):
        with pytest.raises(FmrError, match=message):
            fmr.run(model, ids, keep=keep, edits={site: edit})
    assert (torch_state(), model_state(model), random_state()) == before[:3]
    assert all(torch.equal(value, before[3][name]) for name, value in model.state_dict().items())


def test_a_source_that_does_not_fit_is_told_apart(made: Any) -> None:
    model, ids, short = made
    double = fmr.run(copy.deepcopy(model).double(), ids, keep=[H])
    three = fmr.run(model, ids[[0, 1, 0]], keep=[H])
    for site, source, message in (
        (H, short, r"brings shape \(2, 4, 16\), expected one that broadcasts to \(2, 6, 16\)"),
        (
            Site(H, positions=5),
            short,
            r"has shape \(2, 4, 16\) there, in which it means no parts\. Expected positions that each",
        ),
        (H, double, r"brings torch.float64, expected torch.float32. Convert it: .to\(torch.float32\)"),
        (Site(H, positions=2), three, r"brings shape \(3, 16\), expected one that broadcasts to \(2, 16\)"),
        ("transformer.h.1", double, r"does not hold it: This run did not keep 'transformer.h.1'"),
    ):
        with pytest.raises(EditError, match=message):
            fmr.run(model, ids, keep=(), edits={site: edits.Interchange(source)})


class Narrow(nn.Module):
    """Values of types in which torch computes little, or nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn).float() + torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize()


@pytest.mark.parametrize(
    ("site", "edit", "message"),
    [
        ("/to#0", edits.Add(1.0), r"asks for what torch does not do in torch\.float8_e4m3fn: .*Compute in another type"),
        ("/to#0", edits.Noise(1.0), r"asks for what torch does not do in torch\.float8_e4m3fn"),
        ("/quantize_per_tensor#0", edits.Zero(), r"holds torch\.qint8, which torch does not turn into plain numbers\. Edit"),
        (Site("/quantize_per_tensor#0", units=1), lambda v, c: v, r"holds torch\.qint8"),
    ],
)
@pytest.mark.parametrize("keep", [(), "all"])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # they are to go one day
def test_numbers_that_torch_cannot_compute_with_are_refused_in_words(site: Any, edit: Any, message: str, keep: Any) -> None:
    with pytest.raises(EditError, match=message):
        fmr.run(Narrow(), torch.ones(2, 4), keep=keep, edits={site: edit})
    asked = {"/to#0": lambda value, context: edits.Add(1.0)(value.float(), context).to(value.dtype)}  # as it says there
    run = fmr.run(Narrow(), torch.ones(2, 4), keep=keep, edits=asked)
    assert torch.equal(run.output, torch.full((2, 4), 3.0))
    assert repr(run.receipts["/to#0"]) == "Receipt: fired 1 time, changed 8 elements by 2.83 (L2 norm)"


class Pair(tuple[Tensor, ...]):
    """A tuple that is made in a way of its own and holds more."""

    note: str

    def __new__(cls, first: Tensor, second: Tensor) -> "Pair":
        made = super().__new__(cls, (first, second))
        made.note = "kept"
        return made


class Row(list[Tensor]):
    """A list of a class of its own."""


@pytest.mark.parametrize("form", [Pair, lambda a, b: Row([a, b]), lambda a, b: torch.stack([a, b]).max(0)])
def test_what_holds_an_edited_output_keeps_its_class(form: Any) -> None:
    class Holder(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return form(x * 2, x * 3)

    x = torch.ones(2)
    made = fmr.run(nn.Sequential(Holder()), x, keep=(), edits={"0:0": edits.Zero()}).output
    assert type(made) is type(form(x, x))
    assert not made[0].any()
    assert getattr(made, "note", "kept") == "kept"


@pytest.mark.parametrize("number", [1, -2, "last"])
def test_a_pass_that_a_run_does_not_have_is_told(number: Any, made: Any) -> None:
    with pytest.raises(FmrError, match=rf"^passes\[{number!r}\] of a run of 1 pass: expected a number below 1"):
        made[2].passes[number]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: edits.Clamp(), r"Clamp\(lo=None, hi=None\): expected a number for lo, for hi, or for both"),
        (lambda: edits.Clamp("0"), r"Clamp\(lo='0', hi=None\): expected a number"),
        (lambda: edits.Noise("1"), r"Noise got std='1', expected a number from 0 on"),
        (lambda: edits.Noise(-1.0), r"Noise got std=-1\.0, expected a number from 0 on"),
        (lambda: edits.OnGradient(3), r"OnGradient got 3, expected one of fmr.edits or f\(gradient, context\)"),
        (lambda: edits.OnGradient(edits.Zero), r"OnGradient got <class .*, expected one of fmr.edits"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused_where_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(EditError, match=message):
        make()


def test_nothing_that_is_not_a_number_is_hidden(made: Any) -> None:
    model, ids, _ = made
    run = fmr.run(model, ids, keep=(), edits={H: lambda v, c: v * float("nan")})
    assert repr(run.receipts[H]) == "Receipt: fired 1 time, changed 192 elements by nan (L2 norm)"
    assert run.output.logits.isnan().all()


def test_nested_and_sparse_values_are_refused_and_so_is_what_lies_inside_them() -> None:
    model, args, kwargs = build("encoder_padded")
    nested = "layers.1/transformer_encoder_layer_fwd#0"
    with pytest.raises(EditError, match=r"is a nested tensor, whose elements have no plain places\. Edit what reads it"):
        fmr.run(model, *args, keep=(), edits={nested: edits.Zero()}, **kwargs)
    with pytest.raises(EditError, match=r"layers.0/transformer_encoder_layer_fwd#0 reads nested tensors"):
        fmr.run(model, *args, keep=(), edits={"layers.0/transformer_encoder_layer_fwd#0/softmax#0": edits.Zero()}, **kwargs)
    model, args, kwargs = build("parts")
    with pytest.raises(EditError, match=r"'buffer:links' is a sparse_coo tensor"):
        fmr.run(model, *args, keep=(), edits={"buffer:links": edits.Zero()}, **kwargs)


class Box:
    """An object that holds a tensor."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_a_tensor_inside_an_object_is_refused_not_lost(made: Any) -> None:
    model, ids, _ = made
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    keys = cache.layers[0].keys.clone()
    asked = {"input:past_key_values.layers.0.keys": edits.Zero()}
    with pytest.raises(
        EditError, match=r"'input:past_key_values.layers.0.keys' lies inside an object, which is not taken apart"
    ):
        fmr.run(model, ids[:, :1], past_key_values=cache, keep=(), edits=asked)
    assert torch.equal(cache.layers[0].keys, keys)
    boxing = Fn(lambda module, x: module.inner(x).value, inner=Fn(lambda module, x: Box(x * 2)))
    with pytest.raises(EditError, match=r"'inner' lies inside an object, which is not taken apart"):
        fmr.run(boxing, torch.ones(2), keep=(), edits={"inner": edits.Zero()})
    assert not fmr.run(boxing, torch.ones(2), keep=(), edits={"inner/mul#0": edits.Zero()}).output.any()


def test_a_cache_of_the_user_is_as_without_the_edit_made(made: Any) -> None:
    model, ids, _ = made
    caches = []
    for asked in (None, {"transformer.h.1": edits.Scale(2.0)}):
        cache = DynamicCache()
        fmr.run(model, ids, past_key_values=cache, keep="none" if asked is None else (), edits=asked)
        caches.append(cache)
    for a, b in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_inputs_that_count_alike_but_are_padded_differently_are_not_guessed_between() -> None:
    model, _, kwargs = build("t5")
    given = {"input_ids": kwargs["input_ids"], "decoder_input_ids": kwargs["input_ids"]}
    given["attention_mask"] = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    with pytest.raises(
        EditError, match=r"several inputs of the model that count or pad them differently. Expected inputs of"
    ):
        fmr.run(model, keep=(), edits={Site("encoder.block.0:0", positions=0): edits.Zero()}, **given)
    given["decoder_input_ids"] = kwargs["decoder_input_ids"]
    site = Site("encoder.block.0:0", positions=0)
    run = fmr.run(model, keep=["encoder.block.0:0"], edits={site: edits.Zero()}, **given)
    assert (~run["encoder.block.0:0"].any(-1)).nonzero().tolist() == [[0, 1], [1, 0]]


# ---- compiled and offloaded models


def test_compiled_parts_are_refused_where_an_edit_lies_in_them_and_no_hindrance_elsewhere() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU()), nn.Linear(3, 3)).eval()
    x, twin = torch.randn(2, 3), copy.deepcopy(model)
    model[1].compile(backend="eager")
    for site in ("0", "0/linear#0", "1"):
        run = fmr.run(model, x, keep=(), edits={site: edits.Scale(0.5)})
        assert torch.equal(run.output, fmr.run(twin, x, keep=(), edits={site: edits.Scale(0.5)}).output)
    for asked, keep in (({"1.0/relu#0": edits.Zero()}, ()), ({"0": edits.Zero()}, "all")):
        with pytest.raises(TrackError, match=r"its module '1' is compiled .*Expected a plain module"):
            fmr.run(model, x, keep=keep, edits=asked)
    whole = torch.compile(twin, backend="eager")
    with pytest.raises(
        TrackError, match=r"it is compiled \(OptimizedModule\).*track the module underneath, `model._orig_mod`"
    ):
        fmr.run(whole, x, keep=(), edits={"0": edits.Zero()})


@pytest.mark.parametrize("keep", [(), "all", "*"])
def test_an_offloaded_model_is_edited_like_any_other_but_for_its_weights(keep: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloads weights; an optional package")
    model, _, kwargs = build("gpt2")
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    inside = f"{H}.attn/scaled_dot_product_attention#0/softmax#0"
    asked: dict[Any, Any] = {
        f"{H}.mlp": edits.Scale(0.5),
        f"{H}.ln_1/layer_norm#0": edits.Add(1.0),
        Site(inside, heads=1): edits.Zero(),
    }
    assert torch.equal(*(fmr.run(one, keep=keep, edits=asked, **kwargs).output.logits for one in (away, model)))
    with pytest.raises(
        EditError, match=r"'param:transformer.h.0.mlp.c_fc.weight' is offloaded: it is loaded when its module"
    ):
        fmr.run(away, keep=keep, edits={f"param:{H}.mlp.c_fc.weight": edits.Scale(0.5)}, **kwargs)
    assert all(parameter.is_meta for parameter in away.parameters())


def test_on_the_meta_device_edits_run_and_receipts_have_no_numbers() -> None:
    asked = {"up": edits.Scale(0.5), "param:down.weight": edits.Zero()}
    run = fmr.run(build("chain")[0].to("meta"), torch.ones(3, 4, device="meta"), keep=(), edits=asked)
    with pytest.raises(EditError, match=r"fired 1 times on the meta device, which tells no numbers"):
        run.receipts["up"]


# ---- in place, inside kernels


def by_share(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    h = x * 1
    h.lerp_(y, 0.25)
    return h


def into_out(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.addcmul(x, x, y, out=out)
    return out


def onto_itself(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    h = x * 1
    torch.lerp(h, y, 0.25, out=h.view_as(h))
    return h


INSIDE = [(by_share, "/lerp#0/sub#0"), (onto_itself, "/lerp#0/sub#0"), (into_out, "/addcmul#0/mul#0")]


@pytest.mark.parametrize(("forward", "inner"), INSIDE)
def test_what_lies_inside_an_op_that_overwrites_what_it_reads_is_read_and_edited_as_it_was(forward: Any, inner: str) -> None:
    model, x, y = Fn(forward), torch.randn(3, 4), torch.randn(3, 4)
    truth = x * y if forward is into_out else y - x
    for keep in ([inner], "all", "*"):
        torch.testing.assert_close(fmr.run(model, x, y, keep=keep)[inner], truth)
        run = fmr.run(model, x, y, keep=keep, edits={inner: edits.Zero()})
        assert torch.equal(run.output, x)
        assert not run[inner].any()
    assert torch.equal(fmr.run(model, x, y, keep=(), edits={inner: lambda v, c: v.clone()}).output, model(x, y))
    with pytest.raises(IdError):
        fmr.run(model, x, y)["/lerp#0/exp#0"]
