"""Measurements over data sets, one method a file: updated batch by batch, merged across shards, with a frozen result.

>>> analyzers.HeadClustering(model).over(batches).result()
HeadClusters: 16 heads of 4 layers over 200 tokens in 12 examples
  distance in bits: within a layer 0.3..., between layers 0.4..., permutation p 0.0005
  3 clusters, silhouette 0.4...; map: stress 0.1..., seed 0
"""

from analyzers import images, scale
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
from analyzers.compare.measures import similarity
from analyzers.compare.similarities import Similarities
from analyzers.compare.similarity import Similarity
from analyzers.compare.timeline import Timeline
from analyzers.dictionaries.autoencoder import SparseAutoencoder
from analyzers.dictionaries.contexts import LatentContexts
from analyzers.dictionaries.dictionary import Dictionary
from analyzers.dictionaries.latents import LatentPages
from analyzers.dictionaries.polysemantic import Answers, Polysemanticity
from analyzers.dictionaries.scores import DictionaryScored
from analyzers.dictionaries.scoring import DictionaryScores
from analyzers.dictionaries.steering import LatentSteered, LatentSteering
from analyzers.dictionaries.superposition import Interference, Superposition
from analyzers.dictionaries.training import DictionaryTraining
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
from analyzers.inputs.patches import Patches
from analyzers.inputs.patchmaps import PatchMaps
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
from analyzers.sparsity.activation import ActivationSparsity
from analyzers.sparsity.curves import PruningCurves
from analyzers.sparsity.knowledge import KnowledgeProbe
from analyzers.sparsity.known import Knowledge
from analyzers.sparsity.pruning import Pruning
from analyzers.sparsity.related import Relations
from analyzers.sparsity.relations import TokenRelations
from analyzers.sparsity.sparsity import Sparsity
from analyzers.surgery.ablation import Ablation
from analyzers.surgery.costs import LayerCosts
from analyzers.surgery.surgery import Surgery
from analyzers.texts import sentences
from analyzers.tracing.traces import Traces
from analyzers.tracing.tracing import CausalTracing

__all__ = [
    "Ablation",
    "ActivationPatching",
    "ActivationSparsity",
    "Alignment",
    "AlignmentSearch",
    "Analyzer",
    "AnalyzerError",
    "Answers",
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
    "Dictionary",
    "DictionaryScored",
    "DictionaryScores",
    "DictionaryTraining",
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
    "Interference",
    "KeyCovariance",
    "KeyValueMemories",
    "Knowledge",
    "KnowledgeProbe",
    "Lab",
    "LatentContexts",
    "LatentPages",
    "LatentSteered",
    "LatentSteering",
    "LayerCosts",
    "Lens",
    "LensTranslator",
    "LogitAttribution",
    "LogitLens",
    "LogitParts",
    "Memories",
    "Modularity",
    "Outcome",
    "PatchMaps",
    "Patches",
    "PathPatching",
    "Polysemanticity",
    "Probe",
    "Probed",
    "Profile",
    "Promotion",
    "Pruning",
    "PruningCurves",
    "RankOneEdit",
    "Relations",
    "ResidualDecomposition",
    "Sanity",
    "Similarities",
    "Similarity",
    "SparseAutoencoder",
    "Sparsity",
    "StyleTransfer",
    "Stylized",
    "Superposition",
    "Surgery",
    "Timeline",
    "TokenRelations",
    "TopCrops",
    "TopImages",
    "Traces",
    "Translator",
    "Visualized",
    "images",
    "scale",
    "sentences",
    "similarity",
]
