"""The same ids as transformers' BertTokenizer on the same vocabulary: recorded ones, and live where that is installed."""

import inspect
import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest

from tinyllm.tokenizer import WordPieceTokenizer, train_wordpiece
from tinyllm.tokenizer.basic import basic_split

GOLDEN = json.loads((Path(__file__).parent / "golden" / "wordpiece.json").read_text(encoding="utf-8"))
LATER = 600         # characters, of which Unicode said something else, or nothing, in 2015


@pytest.mark.parametrize("name, lower_case", [("lower", True), ("cased", False)])
def test_ids_equal_the_recorded_ones(name, lower_case):
    tokenizer = WordPieceTokenizer(GOLDEN["vocabulary"], lower_case)
    for probe, ids, as_text in zip(GOLDEN["probes"], GOLDEN[name], GOLDEN[f"{name}_as_text"], strict=True):
        assert tokenizer.encode(probe, allowed_special="all") == ids, ascii(probe)
        assert tokenizer.encode(probe, disallowed_special=()) == as_text, ascii(probe)


@pytest.fixture(scope="module", params=[True, False])
def both(request):
    """Ours and theirs, with a vocabulary learned from sources and from words of many scripts, and the text."""
    transformers = pytest.importorskip("transformers")
    text = "".join(inspect.getsource(module) for module in (inspect, json, random)) + " ".join(GOLDEN["probes"])
    ours = train_wordpiece([text], 3000, lower_case=request.param)
    theirs = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(ours.vocabulary)}, do_lower_case=request.param)
    return ours, theirs, text


@pytest.fixture(scope="module")
def agreed():
    """All characters that are split alike, each between letters; those that are not have come to Unicode, or changed their kind, later."""
    tokenizers = pytest.importorskip("tokenizers")
    clean, split = tokenizers.normalizers.BertNormalizer(), tokenizers.pre_tokenizers.BertPreTokenizer()
    known = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cs", "Cn")]
    alike = [c for c in known if basic_split(f"a{c}b") == [word for word, _ in split.pre_tokenize_str(clean.normalize_str(f"a{c}b"))]]
    later = set(known) - set(alike)
    assert len(later) < LATER and min(later) > "\u0600"
    return alike


@pytest.mark.peers
def test_live_text(both):
    ours, theirs, text = both
    for line in [text, *text.split("\n")]:
        assert ours.encode(line, disallowed_special=()) == theirs.encode(line, add_special_tokens=False, split_special_tokens=True), line


@pytest.mark.peers
def test_live_nasty_unicode(both, agreed):
    ours, theirs, text = both
    draw = random.Random(5)
    common = [c for c in agreed if ord(c) < 0x3100]
    for _ in range(20_000):
        signs = draw.choices("abcXYZ .,'-\u0301\u0327É東", k=draw.randint(0, 9)) + draw.choices(common, k=4) + draw.choices(agreed, k=2)
        signs += draw.choices(["[MASK]", "[SEP]", "[sep]", "[UNK] ", " [CLS]", "the", "self."], k=2)
        draw.shuffle(signs)
        probe = "".join(signs)
        assert ours.encode(probe, allowed_special="all") == theirs.encode(probe, add_special_tokens=False), ascii(probe)


@pytest.mark.peers
def test_live_decoding(both):
    tokenizers = pytest.importorskip("tokenizers")
    ours, theirs, text = both
    theirs.backend_tokenizer.decoder = tokenizers.decoders.WordPiece("##", cleanup=False)      # leaves "a , b" as it is
    for line in text.split("\n"):
        ids = theirs.encode(line)
        if ids[1:-1]:
            assert ours.decode(ids) == theirs.backend_tokenizer.decode(ids, skip_special_tokens=False)
