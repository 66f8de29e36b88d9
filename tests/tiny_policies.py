"""Policies so small that every answer can be listed: their distributions are known exactly, and so is what training should make of them."""
import itertools

import numpy as np

from tinyllm.align import GRPO, PPO, ActorCritic, Preferences, TokenPair, grpo_loss, ppo_loss, preference_loss, sequence_log_probabilities
from tinyllm.align.logprobs import padded
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.tensor import no_grad
from tinyllm.train import TrainConfig, train


class TinyWorld:
    """All answers of T tokens of V to one prompt, the token 0, with a random reward for each; T = 1 is a bandit."""

    def __init__(self, V: int, T: int, beta: float = 1.0):
        self.V, self.T, self.beta = V, T, beta
        self.answers = [list(answer) for answer in itertools.product(range(V), repeat=T)]
        self.rewards = np.random.default_rng(3).standard_normal(V**T)
        self.reference, self.policy = self.new_model(), self.new_model()
        self.rho = self.distribution(self.reference)

    def new_model(self) -> Transformer:
        """The same each time. Weights are larger than at the start of training: far from uniform. (Positions that count: RoPE sees 0, 0 as 0.)"""
        config = TransformerConfig(arch="gpt2", vocab_size=self.V, layers=1, heads=2, width=32, context=self.T + 1, tie=False)
        model = Transformer(config, np.random.default_rng(0))
        for _, p in model.named_parameters():
            if p.ndim == 2:
                p.data *= 5
        return model

    def distribution(self, model) -> np.ndarray:
        """p of each answer, exactly."""
        batch = padded([[0, *answer] for answer in self.answers], [self.T] * len(self.answers))
        with no_grad():
            return np.exp(sequence_log_probabilities(model, batch).data.astype(float))

    @property
    def best(self) -> np.ndarray:
        """π* = ρ·e^(r/β)/Z."""
        p = self.rho * np.exp(self.rewards / self.beta)
        return p / p.sum()

    def reward(self, samples) -> np.ndarray:
        return self.rewards[[np.ravel_multi_index(answer, (self.V,) * self.T) for answer in samples.answers]]

    def preferences(self) -> Preferences:
        """Every pair both ways round, each as often as Bradley and Terry's people would prefer it that way."""
        found = [(i, j) for i in range(len(self.answers)) for j in range(len(self.answers)) if i != j]
        chances = [1 / (1 + np.exp(self.rewards[j] - self.rewards[i])) for i, j in found]
        pairs = [TokenPair([0], self.answers[i], self.answers[j]) for i, j in found]
        return Preferences(pairs, len(pairs), 0, weights=np.array(chances)).with_reference(self.reference, len(pairs))

    def train(self, method, config, steps: int, lr: float = 1e-2, observe=lambda record: None) -> np.ndarray:
        """Train the policy. Returns the distribution that it ends with."""
        settings = TrainConfig(lr=lr, min_lr=lr / 50, weight_decay=0.0, beta2=0.99, warmup=5).planned(steps)
        learner, options = self.policy, dict(end=None, seed=1, observe=observe)
        if method == "preferences":
            preferences = self.preferences()
            train(learner, lambda n: [preferences.batch(n)], preference_loss(config), settings)
        elif method is PPO:
            learner = ActorCritic(self.policy, np.random.default_rng(0))
            train(learner, PPO(learner, self.reference, [[0]], self.reward, config, **options).batches, ppo_loss(config), settings)
        else:
            train(learner, GRPO(learner, self.reference, [[0]], self.reward, config, **options).batches, grpo_loss(config), settings)
        return self.distribution(self.policy)


def total_variation(p, q) -> float:
    """Half of Σ|p - q|: by how much the two can at most disagree about the chance of anything."""
    return float(np.abs(p - q).sum() / 2)
