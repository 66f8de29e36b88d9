"""ln p of texts, by the definition and fast; perplexity by windows; and what models of known probabilities must give."""
import math

import numpy as np
import pytest
from chain_model import ChainModel, random_table

from tinyllm.evaluate import Passage, Request, Task, evaluate, log_likelihoods, passages, token_log_probabilities
from tinyllm.evaluate.likelihood import log_likelihood_naive
from tinyllm.evaluate.perplexity import shard_texts, windows
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.tokenizer import BPETokenizer, CharTokenizer

TINY = dict(vocab_size=17, layers=2, heads=2, width=8, context=12)


def tiny(dtype=np.float64, **changes):
    model = Transformer(TransformerConfig(**(TINY | changes)), np.random.default_rng(1), dtype)
    for _, p in model.named_parameters():
        p.data *= 20  # far from uniform
    return model


def some_requests(count=40, longest=9, seed=2):
    rng = np.random.default_rng(seed)
    return [Request(rng.integers(17, size=rng.integers(1, longest)).tolist(), rng.integers(17, size=rng.integers(1, longest)).tolist())
            for _ in range(count)]  # fmt: skip


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens_at_once", [1, 30, 4096])
def test_fast_equals_the_definition(arch, tokens_at_once):
    """Ragged, some longer than the context, in any batches."""
    model, requests = tiny(arch=arch), some_requests()
    for request, found in zip(requests, log_likelihoods(model, requests, tokens_at_once=tokens_at_once), strict=True):
        wanted = log_likelihood_naive(model, request)
        np.testing.assert_allclose(found.log_probabilities, wanted.log_probabilities, atol=1e-9)
        assert (found.greedy, found.truncated) == (wanted.greedy, wanted.truncated)
    assert any(len(r.context) + len(r.continuation) > 13 for r in requests)


def test_greedy_is_what_the_model_would_have_said():
    model = tiny()
    said = []
    for _ in range(4):
        said.append(int(model(np.array([[3, 5, *said]])).data[0, -1].argmax()))
    right, wrong = log_likelihoods(model, [Request([3, 5], said), Request([3, 5], [*said[:-1], (said[-1] + 1) % 17])])
    assert right.greedy and not wrong.greedy


def test_shared_beginnings_are_read_once():
    """Four choices of one token after one prompt are one row; so is a prompt that begins another."""
    model = ChainModel(random_table(6))
    answers = log_likelihoods(model, [*(Request([1, 2, 3], [c]) for c in range(4)), Request([1], [2]), Request([1, 2, 3], [4, 5])])
    assert (model.calls, model.tokens) == (1, 4)
    np.testing.assert_allclose([a.total for a in answers[:4]], np.log(model.table[3, :4]))
    assert answers[4].total == pytest.approx(math.log(model.table[1, 2]))
    assert answers[5].total == pytest.approx(model.log_p([3, 4, 5]))


def test_a_neighbour_in_the_alphabet_that_is_no_beginning():
    model = ChainModel(random_table(300))
    requests = [Request([1, 256], [2]), Request([1, 1], [0, 3]), Request([1], [1]), Request([256, 1], [5]), Request([1, 256, 2, 7], [9])]
    for request, found in zip(requests, log_likelihoods(model, requests), strict=True):
        assert found.total == pytest.approx(model.log_p([request.context[-1], *request.continuation]))


