"""fmr.runs.given: what is no argument of the model is told in words before it runs."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import Site, TrackError, edits


class Takes(nn.Module):
    """A model that takes whatever it is given by name, as many do."""

    def forward(self, input_ids: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return torch.as_tensor(len(kwargs)) if isinstance(input_ids, dict) else input_ids * (1 + len(kwargs))


X = torch.ones(1, 3)
ASKED = {Site("/mul#0"): edits.Zero()}


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        (
            (X,),
            {"edit": ASKED},
            r"no option 'edit', and the model names no such argument\. Expected edits=\.\.\. An argument",
        ),
        ((X,), {"sites": ASKED}, r"no option 'sites', .*Expected edits="),
        ((X,), {"where": [Site("/mul#0")]}, r"no option 'where', .*Expected edits="),
        (
            (X,),
            {"how": {"/mul#0": edits.Zero()}},
            r"no option 'how', .*bound before: fmr.run\(functools.partial\(model, how=",
        ),
        ((X,), {"kep": "none"}, r"no option 'kep', .*Expected keep="),
        ((X,), {"optionals": True}, r"no option 'optionals', .*Expected optional="),
        ((ASKED, X), {}, r"got edits among the inputs of the model\. Expected them by name: edits=\{site: edit\}"),
        ((edits.Zero(), X), {}, "got edits among the inputs"),
        (
            ({"input_ids": X},),
            {},
            r"got dict as one argument, whose keys input_ids are arguments .*fmr.run\(model, \*\*inputs\)",
        ),
        (
            (UserDict(input_ids=X, attention_mask=X),),
            {},
            "got UserDict as one argument, whose keys input_ids, attention_mask",
        ),
        (("hello",), {}, "got text as input_ids, 'hello'. Expected tokens: fmr.run\\(model, \\*\\*tokenizer\\(text"),
        ((), {"input_ids": ["a", "b"]}, r"got text as input_ids, \"\['a', 'b'\]\""),
    ],
)
def test_what_is_no_argument_of_the_model_is_refused(args: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(TrackError, match=words):
        fmr.run(Takes(), *args, **kwargs)


def test_what_a_model_or_a_function_takes_is_its_own() -> None:
    model = Takes()
    assert fmr.run(model, X, labels=1, use_cache=False, logits_to_keep=0, output_attentions=True).output[0, 0] == 5
    assert fmr.run(model, {"x": X}, mode="text").output == 1

    def own(site: Site, edit: Any, text: str, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch)

    assert fmr.run(own, Site("/mul#0"), edits.Zero(), "hello", {"input_ids": X}).output[0, 0] == 1
    assert fmr.run(own, site=Site("/mul#0"), edit=edits.Zero(), text="hello", batch={"input_ids": X}).output[0, 0] == 1
