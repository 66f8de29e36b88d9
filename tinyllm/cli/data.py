"""`tinyllm data clean|dedup|report|show`: make good documents of text, say what was left out and why, and see what a model gets."""

import argparse
import sys
import time
from collections.abc import Callable

from tinyllm.cli.arguments import add_config, config_from, whole_number
from tinyllm.data import Batch, holds_conversations, pack, read_conversations, show, text_rows
from tinyllm.data.clean import CleanConfig
from tinyllm.data.curate import DocumentFiles, clean_into, deduplicate_into, describe_into, output_folder
from tinyllm.data.dedup import DedupConfig
from tinyllm.data.text import read_documents
from tinyllm.finetune import InstructionBatches, encode_conversations
from tinyllm.nn import TransformerConfig
from tinyllm.stages import stage_config
from tinyllm.tokenizer import Tokenizer, add_special_tokens, load_tokenizer
from tinyllm.train.run import Run

TEXTS = "text files, .jsonl files with a text field, or folders of them"
PROGRESS = 0.2  # seconds between two looks at how far it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The four actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="clean|dedup|report|show")
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
    look = actions.add_parser("show", help="show the rows that a model gets: what is trained on, documents, padding")
    look.add_argument("files", nargs="+", metavar="FILE", help=f"{TEXTS}; or .jsonl files with messages")
    look.add_argument("--tokenizer", required=True, metavar="TOKENIZER|RUN", help="tokenizer file (JSON), or a run folder")
    look.add_argument("--context", type=whole_number, metavar="N", help=f"tokens in a row (default: the run's, else {TransformerConfig.context})")
    look.add_argument("--rows", type=whole_number, default=3, metavar="K", help="how many rows, the first ones (default: %(default)s)")
    look.add_argument("--pack", action="store_true", help="whole documents or conversations share rows; else text is cut into windows, "
                      "and each conversation has a row of its own, padded")  # fmt: skip
    look.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="auto: only on a terminal (default)")


def _files(parser: argparse.ArgumentParser, written: str) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help=TEXTS)
    parser.add_argument("--out", required=True, metavar="FOLDER", help=f"where {written} are written")


def run(args: argparse.Namespace) -> int:
    """Do the chosen action; 0 when it went well, ValueError or OSError when not."""
    if args.action == "show":
        _show(args)
        return 0
    documents = DocumentFiles(args.files, _progress())
    next(iter(documents))  # what cannot be read is said before a folder is made
    folder = output_folder(args.out, args.files)
    figures = {"clean": _clean, "dedup": _dedup, "report": _report}[args.action](args, folder, documents)
    _say_skipped(documents)
    if "kept" in figures:
        for name in ("kept", "dropped"):
            print(f"{name}: {figures[name]['documents']:,} documents, {figures[name]['characters']:,} characters")
    print(f"wrote {folder}; see {folder / 'report.html'}")
    return 0


def _say_skipped(documents: DocumentFiles) -> None:
    for line in documents.skipped:
        print(line, file=sys.stderr)


def _progress() -> Callable[[int, int | None], None]:
    """A line on a terminal with how many documents have been read; it goes away when they all have."""
    live, said = sys.stderr.isatty(), time.monotonic()

    def progress(done: int, total: int | None) -> None:
        nonlocal said
        if live and (done == total or time.monotonic() - said > PROGRESS):
            said = time.monotonic()
            of = "" if total is None else f" of {total:,}"
            print("\r\x1b[K" if done == total else f"\rread: {done:,}{of} documents\x1b[K", end="", file=sys.stderr, flush=True)

    return progress


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


def _show(args) -> None:
    tokenizer, run = load_tokenizer(args.tokenizer), Run(args.tokenizer)
    context = args.context if args.context is not None else (stage_config(run).model.context if run.config.exists() else TransformerConfig.context)
    for name, value in (("context", context), ("rows", args.rows)):
        if value < 1:
            raise ValueError(f"--{name} is {value}: it must be at least 1")
    kinds = {path: holds_conversations(path) for path in args.files}
    if len(set(kinds.values())) > 1:
        chat, text = (next(path for path, kind in kinds.items() if kind == wanted) for wanted in (True, False))
        raise ValueError(f"{chat} holds conversations and {text} texts: show them one after the other")
    if kinds[args.files[0]]:
        tokenizer = add_special_tokens(tokenizer)
        batch = _conversation_rows(tokenizer, args, context)
    else:
        documents = DocumentFiles(args.files, _progress())
        batch = text_rows(tokenizer, documents, context, args.rows, args.pack)
        _say_skipped(documents)
    color = args.color == "always" or args.color == "auto" and sys.stdout.isatty()
    print(show(tokenizer, batch.ids, batch.targets, batch.documents, color=color))


def _conversation_rows(tokenizer: Tokenizer, args, context: int) -> Batch:
    """The first rows as instruction tuning gets them."""
    examples = encode_conversations(tokenizer, read_conversations(args.files), context, lambda line: print(line, file=sys.stderr))
    shared = pack([len(example) for example in examples], context) if args.pack else None
    return next(InstructionBatches(examples, args.rows, 0, shared).in_order())
