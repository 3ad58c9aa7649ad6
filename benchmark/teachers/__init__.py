"""Teachers: pretrained networks of torchvision, timm, pytorchcv, the CIFAR ResNets of cifar.py, or any factory in a user's file or package.

Importing this room does not import torch; describing a teacher that was described before does not either. zoo.py builds networks, weights.py reads
files of weights.
"""

from dfqbench.teachers.card import InMemory, Question, TeacherCard, describe, examine, list_models, load
from dfqbench.teachers.spec import UNTRAINED, TeacherSpec, parse_teacher

__all__ = ["UNTRAINED", "InMemory", "Question", "TeacherCard", "TeacherSpec", "describe", "examine", "list_models", "load", "parse_teacher"]
