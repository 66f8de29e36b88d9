"""Stages whose model answers prompts and learns from what its answers are worth: GRPO with a verifier, PPO with a reward model."""
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinyllm.align import (
    GRPO,
    PPO,
    ActorCritic,
    GRPOConfig,
    PPOConfig,
    RolloutConfig,
    Samples,
    grpo_loss,
    learned_reward,
    policy_metrics,
    ppo_loss,
    read_prompts,
)
from tinyllm.align.rollouts import sample
from tinyllm.backend import array_module, random_stream
from tinyllm.config import again, setting
from tinyllm.evaluate.verifiers import contains, exact_match, last_number
from tinyllm.evaluate.world import same_answer
from tinyllm.nn import Module, Transformer
from tinyllm.stages.base import (
    AdapterConfig,
    AnswerTrainConfig,
    ExamplesConfig,
    Tune,
    TuneConfig,
    TuneText,
    each,
    reference,
    save_weights,
    transformer,
)
from tinyllm.stages.stage import BASE_WEIGHTS, STAGES, Announce, Work, load_module, stage_config
from tinyllm.tokenizer import Tokenizer, encode_prompt, load_tokenizer
from tinyllm.tokenizer.chat import END
from tinyllm.train.config import TrainConfig
from tinyllm.train.run import Run
from tinyllm.train.safetensors import load

EXAMINED = 64  # prompts of a validation batch
VERIFIERS: dict[str, Callable[[str, str], bool]] = {"ending": same_answer, "exact": exact_match, "number": last_number, "contains": contains}


@dataclass(frozen=True)
class PromptsConfig(ExamplesConfig):
    """Prompts. How often they are gone through is no option: `epochs` is what rollouts call the times that an answer is learned from."""

    data: tuple[str, ...] = again(ExamplesConfig, "data", (), ".jsonl with prompt (a text or messages)")
    epochs: float = 1.0


@dataclass(frozen=True)
class TasksConfig(PromptsConfig):
    """Prompts whose answers can be verified."""

    data: tuple[str, ...] = again(ExamplesConfig, "data", (), ".jsonl with prompt (a text or messages) and answer")
    verifier: str = setting("ending", "when an answer is right: its last word or number is the expected one's (ending), it is the same text but for case "
                            "(exact), its last number has the same value (number), or it contains the expected words (contains)", choices=tuple(VERIFIERS))  # fmt: skip


@dataclass(frozen=True)
class RolloutTrainConfig(AnswerTrainConfig):
    """Rewards are noisy: small rates. The batch is that of the rollouts, by whose number --steps are counted."""

    steps: int | None = again(TrainConfig, "steps", None, "updates to make (default: until each prompt was answered once)")
    minutes: float | None = None  # no option: how long answers take changes as they are learned
    eval_every: int | None = again(TrainConfig, "eval_every", None, "updates between evaluations (default: a tenth of all)")
    batch: int = 1  # no option
    accumulate: int = 1
    lr: float = again(TrainConfig, "lr", 1e-4)


@dataclass(frozen=True)
class GRPORunConfig(TuneConfig):
    """Everything that decides a run of GRPO or RLOO."""

    stage = "grpo"
    data: TasksConfig = field(default_factory=TasksConfig)
    train: RolloutTrainConfig = field(default_factory=RolloutTrainConfig)
    rollouts: GRPOConfig = field(default_factory=GRPOConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)


@dataclass(frozen=True)
class PPORolloutConfig(PPOConfig):
    """PPO with the model that judges.     reward_model : a run of `tinyllm align reward`, which is copied into the new one."""

    reward_model: str = setting("", "folder that tinyllm align reward made; a new run needs it", metavar="RUN")


