"""The public names, for type checkers and for __init__.py, which loads each when it is first asked for."""

from .copies import copies_within as copies_within
from .copies import near_copies as near_copies
from .deidentification import Identifier as Identifier
from .deidentification import deidentify as deidentify
from .deidentification import deidentify_texts as deidentify_texts
from .deidentification import moved as moved
from .deidentified_rows import Deidentify as Deidentify
from .experiment_audit import Audit as Audit
from .experiment_audit import of_experiment as of_experiment
from .meaning import Meaning as Meaning
from .membership import Membership as Membership
from .membership import exposure as exposure
from .membership import membership as membership
from .overlaps import Conflict as Conflict
from .overlaps import Example as Example
from .overlaps import Overlap as Overlap
from .person_names import people_of as people_of
from .person_names import register_names as register_names
from .recognisers import RECOGNISERS as RECOGNISERS
from .recognisers import register_recogniser as register_recogniser
