"""Whether a model uses the variables of an algorithm: causal models, and the data of interchanges."""
