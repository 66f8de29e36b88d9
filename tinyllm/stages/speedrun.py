"""The whole life of a small model in about ten minutes: raw text -> cleaned -> pretrained -> tuned -> aligned, measured after each stage.

    FOLDER/speedrun.json    what was asked for             FOLDER/data/        raw text, what is left of it, and later stages' examples
    FOLDER/pretrain … grpo  a run folder for each stage    FOLDER/card.*       the report card, with a column for each stage

Every stage is what its own command does, with the settings below. What is complete is not done again, and what was interrupted goes on.
"""
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from tinyllm.align import GRPOConfig, PreferenceConfig
from tinyllm.config import check, from_dict, setting, suggestion
from tinyllm.data import IGNORE, CleanConfig, DedupConfig, Document, atomic_file, clean_into, deduplicate_into, read_documents
from tinyllm.data.records import write_records
from tinyllm.data.tinyworld import World, best_masked_in_pairs, best_next_sentence_accuracy, save_records
from tinyllm.data.tinyworld.crawl import cleaning, crawl, texts_of
from tinyllm.evaluate import Card, Result, Task, evaluate, reward_curve, training_curve, write_card
from tinyllm.evaluate.card import Table
from tinyllm.evaluate.suite import validation_task
from tinyllm.evaluate.world import world_tasks
from tinyllm.nn import TransformerConfig
from tinyllm.stages.base import AnswerTrainConfig, BaseConfig, TuneTrainConfig
from tinyllm.stages.classify import ClassifyConfig, HeadConfig, LabelledConfig
from tinyllm.stages.encoder import EncoderConfig, EncoderModelConfig, EncoderTrainConfig, SentencesConfig
from tinyllm.stages.instruct import ConversationsConfig, InstructConfig
from tinyllm.stages.preference import DPOConfig, PairsConfig, PreferenceTrainConfig
from tinyllm.stages.pretrain import DataConfig, PretrainConfig
from tinyllm.stages.rollout import GRPORunConfig, RolloutTrainConfig, TasksConfig
from tinyllm.stages.stage import STAGES, Announce, Observers, load_module, load_run, resume, stage_config, start
from tinyllm.train.config import RunConfig, TrainConfig
from tinyllm.train.encoder import masked_metrics
from tinyllm.train.progress import duration
from tinyllm.train.run import Run

SECONDS = {"text": 13, "pretrain": 200, "classify": 12, "encoder": 75, "instruct": 50, "dpo": 16, "grpo": 28}  # each with its evaluation, on two cores
PAGES, DIALOGUES, PAIRS, SUMS, NOTES, DESCRIPTIONS = 7000, 20000, 2000, 2000, 24, 6000
VOCAB_SIZE = 704
MODEL = TransformerConfig(layers=3, heads=4, width=128, context=128, qk_norm=True, init_std=128**-0.5, embedding_std=0.5)
CHAIN = ("pretrain", "instruct", "dpo", "grpo")  # each begins from the one before; the others are asides
EXAMINED = 4  # batches of the encoder
ENCODER = EncoderModelConfig(arch="llama", layers=2, heads=4, width=64, context=32, init_std=64**-0.5)
LEARNED = {"fine-tuned": HeadConfig(), "frozen": HeadConfig(learn_blocks=0), "from-scratch": HeadConfig(scratch=True)}


