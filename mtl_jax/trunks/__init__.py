"""The trunk of an experiment: declared, built, saved in a workdir, and opened again from there.

A trunk of your own is a class that derives from TrunkConfig, with its fields and a linen module whose result is an
EncoderOutput; experiments/own/trunk.py has one.
"""

from mtl_jax.models.encoder import EncoderOutput as EncoderOutput
from mtl_jax.models.kernels import register as register_kernels  # noqa: F401
from mtl_jax.models.layers import Kernels as Kernels
from mtl_jax.trunks.base import CARD as CARD
from mtl_jax.trunks.base import UNBOUNDED as UNBOUNDED
from mtl_jax.trunks.base import Trunk as Trunk
from mtl_jax.trunks.base import TrunkConfig as TrunkConfig
from mtl_jax.trunks.base import adapt as adapt
from mtl_jax.trunks.base import copies as copies
from mtl_jax.trunks.base import draws_dropout as draws_dropout
from mtl_jax.trunks.base import facts as facts
from mtl_jax.trunks.base import init_params as init_params
from mtl_jax.trunks.base import save as save
from mtl_jax.trunks.base import shapes as shapes
from mtl_jax.trunks.base import tables as tables
from mtl_jax.trunks.base import tables_of as tables_of
from mtl_jax.trunks.base import width as width
from mtl_jax.trunks.build import build as build
from mtl_jax.trunks.build import check_packed as check_packed
from mtl_jax.trunks.build import check_remat as check_remat
from mtl_jax.trunks.build import reopen as reopen
from mtl_jax.trunks.from_checkpoint import CAUSAL as CAUSAL
from mtl_jax.trunks.from_checkpoint import DECODER as DECODER
from mtl_jax.trunks.from_checkpoint import Pretrained as Pretrained
from mtl_jax.trunks.from_checkpoint import with_classifier as with_classifier
from mtl_jax.trunks.from_scratch import Embedding as Embedding
from mtl_jax.trunks.from_scratch import Transformer as Transformer
