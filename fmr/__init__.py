"""fmr"""
from fmr.errors import FmrError, GraphError, IdError, StoreError, StructureError, TrackError
from fmr.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.run import Run
from fmr.track import run, track
