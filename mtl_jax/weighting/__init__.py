"""Weighting rules: how much each loss counts at each step."""

from mtl_jax.weighting.base import Rule as Rule
from mtl_jax.weighting.base import Signals as Signals
from mtl_jax.weighting.base import weighted_sum as weighted_sum
from mtl_jax.weighting.gram_rules import aligned as aligned
from mtl_jax.weighting.gram_rules import cagrad as cagrad
from mtl_jax.weighting.gram_rules import config as config
from mtl_jax.weighting.gram_rules import dualproj as dualproj
from mtl_jax.weighting.gram_rules import fairgrad as fairgrad
from mtl_jax.weighting.gram_rules import imtl_g as imtl_g
from mtl_jax.weighting.gram_rules import mgda as mgda
from mtl_jax.weighting.gram_rules import pcgrad as pcgrad
from mtl_jax.weighting.gram_rules import upgrad as upgrad
from mtl_jax.weighting.registry import RULES as RULES
from mtl_jax.weighting.registry import make as make
from mtl_jax.weighting.rules import dwa as dwa
from mtl_jax.weighting.rules import equal as equal
from mtl_jax.weighting.rules import fixed as fixed
