"""The public names, for type checkers and for __init__.py, which loads each when it is first asked for."""

from .copies import copies_within as copies_within
from .copies import near_copies as near_copies
