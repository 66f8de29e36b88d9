"""Pretraining an encoder, from raw text: text -> sentences -> token shards -> a model that fills gaps and knows which sentence follows."""
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tinyllm.backend import random_stream
from tinyllm.config import again, setting
from tinyllm.data import Document, MaskedBatches, Passages, SentencePairs, open_prepared, prepare, sentence_pieces, stored_sentences
from tinyllm.nn import MaskedLanguageModel, Transformer, TransformerConfig
from tinyllm.stages.pretrain import VOCAB_SIZE, DataConfig, given_tokenizer, read_text
from tinyllm.stages.stage import Announce, Stage, Validation, Work
from tinyllm.tokenizer import Tokenizer, load_tokenizer, train_wordpiece
from tinyllm.train.config import RunConfig, TrainConfig
from tinyllm.train.encoder import OBJECTIVES, masked_metrics
from tinyllm.train.run import Run


@dataclass(frozen=True)
class SentencesConfig:
    """Which text, how it becomes tokens, and what is learned from it."""

    objective: str = setting("mlm+nsp", "what is learned: masked tokens, or next sentences too", choices=tuple(OBJECTIVES))
    data: tuple[str, ...] = again(DataConfig, "data", ())
    tokenizer: str = setting("wordpiece", "wordpiece, trained on the text, or a file or run folder to take it from", metavar="wordpiece|PATH")
    vocab_size: int | None = setting(
        None, f"entries of a wordpiece tokenizer (default: {VOCAB_SIZE}, or as many as the text can give)", minimum=6
    )
    val_fraction: float | None = again(DataConfig, "val_fraction", None)


@dataclass(frozen=True)
class EncoderModelConfig(TransformerConfig):
    """The same choices, which by default are BERT's."""

    arch: str = again(TransformerConfig, "arch", "bert")


@dataclass(frozen=True)
class EncoderTrainConfig(TrainConfig):
    """The same loop. What smooths the loss of a next token is no option."""

    batch: int = again(TrainConfig, "batch", 32, "rows per micro-batch: pairs of sentences, or pieces of text")
    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class EncoderConfig(RunConfig):
    """Everything that decides a run of an encoder's pretraining."""

    stage = "encoder"
    data: SentencesConfig = field(default_factory=SentencesConfig)
    model: EncoderModelConfig = field(default_factory=EncoderModelConfig)
    train: EncoderTrainConfig = field(default_factory=EncoderTrainConfig)

    def checked(self) -> "EncoderConfig":
        config = super().checked()
        if self.data.vocab_size is not None and self.data.tokenizer != "wordpiece":
            raise ValueError(f"--vocab-size goes with --tokenizer wordpiece alone, {self.data.tokenizer} has a size of its own: leave it out")
        fraction = DataConfig(self.data.data, val_fraction=self.data.val_fraction).resolved().val_fraction
        return dataclasses.replace(config, data=dataclasses.replace(self.data, val_fraction=fraction))


class PretrainEncoder(Stage):
    """Masked tokens are told from all around them, and from pairs of sentences whether one follows the other."""

    name, Config, command, unit = "encoder", EncoderConfig, ("train",), "rows"
    options = {"data": "text and tokenizer", "model": "model", "train": "training"}

    def prepare(self, config: EncoderConfig, run: Run, announce: Announce) -> EncoderConfig:
        c = config.data
        tokenizer = given_tokenizer(c.tokenizer, "wordpiece")  # before the text is read: a wrong path should be known at once
        if tokenizer is not None and not hasattr(tokenizer, "mask"):
            raise ValueError(f"--tokenizer {c.tokenizer} has no [MASK], [CLS] and [SEP], which an encoder needs: take a wordpiece tokenizer")
        documents = read_text(c.data, announce)
        tokenizer = tokenizer or _learned(c, documents)
        tokenizer.save(run.tokenizer)
        announce(f"tokenizer: {c.tokenizer}, {tokenizer.vocab_size:,} entries")
        prepare(documents, tokenizer, run.data, c.val_fraction, config.train.seed, encode=sentence_pieces)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
        parts = {name: len(rows.source) for name, rows in _rows(config, run, tokenizer, announce).items()}
        announce(f"rows: {parts['train']:,} for training, {parts.get('val', 0):,} for validation")
        return config

    def module(self, config: EncoderConfig, base: Mapping[str, np.ndarray] | None) -> MaskedLanguageModel:
        return MaskedLanguageModel(config.model, random_stream(config.train.seed, "weights"))

    def open(self, config: EncoderConfig, run: Run, tokenizer: Tokenizer, model: MaskedLanguageModel) -> Work:
        c, rows = config.train, _rows(config, run, tokenizer, lambda line: None)
        held = list(rows["val"].in_order()) if "val" in rows else []

        def batches(step: int) -> list:
            whole = rows["train"].batch(step)
            return [whole.part(i, c.accumulate) for i in range(c.accumulate)]

        return Work(
            batches=batches, loss_fn=OBJECTIVES[config.data.objective], measure=lambda some: masked_metrics(model, some),
            validation=Validation(len(held), lambda every: held[::every]) if held else None,
        )  # fmt: skip

    def next_command(self, run: Run) -> list[str]:
        """What its tokens are: an encoder writes nothing that could be looked at."""
        tokens = open_prepared(run.data, load_tokenizer(run.tokenizer).fingerprint()).train.tokens[:16].tolist()
        return ["tokenizer", "show", str(run.tokenizer), load_tokenizer(run.tokenizer).decode(tokens)]

    def language_model(self, model: MaskedLanguageModel) -> Transformer:
        raise ValueError("it is an encoder, which fills gaps and writes no text")


def _learned(config: SentencesConfig, documents: list[Document]) -> Tokenizer:
    texts = (document.text for document in documents)
    return train_wordpiece(texts, config.vocab_size or VOCAB_SIZE, or_fewer=config.vocab_size is None)


def _rows(config: EncoderConfig, run: Run, tokenizer: Tokenizer, on_cut: Announce) -> dict[str, MaskedBatches]:
    """Training and, where some text was set aside, validation rows. ValueError where a part is too short to give any."""
    data, c = open_prepared(run.data, tokenizer.fingerprint()), config.train
    if config.data.val_fraction and data.val is None:
        raise FileNotFoundError(f"{run.data / 'val.bin'}: no such token shard")
    rows = {}
    for name, shard in (("train", data.train), ("val", data.val)):
        if shard is None:
            continue
        documents = stored_sentences(shard.tokens, tokenizer.sep)
        try:
            if config.data.objective == "mlm":
                source = Passages([np.concatenate(sentences) for sentences in documents], config.model.context)
            else:
                source = SentencePairs(documents, config.model.context, on_cut)
        except ValueError as error:
            raise ValueError(f"the {'training' if name == 'train' else 'validation'} part: {error}") from error
        rows[name] = MaskedBatches(source, tokenizer, c.batch * (c.accumulate if name == "train" else 1), c.seed)
    return rows
