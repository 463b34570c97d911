"""Measurements over data sets, one method a file: updated batch by batch, merged across shards, with a frozen result.

>>> analyzers.HeadClustering(model).over(batches).result()
HeadClusters: 72 heads of 6 layers over 3975 tokens in 307 examples
  distance in bits: within a layer 0.230, between layers 0.278, permutation p 0.0005
  19 clusters, silhouette 0.21; map: stress 0.193, seed 0
"""

from analyzers.heads.clustering import HeadClustering, HeadClusters
from analyzers.protocol import Analyzer, AnalyzerError
from analyzers.texts import sentences

__all__ = ["Analyzer", "AnalyzerError", "HeadClustering", "HeadClusters", "sentences"]
