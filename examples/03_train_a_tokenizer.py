"""Byte-pair encoding on one paragraph: what a language model reads instead of letters.

A tokenizer is learned, too: it looks for the pair of neighbours that occurs most often, makes it one token, and does so again and
again. You will see

    1. the text as pieces, the pairs counted, the first merges
    2. the definition and the fast trainer learn the same merges
    3. what merges are good for: more bytes in a token
    4. that nothing is ever unknown or lost, and how an emoji arrives in four parts
    5. special tokens, which text cannot smuggle in

    python examples/03_train_a_tokenizer.py
"""
import inspect
import time

from tinyllm.tokenizer import GPT4, StreamDecoder, train_bpe
from tinyllm.tokenizer.bpe import count_pairs, merge, tie_break, train_naive
from tinyllm.tokenizer.byte_level import count_pieces
from tinyllm.tokenizer.learn import train_incremental
from tinyllm.tokenizer.patterns import Splitter
from tinyllm.tokenizer.show import ribbon, show_steps, visible

TEXT = """\
The smallest thing that a language model reads is a token. A token may be a letter, a part of a word, or a whole word: the tokenizer \
learns from the text itself which parts of words are worth a token of their own. The parts that come again and again become tokens, \
the parts that are rare are spelled out in smaller tokens, and in the end any text at all can be written in tokens, because the \
smallest tokens are the bytes that the text is stored in."""
UNSEEN = "Another text, which the tokenizer has not learned from, still has parts of words that it knows."


def most_frequent(words, count):
    """The most frequent pairs of neighbours, as (how often, pair). words: {ids of a piece: how often it occurs}"""
    pairs = count_pairs(words)
    return [(pairs[pair], pair) for pair in sorted(pairs, key=lambda pair: (-pairs[pair], tie_break(pair)))[:count]]


def first_merge():
    """The pieces of TEXT as bytes, their most frequent pairs, and the same after the most frequent one has become id 256."""
    words = {tuple(piece): count for piece, count in count_pieces([TEXT], Splitter(GPT4)).items()}
    before = most_frequent(words, 5)
    best = before[0][1]
    merged = {merge(word, best, 256): count for word, count in words.items()}
    return before, most_frequent(merged, 5)


def both_trainers(merges=60):
    """The merges by definition and by the fast trainer, with their seconds, on a longer text: Python's own `inspect` module."""
    pieces = count_pieces([inspect.getsource(inspect)], Splitter(GPT4))
    results = []
    for trainer in (train_naive, train_incremental):
        start = time.perf_counter()
        results.append((trainer(pieces, merges), time.perf_counter() - start))
    return results


def compression(sizes=(257, 277, 317, 377)):
    """Bytes per token for tokenizers with more and more merges: (vocabulary, on TEXT, on UNSEEN)."""
    rows = []
    for size in sizes:
        tokenizer = train_bpe([TEXT], size)
        rows.append((size, *(len(text.encode()) / len(tokenizer.encode(text)) for text in (TEXT, UNSEEN))))
    return rows


def streamed(tokenizer, text):
    """What can be shown after each token of text: only whole characters."""
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(token) for token in tokenizer.encode(text)]


def refusal(tokenizer, text):
    """What the tokenizer says to text that contains a special token."""
    try:
        return str(tokenizer.encode(text))
    except ValueError as error:
        return str(error)


def main():
    print("1. Text is cut into pieces first, so that no token spans two words (· is a space):")
    print(f"   {ribbon(piece.encode() for piece in Splitter(GPT4)(TEXT[:70]))} …")
    before, after = first_merge()
    print("   Most frequent pairs of bytes:     ", ",  ".join(f"{visible(bytes(pair))!r} {count} times" for count, pair in before))
    print(f"   Python agrees about the first:     TEXT.count(' t') is {TEXT.count(' t')}")
    named = {256: bytes(before[0][1])}
    shown = [(count, b"".join(named.get(i) or bytes([i]) for i in pair)) for count, pair in after]
    print("   That pair becomes id 256. Now:    ", ",  ".join(f"{visible(pair)!r} {count} times" for count, pair in shown))
    tokenizer = train_bpe([TEXT], 377)
    print(f"   and so on. The first 24 merges:    {ribbon(tokenizer.token_bytes(i) for i in range(256, 280))}")
    print("   How one word is then encoded, the earliest learned merge first:")
    print("\n".join("   " + line for line in show_steps(tokenizer, " tokenizer")) + "\n")

    (naive, slow), (incremental, fast) = both_trainers()
    same = "the same" if naive == incremental else "DIFFERENT"
    print(f"2. {len(naive)} merges of the source code of Python's `inspect`, everything counted again each time: {slow:.2f} s.")
    print(f"   Counting only what a merge changes: {fast:.2f} s, {slow / fast:.0f} times as fast, and the merges are {same}.\n")

    print("3. Vocabulary     bytes per token: this text     unseen text")
    for size, seen, unseen in compression():
        print(f"   {size:10}     {seen:26.2f}     {unseen:11.2f}")
    print("   257 is the 256 bytes and <|endoftext|>: no merges, a byte a token. What is learned helps new text too, but less.")
    print(f"   {ribbon(map(tokenizer.token_bytes, tokenizer.encode(UNSEEN)))}\n")

    text = "naïve 🙂 日本"
    ids = tokenizer.encode(text)
    print(f"4. Nothing is unknown: {text!r} is {len(text)} characters, {len(text.encode())} bytes, {len(ids)} tokens")
    print(f"   {ids}, and back: {tokenizer.decode(ids)!r}")
    print(f"   🙂 alone arrives byte by byte, and is shown when it is whole: {streamed(tokenizer, '🙂')}\n")

    text = "one<|endoftext|>two"
    print(f"5. <|endoftext|> has the id {tokenizer.end_of_text}. In {text!r} it could be meant or be an attack, so you must say which:")
    print(f"   by default it is refused: {refusal(tokenizer, text)}")
    for choice in (dict(allowed_special="all"), dict(disallowed_special=())):
        print(f"   {choice}: {[tokenizer.decode([i]) for i in tokenizer.encode(text, **choice)]}")


if __name__ == "__main__":
    main()
