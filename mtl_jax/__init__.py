"""Multi-task and transfer learning for NLP in JAX.

A script builds an Experiment and calls main(experiment); train(experiment, workdir) is the same from Python. The public names
are those of __init__.pyi; each is loaded when it is first asked for, as jax and its libraries take seconds.
"""

import lazy_loader

from mtl_jax.core.configuration import show_in_one_line as _show_in_one_line

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_show_in_one_line()
