"""fmr looks inside any PyTorch model while it runs.

>>> with fmr.track(model) as run:
...     model(input_ids)
>>> run.graph
Graph of GPT2LMHeadModel: 228 ops in 55 module calls, reading 1 input, 52 params
  most used: view 46, add 24, transpose 20, mul 20, addmm 16, dropout 13
  input   input:input_ids int64[1, 6]
  output  lm_head/linear#0 float32[1, 6, 515] <- /getitem#0, param:transformer.wte.weight  at ...
>>> fmr.locate(run)
Structure of GPT2LMHeadModel: 4 layers, 4 attentions, 4 memories, 0 rejected
  embedding     transformer.wte/embedding#0
  attention[0]  transformer.h.0.attn  self  4 heads of 32  certified: pattern ..., rows ..., z ..., heads ..., out ...
  ...
  mlps[0]  transformer.h.0.mlp  512 memories  certified: post ..., keys ..., out ...
  ...
  residual      8 writes from transformer.drop/dropout#0 to transformer.ln_f/layer_norm#0
  final norm    transformer.ln_f/layer_norm#0
  unembedding   lm_head/linear#0
>>> run["transformer.h.0.attn/softmax#0"].shape
torch.Size([1, 4, 6, 6])
"""

import fmr.edits as edits
import fmr.subspaces as subspaces
import fmr.zoo as zoo
from fmr.corpora.collect import collect
from fmr.corpora.corpus import Corpus
from fmr.errors import (
    DrawError,
    EditError,
    FmrError,
    GraphError,
    IdError,
    ReplayError,
    StoreError,
    StructureError,
    TrackError,
    ZooError,
)
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.interventions.intervention import Intervention
from fmr.nodes import Node
from fmr.pages.page import page
from fmr.runs.census import census
from fmr.runs.run import Run
from fmr.runs.store import load
from fmr.runs.track import run, track
from fmr.structure import locate
from fmr.sweeps.edges import Edge
from fmr.sweeps.replay import replay
from fmr.sweeps.sweep import sweep

__all__ = [
    "Corpus",
    "DrawError",
    "Edge",
    "EditError",
    "FmrError",
    "Graph",
    "GraphError",
    "IdError",
    "Intervention",
    "Node",
    "ReplayError",
    "Run",
    "Site",
    "StoreError",
    "StructureError",
    "TensorId",
    "TrackError",
    "ZooError",
    "census",
    "collect",
    "edits",
    "load",
    "locate",
    "page",
    "replay",
    "run",
    "subspaces",
    "sweep",
    "track",
    "zoo",
]
