"""Everything that a lab keeps comes back as it was, and what it does not keep is refused in words."""

import collections
import dataclasses
import datetime
import decimal
import enum
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import analyzers
import fmr
from analyzers.lab.errors import LabError
from analyzers.lab.outcome import judged
from analyzers.lab.picture import Picture
from analyzers.lab.values import pack, unpack
from analyzers.results import Stored
from tests.analyzers.alignment import models as alignment_models

matplotlib.use("Agg")


def back(value: Any, folder: Path) -> Any:
    """A value through the files of a folder."""
    told, files, _ = pack(value, "result")
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)
    return unpack(told, "result", lambda name: (folder / name).read_bytes(), folder)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


def bits(value: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(
        bytearray(value.contiguous().flatten().view(torch.uint8).numpy().tobytes() or b"0"), dtype=torch.uint8
    )


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.5, 7.0]]).to(dtype)
    assert same(
        back({"a": value, "b": [value.T, value[0, 0], value[:0]]}, tmp_path),
        {"a": value, "b": [value.T, value[0, 0], value[:0]]},
    )


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -(10**30), 0.1, math.inf, -math.inf, math.nan, 1 + 2j, "text", "", "\ud800 é \n", b"x".decode(),
        [], [1, [2.0, "a"]], (), (1, (2,)), {}, {"a": 1, 2: "b", (1, 2): None, None: [1], True: 2}, {1, 2}, {"b", "a"},
        torch.float16, torch.device("cpu"), slice(1, None, 2), ...,
        Path("a/b"), np.arange(6).reshape(2, 3), np.array([1.5, math.nan]), np.array(["a", "longer"]), np.array(2.5),
        np.array([1 + 1j]), np.zeros((0, 3)), np.arange(6)[::-2], {"/": 1, "a.b[0]": torch.ones(2)}, torch.Size([2, 3]),
    ],
    ids=lambda value: repr(sorted(value)) if isinstance(value, set) else repr(value),  # a set's order is each process's own
)  # fmt: skip
def test_plain_values(value: Any, tmp_path: Path) -> None:
    expected = tuple(value) if isinstance(value, torch.Size) else value
    assert same(back(value, tmp_path), expected)


def test_big_endian_arrays_numbers_of_numpy_and_parameters_keep_their_numbers(tmp_path: Path) -> None:
    assert back(np.array([1, 2], dtype=">i4"), tmp_path).tolist() == [1, 2]
    assert back([np.float32(0.5), np.int64(3), np.bool_(True)], tmp_path) == [0.5, 3, True]
    layer = nn.Linear(2, 2)
    found = back({"state": dict(layer.state_dict()), "weight": layer.weight}, tmp_path)
    assert torch.equal(found["weight"], layer.weight)
    assert not found["weight"].requires_grad
    ordered = collections.OrderedDict(a=1)
    assert back(ordered, tmp_path) == {"a": 1}


