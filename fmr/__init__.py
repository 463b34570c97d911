"""fmr looks inside any PyTorch model while it runs.

>>> with fmr.track(model) as run:
...     model(input_ids)
>>> run.graph
Graph of GPT2LMHeadModel: 127 ops in 31 module calls, reading 1 input, 28 params
  most used: view 24, add 14, transpose 10, mul 10, addmm 8, dropout 7
  input   input:input_ids int64[1, 16]
  output  lm_head/linear#0 float32[1, 16, 128] <- /getitem#0, param:transformer.wte.weight  at ...
>>> fmr.locate(run)
Structure of GPT2LMHeadModel: 2 layers, 2 attentions, 2 memories, 0 rejected
  embedding     transformer.wte/embedding#0
  attention[0]  transformer.h.0.attn  self  4 heads of 16  certified: pattern 9e-08, rows 9e-08, z 1e-07, out 2e-07 ...
  attention[1]  transformer.h.1.attn  self  4 heads of 16  certified: pattern 1e-07, rows 9e-08, z 1e-07, out 2e-07 ...
  mlps[0]  transformer.h.0.mlp  256 memories  certified: post 2e-07, out 5e-07 ...
  mlps[1]  transformer.h.1.mlp  256 memories  certified: post 3e-07, out 4e-07 ...
  residual      4 writes from transformer.drop/dropout#0 to transformer.ln_f/layer_norm#0
  final norm    transformer.ln_f/layer_norm#0
  unembedding   lm_head/linear#0
>>> run["transformer.h.0.attn/softmax#0"].shape
torch.Size([1, 4, 16, 16])
"""

import fmr.zoo as zoo
from fmr.errors import DrawError, FmrError, GraphError, IdError, StoreError, StructureError, TrackError, ZooError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.runs.census import census
from fmr.runs.run import Run
from fmr.runs.store import load
from fmr.runs.track import run, track
from fmr.structure import locate

__all__ = [
    "DrawError",
    "FmrError",
    "Graph",
    "GraphError",
    "IdError",
    "Node",
    "Run",
    "Site",
    "StoreError",
    "StructureError",
    "TensorId",
    "TrackError",
    "ZooError",
    "census",
    "load",
    "locate",
    "run",
    "track",
    "zoo",
]
