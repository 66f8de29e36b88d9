"""RLHF in small: people's choices become a reward model, and PPO makes a language model earn its rewards. Half a minute.

The model writes about animals: "the cat is kind", "the cow is rude". Whoever judges it likes kind words. You will see

    1. a model that has read sentences of both kinds, and writes both
    2. a reward model, learned from pairs of sentences of which one was preferred
    3. PPO: the reward rises, and what it costs, the distance (KL) to the model of step 1
    4. best of n, which needs no training, and its KL
    5. what the model wrote before, and what it writes now

    python examples/09_reward_model_and_ppo.py [--steps 240]
"""
import argparse

import numpy as np

from tinyllm.align import (
    PPO,
    ActorCritic,
    PPOConfig,
    Preferences,
    RewardModel,
    TokenPair,
    best_of_n,
    best_of_n_kl,
    centre,
    learned_reward,
    ppo_loss,
    reward_loss,
    reward_metrics,
    sample,
)
from tinyllm.align.logprobs import padded
from tinyllm.backend import random_stream
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.tokenizer import CharTokenizer
from tinyllm.train import TrainConfig, next_token_loss, train

ANIMALS = ["cat", "dog", "cow", "hen", "pig", "fox"]
LIKED, DISLIKED = ["kind", "calm", "brave"], ["rude", "loud", "lazy"]
MAX_TOKENS = 8  # " brave." and one more
tokenizer = CharTokenizer.train([f"the {animal} is {word}.\n" for animal in ANIMALS for word in LIKED + DISLIKED])
END = tokenizer.encode("\n")[0]
PROMPTS = [tokenizer.encode(f"the {animal} is") for animal in ANIMALS]


def new_model():
    config = TransformerConfig(vocab_size=tokenizer.vocab_size, layers=2, heads=2, width=32, context=24)
    return Transformer(config, np.random.default_rng(0))


def settings(steps, lr):
    return TrainConfig(lr=lr, weight_decay=0.0).planned(steps)


def read_sentences(model, steps=200):
    """Step 1: ordinary training on sentences of both kinds."""

    def batches(n):
        random = random_stream(0, "sentences", n)
        rows = [PROMPTS[random.integers(6)] + tokenizer.encode(f" {random.choice(LIKED + DISLIKED)}.\n") for _ in range(16)]
        return [padded(rows, [len(row) - 1 for row in rows])]

    train(model, batches, next_token_loss(settings(steps, 1e-2)), settings(steps, 1e-2))


def pairs(random, count):
    """A liked and a disliked word for the same animal, in token ids."""
    answer = lambda words: tokenizer.encode(f" {random.choice(words)}.\n")  # noqa: E731
    return [TokenPair(PROMPTS[random.integers(6)], answer(LIKED), answer(DISLIKED)) for _ in range(count)]


def learn_rewards(reference, steps=60):
    """Step 2: a copy of the model, with one number at its end instead of a next token."""
    transformer = new_model()
    transformer.load_state_dict(reference.state_dict())
    model = RewardModel(transformer, np.random.default_rng(1))
    seen, unseen = Preferences(pairs(random_stream(0, "pairs"), 64), 16, seed=0), Preferences(pairs(random_stream(1, "pairs"), 64), 16, seed=0)
    train(model, lambda n: [seen.batch(n)], reward_loss, settings(steps, 3e-3))
    centre(model, seen.in_order(16))
    return model, reward_metrics(model, unseen.in_order(16))


def written(model, seed):
    """One sentence for each animal."""
    samples = sample(model, PROMPTS, range(6), MAX_TOKENS, end=END, seed=seed)
    return [tokenizer.decode(prompt + answer).strip() for prompt, answer in zip(samples.prompts, samples.answers, strict=True)]


def main(steps=240):
    reference, policy = new_model(), new_model()
    read_sentences(reference)
    policy.load_state_dict(reference.state_dict())
    print("1. The model after reading sentences of both kinds:\n   " + "  ".join(before := written(reference, seed=0)))

    reward_model, found = learn_rewards(reference)
    reward = learned_reward(reward_model)
    print(f"2. The reward model ranks {found['accuracy']:.0%} of 64 new pairs right, by {found['margins']:.1f} in the mean")

    print(f"3. PPO, {steps} updates, four from each 96 answers\n   rollout  reward  length  KL (k1)  KL (k3)")
    config = PPOConfig(prompts=6, answers=16, max_tokens=MAX_TOKENS, kl=1.0)
    records = []
    actor = ActorCritic(policy, np.random.default_rng(0))
    rollouts = PPO(actor, reference, PROMPTS, reward, config, end=END, seed=0, observe=records.append)
    train(actor, rollouts.batches, ppo_loss(config), settings(steps, 2e-3))
    for record in records[:: max(1, len(records) // 6)] + records[-1:]:
        print("   {iteration:7}  {reward:6.2f}  {length:6.2f}  {kl_k1:7.3f}  {kl_k3:7.3f}".format(**record))

    print("4. Best of n, without training\n         n  reward  KL at most")
    for n in (1, 2, 4, 16):
        best = best_of_n(reference, PROMPTS * 4, n, reward, MAX_TOKENS, end=END)
        print(f"   {n:7}  {np.mean([b.reward for b in best]):6.2f}  {best_of_n_kl(n):10.3f}")
    print("5. Before: " + "  ".join(before) + "\n   After:  " + "  ".join(written(policy, seed=0)))
    return records, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240, help="updates of the policy")
    main(**vars(parser.parse_args()))