@dataclass(frozen=True)
class PPORunConfig(TuneConfig):
    """Everything that decides a run of PPO."""

    stage = "ppo"
    data: PromptsConfig = field(default_factory=PromptsConfig)
    train: RolloutTrainConfig = field(default_factory=RolloutTrainConfig)
    rollouts: PPORolloutConfig = field(default_factory=PPORolloutConfig)

    def checked(self) -> "PPORunConfig":
        if not self.rollouts.reward_model:
            raise ValueError("--reward-model is missing: give a run of tinyllm align reward")
        return super().checked()


class _Rollouts(Tune):
    """What both do with prompts."""

    def complete(self, config: TuneConfig, parts: dict[str, list[dict]], tokenizer: Tokenizer, announce: Announce) -> TuneConfig:
        room = config.model.context - config.rollouts.max_tokens
        for record in (record for records in parts.values() for record in records):
            if (length := len(encode_prompt(tokenizer, record["prompt"]))) > room:
                raise ValueError(f"{record['source']}: the prompt has {length} tokens, and answers up to {config.rollouts.max_tokens}: together more than "
                                 f"the model's context of {config.model.context}; shorten or remove it, or lower --max-tokens")  # fmt: skip
        return config

    def next_command(self, run: Run) -> list[str]:
        return ["chat", str(run.folder)]


class Grpo(_Rollouts, TuneText):
    """A model learns from which of its own answers are right."""

    name, Config, command, unit = "grpo", GRPORunConfig, ("align", "grpo"), "answers"
    options = TuneText.options | {"rollouts": "rollouts and loss"}

    def read(self, paths: Iterable[str | Path]) -> list[dict]:
        return [dict(prompt=prompt.messages, answer=prompt.answer, source=prompt.source) for prompt in read_prompts(paths, answers=True)]

    def complete(self, config: GRPORunConfig, parts: dict[str, list[dict]], tokenizer: Tokenizer, announce: Announce) -> GRPORunConfig:
        for record in (record for records in parts.values() for record in records):
            try:
                VERIFIERS[config.data.verifier](record["answer"], record["answer"])
            except ValueError as error:
                raise ValueError(f"{record['source']}: --verifier {config.data.verifier} cannot verify it: {error}") from error
        return super().complete(config, parts, tokenizer, announce)

    def open(self, config: GRPORunConfig, run: Run, tokenizer: Tokenizer, model: Transformer) -> Work:
        (train, val), verify = self.kept(run), VERIFIERS[config.data.verifier]

        def rewards(records: list[dict]) -> Callable[[Samples], np.ndarray]:
            def right(samples: Samples) -> np.ndarray:
                texts = (tokenizer.decode(answer, "ignore") for answer in _without_end(tokenizer, samples.answers))
                return np.array([float(verify(text, records[i]["answer"])) for text, i in zip(texts, samples.numbers, strict=True)])

            return right

        prompts = _encoded(tokenizer, train)
        rollouts = GRPO(model, reference(config, run, model), prompts, rewards(train), config.rollouts, end=tokenizer.special_tokens[END],
                        seed=config.train.seed)  # fmt: skip
        measure = _measure(tokenizer, model, config, lambda records, samples: rewards(records)(samples))
        return _work(config, rollouts, grpo_loss(config.rollouts), val, measure, len(prompts))


