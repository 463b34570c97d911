"""A model whose weights are divided among processes (FSDP2) is watched, located, edited and swept as the whole one is."""

from pathlib import Path

from tests.ranks import torchrun

SCRIPT = """
import copy
import analyzers
import fmr
from fmr import edits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

plain, tokenizer = fmr.zoo.load("facts", attn_implementation="eager")
inputs = tokenizer("Junel Dunoth grew up in", return_tensors="pt")
model = copy.deepcopy(plain)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for block in model.transformer.h:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
model(**inputs)  # the first call of all makes its groups


def told(name, holds):
    say(rank, name, bool(holds))


with torch.no_grad():
    whole, run = fmr.run(plain, **inputs), fmr.run(model, **inputs)
    told("output", torch.equal(run.output.logits, whole.output.logits))
    shared = [node.id for node in whole.graph if node.id in run.graph.ids() and not node.id.is_source]
    told("ids", len(shared) > 200)
    told("values", all(torch.equal(run[name], whole[name]) for name in shared))
    structure = fmr.locate(run)
    told("structure", [len(part) for part in (structure.attention, structure.mlps, structure.layers)] == [4, 4, 4])
    told("certified", all(block.certified for block in structure.attention))
    cut = {structure.layers[2].resid_post.at(positions=2): edits.Zero()}
    changed = fmr.run(plain, edits=cut, **inputs).output.logits
    told("edit", torch.equal(fmr.run(model, edits=cut, **inputs).output.logits, changed))
    told("replay", torch.equal(fmr.replay(run, cut).output.logits, changed))
    places = [layer.resid_post.at(positions=2) for layer in structure.layers]
    metric = lambda output: output.logits[:, -1, 3]
    grids = [fmr.sweep(one, inputs, places, edits.Zero(), metric) for one in (model, plain)]
    told("sweep", torch.allclose(grids[0].values, grids[1].values, atol=1e-5) and grids[0].how == grids[1].how)
    told("weights", fmr.weights.fingerprint(model) == fmr.weights.fingerprint(plain))
    heads = [analyzers.HeadClustering(one).over([inputs], progress=False).result().distances for one in (model, plain)]
    told("clusters", abs(heads[0] - heads[1]).max() < 1e-9)
    told("after", torch.equal(model(**inputs).logits, whole.output.logits))
"""


def test_a_sharded_model_is_the_same_in_every_respect(tmp_path: Path) -> None:
    lines = torchrun(SCRIPT, tmp_path).strip().splitlines()
    assert len(lines) == 22
    assert all(line.endswith(" True") for line in lines), lines
