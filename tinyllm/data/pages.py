"""The reports of curate.py: what is told of cleaning, of duplicates, and of documents as they are."""
from collections.abc import Iterator
from dataclasses import asdict, fields

import numpy as np

from tinyllm.data.clean import CleanConfig
from tinyllm.data.contamination import Overlap
from tinyllm.data.dedup import DedupConfig, Duplicates
from tinyllm.data.minhash import catch_rate
from tinyllm.data.report import Excerpt, Share, Table
from tinyllm.data.text import Document

LARGEST = 20  # clusters, and items of a benchmark, that are shown; of a cluster the first MEMBERS
MEMBERS = 4
EXCERPT = 160  # characters of a document
STEPS = [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]  # similarities for which the catch rate is told


def what(rule: str) -> str:
    """What a cleaning rule does, in the words of its setting."""
    (text,) = (field.metadata["help"] for field in fields(CleanConfig) if field.name == rule)
    return text


def _totals(figures: dict) -> Table:
    count = sum(figures[name]["documents"] for name in ("kept", "dropped"))
    rows = [[name, figures[name]["documents"], Share(figures[name]["documents"] / max(1, count)), figures[name]["characters"]] for name in ("kept", "dropped")]
    return Table("Documents", "kept.jsonl and dropped.jsonl hold all of them.", ["", "documents", "share", "", "characters"], rows)


def _skipped(figures: dict) -> Table:
    return Table("Files passed over", "They are no text, and nothing of them was read.", ["reason"], [[line] for line in figures["skipped"]])


def cleaning(figures: dict) -> Iterator[Table]:
    """The tables of a cleaning's report."""
    yield _totals(figures)
    rules, settings = figures["rules"], figures["settings"]
    edits = {name: rule for name, rule in rules.items() if not name.startswith(("min_", "max_"))}
    yield Table("Changed", "Removed is negative where what was put in is longer.", ["rule", "what it does", "documents", "places", "characters removed"],
                [[n, r["what"], r["documents"], r["places"], r["characters"]] for n, r in edits.items()])  # fmt: skip
    yield Table("Dropped", "A document is counted for the first rule that it breaks.", ["rule", "what is measured", "bound", "documents", "characters"],
                [[n, r["what"], settings[n], r["documents"], r["characters"]] for n, r in rules.items() if n not in edits])  # fmt: skip
    for name, rule in rules.items():
        if rule["examples"]:
            columns = ["source", "before", "after"] if name in edits else ["source", "found", "text"]
            rows = [[e["source"], *(Excerpt(v) if isinstance(v, str) else v for v in map(e.get, columns[1:]))] for e in rule["examples"]]
            yield Table(f"Examples: {name}", rule["what"], columns, rows)
    yield _skipped(figures)


def duplicate_figures(found: Duplicates, clusters: list[list[int]], seen: dict[int, Document]) -> dict:
    """The figures of a deduplication. seen: the documents that are shown."""
    similarity = found.similarity()
    near = [link.similarity for link in found.links if not link.exact]
    counts, edges = np.histogram(near, bins=20, range=(0, 1))
    exact = sum(link.exact for link in found.links)
    return {
        "exact": exact,
        "near": int(np.count_nonzero(found.first != np.arange(len(found.first)))) - exact,
        "clusters": len(clusters),
        "compared": found.compared,
        "not_compared_at_most": found.not_compared,
        "similarities": {f"{low:.2f}": int(count) for low, count in zip(edges, counts, strict=False) if count},
        "largest": [
            {"size": len(cluster), "members": [asdict(seen[i]) | {"similarity": similarity[i]} for i in cluster[:MEMBERS]]}
            for cluster in clusters[:LARGEST]
        ],
    }


def duplicates(figures: dict) -> Iterator[Table]:
    """The tables of a deduplication's report."""
    yield _totals(figures)
    config = DedupConfig(**figures["settings"])
    yield Table("Duplicates", "Exact: the same but for case and white space. Near: similar to another of its cluster, of which the first is kept.", ["", ""], [
        ["exact duplicates", figures["exact"]], ["near duplicates", figures["near"]], ["clusters", figures["clusters"]],
        ["pairs compared", figures["compared"]], ["pairs not compared, at most (see --compare)", figures["not_compared_at_most"]],
    ])  # fmt: skip
    yield Table("Near duplicates by similarity", "Pairs by which clusters were joined.", ["from", "pairs"],
                [[float(low), count] for low, count in figures["similarities"].items()])  # fmt: skip
    yield Table("What is caught", f"The chance that a pair of this similarity is found, 1-(1-s^r)^b, with b = {config.bands} and r = {config.rows}.",
                ["similarity", "caught", ""], [[s, Share(catch_rate(s, config.bands, config.rows))] for s in STEPS])  # fmt: skip
    rows = [[c["size"] if i == 0 else "", m["source"], m["similarity"], Excerpt(m["text"])] for c in figures["largest"] for i, m in enumerate(c["members"])]
    yield Table(f"The largest clusters, at most {LARGEST}", f"The first {MEMBERS} of each; the very first is kept.",
                ["documents", "source", "highest similarity", "text"], rows)  # fmt: skip
    yield _skipped(figures)


def contamination_figures(overlaps: list[Overlap], n: int) -> dict:
    """How much of a benchmark stands in the data, with the items of which most does."""
    found = sorted((o for o in overlaps if o.found), key=lambda o: -o.share)
    return {
        "n": n,
        "items": len(overlaps),
        "too_short": sum(o.ngrams == 0 for o in overlaps),
        "touched": len(found),
        "at_least_half": sum(o.share >= 0.5 for o in found),
        "whole": sum(o.share == 1 for o in found),
        "worst": [{"item": o.item.source, "share": o.share, "source": o.source, "example": o.example, "text": o.item.text[:EXCERPT]} for o in found[:LARGEST]],
    }


def description(figures: dict) -> Iterator[Table]:
    """The tables of a report on documents as they are."""
    columns = list(next(iter(figures["measures"].values()), {}))
    yield Table("Measures", "The value that so large a part of the documents stays below or reaches.", ["measure", *columns],
                [[name, *quantiles.values()] for name, quantiles in figures["measures"].items()])  # fmt: skip
    c = figures["contamination"]
    if c["items"]:
        names = {"items": "items", "too_short": f"of fewer than {c['n']} words: not checked", "touched": "with an n-gram in the data",
                 "at_least_half": "with half of theirs or more", "whole": "with all of theirs"}  # fmt: skip
        yield Table("Contamination", f"Items of the benchmark whose {c['n']}-grams of words stand in the data.", ["", ""],
                    [[text, c[name]] for name, text in names.items()])  # fmt: skip
        yield Table(f"The most contaminated, at most {LARGEST}", "", ["item", "share", "", "first found in", "these words", "text"],
                    [[w["item"], Share(w["share"]), w["source"], Excerpt(w["example"]), Excerpt(w["text"])] for w in c["worst"]])  # fmt: skip
    yield _skipped(figures)
