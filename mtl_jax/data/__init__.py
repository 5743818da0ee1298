"""Rows, labels and tokens: from files to the batches of a step.

The public names are those of __init__.pyi, loaded when they are first asked for: the doors for a script's own formats and
mixtures, and the values that these are made of.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
