"""What networks of each kind of task answer, and how two answers are compared: one class per image, one per pixel, or boxes.

Whatever the kind, an answer is one tensor, N x ..., which a method may detach, keep and compare; `answers_of(task)` says what is in it.
"""

from dfqbench.tasks.answers import Answers as Answers
from dfqbench.tasks.answers import answers_of as answers_of
from dfqbench.tasks.answers import native_shapes as native_shapes
from dfqbench.tasks.answers import packed as packed
from dfqbench.tasks.answers import unpacked as unpacked
from dfqbench.tasks.answers import without_auxiliary as without_auxiliary