class Ppo(_Rollouts):
    """A model learns from what a reward model thinks of its answers."""

    name, Config, command, unit = "ppo", PPORunConfig, ("align", "ppo"), "answers' tokens"
    options = Tune.options | {"rollouts": "rollouts and loss"}

    def read(self, paths: Iterable[str | Path]) -> list[dict]:
        return [dict(prompt=prompt.messages, source=prompt.source) for prompt in read_prompts(paths, answers=False)]

    def prepare(self, config: PPORunConfig, run: Run, announce: Announce) -> PPORunConfig:
        judge, tokenizer, judge_config = load_module(config.rollouts.reward_model)
        if judge_config.stage != "reward":
            raise ValueError(f"--reward-model {config.rollouts.reward_model} is a run of another stage, {judge_config.stage}: make one with tinyllm align reward")
        config = super().prepare(config, run, announce)
        if tokenizer.fingerprint() != load_tokenizer(run.tokenizer).fingerprint():
            raise ValueError(f"--reward-model {config.rollouts.reward_model} reads other tokens than {config.base.run}: train it from that run")
        if judge_config.model.context < config.model.context:
            raise ValueError(f"--reward-model {config.rollouts.reward_model} reads {judge_config.model.context} tokens at most, {config.base.run} writes up to "
                             f"{config.model.context}: train it from that run")  # fmt: skip
        save_weights(run.base / "reward", judge)
        judge_config.save(run.base / "reward" / "config.json")
        return config

    def module(self, config: PPORunConfig, base: Mapping[str, np.ndarray] | None) -> ActorCritic:
        return ActorCritic(transformer(config, base), random_stream(config.train.seed, "critic"))

    def open(self, config: PPORunConfig, run: Run, tokenizer: Tokenizer, model: ActorCritic) -> Work:
        train, val = self.kept(run)
        judge = learned_reward(_judge(run).to(array_module(model.value.weight.data)))
        prompts = _encoded(tokenizer, train)
        rollouts = PPO(model, reference(config, run, model), prompts, judge, config.rollouts, end=tokenizer.special_tokens[END], seed=config.train.seed)
        measure = _measure(tokenizer, model.policy, config, lambda records, samples: judge(samples))
        return _work(config, rollouts, ppo_loss(config.rollouts), val, measure, len(prompts))

    def language_model(self, model: Module) -> Transformer:
        return model.policy


def _judge(run: Run) -> Module:
    folder = run.base / "reward"
    config = stage_config(Run(folder))
    judge = STAGES[config.stage].module(config, None)
    judge.load_state_dict(load(folder / BASE_WEIGHTS))
    return judge


def _encoded(tokenizer: Tokenizer, records: list[dict]) -> list[list[int]]:
    return [encode_prompt(tokenizer, record["prompt"]) for record in records]


def _without_end(tokenizer: Tokenizer, answers: Sequence[Sequence[int]]) -> list[list[int]]:
    end = tokenizer.special_tokens[END]
    return [[i for i in answer if i != end] for answer in answers]


def _measure(tokenizer: Tokenizer, policy: Transformer, config: TuneConfig, judge: Callable[[list[dict], Samples], np.ndarray]):
    """Mean reward of one drawn answer to each validation prompt, and its length; always the same random numbers."""

    def measure(batches: Iterable[list[dict]]) -> dict[str, float]:
        rewards, lengths = [], []
        for number, records in enumerate(batches):
            samples = sample(policy, _encoded(tokenizer, records), range(len(records)), config.rollouts.max_tokens,
                             end=tokenizer.special_tokens[END], seed=config.train.seed + 1, first_row=number * EXAMINED)  # fmt: skip
            rewards.append(judge(records, samples))
            lengths += map(len, samples.answers)
        return dict(reward=float(np.concatenate(rewards).mean()), length=float(np.mean(lengths)))

    return measure


def _work(config: TuneConfig, rollouts: GRPO | PPO, loss_fn, val: list[dict], measure, prompts: int) -> Work:
    c: RolloutConfig = config.rollouts

    def look_back() -> dict[str, float]:
        """How far the updates from the newest rollout have moved the policy, on its answers (see `policy_metrics`)."""
        found = policy_metrics(rollouts.policy, rollouts.made, c) if rollouts.made is not None else {}
        return {name: found[name] for name in ("clip_fraction", "ratio", "approx_kl") if name in found}

    rollouts.look_back = look_back
    steps = max(1, round(config.data.epochs * prompts / c.prompts)) * c.updates
    held = dataclasses.replace(each(val, EXAMINED, list), loss=False) if val else None
    return Work(batches=rollouts.batches, loss_fn=loss_fn, validation=held, measure=measure, rollouts=rollouts, steps=steps)
