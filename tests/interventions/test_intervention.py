"""Interventions: modules that train and lie in others, saved, and found again in other copies of a model."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits, subspaces
from fmr.errors import EditError, StoreError
from tests.models import build

WIDTH = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).tanh())
        return out


SITE = fmr.Site("first/linear#0")
BASE, SOURCE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.ones(6, 4)


def swap(rotation: Any = None) -> fmr.Intervention:
    return fmr.Intervention({SITE: edits.Interchange("other", within=rotation)})


def test_it_runs_a_model_as_its_edits_do() -> None:
    net, rotation = Net(), subspaces.Rotation(WIDTH, 3)
    plain = fmr.run(net, BASE, edits={SITE: edits.Interchange(SOURCE, within=rotation)}).output
    assert swap(rotation)(net, BASE, sources={"other": SOURCE}).equal(plain)
    assert swap(rotation).run(net, BASE, sources={"other": fmr.run(net, SOURCE)}).output.equal(plain)
    assert not plain.equal(net(BASE))


def test_the_same_source_is_the_identity() -> None:
    net = Net()
    assert swap(subspaces.Rotation(WIDTH, 3))(net, BASE, sources={"other": BASE}).equal(net(BASE))


def test_it_trains_and_the_model_does_not() -> None:
    net, swapped = Net(), swap(subspaces.Rotation(WIDTH, 2))
    weights = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(swapped.parameters(), lr=1.0)
    losses = []
    for _ in range(60):
        loss = swapped(net, BASE, sources={"other": SOURCE}).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-4
    assert all(one.equal(weights[name]) for name, one in net.state_dict().items())
    assert not net.first._forward_hooks


def test_shared_parts_are_counted_once() -> None:
    rotation = subspaces.Rotation(WIDTH)
    one = fmr.Intervention(
        {SITE: [edits.Interchange("a", within=rotation[:4]), edits.Interchange("b", within=rotation[4:])]}
    )
    assert sum(parameter.numel() for parameter in one.parameters()) == WIDTH * WIDTH
    assert one.sources == ("a", "b")


def test_it_lies_inside_another_module_and_is_copied_with_it() -> None:
    class Steered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.steering = Net(), fmr.Intervention({SITE: edits.Add(nn.Parameter(torch.ones(WIDTH)))})

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.steering(self.net, x)
            return out

    steered = Steered()
    assert "steering.vectors.0" in dict(steered.named_parameters())
    twin = copy.deepcopy(steered)
    assert twin(BASE).equal(steered(BASE))
    with torch.no_grad():
        next(twin.steering.parameters()).zero_()
    assert twin(BASE).equal(twin.net(BASE))
    assert not steered(BASE).equal(steered.net(BASE))


def test_reft_begins_as_the_identity_and_learns() -> None:
    net, steering = Net().double(), fmr.Intervention({SITE: edits.LoReFT(WIDTH, 2)}).double()
    x = BASE.double()
    torch.testing.assert_close(steering(net, x), net(x), rtol=0, atol=1e-7)
    with torch.no_grad():
        steering.parts[0].bias.add_(1.0)
    assert (steering(net, x) - net(x)).abs().max() > 1e-3


def test_a_loop_is_edited_at_each_step_or_at_one() -> None:
    cell = nn.GRUCell(4, WIDTH)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(len(x), WIDTH)
            for step in x.unbind(1):
                state = self.cell(step, state)
            return state

    model, x, y = Loop(), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    middle = fmr.Site("cell@1")
    out = fmr.Intervention({middle: edits.Interchange("other")})(model, x, sources={"other": y})
    state = torch.zeros(2, WIDTH)
    for step in y.unbind(1)[:2]:
        state = cell(step, state)
    torch.testing.assert_close(out, cell(x[:, 2], state))
    assert fmr.Intervention({middle: edits.Interchange("other")})(model, x, sources={"other": x}).equal(model(x))


def everything(structure: Any, noise: float = 0.1) -> fmr.Intervention:
    """An intervention with every edit and subspace that can be saved."""
    width = structure.graph[structure.layers[0].resid_post.id].shape[-1]
    rotation, post = subspaces.Rotation(width, 4), structure.layers[0].resid_post.at(positions=-1)
    head = structure.attention[1].z.at(heads=1)
    return fmr.Intervention(
        {
            post: [
                edits.Interchange("a", within=rotation[:2]),
                edits.Interchange("b", at=post, within=rotation[[2, 3]]),
                edits.Add(torch.arange(float(width))),
            ],
            head: [edits.Scale(0.5), edits.Clamp(lo=-1.0), edits.Noise(noise, seed=3)],
            structure.attention[0].pattern: edits.Replace(0.25),
            structure.mlps[1].post: edits.Zero(within=subspaces.Units(structure.mlps[1].n, [3, 1])),
            structure.layers[1].resid_post: [
                edits.LoReFT(width, 2, seed=5),
                edits.Add(nn.Parameter(torch.ones(width))),
                edits.Subtract(1.0, within=subspaces.Basis(torch.eye(width)[:2].T + 1, torch.ones(width))),
                edits.Interchange("a", within=subspaces.Mask(width, temperature=0.5)),
                edits.Interchange("b", within=subspaces.Boundless(width, temperature=2.0)),
                edits.Mean(over=("examples", "positions")),
            ],
        }
    )


def _located() -> Any:
    model, kwargs = _called("gpt2")
    return fmr.locate(fmr.run(model, **kwargs))


def given(noise: float = 0.1) -> tuple[nn.Module, dict[str, Any], fmr.Intervention, Any]:
    model, kwargs = _called("gpt2")
    structure = fmr.locate(fmr.run(model, **kwargs))
    made = everything(structure, noise)
    for one in made.parameters():
        nn.init.normal_(one, std=0.5)
    return model, kwargs, made, structure


def _called(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, _, kwargs = build(name)
    return model, dict(kwargs)


def result(intervention: fmr.Intervention, model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    other = {**kwargs, "input_ids": kwargs["input_ids"].flip(-1)}
    with torch.no_grad():
        out: Tensor = intervention(model, sources={"a": other, "b": {**kwargs}}, **kwargs).logits
    return out


def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    model, kwargs, made, structure = given()
    made.save(tmp_path / "one", structure)
    for loaded in (fmr.Intervention.load(tmp_path / "one"), fmr.Intervention.from_pretrained(tmp_path / "one", structure)):
        assert result(loaded, model, kwargs).equal(result(made, model, kwargs))
        assert repr(loaded) == repr(made)
        shapes = [tuple(one.shape) for one in loaded.parameters()]
        assert shapes == [tuple(one.shape) for one in made.parameters()]
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"intervention.json", "intervention.safetensors"}


def test_it_is_found_again_by_role_under_another_kernel(tmp_path: Path) -> None:
    model, kwargs, made, structure = given(noise=0.0)  # which is drawn by the ID
    made.save(tmp_path, structure)
    eager, _ = _called("gpt2_eager")
    eager.load_state_dict(model.state_dict())
    other = fmr.locate(fmr.run(eager, **kwargs))
    assert other.graph.fingerprint != structure.graph.fingerprint
    loaded = fmr.Intervention.load(tmp_path, other)
    torch.testing.assert_close(result(loaded, eager, kwargs), result(made, model, kwargs), rtol=0, atol=1e-5)
    assert {site.id for site in loaded.edits} != {site.id for site in made.edits}


def test_another_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    structure = _located()
    made = everything(structure)
    made.save(tmp_path, structure)
    wider = nn.Sequential(nn.Linear(4, 4))
    nothing = fmr.locate(fmr.run(wider, torch.ones(1, 4)))
    with pytest.raises(EditError, match=r"acts at layers\[0\].resid_post, and Sequential has none: layers has 0"):
        fmr.Intervention.load(tmp_path, nothing)
    plain = fmr.Intervention({structure.layers[0].resid_post: edits.Zero(within=subspaces.Units(7, [1]))})
    plain.save(tmp_path / "narrow", structure)
    with pytest.raises(EditError, match=r"is one of vectors of 7 numbers, and .* holds .* there"):
        fmr.Intervention.load(tmp_path / "narrow", structure)
    made.save(tmp_path / "bare")
    with pytest.raises(EditError, match="which Sequential does not have, and its role was not saved"):
        fmr.Intervention.load(tmp_path / "bare", nothing)


def test_a_vector_for_every_layer_is_a_few_kilobytes(tmp_path: Path) -> None:
    structure = _located()
    width = structure.graph[structure.layers[0].resid_post.id].shape[-1]
    steering = {layer.resid_post: edits.Add(torch.randn(width)) for layer in structure.layers}
    fmr.Intervention(steering).save(tmp_path, structure)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4096


def test_it_is_pushed_to_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client is stood in for; what it is given is loaded from the folder it was put in."""
    asked: dict[str, Any] = {}

    class HfApi:
        def __init__(self, token: str | None) -> None:
            asked["token"] = token

        def create_repo(self, name: str, **settings: Any) -> str:
            asked[name] = settings
            return f"https://hub/{name}"

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            for path in Path(folder_path).iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())

    hub = ModuleType("huggingface_hub")
    hub.HfApi = HfApi  # type: ignore[attr-defined]
    hub.snapshot_download = lambda name, **settings: asked.update(fetched=name, **settings) or str(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert swap(subspaces.Rotation(WIDTH, 2)).push_to_hub("me/swap", private=True) == "https://hub/me/swap"
    assert asked["me/swap"] == {"exist_ok": True, "private": True}
    loaded = fmr.Intervention.from_pretrained("me/swap", revision="main")
    assert (asked["fetched"], asked["revision"]) == ("me/swap", "main")
    assert loaded.sources == ("other",)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            lambda: swap()(Net(), BASE),
            "The intervention got sources none, expected 'other': sources={name: run or inputs}.",
        ),
        (
            lambda: fmr.Intervention({SITE: edits.Zero()})(Net(), BASE, sources={"a": BASE}),
            "The intervention got sources 'a', expected none: sources={name: run or inputs}.",
        ),
        (
            lambda: fmr.run(Net(), BASE, edits={SITE: edits.Interchange("a")}),
            "The source of Interchange('a') at Site('first/linear#0') is str, expected a run, or inputs of the model: a "
            "tensor, a tuple or a dict of arguments; `sources=` of an fmr.Intervention gives a name its run.",
        ),
    ],
)
def test_missing_sources_are_told(made: Callable[[], Any], told: str) -> None:
    with pytest.raises(EditError) as caught:
        made()
    assert str(caught.value) == told


