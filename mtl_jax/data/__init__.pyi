"""The public names, for type checkers and for __init__.py, which loads each when it is first asked for."""

from .formats import READERS as READERS
from .formats import register_format as register_format
from .formats.rows import Row as Row
from .mixture import MIXTURES as MIXTURES
from .mixture import register_mixture as register_mixture
from .source import Augmentation as Augmentation
from .source import AugmentedRows as AugmentedRows
from .source import RowEdit as RowEdit
from .source import TextColumns as TextColumns
from .source_batches import batches_of as batches_of
