"""The training batches of sources, without an experiment: for a look at them, or for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtl_jax.core.errors import UserError
from mtl_jax.data import augmentations, made_rows
from mtl_jax.data.batch_shape import Batching
from mtl_jax.data.corpus import make_corpus, read_sources, with_augmentations
from mtl_jax.data.labels import Labels
from mtl_jax.data.source import Source
from mtl_jax.data.stream import Stream, single_phase, stream
from mtl_jax.pretrained import locate

if TYPE_CHECKING:
    from mtl_jax.models.trunk_output import TrunkFacts

STEPS = 10**6  # over which a mixture may change; batches do not end there


def batches_of(
    sources: Source | Sequence[Source],
    tasks: Labels | Sequence[Labels],
    *,
    tokenizer: Any = None,
    batching: Batching = Batching(),
    seed: int = 0,
    steps: int = STEPS,
    trunk: TrunkFacts | None = None,
) -> Stream:
    """Endless training batches of sources: those of a run of an experiment with these sources, tasks, batch and seed.

    Args:
        sources: A source, or several.
        tasks: A task, or several: their labels are in the batches.
        tokenizer: A tokenizer of transformers, or a checkpoint that has one: a directory, pip:ASSET/MEMBER, or a hub id. None:
            the trunk's.
        batching: The shape of the batches, the mixture of the sources.
        seed: The seed of the order; of a run, its data_seed or seed.
        steps: The steps over which batching.mixture becomes batching.mixture_end.
        trunk: The facts of a run's trunk, by mtl_jax.trunks.facts(). Tasks that write texts need them: where a text begins and
            ends follows from the trunk. Without it, the token table is taken to have a row for each token of the tokenizer.

    Returns:
        An iterator of Batch: tokens, segments and positions i32[rows, row_length], labels by task. Its get_state() and
        set_state() are a position to resume from; close() ends its thread or processes.

    Raises:
        UserError: A source, label or mixture is refused, or a task writes texts and no trunk is given.

    Examples:
        >>> batches = mtl_jax.data.batches_of(EXPERIMENT.sources, EXPERIMENT.tasks, tokenizer="bert", batching=EXPERIMENT.batch)
        >>> next(batches).tokens.shape
        (8, 24)
        >>> batches.close()
    """
    all_sources = (sources,) if isinstance(sources, Source) else tuple(sources)
    all_tasks = tuple(tasks) if isinstance(tasks, Sequence) else (tasks,)
    for source in all_sources:
        if source.copies != "report":
            what = f"source {source.name!r}: copies is {source.copies!r}, which only a run looks after"
            raise UserError(f"{what}; leave it out here, and find copies by mtl_jax.audit.near_copies")
    if (tokenizer is None) == (trunk is None):
        given = "neither is" if trunk is None else "both are"
        raise UserError(f"either tokenizer or trunk must be given, and {given}; a trunk has its own tokenizer")
    for task in all_tasks if trunk is None else ():
        writes = task.label_level == "target" or task.makes_tokens
        if writes and getattr(task, "end", -1) < 0:  # not put on a trunk yet
            raise UserError(
                f"task {task.name!r} writes texts, and where they begin and end follows from the trunk; in place of tokenizer, "
                "give trunk=mtl_jax.trunks.facts(mtl_jax.trunks.build(EXPERIMENT.trunk, TEXTS, numpy.float32, decodes=True))"
            )
    if trunk is not None:
        tokenizer, all_tasks = trunk.tokenizer, tuple(task.on(trunk) for task in all_tasks)
    elif isinstance(tokenizer, str):
        tokenizer = locate.load_tokenizer(locate.locate(tokenizer))
    token_rows = (trunk.table[0] if trunk is not None else 0) or len(tokenizer)
    augmentations.check(all_sources, all_tasks)
    added = made_rows.add(all_sources, all_tasks, read_sources(all_sources, all_tasks))
    corpus = make_corpus(all_sources, all_tasks, added.data, tokenizer, batching.row_length)
    options: dict[str, Any] = {"token_rows": token_rows, "max_length": batching.row_length, "seed": seed}
    corpus = with_augmentations(corpus, all_sources, (), added, tokenizer=tokenizer, **options)
    return stream(corpus, batching, seed, single_phase(batching, steps))
