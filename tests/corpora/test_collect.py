"""What is collected is what runs hold, token by token; a killed process loses one shard at most, and nothing is mixed up."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fmr
from fmr.corpora.shards import part_of, write_about
from fmr.errors import IdError, StoreError
from tests.models import build

WIDTH = 16


def model() -> nn.Module:
    return build("gpt2_eager")[0].eval()


def texts(batches: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of token ids of unequal length, padded in front and behind in turn."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(batches):
        ids = torch.randint(3, 32, (3, 7), generator=draw)
        mask = torch.ones_like(ids)
        for row, missing in enumerate((0, 2, 4)):
            where = slice(0, missing) if number % 2 else slice(7 - missing, 7)
            mask[row, where] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def by_hand(of: nn.Module, batches: list[dict[str, Tensor]], path: str) -> tuple[Tensor, list[list[int]]]:
    """The same by runs, one example after the other."""
    rows, index = [], []
    for number, batch in enumerate(batches):
        value = fmr.run(of, **batch)[path]
        for row in range(3):
            real = batch["attention_mask"][row].nonzero()[:, 0]
            rows += list(value[row, real])
            ids = batch["input_ids"][row, real].tolist()
            index += [[3 * number + row, place, token] for place, token in enumerate(ids)]
    return torch.stack(rows), index


PATH = "transformer.h.1.mlp"


def collected(to: Path, batches: Any = None, of: nn.Module | None = None, **settings: Any) -> fmr.Corpus:
    given = {"keep": [PATH], "progress": False} | settings
    return fmr.collect(model() if of is None else of, texts() if batches is None else batches, to=to, **given)


# ---- what is there


@pytest.mark.parametrize("shard", [1, 2000, 1 << 28])
def test_every_real_token_has_a_row_whatever_the_shards(tmp_path: Path, shard: int) -> None:
    corpus = collected(tmp_path / "values", shard=shard)
    rows, index = by_hand(model(), texts(), PATH)
    assert torch.equal(corpus[PATH][:], rows)
    assert corpus.index[:].tolist() == index
    assert (len(corpus), corpus.documents, corpus.complete) == (len(rows), 9, True)
    assert len(list((tmp_path / "values").glob("shard-*"))) == {1: 3, 2000: 2, 1 << 28: 1}[shard]
    assert torch.equal(corpus[PATH][corpus.rows(4)], rows[[at[0] == 4 for at in index]])
    assert corpus.table().token.tolist() == [token for _, _, token in index]


def test_rows_are_read_in_any_order_as_new_tensors(tmp_path: Path) -> None:
    rows = collected(tmp_path / "values", shard=1)[PATH]
    whole = rows[:]
    places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows[places], whole[places])
    assert torch.equal(rows[places.numpy() > 20], whole[places > 20])
    assert torch.equal(rows[-1], whole[-1])
    assert torch.equal(torch.cat(list(rows.blocks(5))), whole)
    assert np.array_equal(np.asarray(rows), whole.numpy())
    loaded = torch.cat(list(DataLoader(rows, batch_size=4)))
    assert torch.equal(loaded, whole)
    rows[0].zero_()
    assert torch.equal(rows[0], whole[0])
    assert repr(rows) == f"Rows {len(rows)} x {WIDTH} of float32, in 3 files"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    corpus = collected(tmp_path / "values", dtype=dtype)
    assert corpus[PATH].dtype == dtype
    assert torch.equal(corpus[PATH][:], by_hand(model(), texts(), PATH)[0].to(dtype))


def test_several_sites_of_any_kind_are_kept(tmp_path: Path) -> None:
    of = model()
    structure = fmr.locate(fmr.run(of, **texts()[0]))
    block, layer = structure.attention[0], structure.layers[1]
    ids = fmr.Site("input:input_ids", layout=("examples", "positions"))
    corpus = collected(tmp_path / "a", keep={"z": block.z, "after": layer.resid_post, "ids": ids}, of=of)
    run = fmr.run(of, **texts()[0])
    real = texts()[0]["attention_mask"] != 0
    first = slice(0, int(real.sum()))
    assert torch.equal(corpus["after"][first], run[layer.resid_post][real])
    assert corpus["z"].shape[1:] == (2, 8)
    assert torch.equal(corpus["z"][first][:, 1], run[block.z.at(heads=1)][real])
    assert torch.equal(corpus["ids"][:], corpus.index[:][:, 2])
    last = collected(tmp_path / "b", keep=layer.resid_post.at(positions=-1), of=of)
    assert len(last) == 9
    assert torch.equal(last[layer.resid_post.at(positions=-1)][:3], run[layer.resid_post.at(positions=-1)])


def test_images_have_one_row_each(tmp_path: Path) -> None:
    of = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU()).eval()
    images = torch.rand(7, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    corpus = fmr.collect(of, images.split(3), keep="1", to=tmp_path / "values", progress=False)
    assert torch.allclose(corpus["1"][:], of[1](images.flatten(1)))
    assert corpus.index[:].tolist() == [[row, -1, -1] for row in range(7)]


# ---- killed, and gone on with


class Stopping:
    """Batches of which the last ones do not come."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from texts(6)[: self.after]
        raise KeyboardInterrupt


