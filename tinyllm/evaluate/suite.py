"""Tasks by name: what `tinyllm eval --tasks` takes."""
import dataclasses
import os
from collections.abc import Sequence

from tinyllm.config import suggestion
from tinyllm.data import open_shard, read_documents
from tinyllm.evaluate.formats import READERS
from tinyllm.evaluate.harness import check_names
from tinyllm.evaluate.perplexity import passages, shard_texts
from tinyllm.evaluate.tasks import Task
from tinyllm.tokenizer import Tokenizer
from tinyllm.train.run import Run

OWN = ("validation", "tinyworld")  # these need no file
FROM_DISK = (*READERS, "text")
SPELLING = f"{', '.join(OWN)}, {', '.join(f'{name}=PATH' for name in FROM_DISK)}"


def read_tasks(names: Sequence[str], run: Run, tokenizer: Tokenizer, shots: int = 0, limit: int | None = None) -> list[Task]:
    """The tasks of these names, such as "validation" or "arc=ARC-Easy-Test.jsonl".

    run, tokenizer : whose validation text is meant.     shots : examples before each question of a published benchmark.
    limit : at most this many items of each task, evenly spread over it.
    Raises ValueError or FileNotFoundError, in one line, for what is unknown, missing or malformed.
    """
    tasks: list[Task] = []
    for name in names:
        kind, given, path = name.partition("=")
        if kind not in (*OWN, *FROM_DISK):
            raise ValueError(f"unknown task {kind!r}{suggestion(kind, (*OWN, *FROM_DISK))}: there are {SPELLING}")
        if bool(path) != (kind in FROM_DISK) or given and not path:
            raise ValueError(f"task {name}: write {f'{kind}=PATH' if kind in FROM_DISK else kind}")
        tasks += _read(kind, path, run, tokenizer, shots)
    check_names(tasks)
    return [_limited(task, limit) for task in tasks]


def _read(kind: str, path: str, run: Run, tokenizer: Tokenizer, shots: int) -> Sequence[Task]:
    if kind == "validation":
        return [validation_task(run, tokenizer)]
    if kind == "text":
        found = tuple(p for d in read_documents(path) for p in passages([d.text], os.path.basename(d.source.partition(".jsonl:")[0])))
        return [Task(f"text {os.path.basename(os.path.normpath(path))}", found)]
    if kind == "tinyworld":
        from tinyllm.data.tinyworld import World
        from tinyllm.evaluate.world import world_tasks

        return world_tasks(World())
    return [READERS[kind](path, shots)]


def validation_task(run: Run, tokenizer: Tokenizer) -> Task:
    """The text that a run set aside, as text again, so that any model can be measured on it."""
    path = run.data / "val.bin"
    if not path.exists():
        raise ValueError(f"{run.folder} has no validation text in {path}: name other tasks with --tasks, of {SPELLING}")
    found = passages(shard_texts(open_shard(path, tokenizer.fingerprint()), tokenizer))
    return Task("validation", tuple(p for p in found if tokenizer.end_of_text is not None or len(p.text) > 1))


def _limited(task: Task, limit: int | None) -> Task:
    if limit is None or limit >= len(task.items):
        return task
    return dataclasses.replace(task, items=tuple(task.items[i * len(task.items) // limit] for i in range(limit)))


