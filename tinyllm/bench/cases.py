"""What is timed: each kind of work in its usual sizes, as processes for tinyllm and for the package that one would take instead."""
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tinyllm
from tinyllm.bench.costs import decoding_bytes, training_flops
from tinyllm.bench.machine import PRODUCT, READ_BYTES
from tinyllm.config import suggestion
from tinyllm.data.records import decode
from tinyllm.data.text import files_below
from tinyllm.nn import TransformerConfig

HERE = Path(__file__).parent
ROOT = Path(tinyllm.__file__).parent.parent
RUNNER = HERE / "runner.py"


@dataclass(frozen=True)
class Job:
    """A process: a file of ours/ or peers/, its settings, and how often it works: units that warm up, are timed, are profiled."""

    script: str
    settings: dict
    units: tuple[int, int, int]

    def command(self, threads: int, profiled: bool = True) -> list[str]:
        """The command line that runs it. -P: no file of this folder takes the place of a library of that name."""
        warmup, timed, extra = self.units
        root = str(ROOT) if self.script.startswith("ours/") else None
        settings = self.settings | dict(units=(warmup, timed, extra if profiled else 0), root=root, threads=threads)
        return [sys.executable, "-P", str(RUNNER), str(HERE / self.script), json.dumps(settings)]


@dataclass(frozen=True)
class Peer:
    """Whom to compare with: its name, and the process that does the same work."""

    name: str
    job: Job


@dataclass(frozen=True)
class Yardstick:
    """What bounds the work, at the rate at which this machine does it and nothing else: `amount` in each repetition of a process."""

    unit: str
    amount: float
    job: Job


PRODUCTS = Yardstick("GFLOP/s", 2 * PRODUCT**3 / 1e9, Job("ours/rates.py", dict(what="product"), (2, 15, 0)))
READING = Yardstick("GB/s", READ_BYTES / 1e9, Job("ours/rates.py", dict(what="reading"), (2, 25, 0)))


@dataclass(frozen=True)
class Case:
    """amount : units of work (tokens, MB) in one repetition.      cost : of what the yardstick measures, in one repetition.

    batches : where there are any, each side takes the one that is the fastest for it and fits; amount and cost are then for a row.
    """

    work: str
    size: str
    unit: str
    amount: float
    ours: Job
    peers: tuple[Peer, ...] = ()
    cost: float | None = None
    yardstick: Yardstick | None = None
    batches: tuple[int, ...] = ()


@dataclass(frozen=True)
class GPT:
    """A model of GPT-2's kind, or, by `arch`, of Llama's; the shape of its batch; and the format of its numbers."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    vocab: int
    bias: bool = False
    arch: str = "gpt2"
    precision: str = "fp32"

    def config(self) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=self.vocab, arch=self.arch, layers=self.layers, heads=self.heads, width=self.width, context=self.context, bias=self.bias,
            precision=self.precision,
        )  # fmt: skip

    def settings(self, **others) -> dict:
        """All of it for a process, and what else it is to know."""
        return asdict(self) | dict(mlp_width=self.config().resolved().mlp_width) | others

    @staticmethod
    def of(settings: dict) -> "GPT":
        """What settings() was made of."""
        return GPT(**{name: settings[name] for name in GPT.__dataclass_fields__})


TRAIN = dict(S=GPT(4, 4, 128, 64, 12, 65), M=GPT(6, 6, 384, 256, 8, 65), L=GPT(12, 12, 768, 256, 2, 50304))
TRAIN_UNITS = dict(S=(20, 60, 30), M=(3, 10, 5), L=(2, 5, 2))
DECODE = {"124M": GPT(12, 12, 768, 1024, 1, 50257, bias=True), "small": GPT(4, 4, 128, 256, 1, 1024, bias=True)}
DECODE_UNITS = {"124M": (1, 3, 1), "small": (2, 10, 3)}
DECODE_BATCHES = (1, 8)
PROMPT, NEW_TOKENS = 16, 64
VOCABULARY = 32768
SPREAD = "spread: of the middle half of our timings."
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


def train_case(size: str, gpt: GPT, units: tuple[int, int, int]) -> Case:
    """A training step: forward, backward, clipping, AdamW, in fp32."""
    settings, tokens = gpt.settings(device="cpu", steps=1), gpt.batch * gpt.context
    peer = Peer("PyTorch", Job("peers/torch_train.py", settings | dict(compiled=False), (*units[:2], 0)))
    cost = training_flops(gpt.config()) * tokens / 1e9
    return Case("train", size, "tokens/s", tokens, Job("ours/train.py", settings, units), (peer,), cost, PRODUCTS)


def decode_case(size: str, gpt: GPT, batch: int, units: tuple[int, int, int], new: int = NEW_TOKENS) -> Case:
    """Greedy decoding of `new` tokens a row with a cache of keys and values, in fp32."""
    settings = gpt.settings(device="cpu", batch=batch, prompt=PROMPT, new=new)
    ours = Job("ours/decode.py", settings, units)
    peer = Peer("transformers", Job("peers/transformers_decode.py", settings, (*units[:2], 0)))
    cost = decoding_bytes(gpt.config()) * new / 1e9
    return Case("decode", f"{size} batch {batch}", "tokens/s", batch * new, ours, (peer,), cost, READING)


def tokenizer_cases(size: str, text: bytes, folder: Path, vocabulary: int = VOCABULARY) -> list[Case]:
    """Training a byte-level BPE with GPT-2's split, and encoding the text with it. The text and what is trained lie in `folder`."""
    path = folder / "text.txt"
    path.write_bytes(text)
    settings = dict(text=str(path), ours=str(folder / "ours.json"), theirs=str(folder / "theirs.json"), vocabulary=vocabulary)

    def case(what, units, *peers):
        job = {"what": what} | settings
        others = tuple(Peer(name, Job(f"peers/{name}_bpe.py", job, units)) for name in peers)
        return Case("tokenizer", f"{what} {size}", "MB/s", len(text) / 1e6, Job("ours/tokenizer.py", job, units), others)

    return [case("train", (0, 1, 0), "tokenizers"), case("encode", (0, 3, 0), "tokenizers", "tiktoken")]


