"""An encoder learns a small world by filling in gaps, and by telling which sentence follows which. One to two minutes.

A language model reads from left to right. An encoder sees both sides of a gap, which is what one wants for sorting, searching and
tagging texts. What it reads here are descriptions: three sentences each about one animal, person, town or thing. You will see

    1. two sentences as a row: what is masked, and what is to be told
    2. masked tokens and next sentences learned together, step by step
    3. both on descriptions that it has not read, beside the best that anybody could do
    4. gaps filled, with and without a sentence that helps; and two sentences judged

    python examples/12_masked_language_model.py [--steps 5000] [--rows 120]
"""
import argparse
import itertools

import numpy as np

from tinyllm import ops
from tinyllm.backend import random_stream
from tinyllm.data import IGNORE, Document, MaskedBatches, SentencePairs, encode_sentences
from tinyllm.data.tinyworld import World, best_masked_in_pairs, best_next_sentence_accuracy
from tinyllm.nn import MaskedLanguageModel, TransformerConfig
from tinyllm.tensor import no_grad
from tinyllm.tokenizer import train_wordpiece
from tinyllm.train import TrainConfig, masked_metrics, mlm_nsp_loss, train

WORLD = World(seed=0)
CONTEXT, BATCH = 32, 32


def descriptions(count, seed):
    return [Document(item.text, "") for item in WORLD.documents("fact", count, seed=seed)]


def batches_of(tokenizer, documents, batch, seed):
    return MaskedBatches(SentencePairs(encode_sentences(tokenizer, documents), CONTEXT), tokenizer, batch, seed)


def show_row(tokenizer, batch):
    """The first row of a batch: as it is read, and what is asked for."""
    row = [tokenizer.decode([i]) for i in batch.ids[0] if i != tokenizer.pad]
    asked = [tokenizer.decode([i]) for i in batch.targets[0] if i != IGNORE]
    print(f"1. {' '.join(row)}")
    print(f"   to tell: {', '.join(asked)}; and whether the second sentence follows the first: {'no' if batch.labels[0] else 'yes'}\n")


def learn(tokenizer, documents, held_out, steps):
    """A small encoder, trained by the one loop, with a line about unseen descriptions now and then."""
    config = TransformerConfig(
        tokenizer.vocab_size, "llama",  # whose parts learn this several times faster than arch="bert", BERT's own
        layers=2, heads=4, width=64, context=CONTEXT, init_std=64**-0.5,  # 0.02 is for wide models
    )
    model = MaskedLanguageModel(config, random_stream(0, "weights"))
    batches, losses = batches_of(tokenizer, documents, BATCH, seed=0), []

    def watch(record):
        losses.append(record["loss"])
        if record["step"] % max(1, steps // 8) == 0:
            found = masked_metrics(model, held_out)
            recent = np.mean(losses[-50:])
            print(f"   step {record['step']:>5}{recent:>9.3f}{found['mlm_accuracy']:>16.1%}{found['nsp_accuracy']:>16.1%}", flush=True)

    print("2.              loss   masked tokens  next sentences")
    settings = TrainConfig(lr=4e-3, weight_decay=0.01, threads=1).planned(steps)
    train(model, lambda step: [batches.batch(step)], mlm_nsp_loss, settings, observers=[watch])
    return model, losses


def row_of(tokenizer, *sentences):
    """ids and segments of one row in which [MASK] is written out.     (1, T) ×2"""
    parts = [[*tokenizer.encode(s, allowed_special={"[MASK]"}), tokenizer.sep] for s in sentences]
    ids = [tokenizer.cls, *itertools.chain(*parts)]
    segments = [0, *(i for i, part in enumerate(parts) for _ in part)]
    return np.array([ids]), np.array([segments])


def fill(model, tokenizer, *sentences):
    """The three likeliest tokens at the first gap."""
    ids, segments = row_of(tokenizer, *sentences)
    with no_grad():
        p = ops.softmax(model(ids, segments=segments)[0]).data[0, (ids[0] == tokenizer.mask).argmax()]
    guesses = "  ".join(f"{tokenizer.decode([i])} {p[i]:.2f}" for i in (-p).argsort()[:3].tolist())
    print(f"   {' '.join(sentences):<66} {guesses}")


def judge(model, tokenizer, first, second):
    ids, segments = row_of(tokenizer, first, second)
    with no_grad():
        p = ops.softmax(model(ids, segments=segments)[1]).data[0, 0]
    print(f"   {f'{first} {second}':<66} follows: {p:.2f}")


def main(steps=5000, rows=120):
    documents = descriptions(2000, seed=1)
    read = {document.text for document in documents}
    unseen = [document for document in descriptions(1500, seed=2) if document.text not in read][:300]
    tokenizer = train_wordpiece((document.text for document in documents), 400, or_fewer=True)
    show_row(tokenizer, batches_of(tokenizer, documents, BATCH, seed=0).batch(0))
    held_out = list(batches_of(tokenizer, unseen, BATCH, seed=1).in_order())
    model, losses = learn(tokenizer, documents, held_out, steps)

    (few,) = batches_of(tokenizer, unseen[: rows // 2], rows, seed=2).in_order()  # two pairs of each: the best takes longer to find out
    masked = masked_metrics(model, [few])["mlm_accuracy"], best_masked_in_pairs(WORLD, tokenizer, few)
    follows = masked_metrics(model, held_out)["nsp_accuracy"], best_next_sentence_accuracy(WORLD)
    print("\n3. Unseen descriptions             model   best possible")
    print(f"   masked tokens told right  {masked[0]:>10.1%}{masked[1]:>16.1%}     {np.count_nonzero(few.targets != IGNORE)} tokens")
    print(f"   next sentences told right {follows[0]:>10.1%}{follows[1]:>16.1%}     {sum(map(len, held_out))} pairs\n\n4. Gaps")
    fact, other = WORLD.entities["animals", "fox"][:2]
    gap = fact.statement().replace("fox", "[MASK]")
    fill(model, tokenizer, gap.replace(fact.value, "[MASK]"))
    fill(model, tokenizer, gap.replace(fact.value, "[MASK]"), other.statement())
    fill(model, tokenizer, fact.statement().replace(fact.value, "[MASK]"))
    judge(model, tokenizer, fact.statement(), other.statement())
    judge(model, tokenizer, fact.statement(), WORLD.entities["animals", "owl"][1].statement())
    return losses, masked, follows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="updates of the weights")
    parser.add_argument("--rows", type=int, default=120, help="rows of which the best possible is worked out")
    main(**vars(parser.parse_args()))
