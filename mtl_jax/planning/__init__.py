"""What a step needs on devices that are not here, as their own compilers say."""

from mtl_jax.planning.run_plan import plan as plan
