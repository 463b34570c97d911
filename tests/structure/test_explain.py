"""What any value is to the matchers, in sentences."""

import pytest
import torch
from torch.nn import functional as F

import fmr
from fmr.structure.parts import Structure
from fmr.structure.proof.certificate import MEANS, Certificate
from tests.structure import scores
from tests.structure.idioms import Heads, Plain, Stack
from tests.structure.odd import ODD, Odd


@pytest.fixture(scope="module")
def structure() -> Structure:
    torch.manual_seed(0)
    return fmr.locate(fmr.run(Stack(lambda: Heads(scores.einsum), Plain).eval(), torch.randint(11, (2, 5))))


def odd(name: str) -> Structure:
    torch.manual_seed(0)
    return fmr.locate(fmr.run(Odd(ODD[name]).eval(), torch.randn(2, 5, 8)))


def test_a_role_is_said_with_its_proof(structure: Structure) -> None:
    block = structure.attention[1]
    said = structure.explain(block.pattern)
    assert said.roles == ("the softmax and pattern of structure.attention[1]",)
    assert repr(said).startswith(f"{block.pattern.id} is the softmax and pattern of structure.attention[1]. ")
    assert "structure.attention[1] is certified: recomputed from its parts, it is at most " in said.text
    assert repr(structure.explain(structure.graph[block.pattern.id])) == repr(said)


def test_all_roles_of_a_value_are_said(structure: Structure) -> None:
    said = structure.explain(structure.mlps[0].out)
    assert said.roles == (
        "the second projection and output of structure.mlps[0]",
        "the addend of write 1 of structure.streams[0]",
    )
    last = structure.explain(structure.layers[0].resid_post)
    assert "the value after write 1 of structure.streams[0]" in last.roles
    assert "the stream after of structure.layers[0]" in last.roles
    assert "the stream before of structure.layers[1]" in last.roles


def test_from_a_graph_nothing_is_certified(structure: Structure) -> None:
    said = fmr.locate(structure.graph).explain(structure.attention[0].z.id)
    assert "structure.attention[0] is not certified: it was located in a graph alone, without values." in said.text


def test_what_lies_inside_and_what_goes_into_a_finding(structure: Structure) -> None:
    assert repr(structure.explain("memory.0.up/linear#0")).startswith(
        "memory.0.up/linear#0 is the first projection and pre-activations of structure.mlps[0]."
    )
    assert repr(structure.explain("norms.0/layer_norm#0")) == (
        "norms.0/layer_norm#0 is a norm of /add#0 (the point 0 of structure.streams[0] and the stream before of "
        "structure.layers[0]). It goes into the queries, keys and values of structure.attention[0]."
    )
    assert repr(structure.explain("param:attention.0.q.weight")) == (
        "param:attention.0.q.weight is a weight. It goes into the queries of structure.attention[0]."
    )
    joined = structure.explain("attention.0/flatten#0").text
    assert joined.startswith(
        "attention.0/flatten#0 lies inside structure.attention[0], between its mixed values and its output."
    )


SAID = {
    ("router", "/softmax#0"): "/softmax#0 is no attention: no product of two activations lies above the softmax, up to "
    "l.0/linear#0. It is a softmax of l.0/linear#0. It goes into no finding.",
    (
        "sine of scores",
        "/softmax#0",
    ): "/softmax#0 is no attention: /sin#0 lies between it and /matmul#0, the "
    "nearest product of two activations: it has no scores.",
    ("sine of scores", "/matmul#0"): "It is no product of queries and keys: /sin#0 lies between it and /softmax#0.",
    ("no softmax", "/matmul#0"): "/matmul#0 lies inside structure.mixers[0], between its input 0 and its output.",
    ("made weight", "/matmul#0"): "It is no product of queries and keys: no softmax is made of it before it is multiplied",
    ("sum so far", "up/linear#0"): "up/linear#0 is the input 0 of structure.mixers[0]",
    ("sum so far", "down/linear#0"): "It is no memory: /cumsum#0 lies between its two projections.",
    ("largest", "/mul#0"): "the coefficients of structure.mlps[0]",
    ("by loop", "/softmax#0"): "values are multiplied by it number by number, at /mul#0, and not summed up in one product",
    ("two maps", "l.0/linear#0"): "It goes into no finding; of what is made of it, l.1/linear#0 is no memory: nothing bends",
    ("of constants", "/arange#0"): "/arange#0 is a constant: no input flows into it.",
    ("low rank", "/add#0"): "It is no write to a residual stream: no layer computes",
    ("rolled", "down/linear#0"): "its coefficients are made of other positions, too: /roll#0 turns these round.",
}


@pytest.mark.parametrize(("name", "value"), SAID)
def test_what_stopped_a_matcher_is_said(name: str, value: str) -> None:
    assert SAID[name, value] in odd(name).explain(value).text


def test_values_inside_a_fused_op_and_modules_are_explained() -> None:
    torch.manual_seed(0)
    found = fmr.locate(
        fmr.run(Stack(lambda: Heads(F.scaled_dot_product_attention), Plain).eval(), torch.randint(11, (2, 5)))
    )
    inner = "attention.1/scaled_dot_product_attention#0/softmax#0"
    assert found.explain(inner).roles == ("the softmax and pattern of structure.attention[1]",)
    assert found.explain("memory.1").id == "memory.1.down/linear#0"


def test_the_logarithm_of_a_softmax_is_no_norm() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LogSoftmax(-1))
    said = fmr.locate(fmr.run(model, torch.randn(2, 4))).explain("1").text
    assert said == "1/log_softmax#0 is the logarithm of a softmax of 0/linear#0. It goes into no finding."


def test_an_unknown_value_names_those_that_are_spelled_alike(structure: Structure) -> None:
    with pytest.raises(
        fmr.errors.IdError, match=r"no value 'attention.0/sofmax#0' .*Nearest that exist: .*attention.0/softmax#0"
    ):
        structure.explain("attention.0/sofmax#0")


def test_what_a_failed_proof_means_is_said_in_words() -> None:
    proof = Certificate({"post": 0.0, "places": float("inf"), "out": 0.25}, 1e-4)
    assert proof.why == (
        "its coefficients are made of other positions, too: they follow what was changed there; its output is not the sum "
        "of what its parts write (off by 2e-01 of the largest value, where 1e-04 is allowed)"
    )
    assert Certificate({"out": 0.0}, 1e-4).why == ""
    assert {"pattern", "rows", "z", "heads", "layout", "out", "post", "places", "keys", "writes"} <= MEANS.keys()
