"""Measurements over data sets, one method a file: updated batch by batch, merged across shards, with a frozen result.

>>> heads = analyzers.HeadClustering(model)
>>> heads.over(batches).result()
HeadClusters: 72 heads of 6 layers over 2711 tokens in 300 examples
"""

from analyzers.clustering import HeadClustering, HeadClusters
from analyzers.protocol import Analyzer, AnalyzerError
from analyzers.texts import sentences

__all__ = ["Analyzer", "AnalyzerError", "HeadClustering", "HeadClusters", "sentences"]
