"""WordPiece, the tokenizer of BERT: a word is written with the longest tokens of a vocabulary, from left to right.

    "Unhappily, yes"   basic splitting (basic.py)   unhappily , yes   longest match   un ##happi ##ly , yes

A token that goes on with a word is written with ## before it. A word that cannot be written so is [UNK], as a whole. What is between
words is lost: decoding puts one space there. So text does not come back as it was, unlike with byte-level BPE.

How the vocabulary is learned: gain.py.
Source: Schuster & Nakajima 2012; Devlin et al. 2018 (BERT).
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from tinyllm.tokenizer.base import VERSION, Tokenizer, check_special, check_texts, special_pattern
from tinyllm.tokenizer.basic import basic_split
from tinyllm.tokenizer.gain import INSIDE, alphabet, frequent_characters, train_incremental

PAD, UNK, CLS, SEP, MASK = BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST_WORD = 100          # characters: a longer word is [UNK]
CACHED_WORDS = 1 << 18      # remember the ids of at most so many words: tens of megabytes


class WordPieceTokenizer(Tokenizer):
    """WordPiece tokenizer with the tokens that BERT's training needs, by id: pad, unk, cls, sep, mask.

    Text alone becomes ids; [CLS] and [SEP] around it are put there by whoever makes an encoder's input. [SEP] also is end_of_text.
    """

    kind = "wordpiece"

    def __init__(self, vocabulary: Iterable[str], lower_case: bool = True, special_tokens: Iterable[str] = ()):
        """vocabulary: the tokens, by id, [PAD], [UNK], [CLS], [SEP] and [MASK] among them, as in the lines of BERT's vocab.txt.

        lower_case: small letters without accents, see basic_split. special_tokens: more of them, whose ids come last.
        ValueError where one of the five is missing, or a token is empty, not a string, or there twice.
        """
        self.vocabulary, self.lower_case, further = list(vocabulary), lower_case, list(special_tokens)
        if any(not isinstance(token, str) or not token for token in self.vocabulary):
            raise ValueError("the vocabulary must be a list of strings, none of them empty")
        self._ids = {token: i for i, token in enumerate(self.vocabulary)}
        if len(self._ids) < len(self.vocabulary):
            raise ValueError(f"the vocabulary has the token {Counter(self.vocabulary).most_common(1)[0][0]!r} more than once")
        if missing := [name for name in BERT_TOKENS if name not in self._ids]:
            raise ValueError(f"the vocabulary has no {missing[0]}: it must hold {', '.join(BERT_TOKENS)}")
        check_special([*BERT_TOKENS, *further])
        super().__init__(map(_as_text, self.vocabulary), further)
        self.special_tokens = {name: self._ids[name] for name in BERT_TOKENS} | self.special_tokens
        self.pad, self.unk, self.cls, self.sep, self.mask = (self._ids[name] for name in BERT_TOKENS)
        self._longest = max(map(len, self.vocabulary))
        self._cache: dict[str, list[int]] = {}

    @property
    def end_of_text(self) -> int:
        """Id of [SEP], which ends a text."""
        return self.sep

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of text, special tokens taken as ordinary text."""
        ids: list[int] = []
        cached = self._cache.get
        for word in basic_split(text, self.lower_case):
            ids += cached(word) or self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids = self.longest_match(word)
        if len(self._cache) >= CACHED_WORDS:
            self._cache.clear()
        self._cache[word] = ids
        return ids

    def longest_match(self, word: str) -> list[int]:
        """The ids of one word: the longest token that it begins with, then the longest that the rest begins with, and so on.

        It never goes back: where no token goes on, the word is [UNK], even if a shorter token before would have led to the end.
        """
        if len(word) > LONGEST_WORD:
            return [self.unk]
        ids, start = [], 0
        while start < len(word):
            before = INSIDE if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                if (token := self._ids.get(before + word[start:end])) is not None:
                    break
            else:
                return [self.unk]
            ids.append(token)
            start = end
        return ids

    def encode_bytes(self, data: bytes, allowed_special: Literal["all"] | Collection[str] = frozenset(),
                     disallowed_special: Literal["all"] | Collection[str] = "all") -> list[int]:
        """Ids of UTF-8 text. Other bytes are no characters: UnicodeDecodeError, which is a ValueError, says where."""
        return self.encode(data.decode("utf-8"), allowed_special, disallowed_special)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The words that the ids stand for, with a space between."""
        return super().decode_bytes(ids).removeprefix(b" ")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, with a space before it where it begins a word: so that tokens that come one by one make a text."""
        return super().decode_bytes((token,))

    def __getstate__(self) -> dict:
        """What a copy in another process needs: all but what was remembered."""
        return self.__dict__ | {"_cache": {}}

    def to_json(self) -> dict:
        """All that defines the tokenizer, as the file holds it."""
        further = [name for name in self.special_tokens if name not in BERT_TOKENS]
        return {"kind": self.kind, "version": VERSION, "vocabulary": self.vocabulary, "lower_case": self.lower_case, "special_tokens": further}

    @classmethod
    def from_json(cls, content: dict) -> "WordPieceTokenizer":
        """The tokenizer that to_json described. ValueError when a field is missing or wrong."""
        for field, kind, words in (("vocabulary", list, "a list of tokens"), ("lower_case", bool, "true or false"), ("special_tokens", list, "a list of strings")):
            if not isinstance(content.get(field), kind):
                raise ValueError(f'"{field}" must be {words}')
        return cls(content["vocabulary"], content["lower_case"], content["special_tokens"])