def test_what_was_begun_is_gone_on_with_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "values"
    with pytest.raises(KeyboardInterrupt):
        collected(folder, Stopping(3), shard=1)
    part = fmr.Corpus(folder)
    assert (part.documents, part.complete) == (9, False)
    assert "not complete: collect again into it, which goes on" in repr(part)
    calls, run = [], fmr.corpora.collect.run
    monkeypatch.setattr("fmr.corpora.collect.run", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    whole = collected(folder, texts(6), shard=1)
    assert len(calls) == 3  # the last three batches
    other = collected(tmp_path / "at once", texts(6))
    assert torch.equal(whole[PATH][:], other[PATH][:])
    assert torch.equal(whole.index[:], other.index[:])
    collected(folder, texts(6), shard=1)
    assert len(calls) == 9  # and all of the other folder's


KILLED = """
import os, signal, sys, torch, fmr
from tests.corpora.test_collect import PATH, model, texts
def batches():
    for number, batch in enumerate(texts(6)):
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
torch.set_num_threads(1)
fmr.collect(model(), batches(), keep=[PATH], to=sys.argv[1], shard=4000, progress=False)
"""


def test_a_killed_process_leaves_whole_shards(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "values")], cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == -9
    assert not fmr.Corpus(tmp_path / "values").complete
    whole, other = collected(tmp_path / "values", texts(6), shard=4000), collected(tmp_path / "at once", texts(6))
    assert torch.equal(whole[PATH][:], other[PATH][:])
    assert not list((tmp_path / "values").glob("*.tmp"))


# ---- what is refused


def refused(told: str, to: Path, *args: Any, **settings: Any) -> None:
    with pytest.raises(StoreError, match=told):
        collected(to, *args, **settings)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "values"
    collected(folder)
    refused(
        r"was collected otherwise: dtype was None and is 'float16'. Expected the same, or another",
        folder,
        dtype=torch.float16,
    )
    refused(r"was collected otherwise: sites was \{'transformer.h.1.mlp'.*and is \{'transformer.h.0.mlp'", folder,
            keep="transformer.h.0.mlp")  # fmt: skip
    other = model()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.mul_(2)
    refused(r"was collected otherwise: weights was '[0-9a-f]+' and is", folder, of=other)
    refused(
        r"Batch 0 is another one than .* was collected of. Expected the same batches in the same order", folder, texts(3, 1)
    )
    refused(r"The loader gave 2 batches, and .* holds 3. Expected the same", folder, texts(2))
    assert len(collected(folder)) == len(fmr.Corpus(folder))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(r"mine holds notes.txt and no corpus. Expected an empty folder, or a new one", tmp_path / "mine")
    refused(
        r"The loader gave no batches for .*empty. Expected some: a list, or a loader that is not used",
        tmp_path / "empty",
        [],
    )


def test_what_a_narrower_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    net, large = nn.Sequential(nn.Identity()).eval(), torch.tensor([[1e5, torch.inf], [torch.nan, 1.0]])
    with pytest.raises(StoreError, match=r"'0' holds 1e\+05, which float16 cannot. Expected dtype=torch.bfloat16, or None"):
        fmr.collect(net, [large], ["0"], tmp_path / "half", dtype=torch.float16, progress=False)
    assert not list((tmp_path / "half").glob("shard-*"))
    kept = fmr.collect(net, [large], ["0"], tmp_path / "brain", dtype=torch.bfloat16, progress=False)["0"][:]
    assert torch.equal(kept.nan_to_num(7), large.bfloat16().nan_to_num(7))


def test_a_glob_is_refused_with_what_to_write(tmp_path: Path) -> None:
    refused(r"keep='transformer.h.\*.mlp' is a glob.* Expected sites one by one", tmp_path / "v", keep="transformer.h.*.mlp")


