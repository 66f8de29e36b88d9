"""Training steps through the one training loop, timed from record to record, as its observers see them."""
from tinyllm import threads
from tinyllm.backend import device_module, random_stream
from tinyllm.bench import gpu
from tinyllm.bench.cases import GPT
from tinyllm.bench.gpu_profiler import GpuProfiler
from tinyllm.bench.profiler import Profiler
from tinyllm.data.batches import Batch
from tinyllm.nn import Transformer
from tinyllm.train import next_token_loss, train
from tinyllm.train.config import TrainConfig


def run(settings, meter):
    """meter.units times settings["steps"] steps on one batch of random tokens."""
    threads(settings["threads"])
    shape, steps, device = GPT.of(settings), settings["steps"], settings["device"]
    xp = device_module(device)
    config = TrainConfig(
        batch=shape.batch, lr=1e-3, min_lr=1e-3, warmup=0, beta1=0.9, beta2=0.99, weight_decay=0.1, clip=1.0, threads=settings["threads"],
        device=device, eval_every=meter.units * steps, log_every=steps,
    ).planned(meter.units * steps)  # fmt: skip
    random = random_stream(0, "bench")
    ids, targets = random.integers(shape.vocab, size=(2, shape.batch, shape.context))
    batch = Batch(ids, targets)
    model = Transformer(shape.config(), random).to(xp)
    meter.profiler = Profiler() if device == "cpu" else GpuProfiler()
    meter.wait = meter.wait if device == "cpu" else gpu.wait_for_gpu
    meter.start()
    observers = [lambda record: meter.tick()]
    train(model, lambda step: [batch], next_token_loss(config), config, observers=observers, precision=shape.precision)
    if device != "cpu":
        meter.notes["peak_mb"] = gpu.pool_mb()
