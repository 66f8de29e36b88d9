"""The same merges and ids as Hugging Face's tokenizers and OpenAI's tiktoken: recorded ones, and live where both are installed."""

import inspect
import json
import random
import sys
from pathlib import Path

import pytest

from tinyllm.tokenizer import GPT2, GPT4, train_bpe

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["gpt2", "gpt4"])
def recorded(request):
    record = GOLDEN[request.param]
    return record, train_bpe([GOLDEN["text"]], 256 + len(record["merges"]), request.param, special_tokens=())


def test_merges_equal_the_recorded_ones(recorded):
    record, tokenizer = recorded
    assert [f"{tokenizer.token_bytes(a).hex()} {tokenizer.token_bytes(b).hex()}" for a, b in tokenizer.merges] == record["merges"]


@pytest.mark.parametrize("package", ["hugging_face", "tiktoken"])
def test_ids_equal_the_recorded_ones(recorded, package):
    record, tokenizer = recorded
    for probe, ids in zip(GOLDEN["probes"], record[package], strict=True):
        assert tokenizer.encode(probe) == ids, repr(probe)


def random_texts(count):
    """Ordinary words, odd spaces, and characters from all over Unicode."""
    draw = random.Random(7)
    planes = [(32, 127), (0, 0x250), (0x2000, 0x2070), (0x300, 0x370), (0x600, 0x700), (0x3040, 0x3100), (0x1F300, 0x1F700)]
    for _ in range(count):
        chunks = draw.choices(["the", "I'll", "DON'T", " ", "  ", "\n", "\r\n", "\t", "123456", "self.", "\u00a0", "\u3000", "!!"], k=20)
        chunks += [chr(draw.randrange(*draw.choice(planes))) for _ in range(20)]
        draw.shuffle(chunks)
        yield "".join(chunks)


@pytest.mark.peers
@pytest.mark.parametrize("pattern", [GPT2, GPT4])
def test_live_training_and_encoding(pattern):
    tiktoken, _ = pytest.importorskip("tiktoken"), pytest.importorskip("tokenizers")
    sys.path.insert(0, str(Path(__file__).parent / "golden"))
    import make_tokenizer as peers

    text = "".join(inspect.getsource(module) for module in (inspect, json, random))
    ours = train_bpe([text], 256 + 2000, pattern, special_tokens=())
    theirs = peers.hugging_face(text, pattern, 2000)
    merges = peers.merges_of(theirs)
    assert [(ours.token_bytes(a), ours.token_bytes(b)) for a, b in ours.merges] == merges

    ranks = peers.ranks_of(merges)
    tik = tiktoken.Encoding("live", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for probe in [text, *random_texts(300)]:
        ids = ours.encode(probe)
        assert ids == tik.encode(probe), repr(probe)
        assert ids == [ranks[peers.to_bytes(token)] for token in theirs.encode(probe).tokens], repr(probe)


@pytest.mark.peers
@pytest.mark.parametrize("name, pattern", [("gpt2", GPT2), ("gpt4", GPT4)])
def test_live_special_tokens_and_published_patterns(name, pattern):
    """Special tokens mean what they mean in tiktoken; and our patterns split as the ones that tiktoken publishes today."""
    tiktoken = pytest.importorskip("tiktoken")
    published = {
        "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
                r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    }
    ours = train_bpe([GOLDEN["text"]], 500, pattern, special_tokens=["<|endoftext|>", "<|pad|>"])
    ranks = {ours.token_bytes(i): i for i in range(498)}
    tik = tiktoken.Encoding("special", pat_str=published[name], mergeable_ranks=ranks, special_tokens=ours.special_tokens)
    choices = [{"allowed_special": "all"}, {"allowed_special": {"<|pad|>"}, "disallowed_special": ()}, {"disallowed_special": ()},
               {"disallowed_special": {"<|pad|>"}}, {"allowed_special": {"<|pad|>"}}, {}]
    for text in random_texts(100):
        text = text.replace("the", "<|endoftext|>").replace("123456", "<|pad|>")
        for choice in choices:
            try:
                expected = tik.encode(text, **choice)
            except ValueError:
                with pytest.raises(ValueError, match="special token"):
                    ours.encode(text, **choice)
            else:
                assert ours.encode(text, **choice) == expected, (text, choice)
                assert ours.decode(expected) == tik.decode(expected)