def scaling_case(length: int) -> Case:
    """Forward and backward of tiled attention over one text of that many tokens. The first unit is not timed, but its memory traced."""
    settings = dict(length=length, heads=4, head_width=64)
    return Case("scaling", str(length), "tokens/s", length, Job("ours/scaling.py", settings, (1, min(20, 2 + 8192 // length), 0)))


def python_text() -> bytes:
    """The sources of the running Python's standard library, its tests included: about 30 MB that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in files_below(root, (".py",), ("site-packages", "dist-packages")):
        try:
            texts.append(decode(path.read_bytes(), str(path)).encode())
        except ValueError:  # some tests are files in other encodings
            continue
    if not texts:
        raise FileNotFoundError(f"{root}: this Python came without the sources of its standard library, the text of this benchmark")
    return b"".join(texts)


def _train(sizes: Sequence[str], folder: Path) -> list[Case]:
    return [train_case(size, TRAIN[size], TRAIN_UNITS[size]) for size in known(sizes, TRAIN)]


def _decode(sizes: Sequence[str], folder: Path) -> list[Case]:
    return [decode_case(size, DECODE[size], batch, DECODE_UNITS[size]) for size in known(sizes, DECODE) for batch in DECODE_BATCHES]


def _tokenizer(sizes: Sequence[str], folder: Path) -> list[Case]:
    for size in sizes:
        if not re.fullmatch(r"all|[1-9]\d*MB", size):
            raise ValueError(f"--sizes {size!r}: tokenizer takes all, or a number of megabytes such as 5MB")
    text, cases = python_text(), []
    for size in sizes:
        part = text if size == "all" else text[: int(size.removesuffix("MB")) * 10**6].decode("utf-8", "ignore").encode()
        place = folder / size
        place.mkdir()
        cases += tokenizer_cases(size, part, place)
    return cases


def _scaling(sizes: Sequence[str], folder: Path) -> list[Case]:
    for size in sizes:
        if not re.fullmatch(r"[1-9]\d*", size):
            raise ValueError(f"--sizes {size!r}: scaling takes lengths in tokens, such as 256,512,1024")
    if len({int(size) for size in sizes}) < 2:
        raise ValueError(f"--sizes {','.join(sizes)}: scaling compares lengths, so it takes at least two")
    return [scaling_case(length) for length in sorted({int(size) for size in sizes})]


def known(sizes: Sequence[str], table: dict) -> Sequence[str]:
    for size in sizes:
        if size not in table:
            raise ValueError(f"--sizes {size!r} is unknown: it takes {', '.join(table)}{suggestion(size, table)}")
    return sizes


@dataclass(frozen=True)
class Work:
    """A kind of work: what it is, its usual sizes, the cases of given sizes (their files go into a folder), the packages of its peers.

    how_to_read : what the columns mean, for the end of the table.
    """

    title: str
    sizes: tuple[str, ...]
    cases: Callable[[Sequence[str], Path], list[Case]]
    how_to_read: str
    packages: tuple[str, ...] = ()


WORKS = {
    "train": Work(
        "a training step: forward, backward, clipping, AdamW; fp32", tuple(TRAIN), _train,
        f"""{SPREAD} GFLOP/s: 6 for each weight in a product and 12 for each visible pair and width, a token;
at most: in one large product on this machine. waiting: for the other processes. Python: the engine, the modules and the loop.""",
        ("torch",),
    ),
    "decode": Work(
        f"greedy decoding of {NEW_TOKENS} tokens with a cache; fp32", tuple(DECODE), _decode,
        f"""{SPREAD} GB/s: all weights once a step, whatever the batch; at most: when this machine reads a large matrix
and does nothing else.""",
        ("torch", "transformers"),
    ),
    "tokenizer": Work(
        f"byte-level BPE of {VOCABULARY:,} entries, GPT-2's split, on Python's standard library", ("all",), _tokenizer,
        f"{SPREAD} MB: of UTF-8 text. Encoding starts from an empty cache.",
        ("tokenizers", "tiktoken"),
    ),
    "scaling": Work(
        "tiled attention, forward and backward, as the text grows", tuple(map(str, LENGTHS)), _scaling,
        "peak MB: all arrays, inputs and gradients included; linear memory is T^1. Time per token is linear up to T^1.",
    ),
}  # fmt: skip
