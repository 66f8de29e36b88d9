"""From documents to a folder of better ones: cleaned, or without duplicates, with an account of everything that was left out.

    kept.jsonl       {"text", "source"} a line: what tinyllm reads as data
    dropped.jsonl    the others, with the reason
    report.json      all figures, with examples of what each rule did          (of `describe_into`: only the report)
    report.html      the same to read
"""
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyllm.data import pages
from tinyllm.data.atomic import atomic_file
from tinyllm.data.clean import CleanConfig, Dropped, clean
from tinyllm.data.contamination import contamination
from tinyllm.data.dedup import DedupConfig, deduplicate
from tinyllm.data.measures import measures
from tinyllm.data.report import write_report
from tinyllm.data.text import Document, read_documents

POINTS = {"least": 0, "5 %": 0.05, "half": 0.5, "95 %": 0.95, "greatest": 1}  # quantiles of a report


class DocumentFiles:
    """Files and folders as documents, read anew each time; `skipped` has a line for each file that was passed over.

    progress(done, total) is called for every document; total is None in the first reading, and what was done at the end of each, however it ends.
    """

    def __init__(self, paths: Iterable[str], progress: Callable[[int, int | None], None] = lambda done, total: None):
        self.paths, self.skipped, self.progress, self.total = list(paths), {}, progress, None

    def __iter__(self) -> Iterator[Document]:
        done = 0
        try:
            for done, document in enumerate(read_documents(self.paths, on_skip=lambda line: self.skipped.setdefault(line)), start=1):
                self.progress(done, self.total)
                yield document
            self.total = done
        finally:
            self.progress(done, done)


def output_folder(folder: str, inputs: Iterable[str]) -> Path:
    """The folder, made if it is not there. Raises ValueError if it is, holds or lies in what is read: results would become input, or
    the input would be overwritten."""
    out = Path(folder).resolve()
    for path in inputs:
        read = Path(path).resolve()
        if out == read or out in read.parents or read in out.parents:
            raise ValueError(f"--out {folder}: {path} is read from there, and must stay as it is; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    return Path(folder)


def clean_into(folder: Path, documents: Iterable[Document], config: CleanConfig, skipped: Iterable[str] = ()) -> dict:
    """Write the documents that the rules keep, those they drop, and the report, whose figures are returned."""
    outcomes, tallies = clean(documents, config)
    with _sink(folder) as sink:
        for outcome in outcomes:
            if isinstance(outcome, Dropped):
                sink.write("dropped", outcome.document, rule=outcome.rule, found=outcome.found)
            else:
                sink.write("kept", outcome)
    rules = {name: {"what": pages.what(name)} | asdict(tally) for name, tally in tallies.items()}
    figures = sink.figures | {"settings": asdict(config), "rules": rules, "skipped": list(skipped)}
    write_report(folder, "Cleaned documents", figures, pages.cleaning(figures))
    return figures


def deduplicate_into(folder: Path, documents: Iterable[Document], config: DedupConfig, skipped: Iterable[str] = ()) -> dict:
    """Write the first document of each cluster, the others, and the report, whose figures are returned.

    Documents are read twice, to find duplicates and to write: they must be a list, or something else that begins anew each time.
    A dropped record has `duplicate_of`, the source of the kept document, and `found`, its highest similarity to any of its cluster.
    """
    if iter(documents) is iter(documents):
        raise ValueError("documents are read twice, to find duplicates and to write the others: give a list")
    duplicates = deduplicate((document.text for document in documents), config, folder)
    first, similarity = duplicates.first.tolist(), duplicates.similarity()
    exact = {link.later for link in duplicates.links if link.exact}
    clusters = duplicates.clusters()
    wanted = {member for cluster in clusters[: pages.LARGEST] for member in cluster[: pages.MEMBERS]} | {cluster[0] for cluster in clusters}
    seen: dict[int, Document] = {}  # the wanted, cut short
    count = 0
    with _sink(folder) as sink:
        for number, document in enumerate(documents):
            count += 1
            if count > len(first):
                break
            if number in wanted:
                seen[number] = Document(document.text[: pages.EXCERPT], document.source)
            if first[number] == number:
                sink.write("kept", document)
            else:
                rule = "exact" if number in exact else "near"
                sink.write("dropped", document, rule=rule, found=similarity[number], duplicate_of=seen[first[number]].source)
        if count != len(first):
            raise ValueError("the files have changed while they were read: there are more documents or fewer than at first; start again")
    figures = sink.figures | pages.duplicate_figures(duplicates, clusters, seen) | {"settings": asdict(config), "skipped": list(skipped)}
    write_report(folder, "Documents without duplicates", figures, pages.duplicates(figures))
    return figures


def describe_into(folder: Path, documents: Iterable[Document], benchmark: list[Document], n: int, skipped: Iterable[str] = ()) -> dict:
    """Write a report of the measures of all documents, and of how much of a benchmark ([]: none) stands in them, by n-grams of words.

    The documents are read once, and left as they are. Returns the report's figures.
    """
    values: dict[str, array] = {}

    def measured() -> Iterator[Document]:
        for document in documents:
            for name, value in measures(document.text).items():
                values.setdefault(name, array("d")).append(value)
            yield document

    overlaps = contamination(benchmark, measured(), n)
    characters = values.get("characters", ())
    figures = {"read": {"documents": len(characters), "characters": int(sum(characters))}}
    figures["measures"] = {name: dict(zip(POINTS, np.quantile(column, list(POINTS.values())).tolist(), strict=True)) for name, column in values.items()}
    figures |= {"contamination": pages.contamination_figures(overlaps, n), "skipped": list(skipped)}
    write_report(folder, f"{len(characters):,} documents", figures, pages.description(figures))
    return figures


class _Sink:
    """Where documents go, and how many went there."""

    def __init__(self, kept: BinaryIO, dropped: BinaryIO):
        self.files = {"kept": kept, "dropped": dropped}
        self.figures = {name: {"documents": 0, "characters": 0} for name in self.files}

    def write(self, name: str, document: Document, **reason) -> None:
        record = {"text": document.text, "source": document.source} | reason
        self.files[name].write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.figures[name]["documents"] += 1
        self.figures[name]["characters"] += len(document.text)


@contextmanager
def _sink(folder: Path) -> Iterator[_Sink]:
    with atomic_file(folder / "kept.jsonl") as kept, atomic_file(folder / "dropped.jsonl") as dropped:
        yield _Sink(kept, dropped)
