"""Which tasks help which: estimates of how much a source task helps a target task.

An estimator is a function of arrays to a float; higher is better. The public names are those of __init__.pyi, loaded when
they are first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
