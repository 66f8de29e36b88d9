"""How fast is it here, beside the packages that one would take instead? Read in this order:

    cases.py      what is timed: the sizes of each kind of work, and the processes that do it        gpu_cases.py   the same on a GPU
    costs.py      how much arithmetic and how much reading a piece of work takes, in closed form
    runner.py     the process that is timed: repetitions, a clock, one line of JSON; knows nothing of tinyllm
    ours/         the work done by tinyllm        peers/   the same work done by others, each in a process of its own
    profiler.py   where the time goes: looking every millisecond at what the main thread does        gpu_profiler.py   and what a GPU does
    memory.py     the memory of a process and its children, no shared page counted twice
    turns.py      ours, theirs, ours, theirs: starting the processes, and what comes of their figures
    report.py     figures as tables and as JSON
    machine.py    what this machine is and can do        gpu.py   what its GPU is        advice.py   and what could be better about it
"""
from tinyllm.bench.advice import advice
from tinyllm.bench.cases import WORKS, Case
from tinyllm.bench.gpu import gpu_facts
from tinyllm.bench.machine import Facts, cpu_name, facts
from tinyllm.bench.report import Report, json_line
from tinyllm.bench.turns import Result, bench

__all__ = ["WORKS", "Case", "Facts", "Report", "Result", "advice", "bench", "cpu_name", "facts", "gpu_facts", "json_line"]