def _as_text(token: str) -> bytes:
    """What a token adds to a text: "##ly" -> b"ly", "un" -> b" un"."""
    text = token.removeprefix(INSIDE) if token.startswith(INSIDE) else " " + token
    return text.encode("utf-8", "surrogatepass")


def count_words(texts: Iterable[str], lower_case: bool = True, special_tokens: Sequence[str] = ()) -> Counter[str]:
    """Distinct words of the texts and how often each occurs, without those too long to be encoded. Special tokens are cut out."""
    special = special_pattern([*BERT_TOKENS, *special_tokens])
    counts: Counter[str] = Counter()
    for text in texts:
        for part in special.split(text)[::2]:
            counts.update(basic_split(part, lower_case))
    return Counter({word: count for word, count in counts.items() if len(word) <= LONGEST_WORD})


def train_wordpiece(texts: Iterable[str], vocab_size: int, lower_case: bool = True, characters: int = 1000,
                    special_tokens: Collection[str] = (), or_fewer: bool = False) -> WordPieceTokenizer:
    """Learn a WordPiece tokenizer with exactly vocab_size ids: [PAD] … [MASK], the characters, what they are joined to, special tokens.

    texts is read once and never held, only its distinct words are. characters: of so many, the most frequent, words can be made; others
    make a word [UNK]. or_fewer: a text that cannot give so many ids makes a smaller tokenizer, instead of being refused.
    Raises ValueError when vocab_size is too small to hold the characters, or larger than these texts can give, and for bad special tokens.
    """
    special_tokens = check_special([*BERT_TOKENS, *special_tokens])[len(BERT_TOKENS):]      # before the long work
    if characters < 1:
        raise ValueError(f"characters is {characters}: words are made of at least one")
    counts = count_words(check_texts(texts), lower_case, special_tokens)
    known = frequent_characters(counts, characters)
    counts = {word: count for word, count in counts.items() if known.issuperset(word)}
    signs = alphabet(counts)
    reserved = len(BERT_TOKENS) + len(signs) + len(special_tokens)
    if vocab_size < reserved:
        raise ValueError(f"a vocabulary of {vocab_size} (--vocab-size) is too small: {len(BERT_TOKENS)} + {len(special_tokens)} special tokens and {len(signs)} "
                         f"characters, with and without {INSIDE}, need {reserved}; or keep fewer characters (--characters)")
    made = train_incremental(counts, vocab_size - reserved)
    if reserved + len(made) < vocab_size and not or_fewer:
        raise ValueError(f"a vocabulary of {vocab_size} (--vocab-size) is more than this text can give: after {len(made)} merges no pair is left "
                         f"that would gain anything; ask for at most {reserved + len(made)}, or give more text")
    return WordPieceTokenizer([*BERT_TOKENS, *signs, *made], lower_case, special_tokens)
