"""Text to ids and back. Read in this order:

    bpe.py         byte-pair encoding itself: learn merges from counted pieces, apply them to bytes
    patterns.py    how text is cut into pieces first, so that no token spans two words
    base.py        what every tokenizer does: special tokens, decoding, saving, fingerprint
    byte_level.py  BPETokenizer and train_bpe: bpe.py and patterns.py put together, with a cache of pieces
    learn.py, starts.py, pieces.py, merge_many.py, bulk.py
                   the fast twins: learning merges, cutting, looking up and merging, by array operations over long texts
    characters.py  CharTokenizer: one id a character
    basic.py, gain.py, wordpiece.py
                   WordPieceTokenizer, for BERT-style encoders: words, the vocabulary that makes them likeliest, longest match
    streaming.py   StreamDecoder: ids arrive one at a time, only whole characters leave
    files.py       load_tokenizer: one JSON file, checked
    chat.py        conversations as tokens: roles, and what is to be learned
    show.py        a text's tokens, and the merges that made them, for a terminal
"""

from tinyllm.tokenizer.base import Tokenizer
from tinyllm.tokenizer.byte_level import BPETokenizer, train_bpe
from tinyllm.tokenizer.characters import CharTokenizer
from tinyllm.tokenizer.chat import CHAT_TOKENS, add_special_tokens, encode_chat, encode_prompt, render, shortened
from tinyllm.tokenizer.files import load_tokenizer
from tinyllm.tokenizer.patterns import GPT2, GPT4, PATTERNS, Splitter
from tinyllm.tokenizer.show import ribbon, show
from tinyllm.tokenizer.streaming import StreamDecoder
from tinyllm.tokenizer.wordpiece import WordPieceTokenizer, train_wordpiece

__all__ = [
    "CHAT_TOKENS", "GPT2", "GPT4", "PATTERNS", "BPETokenizer", "CharTokenizer", "Splitter", "StreamDecoder", "Tokenizer", "WordPieceTokenizer",
    "add_special_tokens", "encode_chat", "encode_prompt", "load_tokenizer", "render", "ribbon", "shortened", "show", "train_bpe",
    "train_wordpiece",
]
