"""Instruction tuning: conversations, of which the assistant's tokens are learned."""
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tinyllm.config import again, setting
from tinyllm.data import Conversation, pack, read_conversations
from tinyllm.finetune import Example, InstructionBatches, encode_conversations
from tinyllm.nn import Transformer
from tinyllm.stages.base import AdapterConfig, ExamplesConfig, TuneConfig, TuneText, taken
from tinyllm.stages.stage import Announce, Validation, Work
from tinyllm.tokenizer import Tokenizer
from tinyllm.train.next_token import next_token_loss
from tinyllm.train.run import Run


@dataclass(frozen=True)
class ConversationsConfig(ExamplesConfig):
    """Conversations, and how they become rows."""

    data: tuple[str, ...] = again(ExamplesConfig, "data", (), ".jsonl with a list of messages, each with role and content")
    pack: bool = setting(True, "conversations share rows, which see themselves alone; else each has a row of its own")


@dataclass(frozen=True)
class InstructConfig(TuneConfig):
    """Everything that decides a run of instruction tuning."""

    stage = "instruct"
    data: ConversationsConfig = field(default_factory=ConversationsConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)


class Instruct(TuneText):
    """A model of texts learns to answer."""

    name, Config, command = "instruct", InstructConfig, ("finetune", "instruct")

    def read(self, paths: Iterable[str | Path]) -> list[dict]:
        return [dict(messages=conversation.messages, source=conversation.source) for conversation in read_conversations(paths)]

    def complete(self, config: InstructConfig, parts: dict[str, list[dict]], tokenizer: Tokenizer, announce: Announce) -> InstructConfig:
        for records in filter(None, parts.values()):
            _encoded(tokenizer, records, config, announce)  # says what does not fit
        return config

    def open(self, config: InstructConfig, run: Run, tokenizer: Tokenizer, model: Transformer) -> Work:
        c, (train, val) = config.train, self.kept(run)
        rows = _rows(_encoded(tokenizer, train, config), config)
        held = _rows(_encoded(tokenizer, val, config), config) if val else None
        return Work(
            batches=taken(rows.batch, c.accumulate), loss_fn=next_token_loss(c), steps=config.data.steps(len(rows.rows), c),
            validation=held and Validation(-(-len(held.rows) // c.batch), held.in_order),
        )  # fmt: skip

    def next_command(self, run: Run) -> list[str]:
        return ["chat", str(run.folder)]


def _encoded(tokenizer: Tokenizer, records: list[dict], config: InstructConfig, on_cut: Announce = lambda line: None) -> list[Example]:
    return encode_conversations(tokenizer, [Conversation(**record) for record in records], config.model.context, on_cut)


def _rows(examples: list[Example], config: InstructConfig) -> InstructionBatches:
    shared = pack([len(example) for example in examples], config.model.context) if config.data.pack else None
    return InstructionBatches(examples, config.train.batch, config.train.seed, shared)
