"""Under torchrun every process counts its share, and each ends with what one process alone would have counted."""

from pathlib import Path

import pytest
import torch

import analyzers
import fmr
from analyzers import AnalyzerError, HeadClustering
from analyzers.counts import counts_of, empty, with_counts
from fmr.corpora.ranks import share
from fmr.errors import StoreError
from tests.ranks import torchrun

COUNT = """
import fmr
from analyzers import HeadClustering, KeyCovariance, KeyValueMemories, LensTranslator, Probe, Similarity, TopImages
from fmr.zoo import tasks, world
model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
texts = [f"{fact.prompt} {fact.answer}" for fact in world.facts()[:60:2]]
batches = [tokenizer(texts[n : n + 5], return_tensors="pt", padding=True) for n in range(0, 30, 5)]
labelled = [{**batch, "labels": batch["input_ids"] % 3} for batch in batches]
seer = fmr.zoo.load("digits-cnn").model
images = list(tasks.digits().test.inputs[:60].split(10))


def counted(ranks):
    given = {"progress": False, "ranks": True} if ranks else {"progress": False}
    return {
        "clusters": HeadClustering(model).over(batches, **given).result().distances,
        "probe": Probe(model, sites=["transformer.h.2"]).over(labelled, **given).result().accuracy,
        "triggers": KeyValueMemories(model, tokenizer, k=3).over(batches, **given).result(draws=20).agreement,
        "alike": Similarity(model, measures="cka").over(batches, **given).result().values["cka"],
        "images": TopImages(seer, "conv1", [3], k=2).over(images, **given).result().values,
        "map": LensTranslator(model, tokenizer).over(texts, **given).result(ridge=1e-2).maps,
    }
"""


def test_each_process_ends_with_what_one_alone_counts(tmp_path: Path) -> None:
    told = torchrun(
        COUNT
        + """
import numpy as np
alone, shared = counted(False), counted(True)
for name, value in alone.items():
    same = np.allclose(np.asarray(value, float), np.asarray(shared[name], float), rtol=1e-6, atol=1e-9, equal_nan=True)
    say(rank, name, "same" if same else f"{value} {shared[name]}")
""",
        tmp_path,
    )
    lines = told.strip().splitlines()
    assert len(lines) == 12
    assert all(line.endswith(" same") for line in lines), told


def test_where_one_process_fails_none_counts(tmp_path: Path) -> None:
    told = torchrun(
        """
import fmr
from analyzers import AnalyzerError, HeadClustering
model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
batches = [tokenizer("Junel Dunoth grew up in", return_tensors="pt"), {"nothing": 1}]
heads = HeadClustering(model)
try:
    heads.over(batches, ranks=True, progress=False)
except AnalyzerError as error:
    say(rank, error, repr(heads.counted))
""",
        tmp_path,
    )
    assert "0 Process 1 of 2 failed, so that nothing is counted: AnalyzerError: The batch holds no tensor" in told
    assert "1 The batch holds no tensor" in told
    assert told.count("''") == 2


def test_a_corpus_in_parts_is_that_of_one_process(tmp_path: Path) -> None:
    told = torchrun(
        COUNT
        + """
whole = fmr.collect(model, batches, ["transformer.h.2"], folder + f"/alone-{rank}", progress=False)
parts = fmr.collect(model, batches, ["transformer.h.2"], folder + "/parts", ranks=True, shard=20_000, progress=False)
same = torch.equal(whole["transformer.h.2"][:], parts["transformer.h.2"][:])
say(rank, same, torch.equal(whole.index[:], parts.index[:]), parts.rows(27) == whole.rows(27),
      parts.documents, parts.complete)
again = fmr.collect(model, batches, ["transformer.h.2"], folder + "/parts", ranks=True, shard=20_000, progress=False)
dist.destroy_process_group()
tasks = os.listdir("/proc/self/task") if os.path.isdir("/proc") else []
left = [open(f"/proc/self/task/{one}/comm").read() for one in tasks]
assert not any("gloo" in name for name in left), left  # one that outlives its group may abort the process at its exit
""",
        tmp_path,
        processes=3,
    )
    assert sorted(told.strip().splitlines()) == [f"{rank} True True True 30 True" for rank in range(3)]
    (tmp_path / "parts" / "part-1-of-3").rename(tmp_path / "gone")
    with pytest.raises(StoreError, match=r"has no part-1-of-3\. Expected the parts of as many processes"):
        fmr.Corpus(tmp_path / "parts")


