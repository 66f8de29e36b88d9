"""What cleaning, duplicates and reports take of time and memory, in processes of their own: 100 MB, and a million documents."""
import json
import os
import random
import subprocess
import sys
import time

import pytest
from tiny_run import ENVIRONMENT, ROOT

KILOBYTE = 1000
SYLLABLES = "ba be bi do du ka ke lo lu ma mi no ra re ri sa se ta to tra stro ing er est ly ion ü é".split()


def write_documents(path, count: int) -> None:
    """Documents of about a kilobyte; of twenty, one is an earlier one again, and one an earlier one with another beginning."""
    draw = random.Random(count)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(20_000)]
    passages = [" ".join(draw.choices(words, k=18)) for _ in range(20_000)]     # of some hundred characters
    earlier = []
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            kind = draw.randrange(20) if len(earlier) == 1000 else 2
            if kind < 2:
                text = draw.choice(earlier)
                text = text if kind == 0 else f"{number} {draw.choice(words)}" + text[15:]
            else:
                text = ". ".join(draw.choices(passages, k=8))[: KILOBYTE - 10] + f" {number}."
                (earlier.append(text) if len(earlier) < 1000 else earlier.__setitem__(number % 1000, text))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def measured(*words) -> tuple[float, float]:
    """Seconds and the greatest memory, in GB, that `tinyllm data …` takes."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "tinyllm", "data", *map(str, words)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.perf_counter() - began, usage.ru_maxrss / (1e6 if sys.platform == "linux" else 1e9)


@pytest.fixture(scope="module", params=[100_000, 1_000_000])
def documents(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "documents.jsonl"
    write_documents(path, request.param)
    yield request.param, path
    path.unlink()  # a gigabyte


@pytest.mark.slow
@pytest.mark.parametrize("action", ["clean", "dedup", "report"])
def test_time_and_memory(documents, action, tmp_path):
    """100 MB in less than a minute on two cores; a million documents of a kilobyte in less than 4 GB.

    Measured on one core of an x86 server, November 2026: 100 MB clean 32 s, dedup 10 s, report 32 s, at most 0.22 GB; a million
    documents, at the lowest priority beside other work: clean 612 s and 0.22 GB, dedup 180 s and 0.45 GB, report 828 s and 0.15 GB.
    """
    count, path = documents
    assert 0.9 * KILOBYTE * count < path.stat().st_size < 1.1 * KILOBYTE * count
    seconds, memory = measured(action, path, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["read"] if action == "report" else {"documents": report["kept"]["documents"] + report["dropped"]["documents"]})["documents"] == count
    assert memory < 4 and (seconds < 60 or count > 100_000), f"{seconds:.0f} s, {memory:.2f} GB"
