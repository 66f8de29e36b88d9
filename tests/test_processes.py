"""Groups of processes: sums that all agree on, memory that all see, and an end, whoever ends first and however."""
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from family import alive, wait_until
from tiny_run import ENVIRONMENT, ROOT

from tinyllm import processes
from tinyllm.processes import ProcessGroup, available, shared
from tinyllm.threads import parallel, threads

pytestmark = pytest.mark.skipif(not available, reason="no fork that is safe on this system")


@contextmanager
def group(size, work, limit=10):
    """A started group, whose members run work(group), for at most `limit` seconds."""
    g, me, strayed = ProcessGroup(size), os.getpid(), shared(np.zeros(1))

    def limited():
        signal.alarm(limit)  # which ends it
        work(g)

    try:
        g.start(limited)
        if os.getpid() != me:  # a member has come back from where only rank 0 should
            strayed[0] = 1
            os._exit(1)
        yield g
    except BaseException:
        for process in filter(alive, (process for process, _ in g.members)):
            os.kill(process, signal.SIGKILL)
        raise
    finally:
        g.end()
        assert not strayed[0]


def bits(*values):
    return struct.pack(f"{len(values)}d", *values)


# Sums.

def test_a_group_of_one_is_its_own_sum():
    g = ProcessGroup()
    g.start(lambda: 1 / 0)  # nobody is there to do it
    assert g.sum(1.5, math.inf) == (1.5, math.inf) and g.sum() == () and (g.rank, g.size) == (0, 1)
    g.end()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_get_the_same_sum_added_in_the_order_of_ranks(size):
    """0.1·10ⁿ and the like: another order gives other bits."""
    values = [[0.1, 1e16, -0.0], [0.2, 1.0, -0.0], [0.3, -1e16, -0.0], [1e-17, 3.0, -0.0], [7.7, 1e-3, -0.0]][:size]
    seen = shared(np.zeros((size, 2, 3)))

    def both(g):
        for round in range(2):
            seen[g.rank, round] = g.sum(*values[g.rank])

    def work(g):
        both(g)
        g.sum()

    expected = [sum(column[1:], column[0]) for column in zip(*values, strict=True)]
    with group(size, work) as g:
        both(g)
        g.sum()
    assert all(bits(*row) == bits(*expected) for row in seen.reshape(-1, 3))
    assert math.copysign(1, seen[0, 0, 2]) == -1  # nobody began from +0


def test_sums_of_nothing_and_of_what_is_not_finite():
    seen = shared(np.zeros((2, 3)))

    def meet(g):
        assert g.sum() == ()
        seen[g.rank] = g.sum(math.nan if g.rank else 1.0, math.inf, math.inf if g.rank else -math.inf)
        assert g.sum() == ()

    with group(2, meet) as g:
        meet(g)
    assert np.isnan(seen[:, 0]).all() and (seen[:, 1] == math.inf).all() and np.isnan(seen[:, 2]).all()


def test_different_numbers_of_values_are_an_error():
    with group(2, lambda g: g.sum(1.0, 2.0)) as g, pytest.raises(ValueError, match="zip"):
        g.sum(1.0)


def test_a_sum_waits_for_all_and_shows_what_all_wrote():
    """Each round every member changes every third element, after it has seen the others' changes of the round before."""
    array, size, rounds = shared(np.zeros((3, 30_000), np.int64)), 3, 40

    def rounds_of(g):
        for n in range(rounds):
            if g.rank == n % size:
                time.sleep(0.001)  # somebody is always late
            array[g.rank, g.rank :: size] = n
            g.sum()
            for other in range(size):
                assert (array[other, other::size] == n).all()
            g.sum()  # nobody writes before all have looked

    with group(size, rounds_of) as g:
        rounds_of(g)
    assert array.max() == rounds - 1


# Shared arrays.

@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3, 4)])
def test_shared_is_a_copy_of_the_same_kind(shape):
    source = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for array in (source, np.asfortranarray(source), np.broadcast_to(np.float32(2), shape)):
        copy = shared(array)
        assert (copy.dtype, copy.shape) == (array.dtype, array.shape) and np.array_equal(copy, array)
        assert copy.flags.writeable and copy.flags.c_contiguous and not np.shares_memory(copy, array)


def test_shared_memory_needs_no_file_system():
    """Anonymous, so that a small /dev/shm (64 MB in a container) is no limit."""
    array = shared(np.ones(2**22))
    place = array.__array_interface__["data"][0]
    with open("/proc/self/maps") as file:
        (line,) = [line for line in file if int(line.split("-")[0], 16) <= place < int(line.split()[0].split("-")[1], 16)]
    assert line.split()[1] == "rw-s" and line.split()[-1] in ("/dev/zero", "(deleted)")


# Ends.

def fail(g):
    if g.rank == 1:
        raise LookupError("of käse — no such thing")
    g.sum()


def test_an_error_in_a_member_reaches_rank_0():
    with group(3, fail) as g, pytest.raises(RuntimeError, match="^a process of this run failed: LookupError: of käse — no such thing$"):
        g.sum()


def test_an_error_is_heard_even_where_the_member_went_without_reading():
    """A socket whose other end closed over unread messages reports a reset first, and only then what was sent."""
    with group(2, fail) as g:
        g.tell(b"never read")
        wait_until(lambda: not alive(g.members[0][0]))
        g.tell(b"nobody there")
        with pytest.raises(RuntimeError, match="LookupError"):
            g.sum()


def test_a_very_long_error_is_cut():
    def work(g):
        raise ValueError("ä" * 500_000)

    with group(2, work) as g, pytest.raises(RuntimeError, match="failed: ValueError: äää") as caught:
        g.sum()
    assert len(str(caught.value)) < 2**16


