"""Which weights are best for four sentiment domains? Points of the simplex of weights, all trained at once.

    python experiments/ablate_weights.py
    python experiments/ablate_weights.py --parts heads --heads-steps 20 --workdir runs/quick

Two ablations, each with its own report.html:

- WORKDIR/heads: 16 points of the simplex x 3 seeds, heads on the features of the frozen trunk, which are computed once:
  48 runs, one program.
- WORKDIR/trunk: 8 points x 2 seeds, all parameters train: 16 runs, one program, 8 at once.

Started again, the script resumes.

Test Pearson's correlation, mean and standard deviation over the seeds, float32:

| weights of tweets / movies / products / editorials | tweets        | movies        | products      | editorials    |
|----------------------------------------------------|---------------|---------------|---------------|---------------|
| everything, 0.25 / 0.25 / 0.25 / 0.25 (best by dev) | 0.880 ± 0.002 | 0.739 ± 0.004 | 0.851 ± 0.002 | 0.696 ± 0.015 |
| everything, 0.216 / 0.211 / 0.034 / 0.539          | 0.883 ± 0.003 | 0.730 ± 0.005 | 0.822 ± 0.006 | 0.693 ± 0.014 |
| everything, 0.054 / 0.351 / 0.485 / 0.110          | 0.855 ± 0.005 | 0.730 ± 0.004 | 0.856 ± 0.002 | 0.678 ± 0.015 |
| everything, 0.004 / 0.330 / 0.276 / 0.389          | 0.842 ± 0.001 | 0.730 ± 0.000 | 0.852 ± 0.002 | 0.693 ± 0.012 |
| everything, 0.723 / 0.021 / 0.048 / 0.207          | 0.863 ± 0.005 | 0.654 ± 0.009 | 0.815 ± 0.003 | 0.686 ± 0.015 |
| heads, 0.723 / 0.021 / 0.048 / 0.207 (best by dev) | 0.798 ± 0.005 | 0.653 ± 0.003 | 0.741 ± 0.006 | 0.591 ± 0.004 |
| heads, 0.25 / 0.25 / 0.25 / 0.25                   | 0.797 ± 0.005 | 0.653 ± 0.003 | 0.740 ± 0.007 | 0.591 ± 0.003 |

(five of the eight points, two of the sixteen; WORKDIR/*/report.html has all). If all parameters train, a domain with too little
weight loses up to 0.08, and equal weights are hard to beat. Heads that share only a frozen trunk do not compete, and Adam
divides a weight out again: all sixteen points are equal to 0.001, as the program announces before it trains them. The 48 runs
of heads took 83 s on two CPU cores and the 16 others 16 minutes, both beside other work.
"""

import dataclasses
from pathlib import Path

import quickstart
import tyro

import mtl_jax
from mtl_jax import Batching, Evaluation, Experiment, Phase, ablate
from mtl_jax.core.errors import unknown
from mtl_jax.experiment import select

DOMAINS = ("tweets", "movies", "products", "editorials")
HEADS, EVERYTHING = quickstart.EXPERIMENT.phases
PARTS = ("heads", "trunk")


@dataclasses.dataclass(frozen=True)
class Ablations:
    """The ablations to train.

    Attributes:
        parts: heads, trunk, or both.
        heads_steps: Steps of the heads on the frozen trunk.
        trunk_steps: Steps of all parameters, after 100 steps of the heads.
        points: Numbers of points of the simplex, for heads and trunk.
        seeds: Numbers of seeds, for heads and trunk.
        limit: Rows read from each source; 0: all.
        workdir: The directory with the ablations.
    """

    parts: tuple[str, ...] = PARTS
    heads_steps: int = 450
    trunk_steps: int = 100
    points: tuple[int, int] = (16, 8)
    seeds: tuple[int, int] = (3, 2)
    limit: int = 0
    workdir: str = "runs/ablate_weights"


def experiment(part: str, options: Ablations) -> Experiment:
    """The experiment on the quickstart's four domains; in `heads` the trunk is frozen."""
    sources = tuple(dataclasses.replace(source, limit=options.limit) for source in quickstart.EXPERIMENT.sources)
    domains = select(dataclasses.replace(quickstart.EXPERIMENT, name=f"weights_{part}", sources=sources, only=DOMAINS))
    if part == "heads":
        phases: tuple[Phase, ...] = (dataclasses.replace(HEADS, steps=options.heads_steps),)
        return dataclasses.replace(domains, phases=phases, evaluation=Evaluation(every=150, baseline="probe"))
    phases = (dataclasses.replace(HEADS, steps=100), dataclasses.replace(EVERYTHING, steps=options.trunk_steps))
    batch = Batching(rows=16, row_length=64)
    return dataclasses.replace(domains, phases=phases, batch=batch, evaluation=Evaluation(every=50, baseline="probe"))


def main(options: Ablations) -> None:
    """Trains the chosen ablations."""
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
