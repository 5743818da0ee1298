"""How the tasks share the trunk: from one trunk for all to experts with gates, for Experiment(sharing=...).

A sharing has parameters inside the trunk, like an adapter; some of them belong to single tasks. The public names are those of
__init__.pyi, loaded when they are first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
