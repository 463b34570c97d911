"""Measurements over data sets, one method a file: updated batch by batch, merged across shards, with a frozen result.

>>> analyzers.HeadClustering(model).over(batches).result()
HeadClusters: 16 heads of 4 layers over 200 tokens in 12 examples
  distance in bits: within a layer 0.3..., between layers 0.4..., permutation p 0.0005
  3 clusters, silhouette 0.4...; map: stress 0.1..., seed 0
"""

from analyzers import images
from analyzers.alignment.alignment import Alignment
from analyzers.alignment.causal_model import CausalModel
from analyzers.alignment.counterfactuals import Counterfactuals
from analyzers.alignment.induced import Induced, InterchangeTraining
from analyzers.alignment.search import AlignmentSearch
from analyzers.causal.attribution import AttributionPatching
from analyzers.causal.effects import Effects
from analyzers.causal.patching import ActivationPatching
from analyzers.causal.paths import PathPatching
from analyzers.circuits.circuit import Circuit
from analyzers.circuits.search import CircuitSearch
from analyzers.editing.edit import FactEdit
from analyzers.editing.keys import Covariance, KeyCovariance
from analyzers.editing.rank_one import RankOneEdit
from analyzers.editing.scores import EditScores
from analyzers.heads.clustering import HeadClustering
from analyzers.heads.clusters import HeadClusters
from analyzers.heads.composition import Composition
from analyzers.heads.compositions import Compositions
from analyzers.heads.detect import Heads
from analyzers.heads.jobs import HeadJobs
from analyzers.images.style import StyleTransfer
from analyzers.images.stylized import Stylized
from analyzers.images.top import TopImages
from analyzers.images.topcrops import TopCrops
from analyzers.images.visualization import FeatureVisualization
from analyzers.images.visualized import Visualized
from analyzers.inputs.attribution import InputAttribution
from analyzers.inputs.curves import Curves
from analyzers.inputs.result import Attribution
from analyzers.inputs.sanity import Sanity
from analyzers.lab.lab import Lab
from analyzers.lab.outcome import Outcome
from analyzers.lab.profile import Profile
from analyzers.lenses.attribution import LogitAttribution
from analyzers.lenses.decomposition import Decomposition, ResidualDecomposition
from analyzers.lenses.lens import LogitLens
from analyzers.lenses.readings import Lens
from analyzers.lenses.shares import LogitParts
from analyzers.lenses.translator import LensTranslator, Translator
from analyzers.memories.memories import KeyValueMemories
from analyzers.memories.predictions import Composed, Promotion
from analyzers.memories.result import Memories
from analyzers.networks.communities import Communities
from analyzers.networks.modularity import Modularity
from analyzers.probes.probe import Probe
from analyzers.probes.probed import Probed
from analyzers.protocol import Analyzer, AnalyzerError
from analyzers.texts import sentences
from analyzers.tracing.traces import Traces
from analyzers.tracing.tracing import CausalTracing

__all__ = [
    "ActivationPatching",
    "Alignment",
    "AlignmentSearch",
    "Analyzer",
    "AnalyzerError",
    "Attribution",
    "AttributionPatching",
    "CausalModel",
    "CausalTracing",
    "Circuit",
    "CircuitSearch",
    "Communities",
    "Composed",
    "Composition",
    "Compositions",
    "Counterfactuals",
    "Covariance",
    "Curves",
    "Decomposition",
    "EditScores",
    "Effects",
    "FactEdit",
    "FeatureVisualization",
    "HeadClustering",
    "HeadClusters",
    "HeadJobs",
    "Heads",
    "Induced",
    "InputAttribution",
    "InterchangeTraining",
    "KeyCovariance",
    "KeyValueMemories",
    "Lab",
    "Lens",
    "LensTranslator",
    "LogitAttribution",
    "LogitLens",
    "LogitParts",
    "Memories",
    "Modularity",
    "Outcome",
    "PathPatching",
    "Probe",
    "Probed",
    "Profile",
    "Promotion",
    "RankOneEdit",
    "ResidualDecomposition",
    "Sanity",
    "StyleTransfer",
    "Stylized",
    "TopCrops",
    "TopImages",
    "Traces",
    "Translator",
    "Visualized",
    "images",
    "sentences",
]
