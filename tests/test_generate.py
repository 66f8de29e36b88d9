"""The decode loop: against its definition, alone and in a batch, with every kind of cache, and past the end of the context."""
import numpy as np
import pytest
from generate_fakes import Bigram, Script

from tinyllm.generate import SamplingConfig, beam_search, generate, generate_naive
from tinyllm.generate.samplers import log_probabilities, probabilities, temperature
from tinyllm.nn.config import TransformerConfig
from tinyllm.nn.transformer import Transformer
from tinyllm.tensor import _recording

V = 13
KINDS = {
    "gpt2": dict(arch="gpt2", context=16),
    "llama": dict(arch="llama", context=16),
    "grouped": dict(arch="llama", heads=4, kv_heads=2, qk_norm=True, context=16),
    "multi_query": dict(arch="gpt2", heads=4, kv_heads=1, positions="alibi", context=16),
    "sinusoidal": dict(arch="gpt2", positions="sinusoidal", norm_placement="post", tie=False, context=16),
    "tiled": dict(arch="llama", attention="tiled", context=16),
    "window": dict(arch="llama", window=5, context=16),
    "window_of_one": dict(arch="llama", window=1, context=16),
    "window_alibi": dict(arch="llama", positions="alibi", window=3, context=16),
    "window_learned": dict(arch="gpt2", window=5, context=16),  # the table of positions ends, so the text still rolls
    "odd_context": dict(arch="llama", context=7),
    "context_of_one": dict(arch="llama", context=1),
}
PROMPTS = [[1], [2, 3, 4, 5, 6, 7, 8], [3, 1], list(range(12)), [5] * 16, [*range(13), *range(13)]]


def transformer(kind, dtype=np.float64):
    options = dict(vocab_size=V, layers=2, heads=2, width=16) | KINDS[kind]
    model = Transformer(TransformerConfig(**options), np.random.default_rng(0), dtype=dtype)
    for _, p in model.named_parameters():
        p.data *= 8 if p.data.ndim == 2 else 1  # large weights: distributions far from uniform, which depend on every visible token
    return model


def rows_of(steps):
    """Each row's ids and log-probabilities."""
    steps = list(steps)
    ids, log_p = np.array([step.ids for step in steps]).T, np.array([step.log_probabilities for step in steps]).T
    return [(row[row >= 0].tolist(), p[row >= 0]) for row, p in zip(ids, log_p, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [
    SamplingConfig(max_tokens=25, temperature=0),
    SamplingConfig(max_tokens=25, temperature=1.3, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1, seed=3),
], ids=["greedy", "sampled"])
def test_batch_with_cache_equals_each_prompt_alone_without(kind, config):
    model = transformer(kind)
    last = len(PROMPTS) - 1
    end = generate_naive(model, PROMPTS[last], config, row=last)[3]  # so that the longest row is among the first to end
    together = rows_of(generate(model, PROMPTS, config, end_of_text=end))
    for row, prompt in enumerate(PROMPTS):
        assert together[row][0] == generate_naive(model, prompt, config, end_of_text=end, row=row)
        [(ids, log_p)] = rows_of(generate(model, [prompt], config, end_of_text=end, first_row=row))
        assert together[row][0] == ids
        np.testing.assert_allclose(together[row][1], log_p, rtol=1e-9, atol=1e-12)
    assert len(together[last][0]) <= 4 and (config.temperature == 0 or max(len(ids) for ids, _ in together) > 4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "window"])
def test_log_probabilities_are_the_models_own(kind):
    """Those of the full forward, whatever was done to the logits before drawing."""
    model, prompt = transformer(kind), [4, 2]
    config = SamplingConfig(max_tokens=14, temperature=2, top_k=5, presence_penalty=1)
    [(ids, log_p)] = rows_of(generate(model, [prompt], config))
    text = prompt + ids
    expected = log_probabilities(model(np.array([text])).data[0])
    np.testing.assert_allclose(log_p, [expected[t - 1, text[t]] for t in range(len(prompt), len(text))], rtol=1e-9)


def test_each_token_is_read_once_and_only_while_its_row_lives():
    table = np.full((5, 5), -30.0)
    table[[0, 1, 2, 3], [1, 2, 3, 4]] = table[4, 4] = 30.0
    model = Bigram(table)
    steps = list(generate(model, [[0], [0, 0, 2]], SamplingConfig(max_tokens=4, temperature=0), end_of_text=3))
    assert [step.ids.tolist() for step in steps] == [[1, 3], [2, -1], [3, -1]]
    assert [step.finished.tolist() for step in steps] == [[False, True], [False, True], [True, True]]
    assert [step.log_probabilities[1] == 0 for step in steps[1:]] == [True, True]
    assert model.calls == [(2, 3), (1, 1), (1, 1)]