def test_code_and_runs_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"which is code\. Expected edits of fmr\.edits"):
        fmr.Intervention({SITE: lambda value, context: value}).save(tmp_path)
    with pytest.raises(EditError, match="for a run as source give its name"):
        fmr.Intervention({SITE: edits.Interchange(fmr.run(Net(), BASE))}).save(tmp_path)
    latents = subspaces.Latents(torch.relu, torch.relu, WIDTH, WIDTH)
    with pytest.raises(EditError, match="within Latents, whose encoder is code"):
        fmr.Intervention({SITE: edits.Zero(within=latents)}).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="Expected a folder that intervention"):
        fmr.Intervention.load(tmp_path)
    swap(subspaces.Rotation(WIDTH, 2)).save(tmp_path)
    config = tmp_path / "intervention.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "format": 9}))
    with pytest.raises(StoreError, match="has format 9, expected 1 at most"):
        fmr.Intervention.load(tmp_path)
    config.write_text(json.dumps({**told, "sites": [{"at": {"site": "x"}, "edits": [{"edit": "os.system"}]}]}))
    with pytest.raises(StoreError, match="holds no intervention of fmr"):
        fmr.Intervention.load(tmp_path)
    config.write_text(json.dumps(told))
    numbers = tmp_path / "intervention.safetensors"
    numbers.write_bytes(numbers.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(StoreError, match="does not hold the numbers"):
        fmr.Intervention.load(tmp_path)


def test_it_prints_what_it_does() -> None:
    told = repr(swap(subspaces.Rotation(WIDTH, 2)[:1]))
    assert told == (
        "Intervention of 1 edit, 16 trained numbers:\n"
        "  Site('first/linear#0'): Interchange('other', within=Rotation(8, 2)[:1])"
    )


# ---- tensors of edits are the module's own


def test_tensors_of_edits_are_kept_moved_and_loaded() -> None:
    model, site = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval(), "0"
    one = fmr.Intervention({site: [edits.Add(torch.ones(4)), edits.Scale(torch.full((4,), 2.0))]})
    other = fmr.Intervention({site: [edits.Add(torch.zeros(4)), edits.Scale(torch.ones(4))]})
    assert sorted(one.state_dict()) == ["values_0", "values_1"]
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(model, x), model(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(model, x), one(model, x))
    assert torch.equal(copy.deepcopy(one)(model, x), model[1]((model[0](x) + 1) * 2))
    double = copy.deepcopy(model).double()
    assert torch.equal(copy.deepcopy(one).double()(double, x.double()), double[1]((double[0](x.double()) + 1) * 2))


def test_what_cannot_be_meant_is_told(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval(), torch.zeros(1, 3)
    swap = fmr.Intervention({"0": edits.Interchange("other")})
    with pytest.raises(EditError, match=r"sources is a Tensor, expected a run or inputs for each name: sources=\{'other'"):
        swap(model, x, sources=x)
    with pytest.raises(EditError, match=r"Rotation\(4, 2\), a subspace, expected an edit within it"):
        fmr.Intervention({"0": subspaces.Rotation(4, 2)})
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file cannot be made \(there is a file of that name\)"):
        swap.save(tmp_path / "file")


def test_a_vector_of_another_width_is_refused_on_loading(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids, found = torch.tensor([[3, 4, 5]]), []
    for width in (16, 32):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=width, n_head=2, n_positions=8, vocab_size=20)).eval()
        found.append(fmr.locate(fmr.run(model, ids)))
    fmr.Intervention({found[0].layers[1].resid_post: edits.Add(torch.ones(16))}).save(tmp_path / "steer", found[0])
    with pytest.raises(EditError, match=r"is one of vectors of 16 numbers, and GPT2LMHeadModel holds 32 there"):
        fmr.Intervention.load(tmp_path / "steer", found[1])
