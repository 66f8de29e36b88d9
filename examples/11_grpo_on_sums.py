"""Reinforcement learning with a reward that a program can check: a model that adds so-so gets better. About half a minute.

Answers are drawn, right ones get 1, wrong ones 0, and each is pushed by how much better it was than the others to the same sum (GRPO).
No right answer is ever shown. You will see

    1. a model that has read some sums, and gets some right
    2. one group of answers: rewards, advantages
    3. a loss that prints 0 while its gradient is not
    4. the share of right answers rise on the sums that were rewarded; beside it that on sums that were not, which so small a model, and so
       few sums, leave nearly where it was: it has learned these sums rather than to add

    python examples/11_grpo_on_sums.py [--steps 150]
"""
import argparse

import numpy as np

from tinyllm.align import GRPO, GRPOConfig, group_advantages, grpo_loss, sample
from tinyllm.align.logprobs import padded
from tinyllm.backend import random_stream
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.tokenizer import CharTokenizer
from tinyllm.train import TrainConfig, next_token_loss, train

tokenizer = CharTokenizer.train(["0123456789+=\n"])
END = tokenizer.encode("\n")[0]
SUMS = [(a, b) for a in range(10) for b in range(10)]
UNSEEN = [SUMS[i] for i in np.random.default_rng(0).permutation(100)[:20]]
SEEN = [pair for pair in SUMS if pair not in UNSEEN]


def prompt(a, b):
    return tokenizer.encode(f"{a}+{b}=")


def verifier(sums):
    """The reward: 1 for the right number and its end, 0 for all else."""

    def reward(samples):
        wanted = [f"{sum(sums[i])}\n" for i in samples.numbers]
        return np.array([float(tokenizer.decode(answer) == right) for answer, right in zip(samples.answers, wanted, strict=True)])

    return reward


def settings(steps, lr):
    return TrainConfig(lr=lr, weight_decay=0.01).planned(steps)


def read_sums(model, steps=400):
    """Ordinary training; now and then the sum that is read is wrong by one, as people are."""

    def batches(n):
        random, rows = random_stream(0, "sums", n), []
        for a, b in random.choice(SEEN, 32).tolist():
            rows.append([*prompt(a, b), *tokenizer.encode(f"{max(0, a + b + random.choice([0, 0, 1, -1]))}\n")])
        return [padded(rows, [len(row) - 4 for row in rows])]

    train(model, batches, next_token_loss(settings(steps, 5e-3)), settings(steps, 5e-3))


def right(model, sums, times=10):
    """The share of right answers, each sum asked several times."""
    samples = sample(model, [prompt(*pair) for pair in sums], np.repeat(np.arange(len(sums)), times).tolist(), 3, end=END, seed=99)
    return verifier(sums)(samples).mean()


def show_a_group(model):
    """Step 2: eight answers to one sum."""
    samples = sample(model, [prompt(7, 5)], [0] * 8, 3, end=END, seed=2)
    rewards = verifier([(7, 5)])(samples)
    print("   answers    " + "".join(f"{tokenizer.decode(answer).strip():>7}" for answer in samples.answers))
    print("   rewards    " + "".join(f"{r:7.0f}" for r in rewards))
    print("   advantages " + "".join(f"{a:+7.2f}" for a in group_advantages(rewards[None], "grpo")[0]))


def main(steps=150):
    config = TransformerConfig(vocab_size=tokenizer.vocab_size, arch="gpt2", layers=2, heads=4, width=64, context=8)
    model, reference = (Transformer(config, np.random.default_rng(0)) for _ in range(2))
    read_sums(model)
    reference.load_state_dict(model.state_dict())
    before = right(model, SEEN), right(model, UNSEEN)
    print(f"1. After reading sums, every other one wrong: {before[0]:.0%} of answers right, {before[1]:.0%} for sums never seen")
    print("2. One group, 7 + 5:")
    show_a_group(model)

    grpo = GRPOConfig(prompts=16, answers=8, max_tokens=3, kl=0.01)
    records = []
    rollouts = GRPO(model, reference, [prompt(*pair) for pair in SEEN], verifier(SEEN), grpo, end=END, seed=0, observe=records.append)
    losses = []
    train(model, rollouts.batches, grpo_loss(grpo), settings(steps, 3e-3), observers=[losses.append])
    first = losses[0]
    print(f"3. The first update: loss {first['loss']:+.6f}, norm of the gradient {first['grad_norm']:.3f}")
    print("4. GRPO\n      step  right  length  KL (k3)  entropy       loss  gradient")
    for n in sorted({*range(0, steps, max(1, steps // 6)), steps - 1}):
        line = "   {:7}  {reward:5.0%}  {length:6.2f}  {kl_k3:7.3f}  {entropy:7.2f}".format(n + 1, **records[n])
        print(line + "  {loss:+9.5f}  {grad_norm:8.3f}".format(**losses[n]))
    after = right(model, SEEN), right(model, UNSEEN)
    print(f"   sums that it was rewarded for: {before[0]:.0%} → {after[0]:.0%} right;  never seen: {before[1]:.0%} → {after[1]:.0%}")
    return before, after, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="updates of the weights")
    main(**vars(parser.parse_args()))
