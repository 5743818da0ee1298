"""The public names, for type checkers and for __init__.py, which loads each when it is first asked for."""

from .entity_rows import Concatenate as Concatenate
from .entity_rows import MentionReplacement as MentionReplacement
from .made_files import Made as Made
from .made_files import Written as Written
from .made_files import of_experiment as of_experiment
from .made_files import of_file as of_file
from .made_files import texts as texts
from .made_files import write as write
from .masked_neighbours import MaskedNeighbours as MaskedNeighbours
from .mixes import Mix as Mix
from .mixes import NeighbourSmoothing as NeighbourSmoothing
from .mixes import mixed as mixed
from .mixes import mixed_tokens as mixed_tokens
from .mixes import nearest as nearest
from .mixes import partners as partners
from .rewriting import BackTranslation as BackTranslation
from .rewriting import Generate as Generate
from .rewriting import Paraphrase as Paraphrase
from .rewriting import Rewriting as Rewriting
from .word_edits import Aeda as Aeda
from .word_edits import CharacterNoise as CharacterNoise
from .word_edits import Cutoff as Cutoff
from .word_edits import Eda as Eda
from .word_edits import WordEdit as WordEdit

__all__: list[str]
