"""Work shared out over processes: this one and copies of it, with arrays that all of them see.

Threads of one Python process take turns at its lock; where a step is a thousand calls of fifty microseconds, they mostly wait for
each other. Processes have a lock each. A group is made by fork: every member starts from the same memory at no cost, and goes on alone
but for the arrays that were `shared` before, and for `sum`, where all meet.

    rank 0 ── the caller              A member that ends, for whatever reason, closes its socket: whoever waits for it learns at once
    rank 1 ─┐ copies, each joined     that it is gone. The copies leave by themselves when rank 0 does, and ignore Ctrl-C, which is
    rank 2 ─┘ to rank 0 by a socket   rank 0's to answer.
"""
import ctypes
import mmap
import os
import signal
import socket
import struct
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

import numpy as np

SPINS = 200  # looks at a socket, about 1 µs each, before sleeping: to be woken takes longer than most waits
LONGEST = 2**16  # bytes of a message
ERROR, VALUES = b"e", b"v"  # how a message begins
IGNORED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has not all
PR_SET_PDEATHSIG = 1  # of prctl, Linux's sys/prctl.h
available = sys.platform == "linux"  # elsewhere fork is missing, or unsafe beside the system's own libraries


def shared(array: np.ndarray) -> np.ndarray:
    """A copy of the array in memory that processes forked from now on share with this one."""
    copy = np.frombuffer(mmap.mmap(-1, max(array.nbytes, 1)), array.dtype, array.size).reshape(array.shape)
    copy[...] = array
    return copy


class ProcessGroup:
    """This process as rank 0, and after `start` its copies as ranks 1 to size - 1. A group of one needs no start."""

    def __init__(self, size: int = 1):
        self.size, self.rank = size, 0
        self.cores = sorted(os.sched_getaffinity(0)) if size > 1 else []
        self.members: list[tuple[int, socket.socket]] = []  # of rank 0: (process id, socket) of ranks 1 …; of the others: only rank 0

    def start(self, work: Callable[[], None]) -> None:
        """Fork. Each copy runs work(), in which self.rank is its own, and ends."""
        caller = os.getpid()
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # they wait until a copy knows that it is one
        try:
            for rank in range(1, self.size):
                here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                sys.stdout.flush()  # or what waits in the buffer would be written twice
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # "multi-threaded": BLAS's threads, which it starts anew by itself
                    process = os.fork()
                self.members.append((process, here))
                if process == 0:
                    self._become(rank, there, caller, signals, work)
                there.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        self._settle()

    def _become(self, rank, connection, caller, signals, work) -> None:
        try:
            for number in IGNORED:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # if rank 0 is killed, not to go on until the next meeting
            if os.getppid() != caller:
                raise _Gone  # before that took effect
            for _, other in self.members:
                other.close()
            self.rank, self.members = rank, [(0, connection)]
            self._settle()
            work()
        except _Gone:
            pass  # rank 0 has left
        except BaseException as error:  # for rank 0 to raise: there is nobody else to tell
            with suppress(ConnectionError):
                connection.send((ERROR + f"{type(error).__name__}: {error}".encode())[:LONGEST])
        finally:
            os._exit(0)  # without the clean-up that belongs to the process this is a copy of

    def _settle(self) -> None:
        """Where the group fills the machine, each member stays on a core of its own: one that is moved finds its caches empty, and all
        others wait for it. That took 6 % off a step. A smaller group must not: another one would choose the same cores."""
        if self.size == len(self.cores):
            os.sched_setaffinity(0, {self.cores[self.rank]})

    def sum(self, *values: float) -> tuple[float, ...]:
        """The sums over all members, the same in each, added in the order of ranks. Returns when all have come here.

        What a member wrote to shared arrays before is then seen by all. Raises, in rank 0, RuntimeError with what a member failed of,
        and ChildProcessError where one was killed.
        """
        if self.rank:
            with suppress(ConnectionError):  # that rank 0 has left is found by `told`
                self.members[0][1].send(VALUES + struct.pack(f"{len(values)}d", *values))
            return _unpack(self.told())
        totals = list(values)
        for _, member in self.members:
            totals = [a + b for a, b in zip(totals, _unpack(self._message(member)), strict=True)]
        self.tell(VALUES + struct.pack(f"{len(totals)}d", *totals))
        return tuple(totals)

    def tell(self, message: bytes) -> None:
        """Of rank 0: send a message to all, who wait for it in `told`."""
        for _, member in self.members:
            with suppress(ConnectionError):  # a member that has gone is found by the next `sum`, with what it failed of
                member.send(message)

    def told(self) -> bytes:
        """Of the others: wait for rank 0's next message."""
        return _receive(self.members[0][1])

    def end(self) -> None:
        """Of rank 0: let the others go, and wait until they have: those at work learn of it when they next meet."""
        for _, member in self.members:
            member.shutdown(socket.SHUT_RDWR)  # close() alone is not seen while a process that was forked elsewhere has the socket too
            member.close()
        for process, _ in self.members:
            with suppress(ChildProcessError):  # it has ended, and somebody else has waited for it, as the system does under SIGCHLD's SIG_IGN
                os.waitpid(process, 0)
        self.members = []
        if self.cores:
            os.sched_setaffinity(0, self.cores)

    def _message(self, member) -> bytes:
        try:
            message = _receive(member)
        except _Gone:
            raise ChildProcessError("a process of this run was killed (by the system, for want of memory?)") from None
        if message.startswith(ERROR):
            raise RuntimeError(f"a process of this run failed: {message[len(ERROR) :].decode(errors='replace')}")
        return message


def _unpack(message: bytes) -> tuple[float, ...]:
    return struct.unpack(f"{len(message) // 8}d", message[len(VALUES) :])


class _Gone(Exception):
    """The other end of a socket was closed."""


def _receive(connection) -> bytes:
    for flags in (*SPINS * [socket.MSG_DONTWAIT], 0, 0):  # twice: a reset comes before what the other end had still sent
        try:
            message = connection.recv(LONGEST, flags)
            break
        except (BlockingIOError, ConnectionResetError):  # nothing yet; or the other end went without reading all
            pass
    if not message:
        raise _Gone
    return message
