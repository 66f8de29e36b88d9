"""The processes that belong to a process, for tests that look after them. Linux."""
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def children(process: int | str = "self") -> list[int]:
    """The ids of those that it started and has not yet waited for."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def alive(process: int) -> bool:
    """Whether it still runs; a zombie, which waits for nothing but to be counted, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for it; AssertionError when it takes longer than that."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {seconds} s"
        time.sleep(0.002)
