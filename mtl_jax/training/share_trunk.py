"""The trunk of a run with what its experiment adds to it: adapters, and the sharing."""

from __future__ import annotations

from collections.abc import Sequence

from mtl_jax import trunks
from mtl_jax.experiment import Experiment, unlabelled_sources
from mtl_jax.sharing.base import Hard
from mtl_jax.tasks import Task
from mtl_jax.transfer.adapters import routes
from mtl_jax.transfer.adapters.base import TASK
from mtl_jax.trunks import Trunk


def share_trunk(trunk: Trunk, experiment: Experiment, tasks: Sequence[Task], sources: Sequence[str]) -> Trunk:
    """The trunk with the experiment's adapters and sharing.

    Args:
        trunk: The trunk.
        experiment: The experiment.
        tasks: Its tasks.
        sources: The names of the sources that its batches have rows of, in the order of their numbers.

    Raises:
        UserError: An adapter or the sharing has no place in the trunk.
    """
    sharing = () if isinstance(experiment.sharing, Hard) else (experiment.sharing,)
    of_source = [task.source for task in tasks]
    per_task = any(adapter.per == TASK for adapter in experiment.adapters) and len(set(of_source)) < len(of_source)
    if not (sharing or per_task):
        return trunks.adapt(trunk, experiment.adapters, len(sources))
    unlabelled = unlabelled_sources(experiment)
    readers: dict[str, list[str]] = {source: [] for source in unlabelled}
    for regulariser in experiment.regularisers:
        named = getattr(regulariser, "tasks", ()) or [task.name for task in tasks if task.compared_as]
        for source in set(regulariser.sources) & set(unlabelled):
            readers[source].extend(name for name in named if name not in readers[source])
    made = routes.make([(task.name, task.source) for task in tasks], sources, readers)
    return trunks.adapt(trunk, experiment.adapters, len(sources), sharing=sharing, routes=made)
