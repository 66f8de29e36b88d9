"""RLHF by PPO: rollouts, a critic that says what was to be expected, and clipped losses for both.

    actor = ActorCritic(model, rng)
    rollouts = PPO(actor, reference, prompts, learned_reward(reward_model), PPOConfig(…), end=…, seed=0)
    train(actor, rollouts.batches, ppo_loss(config), …)

The reward of token t is -β·(ln π - ln ρ), and the answer's last token also earns the answer's reward: their sum over an answer is the
reward minus β times (an estimate of) the KL, which is what the policy is to maximise.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinyllm import ops
from tinyllm.align.grpo import mean_entropy
from tinyllm.align.reward import last_token
from tinyllm.align.rollouts import Experience, RolloutConfig, Rollouts
from tinyllm.backend import to_numpy
from tinyllm.config import setting
from tinyllm.data import IGNORE, Batch
from tinyllm.nn import Transformer
from tinyllm.nn.layers import Linear
from tinyllm.nn.module import Module
from tinyllm.tensor import Tensor, no_grad


@dataclass(frozen=True)
class PPOConfig(RolloutConfig):
    """What PPO adds to rollouts."""

    epochs: int = setting(2, "times that each answer is learned from", minimum=1)
    minibatches: int = setting(2, "updates per epoch; answers are shared out over them at random", minimum=1)
    gamma: float = setting(1.0, "discount of later rewards, per token", minimum=0, maximum=1)
    lam: float = setting(0.95, "GAE's lambda: 1 trusts the rewards that came, 0 the critic", minimum=0, maximum=1)
    value_weight: float = setting(0.5, "weight of the critic's loss", minimum=0)
    value_clip: float = setting(0.2, "how far an update may move a value before it is left alone", minimum=0)
    kl_target: float | None = setting(None, "nats per answer that the KL is held near by adapting --kl (default: --kl stays)", minimum=1e-6)

    def __post_init__(self):
        super().__post_init__()
        if self.kl_target is not None and not self.kl:
            raise ValueError("--kl-target adapts --kl, which is 0: give it a value to begin from")


class ActorCritic(Module):
    """The policy, and a value head on its hidden vectors: v(prompt and answer so far) is the reward to be expected from there on.

    The head begins at 0: it knows nothing yet, and says so.
    """

    def __init__(self, policy: Transformer, rng: np.random.Generator, dtype=np.float32):
        self.config, self.policy = policy.config, policy
        self.value = Linear(policy.config.width, 1, rng=rng, std=0.0, dtype=dtype)

    def forward(self, batch: Batch, rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
        """ln π of each target (see `token_log_probabilities`), and the value before that token.     -> (B, T), (B, T)"""
        hidden = self.policy.hidden(batch.ids, rng=rng)
        return ops.linear_log_probabilities(hidden, self.policy.output_weight, batch.targets, ignore_index=IGNORE), self.value(hidden)[..., 0]


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Generalised advantage estimation.     (B, T), (B, T) -> (B, T)

        δ_t = r_t + γ·v_{t+1} - v_t         A_t = Σ_k (γλ)^k·δ_{t+k} = δ_t + γλ·A_{t+1}             v = 0 after the last token

    λ = 1: what came minus what was expected, Σ γ^k r - v: unbiased, noisy. λ = 0: δ alone: little noise, as wrong as the critic.
    Positions that are not the answer's have r = v = 0.        Source: Schulman et al. 2016, eq. 16.
    """
    advantages, following = np.zeros_like(rewards), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        following = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following
        advantages[:, t] = following
    return advantages


class PPO(Rollouts):
    """Rollouts whose tokens' advantages come from a critic.

    kl : β at present. With config.kl_target it is adapted after each rollout, β ← β·(1 + 0.1·clip(KL/target - 1, ±0.2)) (Ziegler et al.
    2019), and is a part of `state()`.
    """

    config: PPOConfig

    def __init__(self, actor: ActorCritic, *arguments, **options):
        super().__init__(actor.policy, *arguments, **options)
        self.actor, self.kl = actor, self.config.kl

    def experience(self, batch: Batch, old_log_p, reference_log_p, rewards) -> Experience:
        c, answered = self.config, batch.targets != IGNORE
        with no_grad():
            values = to_numpy(self.actor(batch)[1].data).astype(float) * answered
        distance = old_log_p - reference_log_p
        each = -self.kl * distance
        each[np.arange(len(batch)), last_token(batch) - 1] += rewards
        advantages = gae(each, values, c.gamma, c.lam) * answered
        returns = (advantages + values) * answered
        counted = advantages[answered]
        advantages = (advantages - counted.mean()) / (counted.std() + 1e-8) * answered  # whitened: steps of one size, whatever rewards are
        if c.kl_target is not None:
            self.kl *= 1 + 0.1 * float(np.clip(distance.sum(-1).mean() / c.kl_target - 1, -0.2, 0.2))
        return Experience(batch.ids, batch.targets, old_log_p, reference_log_p, advantages, answered.astype(float), values, returns)

    def state(self) -> dict[str, np.ndarray]:
        """The newest rollout as arrays, and β; {} before the first."""
        return state | {"kl": np.array(self.kl)} if (state := super().state()) else {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on with the rollout and the β that `state` gave."""
        super().restore(state)
        self.kl = float(state["kl"]) if state else self.kl


def ppo_loss(config: PPOConfig) -> Callable[..., Tensor]:
    """loss_fn(actor, experience, rng): clipped policy loss + value_weight·clipped value loss - entropy bonus, over the answers' tokens."""

    def loss(model: ActorCritic, batch: Experience, rng) -> Tensor:
        log_p, values = model(batch.batch, rng)
        policy = ops.clipped_policy_loss(log_p, batch.old_log_p, batch.advantages, batch.weights, low=config.clip_low, high=config.clip_high)
        critic = ops.clipped_value_loss(values, batch.old_values, batch.returns, batch.weights, clip=config.value_clip)
        total = policy + config.value_weight * critic
        return total - config.entropy * mean_entropy(model.policy, batch) if config.entropy else total

    return loss
