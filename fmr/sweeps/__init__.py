"""Recorded runs run again: the part that an edit reaches, and many edited runs as rows of one; ready-made metrics."""

from fmr.sweeps.metrics import kl, log_prob, logit_diff, loss, probability

__all__ = ["kl", "log_prob", "logit_diff", "loss", "probability"]
