"""`tinyllm data clean|dedup|report`: make good documents of text, and say what was left out and why."""

import argparse
import sys

from tinyllm.cli.arguments import add_config, config_from, whole_number
from tinyllm.data.clean import CleanConfig
from tinyllm.data.curate import DocumentFiles, clean_into, deduplicate_into, describe_into, output_folder
from tinyllm.data.dedup import DedupConfig
from tinyllm.data.text import read_documents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="clean|dedup|report")
    clean = actions.add_parser("clean", help="apply cleaning rules, document by document")
    _files(clean, "kept.jsonl, dropped.jsonl, report.json and report.html")
    add_config(clean, CleanConfig, "rules")
    dedup = actions.add_parser("dedup", help="keep one of documents that say the same")
    _files(dedup, "kept.jsonl, dropped.jsonl, report.json and report.html")
    add_config(dedup, DedupConfig, "what is the same")
    report = actions.add_parser("report", help="measure documents, and look for a benchmark in them; changes nothing")
    _files(report, "report.json and report.html")
    report.add_argument("--benchmark", nargs="+", default=[], metavar="FILE", help="texts that the files should not contain: look for them")
    report.add_argument("--words", type=whole_number, default=13, metavar="N", help="that make an n-gram of a benchmark (default: %(default)s)")


def _files(parser: argparse.ArgumentParser, written: str) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="text files, .jsonl files with a text field, or folders of them")
    parser.add_argument("--out", required=True, metavar="FOLDER", help=f"where {written} are written")


def run(args: argparse.Namespace) -> int:
    """Do the chosen action; 0 when it went well, ValueError or OSError when not."""
    documents = DocumentFiles(args.files)
    next(iter(documents))  # what cannot be read is said before a folder is made
    folder = output_folder(args.out, args.files)
    figures = {"clean": _clean, "dedup": _dedup, "report": _report}[args.action](args, folder, documents)
    for line in documents.skipped:
        print(line, file=sys.stderr)
    if "kept" in figures:
        for name in ("kept", "dropped"):
            print(f"{name}: {figures[name]['documents']:,} documents, {figures[name]['characters']:,} characters")
    print(f"wrote {folder}; see {folder / 'report.html'}")
    return 0


def _clean(args, folder, documents) -> dict:
    figures = clean_into(folder, documents, config_from(args, CleanConfig), documents.skipped)
    for name, rule in figures["rules"].items():
        if rule["documents"]:
            done = "dropped" if name.startswith(("min_", "max_")) else "changed"
            print(f"  {name:<20} {done} {rule['documents']:,} documents")
    return figures


def _dedup(args, folder, documents) -> dict:
    figures = deduplicate_into(folder, documents, config_from(args, DedupConfig), documents.skipped)
    print(f"{figures['exact']:,} exact and {figures['near']:,} near duplicates, in {figures['clusters']:,} clusters")
    if figures["not_compared_at_most"]:
        print(f"up to {figures['not_compared_at_most']:,} pairs of candidates were not compared: see --compare")
    return figures


def _report(args, folder, documents) -> dict:
    benchmark = list(read_documents(args.benchmark))
    figures = describe_into(folder, documents, benchmark, args.words, documents.skipped)
    found = figures["contamination"]
    print(f"read: {figures['read']['documents']:,} documents, {figures['read']['characters']:,} characters")
    if benchmark:
        print(f"benchmark: of {found['items']:,} items {found['touched']:,} share {found['n']} words in a row with the data, {found['whole']:,} stand there whole"
              f"; {found['too_short']:,} are shorter than that")  # fmt: skip
    return figures
