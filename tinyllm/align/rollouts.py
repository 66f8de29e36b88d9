"""Rollouts: the policy answers prompts, its answers are rewarded, and become what the next updates learn from.

One rollout serves `updates` updates of the training loop: epochs over all of its answers, in random parts. What is sampled depends on
(seed, iteration) and the weights at that time alone.
"""
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from tinyllm.align.logprobs import padded, token_log_probabilities
from tinyllm.backend import random_stream, to_numpy
from tinyllm.config import check, setting
from tinyllm.data import IGNORE, Batch
from tinyllm.generate import SamplingConfig, generate
from tinyllm.generate.window import context_of
from tinyllm.nn import Transformer
from tinyllm.ops import KL_ESTIMATORS
from tinyllm.ops.policy import kl_estimate
from tinyllm.tensor import no_grad


@dataclass(frozen=True)
class Samples:
    """Answers that a policy drew.     numbers : (B,) which prompt each answers.     ended : (B,) whether with the end token, or cut off.

    prompts, answers : B lists of ids; an answer holds its end token.     log_probabilities : ln π of each of its tokens, when drawn.
    """

    numbers: np.ndarray
    prompts: list[list[int]]
    answers: list[list[int]]
    log_probabilities: list[list[float]]
    ended: np.ndarray


Reward = Callable[[Samples], np.ndarray]  # (B,): a learned model's, or a program's that checks the answer


def sample(policy: Transformer, prompts: Sequence[Sequence[int]], numbers: Sequence[int], max_tokens: int, *, end: int | None, seed: int,
           first_row: int = 0) -> Samples:
    """One answer to prompts[i] for each i of `numbers`, drawn from π itself: temperature 1, nothing filtered.

    end : the id that ends an answer; None where each has max_tokens.     first_row : number of the first answer's random stream.
    Raises ValueError where a prompt and max_tokens do not fit the context: the model would lose sight of the prompt.
    """
    chosen, context = [list(prompts[i]) for i in numbers], context_of(policy)
    longest = max(map(len, chosen))
    if context is not None and longest + max_tokens > context:
        raise ValueError(f"a prompt of {longest} tokens and an answer of up to {max_tokens} do not fit the model's context of {context}: "
                         "lower max_tokens, or leave long prompts out")  # fmt: skip
    config = SamplingConfig(max_tokens=max_tokens, temperature=1.0, seed=seed)
    answers, log_p = [[] for _ in chosen], [[] for _ in chosen]
    finished = np.zeros(len(chosen), dtype=bool)
    for step in generate(policy, chosen, config, end_of_text=end, first_row=first_row):
        for row in np.flatnonzero(step.ids >= 0).tolist():
            answers[row].append(int(step.ids[row]))
            log_p[row].append(float(step.log_probabilities[row]))
        finished = step.finished
    return Samples(np.asarray(numbers), chosen, answers, log_p, finished)