PARTS = """
import signal
import fmr
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
given = [torch.randn(2, 3, 4) for _ in range(6)]


class Loader(list):
    def __iter__(self):
        for number in range(6):
            if rank == 1 and number == 4 and not os.path.exists(folder + "/died"):
                open(folder + "/died", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            yield self[number]


parts = fmr.collect(net, Loader(given), ["0"], folder + "/parts", ranks=True, shard=1, progress=False)
say(rank, torch.equal(parts["0"][:], torch.cat([net(one) for one in given]).detach().flatten(0, 1)), len(parts.index))
net[0].weight.data += rank
try:
    fmr.collect(net, given, ["0"], folder + "/differ", ranks=True, progress=False)
except Exception as error:
    say(rank, error)
"""


def test_a_killed_process_is_gone_on_with_by_all(tmp_path: Path) -> None:
    torchrun(PARTS, tmp_path, fails=True)
    assert (tmp_path / "parts" / "part-1-of-2" / "shard-000000.safetensors").exists()
    assert not (tmp_path / "parts" / "part-1-of-2" / "shard-000001.safetensors").exists()
    told = torchrun(PARTS, tmp_path)
    assert "0 True 36" in told
    assert "1 True 36" in told
    assert told.count("Process 1 would collect otherwise than process 0: weights was") == 2, told
    assert not list((tmp_path / "differ").glob("*/*"))


def test_without_a_group_of_processes_it_is_refused() -> None:
    model, tokenizer = fmr.zoo.load("facts")
    batches = [tokenizer("Junel Dunoth grew up in", return_tensors="pt")]
    with pytest.raises(AnalyzerError, match=r"ranks=True asks for several processes, and there is no group .*torchrun"):
        HeadClustering(model).over(batches, ranks=True)
    with pytest.raises(StoreError, match="ranks=True asks for several processes"):
        fmr.collect(model, batches, ["transformer.h.2"], "never", ranks=True)
    assert not Path("never").exists()


@pytest.mark.parametrize(("rank", "own"), [(0, [0, 1, 2]), (1, [3, 4, 5]), (2, [6, 7, 8, 9])])
def test_shares_are_pieces_that_make_the_whole(rank: int, own: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmr.corpora.ranks.check_ranks", lambda error: (rank, 3))
    assert list(share(list(range(10)))) == own
    with pytest.raises(StoreError, match="2 batches for 3 processes"):
        share([1, 2])
    with pytest.raises(StoreError, match="a generator without a length"):
        share(n for n in range(9))


def test_what_was_counted_before_is_counted_once() -> None:
    """An analyzer's counts go without the model, and come back with that of another."""
    model, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
    other, _ = fmr.zoo.load("facts", attn_implementation="eager")
    batch = tokenizer("Junel Dunoth grew up in", return_tensors="pt")
    counted = HeadClustering(model).update(batch)
    counts = counts_of(counted)
    assert not any(value is model for value in counts.values())
    assert empty(counted).counted == ""
    there = with_counts(HeadClustering(other), counts)
    assert there.models == {"": other}
    assert torch.equal(torch.as_tensor(there.merge(counted).result().distances), torch.as_tensor(counted.result().distances))


def test_a_store_is_of_one_process(tmp_path: Path) -> None:
    model, tokenizer = fmr.zoo.load("facts")
    memories = analyzers.KeyValueMemories(model, tokenizer, store=tmp_path / "memories.sqlite")
    with pytest.raises(AnalyzerError, match="with ranks=True: several processes would write one file"):
        memories.over(["Junel Dunoth grew up in"], ranks=True)


def test_every_analyzer_can_be_sent(loaded: tuple[torch.nn.Module, object]) -> None:
    model, tokenizer = loaded
    made = [
        analyzers.HeadClustering(model),
        analyzers.KeyCovariance(model),
        analyzers.KeyValueMemories(model, tokenizer),
        analyzers.LensTranslator(model, tokenizer),
        analyzers.Probe(model),
        analyzers.CausalTracing(model, tokenizer),
        analyzers.Modularity(model),
    ]
    for one in made:
        assert repr(with_counts(one, counts_of(one))) == repr(one)