def test_past_the_context_half_of_it_stays():
    """context 6: a text of 7 keeps its last 3, is read again, and has room for 3 more. Each row by its own length."""
    model = Bigram(np.random.default_rng(0).normal(size=(9, 9)), context=6)
    steps = list(generate(model, [[1, 2, 3], [1, 2, 3, 4, 5], list(range(8))], SamplingConfig(max_tokens=9, temperature=0)))
    assert np.array([step.rolled for step in steps]).T.astype(int).tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
    model.calls.clear()
    list(generate(model, [[1, 2, 3]], SamplingConfig(max_tokens=12, temperature=0)))
    assert model.calls == [(1, 3), (1, 1), (1, 1), (1, 1), (1, 3), (1, 1), (1, 1), (1, 1), (1, 3), (1, 1), (1, 1), (1, 1)]


def test_a_sliding_window_never_rolls():
    steps = list(generate(transformer("window"), [[1, 2], list(range(13)) * 4], SamplingConfig(max_tokens=60, temperature=0)))
    assert len(steps) == 60 and not any(step.rolled.any() for step in steps)


def test_seeds():
    model, prompts = transformer("llama"), [[1, 2]] * 3
    def sample(**options):
        return [ids for ids, _ in rows_of(generate(model, prompts, SamplingConfig(max_tokens=12, temperature=1.5, **options)))]
    first = sample(seed=1)
    assert first == sample(seed=1) and first != sample(seed=2)
    assert first[0] != first[1] != first[2]  # the same prompt twice gives two texts


def test_drawn_by_the_adjusted_distribution():
    """Total variation between 4,000 rows' first tokens and the exact distribution."""
    model = Bigram([[0.0, 1.0, 2.0, -1.0]] * 4)
    [step] = generate(model, [[0]] * 4000, SamplingConfig(max_tokens=1, temperature=0.7))
    exact = probabilities(temperature(np.array([[0.0, 1.0, 2.0, -1.0]]), 0.7))[0]
    assert np.abs(np.bincount(step.ids, minlength=4) / 4000 - exact).sum() / 2 < 0.02


def test_penalties_count_the_right_tokens():
    """Repetition looks at the prompt too, presence and frequency only at what was drawn."""
    model = Bigram([[2.0, 1.9, 1.0]] * 3)
    def greedy(prompt, **penalties):
        return rows_of(generate(model, [prompt], SamplingConfig(max_tokens=4, temperature=0, **penalties)))[0][0]
    assert greedy([0]) == [0, 0, 0, 0]
    assert greedy([0], repetition_penalty=1.5) == [1, 0, 0, 0]           # 2/1.5, 1.9/1.5 and 1
    assert greedy([0], presence_penalty=0.5) == [0, 1, 0, 0]             # once each, then as before
    assert greedy([0], frequency_penalty=0.3) == [0, 1, 0, 1]            # 2, 1.9, 1.7, 1.6


def test_an_empty_prompt_begins_a_document():
    model = Bigram(np.random.default_rng(0).normal(size=(5, 5)))
    config = SamplingConfig(max_tokens=3, seed=4)
    assert rows_of(generate(model, [[]], config, end_of_text=4))[0][0] == rows_of(generate(model, [[4]], config, end_of_text=4))[0][0]
    assert rows_of(generate(model, [[]], config, end_of_text=4))[0][0] == generate_naive(model, [], config, end_of_text=4)
    with pytest.raises(ValueError, match="prompt 2 is empty, and this tokenizer has no end-of-text token"):
        list(generate(model, [[1], []], config))


def test_no_prompts_no_steps():
    assert list(generate(Bigram(np.eye(3)), [], SamplingConfig())) == []


def test_gradients_are_off_inside_and_untouched_outside():
    model = transformer("llama", np.float32)
    for step in generate(model, [[1]], SamplingConfig(max_tokens=3)):
        assert _recording.get() and step.ids.shape == (1,)
    assert model(np.array([[1]])).requires_grad


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sampler", [dict(temperature=0), dict(), dict(top_k=3, top_p=0.5, min_p=0.1, typical=0.5), dict(presence_penalty=1)], ids=str)
def test_scores_that_are_not_numbers(value, sampler):
    """Found after the token is chosen, so whatever chooses has to bear them; 600 tokens are ranked in parts."""
    model = Bigram(np.full((600, 600), value))
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="not numbers"):
        list(generate(model, [[1]], SamplingConfig(max_tokens=2, **sampler)))
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="not numbers"):
        beam_search(model, [1], SamplingConfig(max_tokens=2, beams=3))


def test_script_model_in_a_batch_of_lengths():
    model = Script([7, 8, 9, 1], 10)
    assert [ids for ids, _ in rows_of(generate(model, [[0], [0, 0], [0, 0, 0]], SamplingConfig(max_tokens=3, temperature=0)))] == [
        [7, 8, 9], [8, 9, 1], [9, 1, 1]]
