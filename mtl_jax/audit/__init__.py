"""Leaks: copies of texts across splits and sources, and identifiers of persons in texts.

The public names are those of __init__.pyi, loaded when they are first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
