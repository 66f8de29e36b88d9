"""The main job, from raw text to a trained model: text -> tokenizer -> token shards -> model -> loop -> summary."""
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyllm import ops
from tinyllm.backend import array_module, device_module, random_stream
from tinyllm.data import (
    IGNORE,
    Batch,
    Document,
    Epochs,
    PreparedData,
    RandomWindows,
    open_prepared,
    prepare,
    read_documents,
    standard_library,
    validation_batches,
)
from tinyllm.nn import Transformer
from tinyllm.tensor import Tensor
from tinyllm.threads import available_cores, threads
from tinyllm.tokenizer import CharTokenizer, Tokenizer, load_tokenizer, train_bpe
from tinyllm.train.config import VOCAB_SIZE, DataConfig, RunConfig, TrainConfig
from tinyllm.train.interrupt import stop_on_signal
from tinyllm.train.loop import Outcome, mean_loss, train
from tinyllm.train.parallel import DataParallel
from tinyllm.train.run import Log, Run
from tinyllm.train.shortage import shortage_explained
from tinyllm.train.store import Store
from tinyllm.train.summary import write_summary
from tinyllm.train.trainer import Diverged, Trainer

Announce = Callable[[str], None]


def next_token_loss(config: TrainConfig) -> Callable[..., Tensor]:
    """The loss of pretraining: mean cross-entropy of each next token, without ever holding all scores.

    Ids and targets stay NumPy arrays, wherever the model is: so they can be checked without waiting for a device.
    """

    def loss(model: Transformer, batch: Batch, rng) -> Tensor:
        documents = None if batch.documents is None else array_module(model.embedding.weight.data).asarray(batch.documents)
        hidden = model.hidden(batch.ids, documents=documents, rng=rng)
        smoothing = {} if rng is None else dict(label_smoothing=config.label_smoothing, z_loss=config.z_loss)  # evaluation is plain
        return ops.linear_cross_entropy(hidden, model.output_weight, batch.targets, ignore_index=IGNORE, **smoothing)

    return loss


def start(config: RunConfig, run: Run, announce: Announce, observers: Callable[..., Sequence] = lambda *_: ()) -> Outcome:
    """A new run in a folder that holds none. observers(model, tokenizer, steps) gives the loop's observers besides the log."""
    run.begin()
    try:
        config = config.checked()
        xp = _prepare(config.train)
        tokenizer, data = make_data(config.data, config.train.seed, run, announce)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
        batches, _ = _batches(config, data, tokenizer)
        with shortage_explained(config):
            model = _model(config, xp)
            plan = config.train if config.train.steps else timed(model, batches, config, data, seconds=60 * (config.train.minutes or 3))
        config = dataclasses.replace(config, train=plan.planned(plan.steps))
        config.save(run.config)
    except BaseException:  # Ctrl-C too: a folder in which nothing was trained shall not stand in the way of the next try
        run.discard()
        raise
    run.preparing.unlink()
    return _go_on(config, run, model, tokenizer, data, observers)


def resume(run: Run, config: RunConfig, observers: Callable[..., Sequence] = lambda *_: ()) -> Outcome:
    """Continue the run in a folder from its newest checkpoint (or its beginning, where it was killed before the first)."""
    xp = _prepare(config.train)
    try:
        tokenizer = load_tokenizer(run.tokenizer)
        data = open_prepared(run.data, tokenizer.fingerprint())
        if config.data.val_fraction and data.val is None:
            raise FileNotFoundError(f"{run.data / 'val.bin'}: no such token shard")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"cannot resume {run.folder}: {error}. Put the file back from a copy, or start a new run") from error
    run.preparing.unlink(missing_ok=True)
    with shortage_explained(config):
        model = _model(config, xp)
    return _go_on(config, run, model, tokenizer, data, observers)


def _prepare(config: TrainConfig):
    """Set what is one setting of the process; the array library of the device."""
    threads(config.threads or available_cores())  # a resumed run keeps its number, on which the last bits of sums depend
    return device_module(config.device)


def make_data(config: DataConfig, seed: int, run: Run, announce: Announce) -> tuple[Tokenizer, PreparedData]:
    """Read the text, get the tokenizer, and write both parts as token shards into the run folder."""
    tokenizer = given_tokenizer(config.tokenizer)  # before the text is read: a wrong path should be known at once
    documents = list(read_documents(config.data, on_skip=announce) if config.data else standard_library(on_skip=announce))
    characters = sum(len(d.text) for d in documents)
    announce(f"text: {len(documents):,} document{'s' * (len(documents) != 1)}, {characters:,} characters")
    tokenizer = tokenizer or make_tokenizer(config, documents, characters)
    tokenizer.save(run.tokenizer)
    announce(f"tokenizer: {config.tokenizer}, {tokenizer.vocab_size:,} entries")
    data = prepare(documents, tokenizer, run.data, config.val_fraction, seed)
    parts = f"{len(data.train):,} for training, {len(data.val) if data.val else 0:,} for validation"
    announce(f"tokens: {parts}; {data.train.header.text_bytes / max(len(data.train), 1):.2f} bytes per token")
    return tokenizer, data


