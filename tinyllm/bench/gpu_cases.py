"""What is timed on a CUDA GPU, in bf16: sizes that people train there, beside PyTorch as they run it there."""
from collections.abc import Sequence
from pathlib import Path

from tinyllm.bench import cases
from tinyllm.bench.cases import GPT, SPREAD, Case, Job, Peer, Work, Yardstick, known
from tinyllm.bench.costs import decoding_bytes, model_flops
from tinyllm.bench.gpu import COPY_BYTES, PRODUCT, PRODUCTS_AT_ONCE
from tinyllm.bench.machine import installed

PRODUCTS = Yardstick("TFLOP/s", 2 * PRODUCT**3 * PRODUCTS_AT_ONCE / 1e12, Job("ours/rates.py", dict(what="gpu product"), (3, 10, 0)))
COPYING = Yardstick("GB/s", 2 * COPY_BYTES / 1e9, Job("ours/rates.py", dict(what="gpu copy"), (3, 20, 0)))

TRAIN = {
    "gpt2-124M": GPT(12, 12, 768, 1024, 8, 50304, precision="bf16"),
    "llama-350M": GPT(24, 16, 1024, 2048, 8, 50304, precision="bf16", arch="llama"),
}
DECODE = {"124M": GPT(12, 12, 768, 1024, 1, 50257, bias=True, precision="bf16")}
BATCHES = (8, 16, 32, 64)
STEPS = 10  # in a repetition: the host must run ahead of the GPU within it, as it does in training
TRAIN_UNITS, DECODE_UNITS = (2, 5, 1), (2, 5, 0)  # what a graph does cannot be looked into, so that decoding has no parts
NEW_TOKENS = 256


def train_case(size: str, gpt: GPT, units: tuple[int, int, int], batches: Sequence[int] = BATCHES, steps: int = STEPS) -> Case:
    """Training steps, forward, backward, clipping, AdamW: activations and products in 16 bits, weights and sums in fp32."""
    settings = gpt.settings(device="cuda", steps=steps)
    peers = tuple(
        Peer(name, Job("peers/torch_train.py", settings | dict(compiled=compiled), (*units[:2], 0)))
        for name, compiled in (("PyTorch", False), ("torch.compile", True))
    )
    tokens = gpt.context * steps
    cost = model_flops(gpt.config()) * tokens / 1e12
    return Case("train", size, "tokens/s", tokens, Job("ours/train.py", settings, units), peers, cost, PRODUCTS, tuple(batches))


def decode_case(size: str, gpt: GPT, batch: int, units: tuple[int, int, int], new: int = NEW_TOKENS) -> Case:
    """Greedy decoding of `new` tokens a row with a cache of keys and values."""
    settings = gpt.settings(device="cuda", batch=batch, prompt=cases.PROMPT, new=new)
    scripts = {"PyTorch": "torch_decode"} | {name: f"{name}_decode" for name in installed(("transformers",))}  # the second: where it is there
    peers = tuple(Peer(name, Job(f"peers/{script}.py", settings, (*units[:2], 0))) for name, script in scripts.items())
    cost = decoding_bytes(gpt.config()) * new / 1e9
    return Case("decode", f"{size} batch {batch}", "tokens/s", batch * new, Job("ours/decode.py", settings, units), peers, cost, COPYING)


def _train(sizes: Sequence[str], folder: Path) -> list[Case]:
    return [train_case(size, TRAIN[size], TRAIN_UNITS) for size in known(sizes, TRAIN)]


def _decode(sizes: Sequence[str], folder: Path) -> list[Case]:
    return [decode_case(size, DECODE[size], batch, DECODE_UNITS) for size in known(sizes, DECODE) for batch in cases.DECODE_BATCHES]


WORKS = {
    "train": Work(
        f"{STEPS} training steps: forward, backward, clipping, AdamW; bf16, weights and sums fp32; each side with its fastest batch",
        tuple(TRAIN), _train,
        f"""{SPREAD} TFLOP/s: 6·N + 12·L·H·D·T a token, N the weights in products (as nanoGPT counts);
at most: in bf16 products of {PRODUCT} x {PRODUCT} on this GPU. share: of that; for training, the model FLOPs utilisation (MFU).
MB: what each side's pool has taken of the GPU's memory, both with the smaller of the two batches.""",
        ("torch",),
    ),
    "decode": Work(
        f"greedy decoding of {NEW_TOKENS} tokens with a cache; bf16", tuple(DECODE), _decode,
        f"""{SPREAD} GB/s: all weights once a step, whatever the batch; at most: when this GPU copies {COPY_BYTES / 2**30:.0f} GiB, which it
reads and writes. share: of that. MB: what each side's pool has taken of the GPU's memory.""",
        ("torch",),
    ),
}  # fmt: skip
BY_DEVICE = {"cpu": cases.WORKS, "cuda": WORKS}