def test_parts_are_of_as_many_processes_as_were(tmp_path: Path) -> None:
    """Whoever comes with another number, or to what one process wrote, is refused before anything is written."""
    part_of(tmp_path, 0, 2).mkdir()
    assert part_of(tmp_path, 1, 2).name == "part-1-of-2"
    with pytest.raises(StoreError, match=r"holds part-0-of-2, and 3 processes would collect into it. Expected an empty"):
        part_of(tmp_path, 0, 3)
    collected(tmp_path / "alone")
    with pytest.raises(StoreError, match=r"alone holds corpus.json, and 2 processes would collect into it"):
        part_of(tmp_path / "alone", 0, 2)


def test_a_folder_is_written_by_one_process(tmp_path: Path) -> None:
    def nested() -> Iterator[dict[str, Tensor]]:
        refused(r"Another process collects into .*values. Expected one at a time", tmp_path / "values")
        yield from texts()

    assert collected(tmp_path / "values", nested()).complete


def test_a_shard_that_is_missing_or_cut_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "values"
    collected(folder, shard=1)
    last = folder / "shard-000002.safetensors"
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(StoreError, match=r"is cut short|is damaged"):
        fmr.Corpus(folder)
    last.unlink()
    with pytest.raises(
        StoreError, match=r"was complete, and not all is there: shards was 3 and is 2. Collect again into it"
    ):
        fmr.Corpus(folder)
    whole = collected(folder, shard=1)
    assert torch.equal(whole[PATH][:], by_hand(model(), texts(), PATH)[0])
    (folder / "shard-000001.safetensors").unlink()
    with pytest.raises(StoreError, match=r"has no shard-000001.safetensors and has shard-000002"):
        fmr.Corpus(folder)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep": []}, r"keep=\[\]: expected sites, IDs or paths of modules, each once"),
        ({"keep": [PATH, PATH]}, r"expected sites, IDs or paths of modules, each once"),
        ({"dtype": torch.int8}, r"dtype=torch.int8: expected torch.float16, bfloat16, float32 or float64"),
        ({"shard": 0}, r"shard=0: expected a number of bytes"),
        ({"batches": [3]}, r"A batch is a int, expected a tensor or the model's arguments by name"),
        ({"batches": [{}]}, r"A batch is empty, expected a tensor or the model's arguments"),
        ({"of": build("gpt2_eager")[0].train()}, r"The model is in training mode, .* Call model.eval\(\) first"),
        ({"keep": {"a": PATH, "b": "param:transformer.wte.weight"}}, r"'b' has shape .*and the batch has 3 examples"),
        ({"keep": fmr.Site(PATH, positions=[0, 1])}, r"selects several positions. Expected all of them, or one"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    refused(told, tmp_path / "deep" / "values", **settings)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "values").mkdir()
    refused(told, tmp_path / "values", **settings)
    assert list((tmp_path / "values").iterdir()) == []
    assert len(collected(tmp_path / "values")) == 45  # and nothing of it is left


def test_sites_that_are_not_there_leave_a_folder_for_others(tmp_path: Path) -> None:
    with pytest.raises(IdError):
        collected(tmp_path / "values", keep=["nope"])
    assert collected(tmp_path / "values").complete
    (tmp_path / "begun").mkdir()
    write_about(tmp_path / "begun", {"sites": {"other": "other"}, "complete": False})  # by a process killed before any shard
    assert collected(tmp_path / "begun").complete


@pytest.mark.parametrize("error", [KeyboardInterrupt, IndexError])
def test_what_was_run_before_an_error_is_kept(tmp_path: Path, error: type[BaseException]) -> None:
    def stopped() -> Iterator[dict[str, Tensor]]:
        yield from texts()[:2]
        raise error

    with pytest.raises(error):
        collected(tmp_path / "values", stopped())
    held = fmr.Corpus(tmp_path / "values")
    assert (held.documents, held.complete) == (6, False)
    assert torch.equal(collected(tmp_path / "values")[PATH][:], by_hand(model(), texts(), PATH)[0])


def test_a_refusal_leaves_the_folder_of_another_as_it_was(tmp_path: Path) -> None:
    for name, told in (("notes.txt", "holds notes.txt and no corpus"), ("corpus.json", "is not a file of fmr")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        refused(told, folder)
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "{}")]
    refused("holds 7e\\+04, which float16 cannot", tmp_path / "large", of=large(), dtype=torch.float16)
    assert not (tmp_path / "large").exists()


