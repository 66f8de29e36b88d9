"""Results for people, as aligned tables, and for programs, as a line of JSON each."""
import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

from tinyllm.bench.cases import WORKS
from tinyllm.bench.profiler import OTHER, PARTS
from tinyllm.bench.turns import HOW_TO_GET_PEERS, Result, missing_packages

UNITS = {"train": ("tokens/s", "GFLOP/s"), "decode": ("tokens/s", "GB/s"), "tokenizer": ("MB/s", None), "scaling": ("tokens/s", None)}
COUNT = "three digits, or all before the point"
SPREAD = "spread: of the middle half of our timings."
HOW_TO_READ = {
    "train": f"""{SPREAD} GFLOP/s: 6 for each weight in a product and 12 for each visible pair and width, a token;
at most: in one large product on this machine. waiting: for the other processes. Python: the engine, the modules and the loop.""",
    "decode": f"""{SPREAD} GB/s: all weights once a step, whatever the batch; at most: when this machine reads a large matrix
and does nothing else.""",
    "tokenizer": f"{SPREAD} MB: of UTF-8 text. Encoding starts from an empty cache.",
    "scaling": "peak MB: all arrays, inputs and gradients included; linear memory is T^1. Time per token is linear up to T^1.",
}


def json_line(result: Result) -> str:
    """One object; numbers with six digits."""
    return json.dumps(_rounded(dataclasses.asdict(result)), ensure_ascii=False)


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Report:
    """The table of one kind of work: `heading()`, a `line(result)` as each comes in, and `closing(results)`."""

    def __init__(self, work: str, peer: bool, threads: int, cpu: str):
        self.work, self.peer, self.threads, self.cpu = work, peer, threads, cpu

    def heading(self) -> str:
        """What is timed where, and the names of the columns."""
        where = f"{self.threads} thread{'s' * (self.threads != 1)}, {self.cpu}"
        return f"{WORKS[self.work].title}; {where}\n\n" + _row("size", self._columns(), [column.name for column in self._columns()])

    def line(self, result: Result) -> str:
        """A row of the table; for how something grows, a sentence."""
        if result.unit == "power of T":
            return f"{result.size} grows as T^{result.ours:.2f}"
        columns = self._columns()
        return _row(result.size, columns, [_shown(getattr(result, column.field), column.form) for column in columns])

    def closing(self, results: Sequence[Result]) -> str:
        """Where the time goes, and how to read it all."""
        return "\n".join([*_parts_table(results), "", *self._explanations()])

    def _columns(self) -> list["Column"]:
        unit, rate_unit = UNITS[self.work]
        beside = [Column("peer", "peer", COUNT), Column("ratio", "ratio", "{:.2f}")]
        rates = [Column(rate_unit, "rate", COUNT), Column("at most", "machine_rate", COUNT)]
        return [
            Column(unit, "ours", COUNT), *(beside if self.peer else []),
            Column("spread", "spread", "{:.1%}"),
            Column("peak MB", "peak_mb", "{:,.0f}"), *([Column("peer MB", "peer_peak_mb", "{:,.0f}")] if self.peer else []),
            *(rates if rate_unit else []),
            *([Column("beside", "peer_name", "{}", width=21)] if self.peer else []),
        ]  # fmt: skip

    def _explanations(self) -> list[str]:
        said = [HOW_TO_READ[self.work]]
        packages = WORKS[self.work].packages
        if self.peer:
            said.insert(0, "ratio: tinyllm's rate over the peer's, so that above 1 tinyllm is the faster.")
        elif packages:
            missing = f"; not installed here: {HOW_TO_GET_PEERS}" if missing_packages(self.work) else ""
            said.append(f"--peer times {' and '.join(packages)} beside it{missing}.")
        return said


class Column(NamedTuple):
    """field : of the Result.      form : how its value is written, as str.format takes it, or COUNT."""

    name: str
    field: str
    form: str
    width: int = 10


def _row(first: str, columns: Sequence[Column], cells: Sequence[str]) -> str:
    return f"{first:<14}" + "".join(f"{cell:>{column.width}}" for column, cell in zip(columns, cells, strict=True))


def _shown(value, form: str) -> str:
    if value is None:
        return "-"
    if form == COUNT:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return form.format(value)


def _parts_table(results: Sequence[Result]) -> list[str]:
    """Shares of our time, a row for each size that was profiled."""
    profiled = {r.size: r.parts for r in results if r.parts}
    seen = [part for part in (*PARTS, OTHER) if any(part in parts for parts in profiled.values())]
    rows = [_parts_row(size, seen, [f"{100 * parts.get(part, 0):.0f}" for part in seen]) for size, parts in profiled.items()]
    return ["", _parts_row("time in %", seen, seen), *rows] if rows else []


def _parts_row(first: str, names: Sequence[str], cells: Sequence[str]) -> str:
    return f"{first:<14}" + "".join(f"  {cell:>{max(len(name), 3)}}" for name, cell in zip(names, cells, strict=True))
