"""Cutting text into pieces before merging, so that no token joins the end of one word to the start of the next.

GPT2 and GPT4 are the published split patterns of GPT-2 and of GPT-4 (cl100k_base), in the notation of the `regex` package. Both keep one
space with the word behind it and leave the last space of a run to the next word. GPT4 differs where GPT2 wasted tokens on code and numbers:
contractions in capitals count too ('LL), any single sign may lead a word, digits go in threes, newlines end a piece.
Sources: Radford et al. 2019 and its published encoder; the cl100k_base definition in tiktoken.
"""

from collections.abc import Iterable

import regex

GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4 = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s++$|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
PATTERNS = {"gpt2": GPT2, "gpt4": GPT4}

LONG_TEXT = 1 << 20     # characters: beyond this the pieces come one by one, not as one big list


class Splitter:
    """Cuts text by a pattern and loses nothing: what the pattern leaves out between two matches is a piece of its own."""

    def __init__(self, pattern: str):
        """pattern: "gpt2", "gpt4", or any regular expression without capturing groups. ValueError otherwise."""
        if pattern.isalnum() and pattern not in PATTERNS:
            raise ValueError(f"unknown split pattern {pattern!r}: known names are {', '.join(PATTERNS)}; or give a regular expression")
        self.pattern = PATTERNS.get(pattern, pattern)
        try:
            self._compiled = regex.compile(f"({self.pattern})")
        except regex.error as error:
            raise ValueError(f"the split pattern {self.pattern!r} is not a regular expression: {error}") from None
        if self._compiled.groups != 1:
            raise ValueError(f"the split pattern {self.pattern!r} has capturing groups: write (?:…) instead of (…)")

    def __call__(self, text: str) -> Iterable[str]:
        """The pieces of text, in order; joined, they are the text."""
        if len(text) <= LONG_TEXT:
            pieces = self._compiled.findall(text)
            if sum(map(len, pieces)) == len(text):
                return pieces
        return filter(None, self._compiled.splititer(text))     # matches and what lies between them, in turn: slower, but one by one
