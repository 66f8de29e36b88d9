"""Records what transformers' BertTokenizer does, for test_wordpiece_parity.py: python tests/golden/make_wordpiece.py

The vocabulary is made here: every sign of the probes, with and without ##, and some pieces of words, among them ones that lead longest match
astray. Needs `pip install transformers`.
"""

import json
import unicodedata
from pathlib import Path

import transformers
from transformers import BertTokenizer

BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = """the un ##aff ##able ##ffa ##ing play ##ed low ##er ##est lo ##west ##we hello world ##ld cafe strasse 東 ##京 ##lf ##self self
ab abc ##cd ##d Hello World Café naïve ##ï istanbul οδος οδοσ привет ##ив ' ##t it ##s 12 ##34 ##5 12345 don""".split()
PROBES = [
    "", " ", "\t\n\r \u00a0\u3000", "unaffable", "unaffableX", "UNAFFABLE playing", "lowest lower, lowly!", "abcd abcdx", "hello world", "Hello, World!",
    "it's don't 'tis ''s", "12345 1234 12 3.14 -1,000", "self.value ** 2 == x[i]; $5 + 10% ~ `a` ^b| <c>", "naïve café Straße ÉCOLE İstanbul ǅ ﬃ Ⅷ",
    "ΟΔΟΣ ΣΑΣ ς", "привет ПРИВЕТ ёлка й", "東京タワー の 語日本語 한국어 안녕", "\u00e9 e\u0301 \u0301 a\u0300\u0301b", "a\u200bb\u200d\ufeffc\u00ad\u2060d",
    "a\x00b\x07c\x7f\x85d\ufffde", "x\u2028y\u2029z\u2003w\u1680v", "\u3400\U00020000\uf900\U0002f800\u4dff\u9fff", "„Anführung“ – «oui» … ¿qué? ‘’ 、。「」",
    "👋🏽 👩‍👩‍👧 😀!", "नमस्ते दुनिया", "مرحبا، كيف؟ ١٢٣", "שָׁלוֹם", "a" * 100, "a" * 101, "a" * 99 + "é", "x[MASK]y [SEP] [CLS][PAD] [mask] [ MASK ]", "\ue000\U000f0000x",
]


def vocabulary() -> list[str]:
    """Signs as they come out of both kinds of splitting, sorted, behind the pieces; a few are left out, so that some words are [UNK]."""
    signs = {c for probe in PROBES for form in (probe, unicodedata.normalize("NFD", probe).lower()) for c in form if c.isprintable() and c != " "}
    signs -= set("語√ﬃवש")
    return list(dict.fromkeys([*BERT_TOKENS, *PIECES, *sorted(signs), *("##" + sign for sign in sorted(signs))]))


def main() -> None:
    tokens = vocabulary()
    record = {"versions": f"transformers {transformers.__version__}", "vocabulary": tokens, "probes": PROBES}
    for name, lower_case in (("lower", True), ("cased", False)):
        theirs = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=lower_case)
        record[name] = [theirs.encode(probe, add_special_tokens=False) for probe in PROBES]
        record[f"{name}_as_text"] = [theirs.encode(probe, add_special_tokens=False, split_special_tokens=True) for probe in PROBES]
    Path(__file__).with_name("wordpiece.json").write_text(json.dumps(record, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
