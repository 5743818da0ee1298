"""The trunk of a run with what its experiment adds to it: adapters, and the sharing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtl_jax import trunks
from mtl_jax.core.errors import UserError, listed
from mtl_jax.experiment import Experiment, unlabelled_sources
from mtl_jax.sharing.base import Hard
from mtl_jax.tasks import Task
from mtl_jax.transfer.adapters import routes
from mtl_jax.transfer.adapters.base import RUN, TASK
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
    readers = _readers(experiment, tasks)
    owners = _owners(experiment, tasks, sources, readers, per_task)
    if not (sharing or per_task):
        return trunks.adapt(trunk, experiment.adapters, len(sources), owners=owners)
    made = routes.make([(task.name, task.source) for task in tasks], sources, readers)
    return trunks.adapt(trunk, experiment.adapters, len(sources), sharing=sharing, routes=made, owners=owners)


def _readers(experiment: Experiment, tasks: Sequence[Task]) -> dict[str, list[str]]:
    """{source without tasks: the tasks that regularisers apply to its rows}."""
    unlabelled = unlabelled_sources(experiment)
    readers: dict[str, list[str]] = {source: [] for source in unlabelled}
    for regulariser in experiment.regularisers:
        named = getattr(regulariser, "tasks", ()) or [task.name for task in tasks if task.compared_as]
        for source in set(regulariser.sources) & set(unlabelled):
            readers[source].extend(name for name in named if name not in readers[source])
    return readers


def _owners(
    experiment: Experiment, tasks: Sequence[Task], sources: Sequence[str], readers: Mapping[str, Sequence[str]], per_task: bool
) -> tuple[int, ...]:
    """Adapted.owners: rows without tasks read the adapters of the source whose tasks are applied to them.

    Adapters of their own would not be trained when they label these rows.
    """
    stacked = [adapter for adapter in experiment.adapters if adapter.per != RUN and not (per_task and adapter.per == TASK)]
    owners = list(range(len(sources)))
    for source, names in readers.items():
        of_tasks = sorted({task.source for task in tasks if task.name in names})
        if stacked and len(of_tasks) > 1:
            raise UserError(
                f"adapter {stacked[0].name!r}: per is {stacked[0].per}, and tasks of the sources {listed(of_tasks)} are "
                f"applied to the rows of source {source!r}, which can read the adapter of one: in the regulariser, name tasks "
                "of one source, or declare the same file as a second source"
            )
        if of_tasks:
            owners[sources.index(source)] = sources.index(of_tasks[0])
    return tuple(owners) if stacked and owners != list(range(len(sources))) else ()