def given_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer in a file or run folder; None for the kinds that are to be trained."""
    if name in ("bpe", "char"):
        return None
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"--tokenizer {name}: it takes bpe, char, or the path of a tokenizer file or run folder, and there is no such path")
    return load_tokenizer(path)


def make_tokenizer(config: DataConfig, documents: list[Document], characters: int) -> Tokenizer:
    """Train the kind that is asked for on the documents."""
    texts = (d.text for d in documents)
    if config.tokenizer == "char":
        return CharTokenizer.train(texts)
    if config.vocab_size:
        return train_bpe(texts, config.vocab_size)
    return train_bpe(texts, min(VOCAB_SIZE, 257 + characters // 250), or_fewer=True)


def timed(model, batches, config: RunConfig, data: PreparedData, seconds: float) -> TrainConfig:
    """config.train with as many updates as fit into this many seconds, judged by a few gradients that are thrown away.

    Evaluations are part of the time. Where --eval-every leaves it open, there are ten, or as many as a tenth of the time allows.
    The plan is made once, before the first update, so that everything after it is a pure function of the step number.
    """
    c = config.train
    began, times = time.perf_counter(), []
    with DataParallel(Trainer(model, next_token_loss(c), c), batches) as trial:
        while len(times) < 3 or (time.perf_counter() - began < seconds / 30 and len(times) < 20):
            start = time.perf_counter()
            _, square = trial.gradients()
            float(square)  # waits until a device has done all that
            times.append(time.perf_counter() - start)
    step = sorted(times)[len(times) // 2] * 1.05  # the update itself, and the log, come on top
    forward = step / (3 * c.accumulate)  # a third of a micro-batch's step
    whole = -(-len(data.val) // (c.batch * config.model.context)) * forward if data.val else 0.0  # the evaluation at the very end
    partial = min(whole, c.eval_batches * forward)
    left = seconds - (time.perf_counter() - began) - whole - partial
    if c.eval_every:
        return dataclasses.replace(c, steps=max(1, int(left / (step + partial / c.eval_every))))
    evaluations = max(1, min(10, int(0.1 * left / partial))) if partial else 10
    steps = max(1, int((left - evaluations * partial) / step))
    return dataclasses.replace(c, steps=steps, eval_every=-(-steps // evaluations))


def _model(config: RunConfig, xp) -> Transformer:
    return Transformer(config.model, random_stream(config.train.seed, "weights")).to(xp)


def _batches(config: RunConfig, data: PreparedData, tokenizer: Tokenizer):
    """Two functions: step -> its micro-batches, and whether all -> the validation batches."""
    c, context = config.train, config.model.context
    separator = tokenizer.end_of_text if config.data.document_mask else None
    if config.data.document_mask and separator is None:
        raise ValueError("--document-mask needs a tokenizer with <|endoftext|>, which the char tokenizer has not: use --tokenizer bpe")
    windows = (Epochs if config.data.epochs else RandomWindows)(data.train.tokens, context, c.batch, c.seed, separator)

    def validation(everything: bool):
        count = -(-(len(data.val) - 1) // (context * c.batch))
        return validation_batches(data.val.tokens, context, c.batch, separator, every=1 if everything else max(1, -(-count // c.eval_batches)))

    if data.val:
        next(validation(True))  # raises where the part is too short
    return (lambda n: [windows.batch(n * c.accumulate + i) for i in range(c.accumulate)]), validation


def _go_on(config, run, model, tokenizer, data, observers) -> Outcome:
    batches, validation = _batches(config, data, tokenizer)
    store = Store(run.checkpoints, config.train.keep, config)
    loss_fn = next_token_loss(config.train)
    log = Log(run.log, store.newest_step())
    watching = [log, *observers(model, tokenizer, config.train.steps)]
    try:
        with run.lock(), stop_on_signal() as stop, shortage_explained(config):
            outcome = train(
                model, batches, loss_fn, config.train, validation=(lambda: validation(False)) if data.val else None,
                store=store, observers=watching, stop=stop, precision=config.model.precision,
            )  # fmt: skip
            log.open()  # where no step was left to do, nothing has opened it
            if not outcome.interrupted:  # still in the block: a signal that comes now finds the run all but done
                val_loss = mean_loss(model, loss_fn, validation(True)) if data.val else None
                write_summary(run, config, outcome, data, val_loss)
    except Diverged as error:
        newest = store.newest_step()
        raise Diverged(f"{error}. {f'The newest checkpoint is of step {newest}' if newest else 'There is no checkpoint yet'}") from error
    finally:
        log.close()
    return outcome
