"""Stages that learn from pairs of answers: a reward model, and DPO with its relatives."""
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinyllm.align import (
    Pair,
    PreferenceConfig,
    Preferences,
    RewardModel,
    TokenPair,
    preference_loss,
    preference_metrics,
    read_pairs,
    reward_loss,
    reward_metrics,
    tokenize_pairs,
)
from tinyllm.backend import random_stream
from tinyllm.config import again
from tinyllm.nn import Module, Transformer
from tinyllm.stages.base import AdapterConfig, AnswerTrainConfig, ExamplesConfig, Tune, TuneConfig, TuneText, reference, taken, transformer
from tinyllm.stages.stage import Announce, Validation, Work, stage_config
from tinyllm.tokenizer import Tokenizer, encode_prompt
from tinyllm.tokenizer.chat import END
from tinyllm.train.config import TrainConfig
from tinyllm.train.run import Run


@dataclass(frozen=True)
class PairsConfig(ExamplesConfig):
    """Pairs of answers."""

    data: tuple[str, ...] = again(ExamplesConfig, "data", (), ".jsonl with prompt (a text or messages), chosen and rejected")
    epochs: float = again(ExamplesConfig, "epochs", 1.0)


@dataclass(frozen=True)
class RewardConfig(TuneConfig):
    """Everything that decides a run of a reward model."""

    stage = "reward"
    data: PairsConfig = field(default_factory=PairsConfig)
    train: AnswerTrainConfig = field(default_factory=AnswerTrainConfig)


@dataclass(frozen=True)
class PreferenceTrainConfig(AnswerTrainConfig):
    """Preferences move a model far with small rates."""

    lr: float = again(TrainConfig, "lr", 5e-5)


@dataclass(frozen=True)
class DPOConfig(TuneConfig):
    """Everything that decides a run of DPO or one of its relatives."""

    stage = "dpo"
    data: PairsConfig = field(default_factory=PairsConfig)
    train: PreferenceTrainConfig = field(default_factory=PreferenceTrainConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def checked(self) -> "DPOConfig":
        if self.preference.loss == "orpo" and self.preference.beta != PreferenceConfig.beta:
            raise ValueError("--beta weighs the distance to a reference, which --loss orpo has none of: leave it out; --strength is its weight")
        return super().checked()


class _Pairs(Tune):
    """What both do with files of pairs."""

    unit = "pairs"

    def read(self, paths: Iterable[str | Path]) -> list[dict]:
        return [dataclasses.asdict(pair) for pair in read_pairs(paths)]

    def complete(self, config: TuneConfig, parts: dict[str, list[dict]], tokenizer: Tokenizer, announce: Announce) -> TuneConfig:
        for records in parts.values():
            _token_pairs(tokenizer, records, config)  # raises where one does not fit
        return config


class Reward(_Pairs):
    """A model learns to say how good an answer is."""

    name, Config, command = "reward", RewardConfig, ("align", "reward")

    def module(self, config: RewardConfig, base: Mapping[str, np.ndarray] | None) -> RewardModel:
        return RewardModel(transformer(config, base), random_stream(config.train.seed, "reward"))

    def open(self, config: RewardConfig, run: Run, tokenizer: Tokenizer, model: RewardModel) -> Work:
        return _work(config, *(_preferences(tokenizer, records, config) for records in self.kept(run)), reward_loss,
                     lambda batches: reward_metrics(model, batches))  # fmt: skip

    def next_command(self, run: Run) -> list[str]:
        return ["align", "ppo", stage_config(run).base.run, "--reward-model", str(run.folder), "--data", str(run.data / "train.jsonl")]

    def language_model(self, model: Module) -> Transformer:
        raise ValueError("it judges answers and writes none: see tinyllm align ppo --reward-model")


class DPO(_Pairs, TuneText):
    """A model learns to prefer the chosen answers."""

    name, Config, command = "dpo", DPOConfig, ("align", "dpo")
    options = TuneText.options | {"preference": "loss"}

    def open(self, config: DPOConfig, run: Run, tokenizer: Tokenizer, model: Transformer) -> Work:
        parts = [_preferences(tokenizer, records, config, config.preference.loss == "kto") for records in self.kept(run)]
        if config.preference.uses_reference:
            begun = reference(config, run, model)
            parts = [part and part.with_reference(begun) for part in parts]
        return _work(config, *parts, preference_loss(config.preference), lambda batches: preference_metrics(model, batches, config.preference))

    def next_command(self, run: Run) -> list[str]:
        return ["chat", str(run.folder)]


def _token_pairs(tokenizer: Tokenizer, records: list[dict], config: TuneConfig) -> list[TokenPair]:
    """A row also holds the answer's last token (see align.padded), for which there must be room."""
    end = tokenizer.special_tokens[END]
    return tokenize_pairs((Pair(**record) for record in records), lambda messages: encode_prompt(tokenizer, messages), lambda text: [*tokenizer.encode_ordinary(text), end],
                          config.model.context)  # fmt: skip


def _preferences(tokenizer: Tokenizer, records: list[dict], config: TuneConfig, mismatched: bool = False) -> Preferences | None:
    if not records:
        return None
    return Preferences(_token_pairs(tokenizer, records, config), config.train.batch, config.train.seed, mismatched=mismatched)


def _work(config: TuneConfig, train: Preferences, val: Preferences | None, loss_fn, measure) -> Work:
    c = config.train
    return Work(
        batches=taken(train.batch, c.accumulate), loss_fn=loss_fn, steps=config.data.steps(len(train.pairs), c), measure=measure,
        validation=val and Validation(-(-len(val.pairs) // c.batch), lambda every: val.in_order(c.batch, every)),
    )  # fmt: skip