FRAMES = {
    "numbers": pd.DataFrame({"a": [1, 2], "b": [0.5, math.nan]}),
    "mixed": pd.DataFrame({"name": ["x", None], "n": [1, 2], "ok": [True, False]}, index=["r", "s"]),
    "dates": pd.DataFrame({"t": pd.to_datetime(["2020-01-01", None])}),
    "integers with holes": pd.DataFrame({"n": pd.array([1, None], dtype="Int64")}),
    "empty": pd.DataFrame(),
    "no rows": pd.DataFrame({"a": np.array([], dtype=np.float32)}),
    "named": pd.DataFrame([[1, 2]], columns=pd.Index(["a", "b"], name="kind"), index=pd.Index([7], name="row")),
    "twice": pd.DataFrame([[1, 2]], columns=["a", "a"]),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames(name: str, tmp_path: Path) -> None:
    pd.testing.assert_frame_equal(back(FRAMES[name], tmp_path), FRAMES[name])


def test_series(tmp_path: Path) -> None:
    for series in (pd.Series([1.0, 2.0], name="s"), pd.Series(["a", "b"], index=[3, 4])):
        pd.testing.assert_series_equal(back(series, tmp_path), series)


def test_figures_come_back_as_their_pixels(tmp_path: Path) -> None:
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1], [1, 0])
    found = back([figure, figure], tmp_path)
    assert type(found[0]) is Picture
    assert found[0] == found[1]
    wide, high = found[0].size
    assert found[0].pixels.shape == (high, wide, 4)
    assert found[0].pixels.min() < 0.5
    assert same(back(found[0], tmp_path), found[0])
    found[0].save(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == found[0]._repr_png_()
    assert sorted(path.name for path in tmp_path.glob("result*.png"))


def test_images_of_pillow(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    found = back(Image.fromarray(pixels), tmp_path)
    assert np.array_equal((found.pixels[..., :3] * 255).round().astype(np.uint8), pixels)


@dataclasses.dataclass(frozen=True, eq=False)
class Own(Stored):
    """A result of the user's own."""

    numbers: torch.Tensor
    words: tuple[str, ...]


def test_results_of_analyzers_and_of_the_user(tmp_path: Path) -> None:
    x = np.array([[1.0, 2.0, 4.0]])
    outcome = judged(x, 0 * x, ["a"], "paired", "two-sided", "holm", 0, "a", "0", (), ())
    found = back({"outcome": outcome, "own": [Own(torch.ones(2), ("a", "b"))]}, tmp_path)
    assert repr(found["outcome"]) == repr(outcome)
    assert np.array_equal(found["outcome"].p, outcome.p)
    assert type(found["own"][0]) is Own
    assert found["own"][0].words == ("a", "b")


def test_a_result_that_is_a_folder(tmp_path: Path) -> None:
    model, network = alignment_models.equality(), alignment_models.ByHand().eval()
    halves = {"wx": fmr.subspaces.Units(8, range(4)), "yz": fmr.subspaces.Units(8, range(4, 8))}
    found = analyzers.AlignmentSearch(network, model, "first", halves).evaluate(model.counterfactuals(20))
    again = back([found, found], tmp_path)
    assert repr(again[1]) == repr(found)
    assert repr(again[0].intervention) == repr(found.intervention)


def test_every_result_of_analyzers_is_found_by_its_name() -> None:
    from analyzers.lab.stored import class_named

    results = [one for one in vars(analyzers).values() if isinstance(one, type) and issubclass(one, Stored)]
    assert len(results) > 20
    assert all(class_named(f"{one.__module__}.{one.__qualname__}") is one for one in results)
    with pytest.raises(LabError, match=r"os\.system is not known here\. Import the module that defines it"):
        class_named("os.system")
    with pytest.raises(LabError, match="is no result of this version of fmr"):
        class_named("analyzers.gone.Result")


class Colour(enum.Enum):
    RED = 1


Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Plain:
    a: int


def cycle() -> list[Any]:
    value: list[Any] = [1]
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            object(),
            r"result is a builtins\.object, which a lab cannot keep\. Expected numbers.* Return what of it counts as",
        ),
        ([{"a": Plain(1)}], r"result\[0\]\['a'\] is a tests.*Plain, .* Return dataclasses\.asdict\(value\)\."),
        (Pair(1, 2), r"Return value\._asdict\(\)"),
        (datetime.datetime(2020, 1, 1), r"is a datetime\.datetime, .* Return value\.isoformat\(\)"),
        (nn.Linear(2, 2), r"Return value\.state_dict\(\)"),
        (Colour.RED, "Return its name"),
        (decimal.Decimal(1), r"is a decimal\.Decimal"),
        (torch.ones(2).to_sparse(), r"It is not dense; return value\.to_dense\(\)"),
        (torch.ones(2, device="meta"), "It lies on the meta device and has no numbers; return its shape"),
        (np.array([object()]), r"Its dtype is object; return value\.tolist\(\)"),
        (plt.figure().add_subplot(), r"Return value\.figure"),
        (
            pd.DataFrame({"a": [1]}, index=pd.MultiIndex.from_tuples([(1, 2)])),
            r"several levels; return value\.reset_index\(\)",
        ),
        (cycle(), r"result\[1\] is a builtins\.list, .* It holds itself"),
        (lambda: 1, "is a builtins.function"),
        (b"bytes", r"is a builtins\.bytes"),
        ({"a": Own(torch.ones(1), (object(),))}, r"Own, .* It holds <object object>, which its file would"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_kept_is_refused(value: Any, message: str) -> None:
    with pytest.raises(LabError, match=message):
        pack(value, "result")


def test_functions_and_models_may_be_arguments_and_come_back_as_words(lab: analyzers.Lab) -> None:
    @lab.experiment
    def applied(f: Callable[[float], float], other: nn.Module) -> float:
        return f(2.0)

    first = applied.record(math.sqrt, nn.Linear(1, 1))
    second = applied.record(half, nn.Linear(1, 1))
    assert "def half(x: float) -> float:\n    return x / 2" in second.arguments["f"]
    assert second.arguments["other"].startswith("Linear ")
    assert first.arguments["f"] == "# No source: math.sqrt\n"


def half(x: float) -> float:
    return x / 2
