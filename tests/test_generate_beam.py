"""Beam search against trying everything, and against greedy decoding."""
import itertools

import numpy as np
import pytest
from generate_fakes import Bigram

from tinyllm.generate import SamplingConfig, beam_search, generate_naive
from tinyllm.generate.beam import score
from tinyllm.generate.samplers import log_probabilities
from tinyllm.nn.config import TransformerConfig
from tinyllm.nn.transformer import Transformer

V, T, END = 4, 4, 2


def tiny(seed, **options):
    options = dict(vocab_size=V, layers=1, heads=2, width=8, context=8, arch="llama") | options
    model = Transformer(TransformerConfig(**options), np.random.default_rng(seed), dtype=np.float64)
    for _, p in model.named_parameters():
        p.data *= 20 if p.data.ndim == 2 else 1
    return model


def everything(model, prompt, length_penalty, end):
    """(score, ids) of every text that ends with `end` or has T tokens, best first."""
    found = []
    for length in range(1, T + 1):
        for ids in itertools.product(range(V), repeat=length):
            if end not in ids[:-1] and (length == T or ids[-1] == end):
                log_p = log_probabilities(model(np.array([[*prompt, *ids]])).data[0])
                total = sum(log_p[len(prompt) - 1 + t, token] for t, token in enumerate(ids))
                found.append((total / ((5 + length) / 6) ** length_penalty, ids))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length_penalty", [0, 0.6, 2])
@pytest.mark.parametrize("end", [END, None])
def test_wide_enough_it_is_exhaustive(seed, length_penalty, end):
    model, prompt = tiny(seed), [1, 3]
    beams = beam_search(model, prompt, SamplingConfig(max_tokens=T, beams=V**T, length_penalty=length_penalty), end_of_text=end)
    expected = everything(model, prompt, length_penalty, end)
    assert [beam.ids for beam in beams] == [ids for _, ids in expected]
    np.testing.assert_allclose([beam.score for beam in beams], [total for total, _ in expected], rtol=1e-9)
    assert all(beam.ended == (beam.ids[-1] == end) for beam in beams)


@pytest.mark.parametrize("options", [{}, dict(arch="gpt2"), dict(window=3), dict(kv_heads=1)], ids=["llama", "gpt2", "window", "grouped"])
@pytest.mark.parametrize("seed", range(3))
def test_one_beam_is_greedy_also_past_the_context(seed, options):
    model = tiny(seed, **options)
    [beam] = beam_search(model, [1, 0, 3], SamplingConfig(max_tokens=20), end_of_text=END)
    assert list(beam.ids) == generate_naive(model, [1, 0, 3], SamplingConfig(max_tokens=20, temperature=0), end_of_text=END)
    assert beam.score == pytest.approx(score(sum(beam.log_probabilities), len(beam.ids), 0.6))


@pytest.mark.parametrize("seed", range(3))
def test_log_probabilities_belong_to_the_text_after_many_reorders(seed):
    model = tiny(seed, context=16)
    beams = beam_search(model, [1, 0], SamplingConfig(max_tokens=12, beams=5))
    assert len(beams) == 5 and [b.score for b in beams] == sorted((b.score for b in beams), reverse=True)
    for beam in beams:
        log_p = log_probabilities(model(np.array([[1, 0, *beam.ids]])).data[0])
        np.testing.assert_allclose(beam.log_probabilities, [log_p[1 + t, i] for t, i in enumerate(beam.ids)], rtol=1e-9)


def test_looks_further_than_greedy():
    """0 leads to the likeliest first token, but to an even split after it."""
    p = np.array([[0.5, 0.5, 1e-9], [1e-9, 1e-9, 1.0], [0.6, 0.4, 1e-9]])
    config = dict(max_tokens=2, length_penalty=0)
    [greedy] = beam_search(Bigram(np.log(p)), [2], SamplingConfig(**config))
    best = beam_search(Bigram(np.log(p)), [2], SamplingConfig(**config, beams=2))[0]
    assert greedy.ids == (0, 0) and best.ids == (1, 2) and best.score > greedy.score


def test_length_penalty_prefers_longer_texts():
    p = np.array([[0.55, 0.45], [0.5, 0.5]])  # 1 ends the text
    lengths = [len(beam_search(Bigram(np.log(p)), [0], SamplingConfig(max_tokens=6, beams=4, length_penalty=a), end_of_text=1)[0].ids)
               for a in (0, 5)]
    assert lengths == [1, 6]


def test_wu_formula():
    assert score(-6.0, 1, 0.7) == -6.0 and score(-6.0, 7, 1.0) == -3.0 and score(-6.0, 7, 0) == -6.0
