"""How fast this machine multiplies matrices."""
from tinyllm.bench.machine import product
from tinyllm.threads import single_threaded_blas, threads


def run(settings, meter):
    """A large fp32 product, again and again."""
    threads(settings["threads"])
    work, _ = product()
    with single_threaded_blas():  # for each of our threads
        for _ in range(meter.units):
            work()
            meter.tick()
