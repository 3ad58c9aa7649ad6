"""What networks of each kind of task answer (answers.py, with torch), and how well they do: pixels (segment.py), boxes (detect.py), without torch.

Whatever the kind, an answer is one tensor, N x ..., which a method may detach, keep and compare; `answers_of(task)` says what is in it.
"""