@dataclass(frozen=True)
class SpeedrunConfig:
    """What a speedrun is made of. Without files of one's own, everything is about tinyworld."""

    data: tuple[str, ...] = setting((), "text of your own to pretrain on, instead of tinyworld's", metavar="FILE_OR_FOLDER", several=True)
    conversations: tuple[str, ...] = setting((), "with --data: .jsonl with messages, to be tuned by", metavar="FILE", several=True)
    pairs: tuple[str, ...] = setting((), "with --data: .jsonl with prompt, chosen and rejected, for DPO", metavar="FILE", several=True)
    tasks: tuple[str, ...] = setting((), "with --data: .jsonl with prompt and answer, for GRPO", metavar="FILE", several=True)
    without: tuple[str, ...] = setting((), f"stages to leave out, of {', '.join(list(SECONDS)[2:])}", metavar="STAGE", several=True)
    scale: float = setting(1.0, "how many updates each stage makes, as a share of what is usual", minimum=1e-4, maximum=1000)
    seed: int = setting(0, "seed of everything", minimum=0)

    def checked(self) -> "SpeedrunConfig":
        """Itself. Raises ValueError for what does not go together."""
        check(self)
        for name in self.without:
            if name not in (known := list(SECONDS)[2:]):
                raise ValueError(f"--without {name}{suggestion(name, known)}: only {', '.join(known)} can be left out")
        for name in ("conversations", "pairs", "tasks"):
            if getattr(self, name) and not self.data:
                raise ValueError(f"--{name} goes with text of your own: give --data, too")
        return self

    def read_files(self) -> None:
        """Raises FileNotFoundError or ValueError for what is wrong in files of one's own: that should be known before the first stage, not after."""
        for path in self.data:
            next(read_documents([path], on_skip=lambda line: None))
        for name, paths in dict(instruct=self.conversations, dpo=self.pairs, grpo=self.tasks).items():
            STAGES[name].read(paths)

    def stages(self) -> list[str]:
        """Which are done: of one's own data those that have examples."""
        files = dict(pretrain=True, instruct=self.conversations, dpo=self.pairs, grpo=self.tasks)
        return [name for name in list(SECONDS)[1:] if name not in self.without and (not self.data or files.get(name))]

    def chain(self) -> list[str]:
        """Those that make one model, each going on with what the one before made."""
        return [name for name in self.stages() if name in CHAIN]

    def save(self, path: Path) -> None:
        with atomic_file(path) as file:
            file.write((json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    @staticmethod
    def load(path: Path) -> "SpeedrunConfig":
        """Read speedrun.json. Raises FileNotFoundError or ValueError in one line."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found, so {path.parent} is not a folder of tinyllm speedrun")
        try:
            return from_dict(SpeedrunConfig, json.loads(path.read_text(encoding="utf-8")), str(path)).checked()
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}; put back what it was, or start anew in another folder") from error


class Speedrun:
    """One speedrun in its folder. say : told of every part. observers(stage's name) : see `start`. progress : see `evaluate`."""

    def __init__(self, folder: Path, config: SpeedrunConfig, say: Announce, observers: Observers = lambda *_: (),
                 progress: Callable[[str, int, int], None] = lambda *_: None):  # fmt: skip
        self.folder, self.config, self.say, self.observers, self.progress = Path(folder), config, say, observers, progress
        self.texts, self.world = self.folder / "data", None if config.data else World()
        self.columns: list[tuple[str, Sequence[Result]]] = []
        self.began, self.planned, self.done = time.perf_counter(), {"text": SECONDS["text"] * max(0.1, min(1, config.scale))}, 0.0
        self.planned |= {name: SECONDS[name] * config.scale for name in config.stages()}

    def run(self) -> list[Path] | None:
        """All of it: the card's files; None where it was interrupted (and saved)."""
        self._announce("text")
        self._text()
        for name in self.config.stages():
            self._announce(name)
            if name == "classify":
                complete = all(self._aside(label, head) for label, head in LEARNED.items())
            elif (complete := self._stage(name, self._settings(name))) and name in CHAIN:
                self._measure(name)
            if not complete:
                return None
        self.card = self._card()
        return write_card(self.folder, self.card)

    def _announce(self, name: str) -> None:
        """What comes, and how long it and all the rest may take, judged by how long everything took that was done before it."""
        names = list(self.planned)
        spent, left = time.perf_counter() - self.began, sum(self.planned[n] for n in names[names.index(name) :] if not self._complete(n))
        pace = spent / self.done if self.done else 1.0
        number, count = names.index(name) + 1, len(names)
        self.say(f"\n== {number} of {count}: {name}, about {duration(self.planned[name] * pace)} of {duration(left * pace)} that are left")
        self.done += 0 if self._complete(name) else self.planned[name]

    def _complete(self, name: str) -> bool:
        if name == "text":
            return (self.texts / "text.jsonl").exists()
        folders = [f"classify-{label}" for label in LEARNED] if name == "classify" else [name]
        return all(Run(self.folder / folder).summary.exists() for folder in folders)

    # ---- text ----

    def _text(self) -> None:
        """What each stage learns from; the last file that is written is text.jsonl, so that where it is everything is."""
        final = self.texts / "text.jsonl"
        if final.exists():
            return self.say(f"{final} is there already")
        for name in ("clean", "unique"):
            (self.texts / name).mkdir(parents=True, exist_ok=True)
        if self.world is not None:
            self._examples(self.world)
        raw = self.texts / "raw.jsonl"
        if self.world is not None:
            write_documents(raw, crawl(self.world, self._count(PAGES), self.config.seed))
        documents = list(read_documents(self.config.data or [raw], on_skip=self.say))
        self._said("read", len(documents), sum(len(d.text) for d in documents))
        rules = cleaning(len(documents)) if self.world else CleanConfig()
        figures = clean_into(self.texts / "clean", documents, rules)
        self._said("cleaned", **figures["kept"])
        if not figures["kept"]["documents"]:
            raise ValueError(f"cleaning dropped every document: {self.texts / 'clean' / 'report.html'} says why; give other text, or clean it by "
                             "tinyllm data clean with limits of your own and go through the stages one by one")  # fmt: skip
        cleaned = list(read_documents([self.texts / "clean" / "kept.jsonl"]))
        figures = deduplicate_into(self.texts / "unique", cleaned, DedupConfig())
        self._said(f"without {figures['exact']:,} exact and {figures['near']:,} near duplicates", **figures["kept"])
        unique = read_documents([self.texts / "unique" / "kept.jsonl"])
        write_documents(final, texts_of(unique) if self.world else unique)
        self.say(f"reports: {self.texts / 'clean' / 'report.html'}, {self.texts / 'unique' / 'report.html'}")

    def _said(self, what: str, documents: int, characters: int) -> None:
        self.say(f"{what}: {documents:,} documents, {characters:,} characters")

    def _examples(self, world: World) -> None:
        """Conversations, pairs and sums, and of each some that are held out by construction: none of them is about what is learned from."""
        seed = self.config.seed
        descriptions = dict.fromkeys(item.text for item in world.documents("fact", DESCRIPTIONS, seed))  # each once: held out is held out
        write_documents(self.texts / "descriptions.jsonl", (Document(text, f"description {n}") for n, text in enumerate(descriptions, 1)))
        for split, share in (("train", 1.0), ("test", 0.1)):
            save_records(self.texts / f"conversations-{split}.jsonl", world.documents("dialogue", self._count(DIALOGUES * share), seed, split))
            save_records(self.texts / f"pairs-{split}.jsonl", world.preferences(self._count(PAIRS * share), seed, split))
            save_records(self.texts / f"notes-{split}.jsonl", world.classification(NOTES if split == "train" else 500, seed, split))
            save_records(self.texts / f"sums-{split}.jsonl", world.exercises(self._count(SUMS * share), seed, split))

    def _count(self, usual: float) -> int:
        """Examples: fewer where there is less time to learn from them, though not so few that nothing is there to learn."""
        return round(usual * max(0.1, min(1, self.config.scale)))

    def _files(self, name: str, own: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """What the data of a stage's config says of its files."""
        if self.world is None:
            return dict(data=own)
        return dict(data=(str(self.texts / f"{name}-train.jsonl"),), val_data=(str(self.texts / f"{name}-test.jsonl"),))

    # ---- stages ----

    def _stage(self, name: str, settings: RunConfig) -> bool:
        """Begin it, go on with it, or leave it where it is complete. Whether it is complete now."""
        run = Run(self.folder / name)
        if run.summary.exists():
            self.say(f"{run.folder} is complete already")
            return True
        if run.config.exists():
            self.say(f"going on with {run.folder}")
            return not resume(run, stage_config(run), self.observers(settings.stage)).interrupted
        return not start(settings, run, self.say, self.observers(settings.stage)).interrupted

    def _aside(self, label: str, head: HeadConfig) -> bool:
        self.say(f"-- {label}")
        return self._stage(f"classify-{label}", self._classifier(head))

    def _before(self, name: str) -> BaseConfig:
        chain = self.config.chain()
        return BaseConfig(run=str(self.folder / chain[chain.index(name) - 1]))

    def _steps(self, count: int) -> int:
        return max(2, round(count * self.config.scale))

    def _settings(self, name: str) -> RunConfig:
        c = self.config
        if name == "pretrain":
            return PretrainConfig(
                data=DataConfig(data=(str(self.texts / "text.jsonl"),), vocab_size=VOCAB_SIZE if self.world else None, pack=True, val_fraction=0.02),
                model=MODEL,
                train=TrainConfig(batch=8, steps=self._steps(4500), lr=3e-3, seed=c.seed),
            )
        if name == "encoder":
            data = SentencesConfig(data=(str(self.texts / "descriptions.jsonl"),), val_fraction=0.15)
            return EncoderConfig(data=data, model=ENCODER,
                                 train=EncoderTrainConfig(steps=self._steps(8000), lr=4e-3, weight_decay=0.01, seed=c.seed))  # fmt: skip
        if name == "instruct":
            data = ConversationsConfig(**self._files("conversations", c.conversations))
            return InstructConfig(base=self._before(name), data=data, train=TuneTrainConfig(batch=8, steps=self._steps(1000), lr=1.5e-3, seed=c.seed))
        if name == "dpo":
            return DPOConfig(base=self._before(name), data=PairsConfig(**self._files("pairs", c.pairs)), preference=PreferenceConfig(beta=0.1),
                             train=PreferenceTrainConfig(batch=16, steps=self._steps(100), lr=1e-4, seed=c.seed))  # fmt: skip
        return GRPORunConfig(base=self._before(name), data=TasksConfig(**self._files("sums", c.tasks)), rollouts=GRPOConfig(max_tokens=40),
                             train=RolloutTrainConfig(steps=self._steps(60), lr=3e-4, seed=c.seed))  # fmt: skip

    def _classifier(self, head: HeadConfig) -> RunConfig:
        """Spam, told from a few hundred notes: what pretraining has learned of the world's language is what it takes."""
        base = BaseConfig(run=str(self.folder / "pretrain"))
        lr = 5e-4 if head.learn_blocks is None else 1e-2  # a head alone, which begins at 0, has a long way to go
        return ClassifyConfig(base=base, data=LabelledConfig(**self._files("notes", ())), head=head,
                              train=AnswerTrainConfig(batch=16, steps=self._steps(120), lr=lr, seed=self.config.seed))  # fmt: skip

    # ---- measuring ----

    def tasks(self) -> Sequence[Task]:
        """What every stage is measured by."""
        if self.world is not None:
            return world_tasks(self.world)
        model, tokenizer, _ = load_run(self.folder / "pretrain")
        return [validation_task(Run(self.folder / "pretrain"), tokenizer)]

    def _measure(self, name: str) -> None:
        model, tokenizer, _ = load_run(self.folder / name)
        results = evaluate(model, tokenizer, self.tasks(), progress=self.progress)
        for result in results:
            figures = ", ".join(f"{figure.metric.title} {figure.value:.3f}" for figure in list(result.figures().values())[:1])
            self.say(f"{name}: {result.task}: {figures}")
        self.columns.append((name, results))

    def _card(self) -> Card:
        seconds = time.perf_counter() - self.began
        facts = [("stages", ", ".join(self.config.stages())), ("updates, as a share of what is usual", f"{self.config.scale:g}"),
                 ("minutes, of the process that wrote this", f"{seconds / 60:.1f}"),
                 ("seed", str(self.config.seed))]  # fmt: skip
        curves = [dataclasses.replace(curve, title=f"{curve.title}, {name}") for name in self.config.chain()
                  for curve in reward_curve(Run(self.folder / name)) or training_curve(Run(self.folder / name))]  # GRPO's loss says nothing
        asides = dict(classify=self._classified, encoder=self._encoder)
        tables = [table() for name, table in asides.items() if name in self.config.stages()]
        return Card(f"Report card of {self.folder}", self.columns, facts, curves, tables=tables)

    def _classified(self) -> Table:
        rows = []
        for label in LEARNED:
            summary = json.loads(Run(self.folder / f"classify-{label}").summary.read_text())
            figures = summary["figures"]
            rows.append([label, f"{figures['accuracy']:.1%}", f"{figures['macro_f1']:.3f}", f"{summary['parameters']:,}"])
        return Table(f"Spam, from {NOTES} notes", ["what learned", "accuracy", "macro F1", "parameters learned"], rows)

    def _encoder(self) -> Table:
        """What it tells of held-out descriptions, beside the best that anybody could who knows the world and how masks are drawn."""
        model, tokenizer, config = load_module(self.folder / "encoder")
        work = STAGES["encoder"].open(config, Run(self.folder / "encoder"), tokenizer, model)
        few = list(islice(work.validation.all(), EXAMINED))  # the best takes longer to find out
        found, of_few = (masked_metrics(model, batches) for batches in (work.validation.all(), few))
        masks = [int(np.count_nonzero(batch.targets != IGNORE)) for batch in few]
        best = np.average([best_masked_in_pairs(self.world, tokenizer, batch) for batch in few], weights=masks)
        rows = [[f"masked tokens ({sum(masks)}, for which the best was worked out)", f"{of_few['mlm_accuracy']:.1%}", f"{best:.1%}"],
                ["masked tokens, all", f"{found['mlm_accuracy']:.1%}", "–"],
                ["next sentences", f"{found['nsp_accuracy']:.1%}", f"{best_next_sentence_accuracy(self.world):.1%}"]]  # fmt: skip
        return Table("Encoder: held-out descriptions told right", ["what", "model", "best possible"], rows)


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """A .jsonl file of texts with their sources."""
    write_records(path, map(dataclasses.asdict, documents))
