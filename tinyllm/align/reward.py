"""A reward model: a language model that reads prompt and answer and gives one number, learned from preferences."""
from collections.abc import Iterable

import numpy as np

from tinyllm import ops
from tinyllm.align.logprobs import padded
from tinyllm.align.preferences import PreferenceBatch
from tinyllm.align.rollouts import Samples
from tinyllm.backend import array_module, to_numpy
from tinyllm.data import IGNORE, Batch
from tinyllm.nn import Transformer
from tinyllm.nn.layers import Linear
from tinyllm.nn.module import Module
from tinyllm.tensor import Tensor, no_grad


class RewardModel(Module):
    """r = w·h + b, h the last layer's vector at the answer's last token, which has seen all of prompt and answer.     (B, T) -> (B,)

    transformer : usually a copy of the tuned model.     rng : draws w. Of rewards only differences are learned: b is what centres them.
    """

    def __init__(self, transformer: Transformer, rng: np.random.Generator, dtype=np.float32):
        self.config, self.transformer = transformer.config, transformer
        self.head = Linear(transformer.config.width, 1, rng=rng, dtype=dtype)

    def forward(self, batch: Batch, rng: np.random.Generator | None = None) -> Tensor:
        """The reward of each row, padded as `padded` does it."""
        hidden = self.transformer.hidden(batch.ids, rng=rng)
        xp = array_module(hidden.data)
        return self.head(hidden[xp.arange(len(batch)), xp.asarray(last_token(batch))])[:, 0]


def last_token(batch: Batch) -> np.ndarray:
    """Where each row's answer ends: one after the last target that counts.     -> (B,) int"""
    T = batch.targets.shape[1]
    return T - np.argmax(batch.targets[:, ::-1] != IGNORE, axis=1)


def reward_loss(model: RewardModel, batch: PreferenceBatch, rng) -> Tensor:
    """Bradley and Terry's loss of pairs: loss_fn(model, batch, rng) for the training loop."""
    rewards = model(batch.answers, rng).reshape(len(batch), -1)
    return ops.bradley_terry(rewards[:, 0], rewards[:, 1], batch.weights)


def reward_metrics(model: RewardModel, batches: Iterable[PreferenceBatch]) -> dict[str, float]:
    """accuracy : share of pairs whose chosen answer gets the higher reward.     margins : by how much, in the mean; and the mean rewards."""
    with no_grad():
        rewards = np.concatenate([to_numpy(model(b.answers).data).reshape(len(b), -1) for b in batches]).astype(float)
    margins = rewards[:, 0] - rewards[:, 1]
    return dict(accuracy=float((margins > 0).mean()), margins=float(margins.mean()),
                rewards_chosen=float(rewards[:, 0].mean()), rewards_rejected=float(rewards[:, 1].mean()))  # fmt: skip


def centre(model: RewardModel, batches: Iterable[PreferenceBatch]) -> None:
    """Set b so that the mean reward over these pairs is 0. No preference can tell, but PPO's value head need not learn the offset then."""
    found = reward_metrics(model, batches)
    model.head.bias.data -= (found["rewards_chosen"] + found["rewards_rejected"]) / 2
    model.head.bias.version.count += 1


def learned_reward(model: RewardModel):
    """The model as a reward of samples: reward(samples) -> (B,)."""

    def reward(samples: Samples) -> np.ndarray:
        rows = [[*prompt, *answer] for prompt, answer in zip(samples.prompts, samples.answers, strict=True)]
        with no_grad():
            return to_numpy(model(padded(rows, [len(answer) for answer in samples.answers])).data).astype(float)

    return reward
