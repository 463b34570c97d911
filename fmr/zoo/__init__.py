"""Trained models by name, nothing to download: small ones that ship with fmr, and pretrained ones in Python packages.

>>> fmr.zoo.names()
['digits-cnn', 'digits-mlp', 'efficientnet', 'equality-mlp', 'facts', 'gru', 'minilm', 'smollm2', 'superposition', ...]
>>> model, tokenizer = fmr.zoo.load("facts")

What ships is reproduced by the scripts in etc/train: `fmr.zoo.world` holds the sentences of "facts", `fmr.zoo.tasks` the
data of the classifiers, `fmr.zoo.models` their architectures; `fmr.zoo.measure` finds the accuracies that a card reports.
"minilm", "smollm2" and "efficientnet" were trained by others; `fmr.zoo.photos` are two photographs to look at.
"""

import fmr.zoo.models as models
import fmr.zoo.tasks as tasks
import fmr.zoo.world as world
from fmr.zoo.images import photos
from fmr.zoo.measures import correct, measure
from fmr.zoo.shelf import load, names
from fmr.zoo.trained import Trained

__all__ = ["Trained", "correct", "load", "measure", "models", "names", "photos", "tasks", "world"]
