"""One paper, or one standard loss, per file: its labeler, its pixel weights and its terms together.

The faces are in base.py, the record that they read and write in engine/step.py. The constants and
equations of a paper stand in the docstring of its file, where [C] marks what the authors' code does
and [R] what is a reconstruction.
"""
