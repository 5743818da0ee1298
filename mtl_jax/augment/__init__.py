"""More training rows from few: edits with which labels move, rewriting by models, mixing.

Each is a subclass of mtl_jax.data.Augmentation, as one of a script would be; Mix is a regulariser. The public names are those
of __init__.pyi, loaded when they are first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
