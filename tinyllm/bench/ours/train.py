"""Training steps through the one training loop, timed from record to record, as its observers see them."""
from tinyllm import threads
from tinyllm.backend import random_stream
from tinyllm.bench.cases import GPT
from tinyllm.bench.profiler import Profiler
from tinyllm.data.batches import Batch
from tinyllm.nn import Transformer
from tinyllm.train import next_token_loss, train
from tinyllm.train.config import TrainConfig


def run(settings, meter):
    """meter.units steps on one batch of random tokens."""
    threads(settings["threads"])
    gpt = GPT(**{name: settings[name] for name in GPT.__dataclass_fields__})
    config = TrainConfig(
        batch=gpt.batch, lr=1e-3, min_lr=1e-3, warmup=0, beta1=0.9, beta2=0.99, weight_decay=0.1, clip=1.0, threads=settings["threads"]
    ).planned(meter.units)
    random = random_stream(0, "bench")
    ids, targets = random.integers(gpt.vocab, size=(2, gpt.batch, gpt.context))
    batch = Batch(ids, targets)
    model = Transformer(gpt.config(), random)
    meter.profiler = Profiler()
    meter.start()
    train(model, lambda step: [batch], next_token_loss(config), config, observers=[lambda record: meter.tick()])
