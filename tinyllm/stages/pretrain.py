"""Pretraining, from raw text to a trained model: text -> tokenizer -> token shards -> model that predicts each next token."""
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinyllm.backend import random_stream
from tinyllm.config import option_name, setting
from tinyllm.data import (
    Document,
    Epochs,
    PackedRows,
    PreparedData,
    RandomWindows,
    open_prepared,
    open_shard,
    prepare,
    read_documents,
    standard_library,
    validation_batches,
)
from tinyllm.nn import Transformer
from tinyllm.nn.describe import describe
from tinyllm.stages.stage import Announce, Stage, Validation, Work, stage_config
from tinyllm.tokenizer import CharTokenizer, Tokenizer, load_tokenizer, train_bpe
from tinyllm.train.config import RunConfig
from tinyllm.train.loop import Outcome
from tinyllm.train.next_token import next_token_loss
from tinyllm.train.run import Run

VOCAB_SIZE = 2048  # of a bpe tokenizer, where nothing else is asked for and the text is not small


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    data: tuple[str, ...] = setting(
        (), "text, .jsonl with a text field, or folders of them (default: the Python standard library's sources)",
        metavar="FILE_OR_FOLDER", several=True,
    )  # fmt: skip
    tokenizer: str = setting(
        "bpe", "bpe or char, trained on the text, or a tokenizer file or run folder to take it from", metavar="bpe|char|PATH"
    )
    vocab_size: int | None = setting(
        None, f"entries of a bpe tokenizer (default: {VOCAB_SIZE}; for short texts 257 + one for each 250 characters)", minimum=257
    )
    val_fraction: float | None = setting(
        None, "share of the text that is set aside for validation (default: 0.1; of the standard library 0.02)", minimum=0, maximum=0.9
    )
    epochs: bool = setting(False, "go through the text without repetition, instead of drawing windows at random")
    pack: bool = setting(False, "whole documents share a window, which see themselves alone, instead of windows that cut them")
    document_mask: bool = setting(False, "a token sees its own document only, not those before it in the window")

    def resolved(self) -> "DataConfig":
        """The same config with val_fraction filled in."""
        fraction = (0.1 if self.data else 0.02) if self.val_fraction is None else self.val_fraction
        return dataclasses.replace(self, val_fraction=fraction)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Everything that decides a run of pretraining."""

    stage = "pretrain"
    data: DataConfig = field(default_factory=DataConfig)

    def checked(self) -> "PretrainConfig":
        config = super().checked()
        if self.data.vocab_size is not None and self.data.tokenizer != "bpe":
            raise ValueError(f"--vocab-size goes with --tokenizer bpe alone, {self.data.tokenizer} has a size of its own: leave it out")
        for option in ("pack", "document_mask"):
            if getattr(self.data, option) and self.data.tokenizer == "char":
                raise ValueError(f"{option_name(option)} needs a tokenizer with <|endoftext|>, which char has not: use --tokenizer bpe")
        for option in ("epochs", "document_mask"):
            if self.data.pack and getattr(self.data, option):
                raise ValueError(f"{option_name(option)} is part of what --pack does: leave it out")
        return dataclasses.replace(config, data=self.data.resolved())


class Pretrain(Stage):
    """Every token of the text is learned, in windows drawn at random or one after the other."""

    name, Config, command = "pretrain", PretrainConfig, ("train",)
    options = {"data": "text and tokenizer", "model": "model", "train": "training"}
    continues = True

    def prepare(self, config: PretrainConfig, run: Run, announce: Announce) -> PretrainConfig:
        tokenizer = make_data(config.data, config.train.seed, run, announce)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))

    def module(self, config: PretrainConfig, base: Mapping[str, np.ndarray] | None) -> Transformer:
        return Transformer(config.model, random_stream(config.train.seed, "weights"))

    def open(self, config: PretrainConfig, run: Run, tokenizer: Tokenizer, model: Transformer) -> Work:
        data = open_prepared(run.data, tokenizer.fingerprint())
        if config.data.val_fraction and data.val is None:
            raise FileNotFoundError(f"{run.data / 'val.bin'}: no such token shard")
        by_documents = next((option for option in ("pack", "document_mask") if getattr(config.data, option)), None)
        if by_documents and tokenizer.end_of_text is None:
            raise ValueError(f"{option_name(by_documents)} needs a tokenizer with <|endoftext|>, which this one has not: use --tokenizer bpe")
        c, separator = config.train, tokenizer.end_of_text if by_documents else None
        kind = PackedRows if config.data.pack else Epochs if config.data.epochs else RandomWindows
        windows = kind(data.train.tokens, config.model.context, c.batch, c.seed, separator)
        return Work(
            batches=lambda n: [windows.batch(n * c.accumulate + i) for i in range(c.accumulate)], loss_fn=next_token_loss(c),
            validation=_validation(config, data, separator), closing=lambda outcome, val_loss: _figures(config, data, outcome, val_loss),
        )  # fmt: skip

    def next_command(self, run: Run) -> list[str]:
        """To go on with the words that the text begins with."""
        tokens = open_shard(run.data / "train.bin").tokens[:16].tolist()
        start = load_tokenizer(run.tokenizer).decode(tokens, "ignore")
        return ["sample", str(run.folder), "--prompt", start.strip().partition("\n")[0] or start[:1] if stage_config(run).data.data else "def "]


def _validation(config: PretrainConfig, data: PreparedData, separator: int | None) -> Validation | None:
    if not data.val:
        return None
    context, batch = config.model.context, config.train.batch
    if config.data.pack:
        rows = PackedRows(data.val.tokens, context, batch, config.train.seed, separator)
        return Validation(rows.batches, rows.in_order)

    def every(n: int):
        return validation_batches(data.val.tokens, context, batch, separator, every=n)

    next(every(1))  # raises where the part is too short
    return Validation(-(-(len(data.val) - 1) // (context * batch)), every)


def _figures(config: PretrainConfig, data: PreparedData, outcome: Outcome, val_loss: float | None) -> dict:
    """bits_per_byte = val_loss·tokens / (ln 2·bytes), which does not depend on the tokenizer.     flops : of all training tokens,
    forward and backward."""
    if val_loss is None:
        bits = None
    else:
        counted = len(data.val) - (not config.data.pack)  # windows have no target for the very first token, documents do
        bits = val_loss * counted / (math.log(2) * data.val.header.text_bytes)
    return dict(bits_per_byte=bits, flops=describe(config.model, config.train.batch).flops_per_token * outcome.tokens)


def make_data(config: DataConfig, seed: int, run: Run, announce: Announce) -> Tokenizer:
    """Read the text, get the tokenizer, and write it and both parts of the text, as token shards, into the run folder."""
    tokenizer = given_tokenizer(config.tokenizer, "bpe", "char")  # before the text is read: a wrong path should be known at once
    documents = read_text(config.data, announce)
    tokenizer = tokenizer or make_tokenizer(config, documents)
    tokenizer.save(run.tokenizer)
    announce(f"tokenizer: {config.tokenizer}, {tokenizer.vocab_size:,} entries")
    data = prepare(documents, tokenizer, run.data, config.val_fraction, seed)
    parts = f"{len(data.train):,} for training, {len(data.val) if data.val else 0:,} for validation"
    announce(f"tokens: {parts}; {data.train.header.text_bytes / max(len(data.train), 1):.2f} bytes per token")
    return tokenizer


def read_text(data: tuple[str, ...], announce: Announce) -> list[Document]:
    """The documents that were given, or the standard library's sources."""
    documents = list(read_documents(data, on_skip=announce) if data else standard_library(on_skip=announce))
    characters = sum(len(d.text) for d in documents)
    announce(f"text: {len(documents):,} document{'s' * (len(documents) != 1)}, {characters:,} characters")
    return documents


def given_tokenizer(name: str, *kinds: str) -> Tokenizer | None:
    """The tokenizer in a file or run folder; None for the kinds that are to be trained."""
    if name in kinds:
        return None
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(
            f"--tokenizer {name}: it takes {', '.join(kinds)}, or the path of a tokenizer file or run folder, and there is no such path"
        )
    return load_tokenizer(path)


def make_tokenizer(config: DataConfig, documents: list[Document]) -> Tokenizer:
    """Train the kind that is asked for on the documents."""
    characters = sum(len(d.text) for d in documents)
    texts = (d.text for d in documents)
    if config.tokenizer == "char":
        return CharTokenizer.train(texts)
    if config.vocab_size:
        return train_bpe(texts, config.vocab_size)
    return train_bpe(texts, min(VOCAB_SIZE, 257 + characters // 250), or_fewer=True)
