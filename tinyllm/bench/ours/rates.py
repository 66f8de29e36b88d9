"""How fast this machine does what bounds the work, when it does nothing else."""
from tinyllm.bench import gpu, machine
from tinyllm.threads import single_threaded_blas, threads

WORK = {"product": machine.product, "reading": machine.reading, "gpu product": gpu.product, "gpu copy": gpu.copying}


def run(settings, meter):
    """settings["what"], again and again."""
    threads(settings["threads"])
    work, _ = WORK[settings["what"]]()
    if settings["what"].startswith("gpu"):
        meter.wait = gpu.wait_for_gpu
    meter.start()
    with single_threaded_blas():  # for each of our threads
        for _ in range(meter.units):
            work()
            meter.tick()
