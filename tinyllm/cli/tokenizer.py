"""`tinyllm tokenizer train|encode|decode|show`: make a tokenizer, use it, look at its work."""

import argparse
import os
import sys
import time
from collections.abc import Iterator

from tinyllm.cli.arguments import whole_number
from tinyllm.tokenizer import PATTERNS, BPETokenizer, CharTokenizer, WordPieceTokenizer, load_tokenizer, train_bpe, train_wordpiece
from tinyllm.tokenizer.base import END_OF_TEXT
from tinyllm.tokenizer.gain import INSIDE
from tinyllm.tokenizer.show import show
from tinyllm.tokenizer.wordpiece import BERT_TOKENS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The four actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|encode|decode|show")

    train = actions.add_parser("train", help="learn a tokenizer from text files")
    train.add_argument("files", nargs="+", metavar="FILE", help="text files, .jsonl files with a text field, or folders of them")
    train.add_argument("--out", required=True, metavar="FILE", help="where the tokenizer is written (JSON)")
    train.add_argument("--kind", choices=["bpe", "char", "wordpiece"], default="bpe",
                       help="byte-level BPE, one id a character, or WordPiece, for encoders (default: %(default)s)")
    train.add_argument("--vocab-size", type=whole_number, default=4096, metavar="N",
                       help="BPE, WordPiece: number of ids, the 256 bytes or the characters and special tokens included (default: %(default)s)")
    train.add_argument("--pattern", choices=list(PATTERNS), default="gpt4",
                       help="BPE: how text is cut into pieces before merging (default: %(default)s)")
    train.add_argument("--special", action="append", metavar="TOKEN",
                       help=f"a special token; may be given several times (default: BPE {END_OF_TEXT}; WordPiece no more than it always has)")
    train.add_argument("--cased", action="store_true", help="WordPiece: keep capitals and accents")
    train.add_argument("--characters", type=whole_number, default=1000, metavar="N",
                       help="WordPiece: make words of the N most frequent characters; one with another is unknown (default: %(default)s)")

    encode = actions.add_parser("encode", help="print the ids of a text")
    _tokenizer_argument(encode)
    encode.add_argument("text", metavar="TEXT", help="the text, or - for standard input")
    encode.add_argument("--special", choices=["refuse", "allow", "text"], default="refuse",
                        help="a special token in the text: refuse it, allow it as that token, or take it as text (default: %(default)s)")

    decode = actions.add_parser("decode", help="print the text of ids")
    _tokenizer_argument(decode)
    decode.add_argument("ids", nargs="*", metavar="ID", help="the ids; none, or -: read them from standard input")

    look = actions.add_parser("show", help="show a text's tokens in colours, and the merges that made them")
    _tokenizer_argument(look)
    look.add_argument("text", metavar="TEXT", help="the text, or - for standard input")
    look.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="auto: only on a terminal (default)")


def _tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", metavar="TOKENIZER", help="tokenizer file (JSON), or a run folder")


def run(args: argparse.Namespace) -> int:
    """Do the chosen action; 0 when it went well, ValueError or OSError when not."""
    {"train": _train, "encode": _encode, "decode": _decode, "show": _show}[args.action](args)
    return 0


def _train(args: argparse.Namespace) -> None:
    from tinyllm.data.text import read_documents
    read = {"documents": 0, "bytes": 0}

    def texts() -> Iterator[str]:
        for document in read_documents(args.files, on_skip=lambda line: print(line, file=sys.stderr)):
            read["documents"] += 1
            read["bytes"] += len(document.text.encode("utf-8", "surrogatepass"))
            yield document.text

    start = time.perf_counter()
    if args.kind == "char":
        tokenizer = CharTokenizer.train(texts())
    elif args.kind == "wordpiece":
        tokenizer = train_wordpiece(texts(), args.vocab_size, not args.cased, args.characters, args.special or ())
    else:
        tokenizer = train_bpe(texts(), args.vocab_size, args.pattern, args.special or (END_OF_TEXT,))
    tokenizer.save(args.out)
    seconds = time.perf_counter() - start
    print(f"read {read['documents']} documents, {read['bytes'] / 1e6:.1f} MB, in {seconds:.1f} s")
    if isinstance(tokenizer, BPETokenizer):
        print(f"{tokenizer.vocab_size} ids: 256 bytes, {len(tokenizer.merges)} merges, {len(tokenizer.special_tokens)} special")
    elif isinstance(tokenizer, WordPieceTokenizer):
        inside = sum(token.startswith(INSIDE) for token in tokenizer.vocabulary)
        print(f"{tokenizer.vocab_size} ids: {len(tokenizer.special_tokens)} special, {inside} that go on with a word, "
              f"{len(tokenizer.vocabulary) - inside - len(BERT_TOKENS)} that begin one")  # fmt: skip
    else:
        print(f"{tokenizer.vocab_size} ids, one for each character")
    print(f"wrote {args.out}")


def _input(text: str) -> bytes:
    """The bytes of a command-line argument, or of standard input for -."""
    return sys.stdin.buffer.read() if text == "-" else os.fsencode(text)


def _encode(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    data = _input(args.text)
    found = [name for name in tokenizer.special_tokens if name.encode("utf-8", "surrogatepass") in data]
    if found and args.special == "refuse":
        raise ValueError(f"the text contains the special token {found[0]!r}: add --special allow to encode it as that token, "
                         "or --special text to encode it as ordinary text")
    print(*tokenizer.encode_bytes(data, allowed_special="all" if args.special == "allow" else (), disallowed_special=()))


def _decode(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    words = sys.stdin.read().split() if args.ids in ([], ["-"]) else args.ids
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"an id must be a whole number, got {word!r}")
    sys.stdout.flush()
    sys.stdout.buffer.write(tokenizer.decode_bytes(map(int, words)))    # bytes: what was not UTF-8 comes back as it was
    sys.stdout.buffer.write(b"\n" if sys.stdout.isatty() else b"")
    sys.stdout.buffer.flush()


def _show(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    color = args.color == "always" or args.color == "auto" and sys.stdout.isatty()
    print(*show(tokenizer, _input(args.text).decode("utf-8", "replace"), color=color), sep="\n")
