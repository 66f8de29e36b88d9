"""Data parallelism: each step's batch shared out by rows over processes, every one with a copy of the gradients.

    every member   gradient of its own rows                                  forward and backward, on one core, without waiting
    meet           each adds up its share of the blocks over all copies      in the order of ranks: the same bits every time
    meet           norm of all → clip factor; each updates its blocks        weights and moments are in memory that all share
    meet           the step is done

So a step's arithmetic is divided evenly, the optimizer's too, and what a member needs of the others it reads where they wrote it. With
the same kernels on two cores, a model of 0.8 million parameters took 34 ms a step where two threads in one process took 68, one of 10
million 840 ms instead of 907. The price is a copy of the gradients for each process: beyond `LARGEST` parameters, where a single call keeps all
cores busy anyway, the threads of the kernels do the sharing.
"""
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import numpy as np

from tinyllm.memory import freed_memory_kept
from tinyllm.optim import Optimizer, sum_of_squares
from tinyllm.processes import ProcessGroup, available, shared
from tinyllm.threads import single_threaded_blas, threads

LARGEST = 2**25


class Team:
    """The processes that train one model together; only this one, until `assemble`. Each member has its own Team, Trainer and model."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer, self.group = optimizer, ProcessGroup()
        self.copies = []  # of the flat gradients, by rank

    @property
    def alone(self) -> bool:
        return self.group.size == 1

    def size_for(self, batches: Sequence) -> int:
        """How many processes can share such batches: at most one a thread and one a row."""
        flat = self.optimizer.flat.data
        if not (available and isinstance(flat, np.ndarray) and flat.size <= LARGEST and all(hasattr(b, "part") for b in batches)):
            return 1
        return min([threads(), *map(len, batches)])

    def assemble(self, size: int, follow: Callable[[], None]) -> None:
        """Make this process rank 0 of `size`; the others run follow()."""
        flat = self.optimizer.flat
        self.group, self.all_blocks = ProcessGroup(size), flat.blocks
        self.copies = [shared(flat.grad) for _ in range(size)]
        self.optimizer.state = {name: shared(array) for name, array in self.optimizer.state.items()}
        flat.use(shared(flat.data), self.copies[0])

        def begin():
            flat.use(flat.data, self.copies[self.group.rank])
            self._take_blocks()
            follow()

        self.group.start(begin)
        self._take_blocks()

    def _take_blocks(self):
        self.optimizer.flat.blocks = self.all_blocks[self.group.rank :: self.group.size]

    def dismiss(self) -> None:
        """End the other processes; this one goes on alone, with arrays of its own: a later fork must not share the weights. The gradients,
        which lie in parts in all of them, are gone."""
        flat = self.optimizer.flat
        flat.blocks = self.all_blocks
        self.group.end()
        self.group, self.copies = ProcessGroup(), []
        self.optimizer.state = {name: array.copy() for name, array in self.optimizer.state.items()}
        flat.use(flat.data.copy(), np.empty_like(flat.data))
        flat.zero_grad()

    def share(self, items: Iterable) -> Iterable:
        """This member's part of a list of work."""
        return (item for i, item in enumerate(items) if i % self.group.size == self.group.rank)

    def part(self, batch, rank: int):
        """A member's rows of a batch."""
        return batch if self.alone else batch.part(rank, self.group.size)

    def sum(self, *values) -> tuple:
        """The sums over all members (see `ProcessGroup.sum`); of one alone the values themselves, which may wait on a device."""
        return values if self.alone else self.group.sum(*values)

    def square(self):
        """Σ g² over the whole gradient; where there are others, each adds up its blocks first."""
        if self.alone:
            return self.optimizer.square()
        mine = self.optimizer.flat.grad
        self.group.sum()  # all copies are complete
        square = 0.0
        for block, _ in self.optimizer.flat.blocks:
            total = self.copies[0][block] + self.copies[1][block]
            for copy in self.copies[2:]:
                total += copy[block]
            mine[block] = total
            square += sum_of_squares(total)
        return self.group.sum(square)[0]


class DataParallel:
    """`with DataParallel(trainer, batches, …) as parallel:` the trainer's work is done by as many processes as its batches allow.

    batches(n) : the micro-batches of step n; every member asks for them itself and takes its rows.
    evaluation() : the mean loss over the validation batches (see `loop.mean_loss`), which every member calls.
    """

    def __init__(self, trainer, batches: Callable[[int], Sequence], evaluation: Callable[[], float] | None = None):
        self.trainer, self.batches, self.evaluation = trainer, batches, evaluation

    def __enter__(self) -> "DataParallel":
        team, count = self.trainer.team, threads()
        size = team.size_for(self.batches(0))  # of the first step, wherever this run begins: on the number depend the last bits of sums
        with ExitStack() as stack:
            stack.enter_context(freed_memory_kept())
            stack.enter_context(single_threaded_blas())  # products are shared out by us; BLAS's threads would fight ours for the cores
            if size > 1:
                stack.callback(threads, count)
                threads(1)
                stack.callback(team.dismiss)
                team.assemble(size, self._follow)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self.stack.close()

    def update(self) -> int:
        """`Trainer.update` with the batches of the next step."""
        return self._together("update", lambda: self.trainer.update(self.batches(self.trainer.step)))

    def look(self) -> dict:
        """`Trainer.look`: all members know the same, so one of them tells."""
        return self.trainer.look(self.batches)

    def gradients(self) -> tuple:
        """`Trainer.gradients` of them."""
        return self._together("gradients", lambda: self.trainer.gradients(self.batches(self.trainer.step)))

    def evaluate(self) -> float:
        """The mean loss over the validation batches."""
        return self._together("evaluate", self.evaluation)

    def _together(self, name: str, work: Callable):
        """Have all members do this; the others do it when they are told its name."""
        group = self.trainer.team.group
        if group.rank == 0:
            group.tell(name.encode())
        return work()

    def _follow(self):
        while True:
            getattr(self, self.trainer.team.group.told().decode())()