class Done(Exception):
    pass


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_member_is_found_at_once(victim, told):
    with pytest.raises(Done), group(3, lambda g: signal.pause()) as g:
        if told:
            g.tell(b"something that nobody reads")
        os.kill(g.members[victim][0], signal.SIGKILL)
        if victim == 1:
            os.kill(g.members[0][0], signal.SIGKILL)  # rank 0 reads in the order of ranks
        start = time.monotonic()
        with pytest.raises(ChildProcessError, match="^a process of this run was killed"):
            g.sum()
        assert time.monotonic() - start < 1
        raise Done  # the others pause: they would not meet


def test_a_member_killed_in_the_middle_lets_the_others_end():
    def work(g):
        for _ in range(10**9):
            g.sum(1.0)

    with group(3, work) as g:
        members = [process for process, _ in g.members]
        for n in range(10**9):
            if n == 50:
                os.kill(members[1], signal.SIGKILL)
            try:
                assert g.sum(1.0) == (3.0,)
            except ChildProcessError:
                break
    assert not any(map(alive, members)) and n < 10_000


def test_members_ignore_what_is_for_rank_0_to_answer():
    with group(2, lambda g: g.sum()) as g:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(g.members[0][0], number)
        assert g.sum() == ()


def test_end_waits_until_all_are_gone_and_can_be_repeated():
    g = ProcessGroup(3)
    g.start(g.told)
    members = [process for process, _ in g.members]
    assert all(map(alive, members))
    g.end()
    assert g.members == [] and not any(os.path.exists(f"/proc/{process}") for process in members)  # not even as zombies
    g.end()


def test_end_where_somebody_else_has_waited():
    with group(3, lambda g: g.told()) as g:
        process = g.members[0][0]
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as some services start their programs: the system waits for all children
    try:
        with group(2, lambda g: g.told()) as g:
            pass
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_end_does_not_wait_for_a_process_that_inherited_a_socket():
    """Somebody else's fork, meanwhile, holds a copy of everything: closing alone would not tell the member anything."""
    with group(2, lambda g: g.told(), limit=2) as g:
        other = os.fork()
        if other == 0:
            signal.alarm(10)
            signal.pause()
            os._exit(0)
        start = time.monotonic()
        g.end()
        assert time.monotonic() - start < 1
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)


SCRIPT = """
import os, signal, sys, time
from tinyllm.processes import ProcessGroup
group = ProcessGroup(3)
signal.alarm(20)
print("once")   # waits in the buffer while the process is copied
def work():
    signal.alarm(20)   # a copy does not inherit it
    print("member", flush=True)
    group.sum()
    if sys.argv[1] == "meet":
        while True: group.sum()
    end = time.monotonic() + 60
    while time.monotonic() < end: pass   # never meets
group.start(work)
group.sum()
print(*(process for process, _ in group.members), flush=True)
while sys.argv[1] == "meet": group.sum()
signal.pause()
"""


@pytest.mark.parametrize("how", ["meet", "compute"])
def test_when_rank_0_is_killed_the_others_leave(how):
    command = [sys.executable, "-c", SCRIPT, how]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as script:
        try:
            *printed, last = [script.stdout.readline() for _ in range(4)]
            members = [int(word) for word in last.split()]
            assert printed == ["once\n", "member\n", "member\n"]
            assert len(members) == 2 and all(map(alive, members))
        finally:
            script.kill()
    wait_until(lambda: not any(map(alive, members)), seconds=1)


def test_a_signal_while_members_are_made_is_rank_0s_alone(monkeypatch):
    """SIGINT comes to all processes of a terminal: one that is not yet a member must not go up its copy of the caller's stack."""
    reader, writer = os.pipe()
    fork = os.fork

    def interrupted_fork():
        process = fork()
        if process == 0:
            signal.raise_signal(signal.SIGINT)
            os.write(writer, b".")
        return process

    me = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(processes.os, "fork", interrupted_fork)
        try:
            with group(3, lambda g: g.sum()) as g:
                assert g.sum() == ()
        except BaseException:
            if os.getpid() != me:
                os.write(writer, b"!")
                os._exit(1)
            raise
    os.close(writer)
    assert os.read(reader, 10) == b".."
    os.close(reader)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


# Where it runs.

def test_in_a_thread_beside_others_and_blas():
    """Forked from a thread that is not the main one, while our threads and BLAS's exist."""
    before, results = threads(), []
    threads(2)
    parallel(lambda part, number: None, 100)
    product = np.ones((600, 600)) @ np.ones((600, 600))

    def work(g):
        a = np.ones((600, 600)) @ np.ones((600, 600))
        found = []
        parallel(lambda part, number: found.append(number), 100)
        g.sum(a.sum(), len(found))

    def main():
        with group(2, work) as g:
            results.append(g.sum(0.0, 0.0))

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    thread.join(20)
    threads(before)
    assert results == [(product.sum(), 2.0)]


def test_fifty_groups_leave_nothing_open():
    def state():
        with open("/proc/self/maps") as file:
            return len(os.listdir("/proc/self/fd")), sum("/dev/zero" in line for line in file)

    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            array = shared(np.zeros(10))
            with group(3, lambda g: g.sum()) as g:
                g.sum()
            del array
    assert state() == before


def sockets() -> int:
    """How many this process has open."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(link.startswith("socket") for link in links)


def test_a_member_has_no_socket_but_its_own():
    seen, before = shared(np.zeros(4)), sockets()

    def work(g):
        seen[g.rank] = sockets() - before
        g.sum()

    with group(4, work) as g:
        g.sum()
        assert sockets() - before == 3
    assert seen.tolist() == [0, 1, 1, 1]
