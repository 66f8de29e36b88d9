"""Classification: a head on a model's vectors of a text, learned with it, or with its uppermost blocks, or alone."""
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinyllm.backend import to_numpy
from tinyllm.config import again, setting
from tinyllm.data import read_labelled
from tinyllm.finetune import (
    LabelledBatch,
    LabelledBatches,
    accuracy,
    classification_loss,
    confusion_matrix,
    encode_texts,
    f1_scores,
    learn_top,
)
from tinyllm.nn import Classifier, Module, Transformer
from tinyllm.nn.classifier import POOLINGS
from tinyllm.stages.base import ExamplesConfig, Tune, TuneConfig, taken, transformer
from tinyllm.stages.stage import Announce, Validation, Work
from tinyllm.tensor import no_grad
from tinyllm.tokenizer import Tokenizer
from tinyllm.train.run import Run


@dataclass(frozen=True)
class LabelledConfig(ExamplesConfig):
    """Texts with labels."""

    data: tuple[str, ...] = again(ExamplesConfig, "data", (), "a folder with a subfolder for each label, or .csv or .jsonl with text and label")


@dataclass(frozen=True)
class HeadConfig:
    """What is put on the model, and how much of the model learns with it.     labels : their names, which the texts decide; no option."""

    labels: tuple[str, ...] = ()
    pooling: str = setting("last", "which vectors stand for a text: of its last or first token, or the mean of all (in a decoder the first has seen nothing but itself)", choices=tuple(POOLINGS))
    learn_blocks: int | None = setting(None, "uppermost blocks that learn with the head, 0 for none (default: the whole model)", minimum=0)
    scratch: bool = setting(False, "begin with random weights: shows what the base's were worth")


@dataclass(frozen=True)
class ClassifyConfig(TuneConfig):
    """Everything that decides a run of classification."""

    stage = "classify"
    data: LabelledConfig = field(default_factory=LabelledConfig)
    head: HeadConfig = field(default_factory=HeadConfig)

    def checked(self) -> "ClassifyConfig":
        if self.head.scratch and self.head.learn_blocks is not None:
            raise ValueError("--scratch begins with random weights, which all have to learn: leave out --learn-blocks")
        return super().checked()


class Classify(Tune):
    """A model of texts learns to tell them apart."""

    name, Config, command, unit = "classify", ClassifyConfig, ("finetune", "classify"), "texts"
    options = Tune.options | {"head": "head"}
    chat = False

    def read(self, paths: Iterable[str | Path]) -> list[dict]:
        return [dict(text=found.text, label=found.label, source=found.source) for path in paths for found in read_labelled(path)]

    def complete(self, config: ClassifyConfig, parts: dict[str, list[dict]], tokenizer: Tokenizer, announce: Announce) -> ClassifyConfig:
        known = sorted({record["label"] for record in parts["train"]})
        for record in parts["val"]:
            if record["label"] not in known:
                raise ValueError(f"{record['source']}: the label {record['label']!r} is in the validation part only: give more texts of it, or another --seed")
        encode_texts(tokenizer, [record["text"] for part in parts.values() for record in part], config.model.context, announce)
        announce(f"labels: {', '.join(known)}")
        return dataclasses.replace(config, head=dataclasses.replace(config.head, labels=tuple(known)))

    def module(self, config: ClassifyConfig, base: Mapping[str, np.ndarray] | None) -> Classifier:
        model = Classifier(transformer(config, None if config.head.scratch else base), len(config.head.labels), pooling=config.head.pooling)
        if config.head.learn_blocks is not None:
            learn_top(model, config.head.learn_blocks)
        return model

    def open(self, config: ClassifyConfig, run: Run, tokenizer: Tokenizer, model: Classifier) -> Work:
        c, (train, val) = config.train, self.kept(run)
        labels = list(config.head.labels)

        def batches(records: list[dict]) -> LabelledBatches:
            rows = encode_texts(tokenizer, [record["text"] for record in records], config.model.context, lambda line: None)
            return LabelledBatches(rows, [labels.index(record["label"]) for record in records], c.batch, c.seed)

        held = batches(val) if val else None
        return Work(
            batches=taken(batches(train).batch, c.accumulate), loss_fn=classification_loss, steps=config.data.steps(len(train), c),
            validation=held and Validation(-(-len(val) // c.batch), held.in_order),
            measure=lambda some: _figures(_confusion(model, some, len(labels))),
            closing=lambda *_: dict(labels=labels, confusion=_confusion(model, held.in_order(), len(labels)).tolist()) if held else {},
        )  # fmt: skip

    def next_command(self, run: Run) -> list[str]:
        text = self.kept(run)[0][0]["text"].strip().partition("\n")[0][:60]
        return ["finetune", "predict", str(run.folder), f"--text={text}"]  # one that begins with - would be taken for an option

    def language_model(self, model: Module) -> Transformer:
        raise ValueError("it tells texts apart and writes none: see tinyllm finetune predict")


def _confusion(model: Classifier, batches: Iterable[LabelledBatch], classes: int) -> np.ndarray:
    """How often each class was taken for which.     -> (K, K) int"""
    labels, guesses = [], []
    with no_grad():
        for batch in batches:
            labels += batch.labels.tolist()
            guesses += to_numpy(model(batch.ids, batch.lengths).data).argmax(-1).tolist()
    return confusion_matrix(labels, guesses, classes)


def _figures(confusion: np.ndarray) -> dict[str, float]:
    return dict(accuracy=accuracy(confusion), macro_f1=float(f1_scores(confusion)[2].mean()))