def test_a_disk_that_is_full_from_the_first_byte_on_is_told(tmp_path: Path) -> None:
    code = """
import resource, signal, sys, fmr
from tests.corpora.test_collect import PATH, model, texts
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    fmr.collect(model(), texts(), keep=[PATH], to=sys.argv[1], progress=False)
except fmr.errors.StoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "new")], capture_output=True, text=True, check=True)
    assert "corpus.json cannot be written (File too large)" in done.stdout
    assert not (tmp_path / "new").exists()


def large() -> nn.Module:
    found = model()
    with torch.no_grad():
        found.transformer.h[1].mlp.c_proj.bias.fill_(7e4)  # type: ignore[union-attr, index]
    return found


def test_a_bit_that_flipped_is_found_by_a_check_that_reads_all(tmp_path: Path) -> None:
    corpus = collected(tmp_path / "values", shard=1)
    corpus.check()
    path = tmp_path / "values" / "shard-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-40] ^= 0x40
    path.write_bytes(data)
    told = r"shard-000001.safetensors is damaged: the checksum of 'values.transformer.h.1.mlp' is another. Delete it and all"
    with pytest.raises(StoreError, match=told):
        fmr.Corpus(tmp_path / "values").check()
    for number in (1, 2):
        (tmp_path / "values" / f"shard-00000{number}.safetensors").unlink()
    again = collected(tmp_path / "values", shard=1)
    again.check()
    assert torch.equal(again[PATH][:], by_hand(model(), texts(), PATH)[0])


def test_documents_of_padding_alone_have_no_rows_and_are_counted(tmp_path: Path) -> None:
    batches = texts(1)
    batches[0]["attention_mask"][1:] = 0
    corpus = collected(tmp_path / "values", batches)
    assert corpus.documents == 3
    assert [len(range(45)[corpus.rows(n)]) for n in range(3)] == [7, 0, 0]


def test_a_row_or_a_site_that_is_not_there_is_told(tmp_path: Path) -> None:
    corpus = collected(tmp_path / "values")
    with pytest.raises(IndexError, match=r"Row 99 of 45: expected 0 to 44"):
        corpus[PATH][99]
    with pytest.raises(IndexError, match=r"asks for row 99 of 45. Expected numbers below 45"):
        corpus[PATH][[0, 99]]
    with pytest.raises(IndexError, match=r"expected a whole number, a slice, or whole numbers in one dimension"):
        corpus[PATH][[[0]]]
    with pytest.raises(IndexError, match=r"asks for row -99 of 45. Expected numbers below 45"):
        corpus[PATH][[0, -99]]
    for mask, shape in (([True, False], "2"), (True, "one"), (torch.ones(45, 2, dtype=torch.bool), "45 x 2")):
        with pytest.raises(IndexError, match=rf"got {shape} of true or false for 45 rows. Expected one for each"):
            corpus[PATH][mask]
    for document in (-1, 99, 1.5, True, None):
        with pytest.raises(IndexError, match=rf"Document {document} of 9: expected a whole number from 0 to 8."):
            corpus.rows(document)  # type: ignore[arg-type]
    for read in (corpus.arrow, corpus.table):
        with pytest.raises(IndexError, match=r"rows=3: expected a slice, as slice\(0, 100\), or corpus.rows"):
            read(3)  # type: ignore[operator]
    with pytest.raises(IdError, match=r"'transformer.h.2.mlp' was not collected"):
        corpus["transformer.h.2.mlp"]
    with pytest.raises(StoreError, match=r"cannot be read .*Expected a folder that fmr.collect wrote"):
        fmr.Corpus(tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_a_table_of_arrow_holds_the_same(tmp_path: Path, dtype: torch.dtype | None) -> None:
    corpus = collected(
        tmp_path, keep={"mlp": PATH, "heads": fmr.locate(fmr.run(model(), **texts()[0])).attention[0].z}, dtype=dtype
    )
    table = corpus.arrow()
    assert table.column_names == ["document", "position", "token", "mlp", "heads"]
    assert table.num_rows == len(corpus)
    assert table["token"].to_pylist() == corpus.index[:][:, 2].tolist()
    for name in ("mlp", "heads"):
        assert torch.equal(torch.tensor(table[name].to_pylist()), corpus[name][:].float())
    assert corpus.arrow(slice(2, 5)).equals(table.slice(2, 3))
