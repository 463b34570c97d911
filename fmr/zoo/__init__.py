"""Small trained models that ship with fmr, by name: nothing to download, and each reproduced by a script in etc/train.

>>> fmr.zoo.names()
['digits-cnn', 'digits-mlp', 'efficientnet', 'equality-mlp', 'facts', 'gru', 'minilm', 'smollm2']
>>> model, tokenizer = fmr.zoo.load("facts")

`fmr.zoo.world` holds the sentences of "facts", `fmr.zoo.tasks` the data of the classifiers, `fmr.zoo.models` their
architectures; `fmr.zoo.measure` finds the accuracies that a card reports.
"""

import fmr.zoo.models as models
import fmr.zoo.tasks as tasks
import fmr.zoo.world as world
from fmr.zoo.images import photos
from fmr.zoo.measures import correct, measure
from fmr.zoo.shelf import load, names
from fmr.zoo.trained import Trained

__all__ = ["Trained", "correct", "load", "measure", "models", "names", "photos", "tasks", "world"]
