"""Teach a model that continues texts to answer questions.

Pretraining puts knowledge into the weights; instruction tuning shows how it is asked for. A tiny model reads sentences about countries and
is then tuned on questions about most of them. It answers about the others, too: it knew already, and has only learned to be asked.
You will see

    1. a conversation as tokens, and which of them are learned
    2. a language model of facts, before it has seen a question
    3. the model with rows for the new tokens, tuned on the assistant's tokens alone
    4. its answers about countries that no question of the tuning asked for
    5. the same with LoRA: how little is learned, and that merging it changes nothing

    python examples/08_instruction_tuning.py [--steps 1500] [--tuning 400]
"""
import argparse
import copy

import numpy as np

from tinyllm.backend import random_stream
from tinyllm.data import IGNORE, Conversation, RandomWindows
from tinyllm.finetune import InstructionBatches, encode_conversations
from tinyllm.generate import SamplingConfig, replies
from tinyllm.nn import LoRA, LoRAConfig, Transformer, TransformerConfig, grow_vocabulary, unfreeze
from tinyllm.tensor import no_grad
from tinyllm.tokenizer import add_special_tokens, train_bpe
from tinyllm.train import TrainConfig, next_token_loss, train

FACTS = """Peru Lima Spanish, France Paris French, Japan Tokyo Japanese, Egypt Cairo Arabic, Italy Rome Italian, Norway Oslo Norwegian,
Cuba Havana Spanish, Iraq Baghdad Arabic, Poland Warsaw Polish, Greece Athens Greek, Chile Santiago Spanish, Austria Vienna German,
Senegal Dakar French, Jordan Amman Arabic, Germany Berlin German, Spain Madrid Spanish, Hungary Budapest Hungarian, Finland Helsinki Finnish,
Syria Damascus Arabic, Denmark Copenhagen Danish, Turkey Ankara Turkish, Russia Moscow Russian, Portugal Lisbon Portuguese, China Beijing Chinese"""
COUNTRIES = [tuple(fact.split()) for fact in FACTS.replace("\n", " ").split(", ")]
UNASKED = COUNTRIES[::6]  # no question of the tuning is about these
SENTENCES = ("The capital of {0} is {1}.", "The language of {0} is {2}.", "{1} is a city in {0}.", "People in {0} speak {2}.")
QUESTIONS = {"What is the capital of {0}?": SENTENCES[0], "What is the language of {0}?": SENTENCES[1]}


def conversations(countries):
    """A question and its answer for each kind and country."""
    for question, answer in QUESTIONS.items():
        for fact in countries:
            yield Conversation([{"role": "user", "content": question.format(*fact)},
                                {"role": "assistant", "content": answer.format(*fact)}], fact[0])  # fmt: skip


def quiet_train(model, batches, steps, lr):
    """The one training loop, with the loss of pretraining. Returns the loss of every step."""
    losses, settings = [], TrainConfig(lr=lr, weight_decay=0.01, threads=1).planned(steps)
    observers = [lambda record: losses.append(record["loss"])]
    train(model, lambda n: [batches.batch(n)], next_token_loss(settings), settings, observers=observers)
    return losses


def pretrain(steps):
    """A tokenizer and a model of short texts, each all sentences about one country, in random order. Returns the losses, too."""
    rng = np.random.default_rng(0)
    facts = [COUNTRIES[i] for _ in range(50) for i in rng.permutation(len(COUNTRIES))]
    texts = [" ".join(rng.permutation(SENTENCES)).format(*fact) for fact in facts]
    tokenizer = train_bpe([*texts, *QUESTIONS], 700, or_fewer=True)
    tokens = np.concatenate([[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts])
    model = Transformer(TransformerConfig(vocab_size=tokenizer.vocab_size, layers=2, heads=4, width=64, context=48), random_stream(0, "weights"))
    return tokenizer, model, quiet_train(model, RandomWindows(tokens, 48, 8, seed=0), steps, lr=4e-3)


def show(tokenizer, example):
    """The inputs of a conversation, and below each the target, where it counts."""
    shown = [[tokenizer.decode([i]).replace(" ", "·") if i != IGNORE else "-" for i in row.tolist()] for row in (example.ids, example.targets)]
    widths = [max(len(a), len(b)) for a, b in zip(*shown, strict=True)]
    return [" ".join(f"{token:<{w}}" for token, w in zip(row, widths, strict=True)).rstrip() for row in shown]


def right(model, tokenizer, countries):
    """The questions about these countries with the model's answers and whether they are right."""
    asked = list(conversations(countries))
    answers = replies(model, tokenizer, [c.messages[:1] for c in asked], SamplingConfig(max_tokens=24, temperature=0))
    return [(c.messages[0]["content"], a.text, a.text == c.messages[1]["content"]) for c, a in zip(asked, answers, strict=True)]


def share(answers):
    return f"{sum(ok for *_, ok in answers)} of {len(answers)}"


def with_lora(model, batches, tuning):
    """Tune an adapter and the rows of the tokens. Returns it, the number of learned weights, and the largest change by merging in any score."""
    adapter = LoRA(model, LoRAConfig(rank=8, alpha=64.0), random_stream(0, "adapter"))
    unfreeze(model, "embedding")  # <|user|> and the others are new: their rows must be learned
    quiet_train(model, batches, tuning, lr=3e-4)
    ids = batches.batch(0).ids
    with no_grad():
        before = model(ids).numpy()
        adapter.merge()
        difference = np.abs(model(ids).numpy() - before).max()
    return adapter, sum(p.size for _, p in adapter.named_parameters()), difference


def run(steps=1500, tuning=400):
    """The whole way. Returns the answers about unasked countries: before tuning, after it, and after tuning an adapter."""
    plain, model, losses = pretrain(steps)
    tokenizer = add_special_tokens(plain)
    examples = encode_conversations(tokenizer, conversations([c for c in COUNTRIES if c not in UNASKED]), model.config.context)
    batches = InstructionBatches(examples, batch=12, seed=0)
    print("1. " + "\n   ".join(show(tokenizer, examples[0])))
    print(f"\n2. {steps} steps on facts about {len(COUNTRIES)} countries: from {losses[0]:.2f} to {losses[-1]:.2f} nats a token")

    grow_vocabulary(model, tokenizer.vocab_size, random_stream(0, "rows"))
    before, untuned = right(model, tokenizer, UNASKED), copy.deepcopy(model)
    print(f"   It has {tokenizer.vocab_size - plain.vocab_size} more tokens now, which it does not understand: {before[0][0]} → {before[0][1]!r}\n")
    losses = quiet_train(model, batches, tuning, lr=3e-4)
    after = right(model, tokenizer, UNASKED)
    print(f"3. {tuning} steps on {len(examples)} conversations: from {losses[0]:.2f} to {losses[-1]:.3f} nats a token of the assistant's\n")
    print("4. " + "\n   ".join(f"{question:<36}{answer}{'' if ok else '   (wrong)'}" for question, answer, ok in after))
    print(f"   right: {share(before)} before tuning, {share(after)} after it")

    adapter, learned, difference = with_lora(untuned, batches, tuning)
    adapted = right(untuned, tokenizer, UNASKED)
    total = sum(p.size for p in dict(model.named_parameters()).values())
    print(f"\n5. LoRA learns {learned:,} numbers instead of {total:,}, besides the tokens' rows, and answers {share(adapted)} right.")
    print(f"   Merged into the weights it gives the same scores within {difference:.0e}.")
    return before, after, adapted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="updates of the language model")
    parser.add_argument("--tuning", type=int, default=400, help="updates of the tuning")
    run(**vars(parser.parse_args()))
