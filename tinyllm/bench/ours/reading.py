"""How fast this machine reads weights from memory."""
from tinyllm.bench.machine import reading
from tinyllm.threads import single_threaded_blas, threads


def run(settings, meter):
    """A large matrix times a vector, again and again."""
    threads(settings["threads"])
    work, _ = reading()
    with single_threaded_blas():  # for each of our threads
        for _ in range(meter.units):
            work()
            meter.tick()
