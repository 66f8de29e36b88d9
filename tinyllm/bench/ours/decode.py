"""Greedy decoding through generate(), with its cache."""
from tinyllm import threads
from tinyllm.backend import random_stream
from tinyllm.bench.cases import GPT
from tinyllm.bench.profiler import Profiler
from tinyllm.generate import SamplingConfig, generate
from tinyllm.nn import Transformer


def run(settings, meter):
    """Continue a batch of random prompts, once for each of meter.units."""
    threads(settings["threads"])
    gpt = GPT(**{name: settings[name] for name in GPT.__dataclass_fields__})
    random = random_stream(0, "bench")
    model = Transformer(gpt.config(), random)
    prompts = random.integers(gpt.vocab, size=(gpt.batch, settings["prompt"])).tolist()
    meter.profiler = Profiler()
    meter.start()
    for _ in range(meter.units):
        for _ in generate(model, prompts, SamplingConfig(max_tokens=settings["new"], temperature=0)):
            pass
        meter.tick()