@dataclass(frozen=True)
class Experience:
    """Answers with what each token earned: a batch of the training loop.     All (B, T), 0 where a token is not the answer's

    ids, targets : see `padded`.     old_log_p, reference_log_p : ln π when drawn, ln ρ.     advantages : how much better than expected.
    weights : how much a token counts.     old_values, returns : the critic's, where there is one, else 0.
    """

    ids: np.ndarray
    targets: np.ndarray
    old_log_p: np.ndarray
    reference_log_p: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray
    old_values: np.ndarray
    returns: np.ndarray

    @property
    def weight(self) -> float:
        return float(self.weights.sum())

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, which) -> "Experience":
        """These rows alone."""
        return Experience(*(getattr(self, field.name)[which] for field in fields(self)))

    def part(self, number: int, count: int) -> "Experience":
        """The rows that are left to one of `count` workers."""
        return self.rows(slice(len(self) * number // count, len(self) * (number + 1) // count))

    @property
    def batch(self) -> Batch:
        return Batch(self.ids, self.targets)

    @property
    def answered(self) -> np.ndarray:
        """Which positions predict a token of the answer.     -> (B, T) bool"""
        return self.targets != IGNORE


@dataclass(frozen=True)
class RolloutConfig:
    """How many answers are drawn, and how often each is learned from."""

    prompts: int = setting(8, "different prompts per rollout", minimum=1)
    answers: int = setting(8, "answers drawn to each prompt", minimum=1)
    max_tokens: int = setting(32, "longest answer, in tokens; one that is cut off there counts as it stands", minimum=1)
    epochs: int = setting(1, "times that each answer is learned from", minimum=1)
    minibatches: int = setting(1, "updates per epoch; answers are shared out over them at random", minimum=1)
    kl: float = setting(0.05, "how much staying near the reference counts beside the reward (beta)", minimum=0)
    clip_low: float = setting(0.2, "how much less likely an update may make a token, as a share, before it is left alone", minimum=0, maximum=1)
    clip_high: float = setting(0.2, "how much likelier", minimum=0)
    entropy: float = setting(0.0, "bonus for undecided distributions", minimum=0)

    def __post_init__(self):
        check(self)
        if self.minibatches > self.prompts * self.answers:
            raise ValueError(f"--minibatches {self.minibatches} is more than the {self.prompts * self.answers} answers of a rollout: lower it")

    @property
    def updates(self) -> int:
        """Updates of the training loop per rollout."""
        return self.epochs * self.minibatches


class Rollouts(ABC):
    """`batches(n)` for the training loop; a subclass says what answers are worth (`experience`).

    policy : the Transformer that answers.     reference : ρ, which stays as it is.     prompts : ids of each.     end : see `sample`.
    observe : called with the record of each rollout: {"event": "rollout", "step" (the first update that it serves), "iteration",
    "reward", …, and what look_back() returns}.

    A rollout depends on the weights when it began. So that a run that is resumed in the midst of its updates goes on bitwise, save
    `state()` with each checkpoint and give it to `restore`.
    """

    def __init__(self, policy: Transformer, reference: Transformer, prompts: Sequence[Sequence[int]], reward: Reward, config: RolloutConfig,
                 *, end: int | None, seed: int, observe: Callable[[dict], None] = lambda record: None):  # fmt: skip
        if not prompts:
            raise ValueError("rollouts need at least one prompt")
        self.policy, self.reference, self.prompts, self.reward = policy, reference, prompts, reward
        self.config, self.end, self.seed, self.observe = config, end, seed, observe
        self.iteration, self.made = -1, None  # the newest rollout
        self.look_back: Callable[[], dict] = dict  # figures of the updates made since the rollout before, for the record of the next
        self.process = os.getpid()

    def batches(self, n: int) -> list[Experience]:
        """The micro-batch of update n: a part of its rollout's answers.

        Training never goes back. Only a loop that resumes asks for update 0 again, to see how many workers can share such a batch:
        the newest rollout serves for that.
        """
        iteration, update = divmod(n, self.config.updates)
        if iteration > self.iteration:
            self.made = self._roll_out(iteration)
            self.iteration = iteration
        epoch, part = divmod(update, self.config.minibatches)
        order = random_stream(self.seed, "minibatches", iteration * self.config.epochs + epoch).permutation(len(self.made))
        return [self.made.rows(np.sort(order[part :: self.config.minibatches]))]

    def state(self) -> dict[str, np.ndarray]:
        """The newest rollout as arrays; {} before the first."""
        if self.made is None:
            return {}
        return {"iteration": np.array(self.iteration)} | {field.name: getattr(self.made, field.name) for field in fields(Experience)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on with the rollout that `state` gave."""
        if state:
            self.iteration, self.made = int(state["iteration"]), Experience(*(state[field.name] for field in fields(Experience)))

    def numbers(self, iteration: int) -> np.ndarray:
        """Which prompts are answered: all in random order, then all again; the answers to one prompt are neighbours."""
        c, count = self.config, len(self.prompts)
        places = np.arange(iteration * c.prompts, (iteration + 1) * c.prompts)
        chosen = [random_stream(self.seed, "prompts", epoch).permutation(count)[place] for epoch, place in zip(*divmod(places, count), strict=True)]
        return np.repeat(chosen, c.answers)

    def _roll_out(self, iteration: int) -> Experience:
        numbers = self.numbers(iteration)
        samples = sample(self.policy, self.prompts, numbers.tolist(), self.config.max_tokens, end=self.end, seed=self.seed,
                         first_row=iteration * len(numbers))  # fmt: skip
        rewards = np.asarray(self.reward(samples), dtype=float)
        if rewards.shape != (len(numbers),) or not np.isfinite(rewards).all():
            raise ValueError(f"the reward must give one finite number for each of {len(numbers)} answers, got {rewards!r}")
        rows = [[*prompt, *answer] for prompt, answer in zip(samples.prompts, samples.answers, strict=True)]
        batch = padded(rows, [len(answer) for answer in samples.answers])
        old = np.zeros(batch.ids.shape)
        old[batch.targets != IGNORE] = np.concatenate(samples.log_probabilities)
        with no_grad():
            reference = to_numpy(token_log_probabilities(self.reference, batch).data).astype(float)
        if os.getpid() == self.process:  # workers of a team are forks of it: they draw the same answers, and say nothing
            found = rollout_metrics(samples, rewards, old, reference, batch.targets != IGNORE)
            self.observe(dict(event="rollout", step=iteration * self.config.updates + 1, iteration=iteration) | found | self.look_back())
        return self.experience(batch, old, reference, rewards)

    @abstractmethod
    def experience(self, batch: Batch, old_log_p: np.ndarray, reference_log_p: np.ndarray, rewards: np.ndarray) -> Experience:
        """What each token of the answers is worth.     (B, T) ×3, (B,)"""


def rollout_metrics(samples: Samples, rewards, log_p, reference_log_p, answered) -> dict[str, float]:
    """Means over answers: reward (and its standard deviation), length in tokens, ended (share), and KL(π ‖ ρ) of whole answers by each
    estimator, in nats per answer; entropy: -ln π of whole answers, whose mean is the policy's entropy."""
    lengths = answered.sum(-1)
    kl = {name: float(kl_estimate.array(log_p, reference_log_p, answered, estimator=name)[0] * answered.sum() / len(lengths)) for name in KL_ESTIMATORS}
    return dict(
        reward=float(rewards.mean()), reward_std=float(rewards.std()), length=float(lengths.mean()), ended=float(samples.ended.mean()),
        entropy=float(-log_p.sum(-1).mean()), **{f"kl_{name}": value for name, value in kl.items()},
    )  # fmt: skip
