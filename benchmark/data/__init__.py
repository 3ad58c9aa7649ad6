"""Evaluation sets: the only room that opens real data. Importing it does not import torch.

No quantizer gets here: methods are handed a `Task`, and the sets are opened by evaluation (and by `pretrain`, which makes teachers).
"""

from dfqbench.data.find import find_set, list_sets
from dfqbench.data.images import Images
from dfqbench.data.own import OwnSet, register_set
from dfqbench.data.sets import EvaluationSet
from dfqbench.data.yardstick import Yardstick

__all__ = ["EvaluationSet", "Images", "OwnSet", "Yardstick", "find_set", "list_sets", "register_set"]
