"""How much should each domain count? Weights of four sentiment domains on the simplex, all of them trained at once.

    python experiments/ablate_weights.py
    python experiments/ablate_weights.py --parts heads --heads-steps 20 --workdir runs/quick

Two ablations, each with a report.html of its own:

- WORKDIR/heads: 16 points of the simplex x 3 seeds, heads on the features of the frozen trunk, which are computed once:
  48 runs, one program.
- WORKDIR/trunk: 8 points x 2 seeds, and everything trains: 16 runs, one program.

Started again, the script goes on where it was.
"""

import dataclasses
from pathlib import Path

import quickstart
import tyro

import mtl_jax
from mtl_jax import Batching, Evaluation, Experiment, Phase, ablate
from mtl_jax.errors import unknown
from mtl_jax.experiment import select

DOMAINS = ("tweets", "movies", "products", "editorials")
HEADS, EVERYTHING = quickstart.EXPERIMENT.phases
PARTS = ("heads", "trunk")


@dataclasses.dataclass(frozen=True)
class Ablations:
    """What is trained.

    Attributes:
        parts: heads, trunk.
        heads_steps: Steps of the heads on the frozen trunk.
        trunk_steps: Steps of everything, after 100 of the heads.
        points: Points of the simplex, for heads and trunk.
        seeds: Seeds, for heads and trunk.
        limit: Rows read from each source; 0: all.
        workdir: Where the ablations are.
    """

    parts: tuple[str, ...] = PARTS
    heads_steps: int = 450
    trunk_steps: int = 100
    points: tuple[int, int] = (16, 8)
    seeds: tuple[int, int] = (3, 2)
    limit: int = 0
    workdir: str = "runs/ablate_weights"


def experiment(part: str, options: Ablations) -> Experiment:
    """The quickstart's four domains; in `heads` the trunk stays frozen."""
    sources = tuple(dataclasses.replace(source, limit=options.limit) for source in quickstart.EXPERIMENT.sources)
    whole = select(dataclasses.replace(quickstart.EXPERIMENT, name=f"weights_{part}", sources=sources, only=DOMAINS))
    if part == "heads":
        phases: tuple[Phase, ...] = (dataclasses.replace(HEADS, steps=options.heads_steps),)
        return dataclasses.replace(whole, phases=phases, evaluation=Evaluation(every=150, baseline="probe"))
    phases = (dataclasses.replace(HEADS, steps=100), dataclasses.replace(EVERYTHING, steps=options.trunk_steps))
    batch = Batching(rows=16, row_length=64)
    return dataclasses.replace(whole, phases=phases, batch=batch, evaluation=Evaluation(every=50, baseline="probe"))


def main(options: Ablations) -> None:
    """Trains what is asked for."""
    for part in options.parts:
        if part not in PARTS:
            raise unknown("--parts", part, PARTS)
        number = PARTS.index(part)
        points, seeds = options.points[number], options.seeds[number]
        folder = Path(options.workdir) / part
        ablate(experiment(part, options), folder, [f"weights=simplex:{points}"], seeds=seeds)
        print(f"everything is in {folder}")


if __name__ == "__main__":
    mtl_jax.run(lambda: main(tyro.cli(Ablations, description=__doc__)))
