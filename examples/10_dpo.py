"""Direct preference optimisation: pairs of answers teach a model what is preferred, without a reward model. A quarter of a minute.

The model answers greetings politely or curtly, as it has read both; people prefer it polite. You will see

    1. the model before: how likely it takes each answer to be
    2. DPO's loss begin at ln 2, and its margins grow, for pairs that it has never seen too
    3. the best policy for a reward in closed form, and DPO's implicit reward beside it
    4. the relatives, IPO, KTO, ORPO and SimPO, on the same pairs
    5. what the model answers before and after

    python examples/10_dpo.py [--steps 60]
"""
import argparse
import math

import numpy as np

from tinyllm.align import PreferenceConfig, Preferences, TokenPair, preference_loss, preference_metrics, sample
from tinyllm.align.logprobs import padded
from tinyllm.backend import random_stream
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.tokenizer import CharTokenizer
from tinyllm.train import TrainConfig, next_token_loss, train

NAMES = ["Ada", "Bo", "Cem", "Dora", "Eve", "Finn", "Gus", "Hana"]
UNSEEN = ["Ivo", "Nora"]  # their letters occur in the sentences that are read, their pairs are not trained on
POLITE, CURT = "Good day, {}!\n", "What, {}?\n"
tokenizer = CharTokenizer.train(["Hi, I'm .", *NAMES, *UNSEEN, POLITE, CURT])
END = tokenizer.encode("\n")[0]


def prompt(name):
    return tokenizer.encode(f"Hi, I'm {name}.")


def pair(name):
    return TokenPair(prompt(name), tokenizer.encode(POLITE.format(name)), tokenizer.encode(CURT.format(name)))


def new_model(state=None):
    config = TransformerConfig(vocab_size=tokenizer.vocab_size, layers=2, heads=2, width=32, context=40)
    model = Transformer(config, np.random.default_rng(0))
    if state is not None:
        model.load_state_dict(state)
    return model


def settings(steps, lr):
    return TrainConfig(lr=lr, weight_decay=0.0).planned(steps)


def read_answers(model, steps=300):
    """Ordinary training on both kinds of answers, one as often as the other."""

    def batches(n):
        random = random_stream(0, "answers", n)
        chosen = [pair(random.choice(NAMES + UNSEEN)) for _ in range(16)]
        rows = [[*p.prompt, *(p.chosen if random.integers(2) else p.rejected)] for p in chosen]
        return [padded(rows, [len(row) - 1 for row in rows])]

    train(model, batches, next_token_loss(settings(steps, 1e-2)), settings(steps, 1e-2))


def learn(reference, config, steps):
    """A copy of the reference after `steps` updates; the loss of each; what it makes of pairs with unseen names before and after."""
    model, losses = new_model(reference.state_dict()), []
    seen = Preferences([pair(name) for name in NAMES], 8, seed=0, mismatched=config.loss == "kto").with_reference(reference)
    unseen = Preferences([pair(name) for name in UNSEEN], 2, seed=0).with_reference(reference)
    before = preference_metrics(model, unseen.in_order(2), config)
    observe = lambda record: losses.append(record["loss"])  # noqa: E731
    train(model, lambda n: [seen.batch(n)], preference_loss(config), settings(steps, 2e-4), observers=[observe])
    return model, losses, before, preference_metrics(model, unseen.in_order(2), config)


def answers(model):
    samples = sample(model, [prompt(name) for name in UNSEEN], [0, 0, 1, 1], 20, end=END, seed=1)
    return "  ".join(tokenizer.decode(answer).strip() for answer in samples.answers)


def main(steps=60):
    reference = new_model()
    read_answers(reference)
    config = PreferenceConfig(beta=0.5)
    model, losses, before, after = learn(reference, config, steps)
    p = {name: math.exp(before[f"logps_{name}"]) for name in ("chosen", "rejected")}
    print(f"1. Before: the polite answer has probability {p['chosen']:.2f}, the curt one {p['rejected']:.2f}")
    print(f"2. DPO, {steps} steps, β = {config.beta}: the loss begins at {losses[0]:.4f} (ln 2 = {math.log(2):.4f}) and ends at {losses[-1]:.4f}")
    print(f"   unseen pairs: margin {before['margins']:.2f} → {after['margins']:.2f}, preferred answer likelier in {after['accuracy']:.0%}")
    gap = after["logps_chosen"] - after["logps_rejected"] - before["logps_chosen"] + before["logps_rejected"]
    print("3. π* = π_ref·e^(r/β)/Z, so the reward that this policy is best for is β·ln(π/π_ref), but for a constant:")
    print(f"   by it a polite answer is worth {config.beta * gap:.2f} more than a curt one, the margin itself: {after['margins']:.2f}")
    print("4. The relatives           margin  accuracy  ln p(polite)  ln p(curt)")
    for loss, beta in (("dpo", 0.5), ("ipo", 0.2), ("kto", 0.5), ("orpo", 0.5), ("simpo", 2.0)):
        found = learn(reference, PreferenceConfig(loss=loss, beta=beta), steps)[3]
        print(f"   {loss:6} β = {beta}        {found['margins']:10.2f}  {found['accuracy']:8.0%}  {found['logps_chosen']:12.2f}  {found['logps_rejected']:10.2f}")
    print(f"5. Before: {answers(reference)}\n   After:  {answers(model)}")
    return losses, before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="updates of the weights")
    main(**vars(parser.parse_args()))
