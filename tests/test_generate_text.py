"""Text in, text out: whole characters, stop strings across every border, reasons."""
import itertools

import numpy as np
import pytest
from generate_fakes import Bigram, Script, byte_tokenizer

from tinyllm.generate import SamplingConfig, complete, stream
from tinyllm.generate.text import StopFilter
from tinyllm.tokenizer import CharTokenizer

GREEDY = dict(temperature=0)


def script(tokenizer, text, end=False):
    ids = tokenizer.encode_ordinary(text)
    return Script(ids + [tokenizer.end_of_text] * end, tokenizer.vocab_size), len(ids) + end


def pieces_of(text, **options):
    tokenizer = byte_tokenizer()
    model, length = script(tokenizer, text)
    return list(stream(model, tokenizer, ["x"], SamplingConfig(**GREEDY, **dict(max_tokens=length) | options)))


def test_emoji_are_shown_whole():
    text = "a👩‍👩‍👧é€ ok"
    pieces = pieces_of(text)
    assert len(pieces) == len(text.encode()) and [piece.text for piece in pieces if piece.text] == list(text)
    assert pieces[-1].completion.text == text and not any(piece.completion for piece in pieces[:-1])


def test_a_character_that_is_cut_off_by_max_tokens_is_marked():
    assert [piece.text for piece in pieces_of("a€", max_tokens=3)] == ["a", "", "\ufffd"]


@pytest.mark.parametrize("stop, shown", [
    (("END",), "say EN no "),
    (("end",), "say EN no END more"),
    (("\n", "no"), "say EN "),
    (("END more",), "say EN no "),
    (("y EN ", "EN"), "say "),           # both begin before the other ends: the first that is complete counts
    (("o E", "no E"), "say EN "),        # complete together: the longest
    (("say",), ""),
    (("more!",), "say EN no END more"),  # held back, then shown
])
@pytest.mark.parametrize("merged", [(), ("EN", "no", " E", "D ", "ay")], ids=["bytes", "merged"])
def test_stop_strings_whatever_the_tokens(stop, shown, merged):
    tokenizer = byte_tokenizer(*merged)
    model, length = script(tokenizer, "say EN no END more")
    pieces = list(stream(model, tokenizer, ["x"], SamplingConfig(**GREEDY, stop=stop, max_tokens=length)))
    done = pieces[-1].completion
    assert "".join(piece.text for piece in pieces) == done.text == shown
    assert done.reason == ("length" if shown.endswith("more") else "stop") and len(done.ids) == len(pieces)
    for piece, _ in zip(itertools.accumulate(piece.text for piece in pieces), pieces, strict=True):
        assert shown.startswith(piece)  # nothing that was shown is taken back


def test_stop_string_inside_and_across_characters():
    tokenizer = byte_tokenizer()
    model, length = script(tokenizer, "né👍👎x")
    assert complete(model, tokenizer, "x", SamplingConfig(**GREEDY, stop=("👎",), max_tokens=length)).text == "né👍"
    assert complete(model, tokenizer, "x", SamplingConfig(**GREEDY, stop=("é👍",), max_tokens=length)).text == "n"


@pytest.mark.parametrize("seed", range(30))
def test_stop_filter_does_not_depend_on_the_pieces(seed):
    """Random texts of two letters, random stop strings, random cuts: the same as one letter at a time, and as the definition."""
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(["a", "b"], 30))
    stop = ["".join(rng.choice(["a", "b"], rng.integers(3, 9))) for _ in range(3)]
    ends = [end for end in range(31) if any(text[:end].endswith(s) for s in stop)]
    expected = text if not ends else text[: ends[0] - max(len(s) for s in stop if text[: ends[0]].endswith(s))]
    for _ in range(20):
        cuts = [0, *sorted(rng.integers(0, 31, rng.integers(0, 12))), 30]
        filtered, shown = StopFilter(stop), ""
        for a, b in itertools.pairwise(cuts):
            shown += filtered.push(text[a:b])
            assert expected.startswith(shown)
        assert shown + filtered.flush() == expected and filtered.stopped == bool(ends)


def test_end_of_text_ends_it_and_is_not_shown():
    tokenizer = byte_tokenizer()
    model, length = script(tokenizer, "ok EN", end=True)
    done = complete(model, tokenizer, "x", SamplingConfig(**GREEDY, stop=("END",)))
    assert (done.text, done.reason, len(done.ids)) == ("ok EN", "end_of_text", length) and done.ids[-1] == tokenizer.end_of_text
    assert len(done.log_probabilities) == length and -1e-5 < sum(done.log_probabilities) < 0


def test_rows_end_each_for_its_own_reason_and_equal_themselves_alone():
    tokenizer = byte_tokenizer()
    model, _ = script(tokenizer, "ab. cdef", end=True)
    prompts = ["x", "xxxx", "xx"]  # a script goes by position: longer prompts start later in it
    config = SamplingConfig(**GREEDY, stop=(".",), max_tokens=4)
    done = complete(model, tokenizer, prompts, config)
    assert [(c.prompt, c.text, c.reason) for c in done] == [("x", "ab", "stop"), ("xxxx", " cde", "length"), ("xx", "b", "stop")]
    assert done == [complete(model, tokenizer, prompt, config) for prompt in prompts]
    assert model.calls[:4] == [(3, 4), (3, 1), (2, 1), (1, 1)]  # no work for rows that a stop string has ended


def test_beams_and_stop():
    tokenizer = byte_tokenizer()
    model, length = script(tokenizer, "one. two", end=True)
    config = SamplingConfig(max_tokens=30, beams=3)
    assert complete(model, tokenizer, ["x", "x"], config)[1].text == "one. two"
    done = complete(model, tokenizer, "x", SamplingConfig(max_tokens=30, beams=3, stop=(". ",)))
    assert (done.text, done.reason, len(done.ids)) == ("one", "stop", 5)


def test_prompts():
    tokenizer = byte_tokenizer()
    model = Bigram(np.random.default_rng(0).normal(size=(tokenizer.vocab_size,) * 2))
    config = SamplingConfig(max_tokens=2)
    assert complete(model, tokenizer, "", config).prompt == ""
    assert complete(model, tokenizer, "<|endoftext|>", config).ids == complete(model, tokenizer, ">", config).ids  # read as text
    assert complete(model, tokenizer, [], config) == []
    characters = CharTokenizer.train(["abc"])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        complete(Bigram(np.eye(3)), characters, "", config)
    with pytest.raises(ValueError, match="character 'z'"):
        complete(Bigram(np.eye(3)), characters, "z", config)


def test_streaming_is_live():
    """The first piece is there after one step of the model."""
    tokenizer = byte_tokenizer()
    model, length = script(tokenizer, "hello")
    next(stream(model, tokenizer, ["x"], SamplingConfig(**GREEDY, max_tokens=length)))
    assert len(model.calls) == 1