def test_order_and_progress():
    seen = []
    log_likelihoods(tiny(), some_requests(30), tokens_at_once=50, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (30, 30) and seen == sorted(seen) and len(seen) > 3
    assert log_likelihoods(tiny(), []) == []


def test_too_long_a_context_loses_its_beginning_and_says_so():
    model = ChainModel(random_table(9), context=4)
    cut, whole = log_likelihoods(model, [Request([1, 2, 3, 4, 5], [6, 7]), Request([4, 5, 6], [7, 8])])
    assert (cut.truncated, whole.truncated) == (True, False)
    assert cut.total == pytest.approx(model.log_p([5, 6, 7]))


@pytest.mark.parametrize(("request_", "message"), [
    (Request([], [1]), "no end-of-text token to begin from"),
    (Request([1], []), "has no tokens"),
    (Request([1], [2] * 13), "13 tokens does not fit the model's context of 12"),
])  # fmt: skip
def test_what_cannot_be_asked(request_, message):
    with pytest.raises(ValueError, match=message):
        log_likelihoods(tiny(), [request_])


def test_damaged_weights_are_no_figures():
    model = tiny()
    model.embedding.weight.data[:] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        log_likelihoods(model, [Request([1], [2])])


@pytest.mark.parametrize("size", [1, 3, 10, 50])
@pytest.mark.parametrize("length", [0, 1, 2, 10, 11, 12, 37])
def test_windows_predict_every_token_once(size, length):
    for stride in {1, (size + 1) // 2, size}:
        place = 1
        for request in windows(range(length), size, stride):
            assert list(request.context) + list(request.continuation) == list(range(request.context[0], place + len(request.continuation)))
            assert request.continuation[0] == place and len(request.context) + len(request.continuation) <= size + 1
            assert len(request.context) >= min(place, size - stride + 1)  # the first one is not predicted, but seen
            place += len(request.continuation)
        assert place == max(length, 1)


def test_strided_perplexity():
    """A stride of 1 is the definition: each token after as many as fit. A text that fits is read in one go, whatever the stride."""
    model, ids = tiny(), np.random.default_rng(4).integers(17, size=40).tolist()
    wanted = [log_likelihood_naive(model, Request(ids[max(0, t - 12) : t], ids[t : t + 1])).total for t in range(1, 40)]
    np.testing.assert_allclose(token_log_probabilities(model, ids, stride=1), wanted, atol=1e-9)
    short = log_likelihood_naive(model, Request(ids[:1], ids[1:13])).log_probabilities
    for stride in (1, 6, 12):
        np.testing.assert_allclose(token_log_probabilities(model, ids[:13], stride), short, atol=1e-9)
    for bad in (0, 13):
        with pytest.raises(ValueError, match="at least 1, and at most the model's context of 12"):
            token_log_probabilities(model, ids, bad)


def letters(text):
    return CharTokenizer(sorted(set(text)))


def test_bits_per_byte_of_a_known_model():
    """A uniform model: ln V nats for each token but the first, its chance exactly. Bytes are UTF-8's, without the first character's."""
    text = "naïve Ωmega"
    tokenizer = letters(text)
    model = ChainModel(np.full((tokenizer.vocab_size,) * 2, 1 / tokenizer.vocab_size))
    [result] = evaluate(model, tokenizer, [Task("t", (Passage(text), Passage("nav")))])
    found = result.figures()
    V, tokens, size = tokenizer.vocab_size, 10 + 2, len("aïve Ωmega".encode()) + 2
    assert found["nats_per_token"].value == pytest.approx(math.log(V)) == pytest.approx(found["nats_per_token"].chance)
    assert found["perplexity"].value == pytest.approx(V)
    assert found["bits_per_byte"].value == pytest.approx(tokens * math.log2(V) / size)
    assert result.records[0]["tokens"] == 10 and result.records[0]["bytes"] == len("aïve Ωmega".encode())


def test_a_text_begins_after_and_ends_with_the_end_of_text():
    tokenizer = BPETokenizer([], special_tokens=["<|endoftext|>"])
    model, end = ChainModel(random_table(tokenizer.vocab_size)), tokenizer.end_of_text
    [result] = evaluate(model, tokenizer, [Task("t", (Passage("né", log_probability=-3.0), Passage("<|endoftext|>", log_probability=-4.0)))])
    nats = [-model.log_p([end, *tokenizer.encode_ordinary(text), end]) for text in ("né", "<|endoftext|>")]
    np.testing.assert_allclose([r["nats"] for r in result.records], nats)
    assert [r["tokens"] for r in result.records] == [4, 14] and [r["bytes"] for r in result.records] == [3, 13]
    assert result.figures()["nats_per_token"].best == pytest.approx(7 / 18)


def test_a_passage_with_nothing_in_it():
    tokenizer = letters("ab")
    model = ChainModel(random_table(2))
    for text in ("", "a"):
        with pytest.raises(ValueError, match="t, passage 2: there is nothing in it to predict"):
            evaluate(model, tokenizer, [Task("t", (Passage("ab"), Passage(text)))])


def test_long_texts_are_cut_and_nothing_is_lost():
    texts = ["a" * 8192, "b" * 8193, "", "é" * 20000]
    found = passages(texts)
    assert [len(p.text) for p in found] == [8192, 4096, 4097, 6666, 6667, 6667]
    assert "".join(p.text for p in found) == "".join(texts)


def test_texts_of_a_shard():
    from types import SimpleNamespace

    tokenizer = BPETokenizer([], special_tokens=["<|endoftext|>"])
    ids = [i for text in ("one", "Ω", "") for i in (*tokenizer.encode_ordinary(text), tokenizer.end_of_text)]
    assert list(shard_texts(SimpleNamespace(tokens=np.array(ids)), tokenizer)) == ["one", "Ω"]
    assert list(shard_texts(SimpleNamespace(tokens=np.array([0, 1])), letters("ab"))) == ["ab"]


@pytest.mark.peers
def test_against_transformers():
    """The same weights in transformers' GPT-2: ln p of continuations, and of a whole text by its own loss."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from torch.nn.functional import log_softmax

    config = transformers.GPT2Config(vocab_size=17, n_positions=12, n_embd=8, n_layer=2, n_head=2, activation_function="gelu_new")
    theirs = transformers.GPT2LMHeadModel(config).eval().double()
    model = tiny(arch="gpt2")
    with torch.no_grad():
        for ours, other in zip(_gpt2_order(model), theirs.transformer.parameters(), strict=True):
            other.copy_(torch.tensor(ours))
    for request, found in zip(some_requests(10, 6), log_likelihoods(model, some_requests(10, 6)), strict=True):
        ids = [*request.context, *request.continuation]
        with torch.no_grad():
            log_p = log_softmax(theirs(torch.tensor([ids[:-1]])).logits[0], -1)
        wanted = [float(log_p[t - 1, ids[t]]) for t in range(len(request.context), len(ids))]
        np.testing.assert_allclose(found.log_probabilities, wanted, atol=1e-4)


def _gpt2_order(model):
    """Our weights in the order, and transposed as, transformers keeps them."""
    yield model.embedding.weight.data
    yield model.position_embedding.weight.data
    for block in model.blocks:
        attention = block.attention
        parts = (attention.query, attention.key, attention.value)
        yield from (block.attention_norm.weight.data, block.attention_norm.bias.data)
        yield np.concatenate([p.weight.data for p in parts]).T
        yield np.concatenate([p.bias.data for p in parts])
        yield from (attention.output.weight.data.T, attention.output.bias.data)
        yield from (block.mlp_norm.weight.data, block.mlp_norm.bias.data)
        yield from (block.mlp.up.weight.data.T, block.mlp.up.bias.data, block.mlp.down.weight.data.T, block.mlp.down.bias.data)
    yield from (model.norm.weight.data, model.norm.bias.data)
