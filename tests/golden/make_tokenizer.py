"""Records what Hugging Face's tokenizers and OpenAI's tiktoken do, for test_tokenizer_parity.py: python tests/golden/make_tokenizer.py

Hugging Face trains on a text made here (words drawn at random, so that many pairs tie); its merges, as pairs of byte strings in
hexadecimal, go into tokenizer.json with the ids that both packages give to some texts, where byte b has id b and merge i has id 256 + i.
Needs `pip install tokenizers tiktoken`.
"""

import json
import random
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from tinyllm.tokenizer import GPT2, GPT4

MERGES = 400
WORDS = """the of and low lower lowest slow slower newest wider it's they'll we've I'M DON'T isn't def return self.value self.grad import
for i in range(10): x += 1 == != -> ** 0x1F 3.14159 1234567 2024
naïve café Straße größer Москва привет 東京 日本語 안녕하세요 مرحبا 👋 😉 👩‍👩‍👧 é""".split()
SYLLABLES = "ba be bi do du ka ke lo lu ma mi no ra re ri sa se ta to tra stro ing er est ly ion ü ø ß 語 の".split()
SPACES = [" "] * 12 + ["  ", "\n", "\n    ", "\n\n", "\t", " \n", "\u00a0", ", ", ". "]
PROBES = [
    "", " ", "hello123!!!? (안녕하세요!) 😉", "Hello, world. Is this-- a test?", "the lowest of the slowest\n\n    return self.value ** 2\n",
    "  leading and trailing  ", "a \n  ", "\r\n\r\n \t x", "I'LL we'll 'tis ''s", "1234567890 3.14 ½ ٣٤", "e\u0301 é ﷺ 👩‍👩‍👧",
    "\x00\x7f\u0080\u200b\ufeff", "東京の日本語、привет!", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "x\u2003\u3000y\x1c\x85z",
]


def byte_symbols() -> dict[str, int]:
    """GPT-2's character for each byte, inverted: Hugging Face stores merges in these."""
    visible = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


SYMBOLS = byte_symbols()


def to_bytes(token: str) -> bytes:
    return bytes(SYMBOLS[c] for c in token)


def hugging_face(text: str, pattern: str, merges: int) -> tokenizers.Tokenizer:
    """A byte-level BPE trained by Hugging Face."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def merges_of(tokenizer: tokenizers.Tokenizer) -> list[tuple[bytes, bytes]]:
    return [(to_bytes(a), to_bytes(b)) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]]


def ranks_of(merges: list[tuple[bytes, bytes]]) -> dict[bytes, int]:
    """Bytes of each token -> id, as tiktoken wants them."""
    return {bytes([b]): b for b in range(256)} | {a + b: 256 + i for i, (a, b) in enumerate(merges)}


def main() -> None:
    draw = random.Random(2)
    words = WORDS + ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(200)]
    text = "".join(draw.choice(words) + draw.choice(SPACES) for _ in range(1200))
    record = {"versions": f"tokenizers {tokenizers.__version__}, tiktoken {tiktoken.__version__}", "text": text, "probes": PROBES}
    for name, pattern in (("gpt2", GPT2), ("gpt4", GPT4)):
        theirs = hugging_face(text, pattern, MERGES)
        merges = merges_of(theirs)
        ranks = ranks_of(merges)
        tik = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        record[name] = {
            "merges": [f"{a.hex()} {b.hex()}" for a, b in merges],
            "hugging_face": [[ranks[to_bytes(token)] for token in theirs.encode(probe).tokens] for probe in PROBES],
            "tiktoken": [tik.encode_ordinary(probe) for probe in PROBES],
        }
    Path(__file__).with_name("tokenizer.json").write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
