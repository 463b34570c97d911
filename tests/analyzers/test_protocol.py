"""What every analyzer is alike in: it says what it is, and refuses what is no model."""

import copy
import inspect
import re
from typing import Any

import pytest
import torch
from torch import nn

import analyzers
import fmr
from analyzers import AnalyzerError, CausalModel, HeadClustering, KeyValueMemories, LensTranslator, LogitLens, RankOneEdit
from analyzers.protocol import Method
from fmr.subspaces import Units
from tests.models import build

METHODS = [
    one
    for name in analyzers.__all__
    if isinstance(one := getattr(analyzers, name), type) and issubclass(one, Method) and not inspect.isabstract(one)
]


WITH_A_MODEL = [one for one in METHODS if "model" in inspect.signature(one.__init__).parameters]


class Words:
    """In place of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


WORDS = Words()


OTHERS = {"causal_model": CausalModel({"a": range(2)}, {"out": lambda a: a}), "site": "a", "subspace": Units(2, [0])}
OTHERS |= {"content": "a", "style": "b", "dictionary": analyzers.SparseAutoencoder(2, 4)}
"""What some methods must be given beside a model."""


def asked(method: type[Method], model: Any, tokenizer: Any = WORDS) -> Method:
    """One of a method, with what it must be given, and a tokenizer where it takes one."""
    takes = inspect.signature(method.__init__).parameters
    given = {name: value for name, value in {**OTHERS, "tokenizer": tokenizer}.items() if name in takes}
    if "dictionary" in takes and "mean" in takes:
        given["mean"] = torch.zeros(2)
    return method(model, **given)


def test_every_method_is_among_them() -> None:
    every = [one for name in analyzers.__all__ if isinstance(one := getattr(analyzers, name), type)]
    makers = {one.__name__ for one in every if hasattr(one, "run") or hasattr(one, "update")} - {"Analyzer", "CausalModel"}
    assert {one.__name__ for one in METHODS} == makers


@pytest.mark.parametrize("method", METHODS, ids=lambda one: one.__name__)
def test_what_is_no_tokenizer_is_told_so(method: type[Method]) -> None:
    if "tokenizer" not in inspect.signature(method.__init__).parameters:
        return
    with pytest.raises(AnalyzerError, match=f"{method.__name__} got a dict for its tokenizer, expected what turns"):
        asked(method, nn.Linear(2, 2), {"vocab": 3})


@pytest.mark.parametrize("make", [KeyValueMemories, LensTranslator])
@pytest.mark.parametrize("layers", [3, "3", [], [1.5], [None]])
def test_what_are_no_layers_is_told_so(make: Any, layers: Any) -> None:
    with pytest.raises(AnalyzerError, match=r"layers=.*: expected numbers of layers, as layers=\[3\], or None for all"):
        make(nn.Linear(2, 2), layers=layers)


@pytest.mark.parametrize("method", WITH_A_MODEL, ids=lambda one: one.__name__)
def test_what_is_no_model_is_told_so(method: type[Method]) -> None:
    name = method.__name__
    for given, told in (
        ("gpt2", "got 'gpt2' for its model, expected a torch.nn.Module"),
        (nn.Linear, "got the class Linear for its model, expected a torch.nn.Module: an instance, not its class"),
        (7, "got 7 for its model"),
        (torch.ones(2), r"got a Tensor for its model"),
        (fmr.zoo.load("gru"), rf"got a Trained for its model, expected a torch.nn.Module: {name}\(given.model, ...\)"),
    ):
        with pytest.raises(AnalyzerError, match=f"{name} {told}"):
            asked(method, given)
    if inspect.signature(method.__init__).parameters["model"].default is None:
        assert "None" not in repr(method())  # counts alone are read
    else:
        with pytest.raises(AnalyzerError, match=f"{name} got None for its model, expected a torch.nn.Module"):
            asked(method, None)


def test_one_of_several_models_that_is_none_is_told_so() -> None:
    with pytest.raises(AnalyzerError, match=r"HeadClustering got 'gpt2' for its model, expected a torch.nn.Module"):
        HeadClustering({"one": nn.Linear(2, 2), "two": "gpt2"})  # type: ignore[dict-item]


@pytest.mark.parametrize("method", WITH_A_MODEL, ids=lambda one: one.__name__)
def test_a_method_says_what_it_is(method: type[Method]) -> None:
    told = "|".join(f"{name}=[^,]+" for name in (*OTHERS, "mean"))
    assert re.fullmatch(
        rf"{method.__name__}\(Linear(, Words|, ({told}))*\)(: nothing counted yet)?",
        repr(asked(method, nn.Linear(2, 2))),
    )


def test_settings_and_what_was_counted_are_told() -> None:
    model, _, kwargs = build("gpt2_eager")
    fitting = LensTranslator(model, layers=[0], skip=1)
    assert repr(fitting) == "LensTranslator(GPT2LMHeadModel, layers=[0], skip=1): nothing counted yet"
    fitting.update(kwargs)
    assert repr(fitting) == f"LensTranslator(GPT2LMHeadModel, layers=[0], skip=1): {fitting.tokens} tokens counted"
    assert repr(copy.copy(fitting)) == repr(fitting)
    lens = LogitLens(model, None, fitting.result())
    assert repr(lens) == "LogitLens(GPT2LMHeadModel, translator=Translator)"
    edit = RankOneEdit(model, WORDS, texts=["It rains."] * 30, clamp=3.0)
    assert repr(edit) == "RankOneEdit(GPT2LMHeadModel, Words, texts=list of 30, clamp=3.0)"
    two = HeadClustering({"before": model, "after": model}, scope="*.h.*")
    assert repr(two) == (
        "HeadClustering({'before': GPT2LMHeadModel, 'after': GPT2LMHeadModel}, scope='*.h.*'): nothing counted yet"
    )
    assert repr(KeyValueMemories(k=3)) == "KeyValueMemories(k=3): nothing counted yet"


def test_a_wrong_argument_is_still_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer'"):
        LensTranslator(nn.Linear(2, 2), layer=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        LogitLens()  # type: ignore[call-arg]


COUNTING = [one for one in WITH_A_MODEL if issubclass(one, analyzers.Analyzer)]


@pytest.mark.parametrize("method", COUNTING, ids=lambda one: one.__name__)
def test_only_what_another_one_counted_of_the_same_weights_is_merged(method: Any) -> None:
    one, other = (asked(method, nn.Linear(2, 2).eval()) for _ in range(2))
    with pytest.raises(AnalyzerError, match=f"merge got int, expected another {method.__name__}"):
        one.merge(3)
    if method is not KeyValueMemories:  # which knows each batch again
        with pytest.raises(AnalyzerError, match=f"merge got the same {method.__name__} once more. Expected what another"):
            one.merge(one)
    if method not in (KeyValueMemories, LensTranslator, analyzers.TopImages):  # whose counts know their weights
        with pytest.raises(AnalyzerError, match="merge got what was counted on a Linear with other weights"):
            one.merge(other)


@pytest.mark.parametrize("method", COUNTING, ids=lambda one: one.__name__)
def test_a_loader_that_gives_nothing_is_refused(method: Any) -> None:
    with pytest.raises(
        AnalyzerError, match=r"The loader gave no batch. Expected some: a list, or a loader that is not used up"
    ):
        asked(method, nn.Linear(2, 2).eval()).over(iter([]))
