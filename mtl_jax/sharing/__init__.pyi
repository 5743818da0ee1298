"""The public names, for type checkers and for __init__.py, which loads each when it is first asked for."""

from .base import Hard as Hard
from .base import Sharing as Sharing
from .base import TrainedTrunk as TrainedTrunk
from .columns import CrossStitch as CrossStitch
from .columns import Sluice as Sluice
from .columns import Subspaces as Subspaces
from .columns import TopLayers as TopLayers
from .experts import CGC as CGC
from .experts import DSelectK as DSelectK
from .experts import MMoE as MMoE
from .fusion import AdapterFusion as AdapterFusion
from .fusion import fusion_only as fusion_only
from .generated import HyperFormer as HyperFormer
from .generated import Pal as Pal
from .layer_experts import PLE as PLE
from .layer_experts import MMoELayers as MMoELayers
from .low_rank_parts import HydraLora as HydraLora
from .low_rank_parts import MoeLora as MoeLora
from .low_rank_parts import MtlLora as MtlLora
from .shown_weights import Usage as Usage
from .shown_weights import usage as usage
from .task_adapters import TaskAdapters as TaskAdapters
