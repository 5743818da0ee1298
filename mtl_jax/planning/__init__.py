"""The needs of a step on devices that are not here, as estimated by their own compilers."""

from mtl_jax.planning.run_plan import plan as plan
