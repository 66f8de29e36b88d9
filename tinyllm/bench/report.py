"""Results for people, as aligned tables, and for programs, as a line of JSON each."""
import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

from tinyllm.bench.cases import Work
from tinyllm.bench.gpu_profiler import REST
from tinyllm.bench.profiler import OTHER, PARTS
from tinyllm.bench.turns import HOW_TO_GET_PEERS, Result, missing_packages

COUNT = "three digits, or all before the point"


def json_line(result: Result) -> str:
    """One object; numbers with six digits."""
    return json.dumps(_rounded(dataclasses.asdict(result)), ensure_ascii=False)


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Report:
    """The table of one kind of work: `heading()`, a `line(result)` as each comes in, and `closing(results)`.

    first : any result of the work: its units are those of all.      where : the machine, in words.
    """

    def __init__(self, work: Work, first: Result, peer: bool, where: str):
        self.work, self.peer, self.where, self.columns = work, peer, where, _columns(first, peer)

    def heading(self) -> str:
        """What is timed where, and the names of the columns."""
        return f"{self.work.title}; {self.where}\n\n" + _row("size", self.columns, [column.name for column in self.columns])

    def line(self, result: Result) -> str:
        """A row of the table; for how something grows, a sentence."""
        if result.unit == "power of T":
            return f"{result.size} grows as T^{result.ours:.2f}"
        return _row(result.size, self.columns, [_shown(getattr(result, column.field), column.form) for column in self.columns])

    def closing(self, results: Sequence[Result]) -> str:
        """Where the time goes, and how to read it all."""
        return "\n".join([*_parts_table(results), "", *self._explanations()])

    def _explanations(self) -> list[str]:
        said, packages = [self.work.how_to_read], self.work.packages
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


def _columns(first: Result, peer: bool) -> list[Column]:
    batches = first.batch is not None
    beside = [
        Column("peer", "peer", COUNT), *([Column("batch", "peer_batch", "{}", width=7)] if batches else []),
        Column("ratio", "ratio", "{:.2f}", width=7),
    ]  # fmt: skip
    rates = [Column(first.rate_unit, "rate", COUNT), Column("at most", "machine_rate", COUNT), Column("share", "share", "{:.0%}", width=7)]
    return [
        Column(first.unit, "ours", COUNT), *([Column("batch", "batch", "{}", width=7)] if batches else []), *(beside if peer else []),
        Column("spread", "spread", "{:.1%}", width=8),
        Column("peak MB", "peak_mb", "{:,.0f}"), *([Column("peer MB", "peer_peak_mb", "{:,.0f}")] if peer else []),
        *(rates if first.rate_unit else []),
        *([Column("beside", "peer_name", "{}", width=21)] if peer else []),
    ]  # fmt: skip


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
    seen = [part for part in (*PARTS, REST, OTHER) if any(part in parts for parts in profiled.values())]
    rows = [_parts_row(size, seen, [f"{100 * parts.get(part, 0):.0f}" for part in seen]) for size, parts in profiled.items()]
    return ["", _parts_row("time in %", seen, seen), *rows] if rows else []


def _parts_row(first: str, names: Sequence[str], cells: Sequence[str]) -> str:
    return f"{first:<14}" + "".join(f"  {cell:>{max(len(name), 3)}}" for name, cell in zip(names, cells, strict=True))
