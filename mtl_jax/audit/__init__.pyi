"""The public names, for type checkers and for __init__.py, which loads each when it is first asked for."""

from .copies import copies_within as copies_within
from .copies import near_copies as near_copies
from .of_experiment import Audit as Audit
from .of_experiment import of_experiment as of_experiment
from .overlaps import Conflict as Conflict
from .overlaps import Example as Example
from .overlaps import Overlap as Overlap
