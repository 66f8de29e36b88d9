"""Showing text while its ids still arrive. A character may be spread over several tokens; half of one must not be shown."""

import codecs

from tinyllm.tokenizer.base import Tokenizer


class StreamDecoder:
    """Ids in, one at a time; whole characters out. All that push and flush return, joined, is tokenizer.decode of all the ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes: often one word, sometimes "". Bytes that cannot become UTF-8 give U+FFFD."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The end: U+FFFD if a character was left unfinished, else "". The decoder is then as new."""
        return self._utf8.decode(b"", final=True)
