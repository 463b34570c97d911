"""By Ray every block is counted once, whatever dies, and the sum is that of one process."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import analyzers
import fmr
from analyzers import AnalyzerError, HeadClustering
from analyzers.scale.by_ray import started
from fmr.zoo import world


def load() -> nn.Module:
    torch.set_num_threads(1)
    model: nn.Module = fmr.zoo.load("facts", attn_implementation="eager").model
    return model


def batches() -> list[Any]:
    tokenizer = fmr.zoo.load("facts").tokenizer
    texts = [f"{fact.prompt} {fact.answer}" for fact in world.facts()[:60:2]]
    return [tokenizer(texts[n : n + 5], return_tensors="pt", padding=True) for n in range(0, 30, 5)]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield started(False)
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_dies_is_retried_and_nothing_is_counted_twice(ray: Any, tmp_path: Path) -> None:
    died = tmp_path / "died"

    class Dies(HeadClustering):
        def update(self, batch: Any) -> "Dies":
            if os.getpid() != parent and not died.exists():
                died.write_text("")
                os._exit(1)
            super().update(batch)
            return self

    parent, given = os.getpid(), batches()
    shared = analyzers.scale.over(lambda: Dies(load()), given, workers=2, block=2, progress=False)
    alone = HeadClustering(load()).over(given, progress=False)
    assert died.exists()
    assert shared.counted == alone.counted
    assert torch.allclose(torch.as_tensor(shared.result().distances), torch.as_tensor(alone.result().distances), atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_a_corpus_by_workers_is_that_of_one_process(ray: Any, tmp_path: Path) -> None:
    given = batches()
    whole = fmr.collect(load(), given, ["transformer.h.2"], tmp_path / "alone", progress=False)
    parts = analyzers.scale.collect(load, given, ["transformer.h.2"], tmp_path / "parts", workers=2, progress=False)
    assert torch.equal(parts["transformer.h.2"][:], whole["transformer.h.2"][:])
    assert torch.equal(parts.index[:], whole.index[:])


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_counted_is_told(ray: Any) -> None:
    with pytest.raises(AnalyzerError, match="make is a HeadClustering"):
        analyzers.scale.over(HeadClustering(load()), batches())  # type: ignore[type-var]
    with pytest.raises(AnalyzerError, match=r"make\(\) gave a GPT2LMHeadModel, expected an analyzer"):
        analyzers.scale.over(load, batches())  # type: ignore[type-var]
    with pytest.raises(AnalyzerError, match="The loader gave no batch"):
        analyzers.scale.over(lambda: HeadClustering(load()), [])
    with pytest.raises(AnalyzerError, match="6 batches for 7 workers"):
        analyzers.scale.collect(load, batches(), ["transformer.h.2"], "never", workers=7)
    with pytest.raises(AnalyzerError, match="batches is a generator, expected a list of batches"):
        analyzers.scale.collect(load, (one for one in batches()), ["transformer.h.2"], "never")  # type: ignore[arg-type]
    with pytest.raises(AnalyzerError, match=r"A worker failed at part 1 of 2: AnalyzerError: The batch holds no tensor"):
        analyzers.scale.over(lambda: HeadClustering(load()), [*batches()[:1], {"x": 1}], workers=1, block=1, progress=False)
