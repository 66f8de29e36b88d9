"""Greedy decoding through generate(), with its cache."""
from tinyllm import threads
from tinyllm.backend import device_module, random_stream
from tinyllm.bench import gpu
from tinyllm.bench.cases import GPT
from tinyllm.bench.profiler import Profiler
from tinyllm.generate import SamplingConfig, generate
from tinyllm.nn import Transformer


def run(settings, meter):
    """Continue a batch of random prompts, once for each of meter.units."""
    threads(settings["threads"])
    shape, device = GPT.of(settings), settings["device"]
    random = random_stream(0, "bench")
    model = Transformer(shape.config(), random).to(device_module(device))
    prompts = random.integers(shape.vocab, size=(shape.batch, settings["prompt"])).tolist()
    meter.profiler = Profiler()
    meter.wait = meter.wait if device == "cpu" else gpu.wait_for_gpu
    meter.start()
    for _ in range(meter.units):
        for _ in generate(model, prompts, SamplingConfig(max_tokens=settings["new"], temperature=0)):
            pass
        meter.tick()
    if device != "cpu":
        meter.notes["peak_mb"] = gpu.pool_mb()
