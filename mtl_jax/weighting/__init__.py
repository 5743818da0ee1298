"""Weighting rules: how much each loss counts at each step."""

from mtl_jax.weighting.base import Rule as Rule
from mtl_jax.weighting.base import Signals as Signals
from mtl_jax.weighting.base import weighted_sum as weighted_sum
from mtl_jax.weighting.rules import RULES as RULES
from mtl_jax.weighting.rules import dwa as dwa
from mtl_jax.weighting.rules import equal as equal
from mtl_jax.weighting.rules import fixed as fixed
from mtl_jax.weighting.rules import make as make
