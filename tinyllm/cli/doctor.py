"""What this machine and this installation have, what they can do, and what to change. Takes about two seconds."""
import argparse

from tinyllm.bench import Facts, advice, facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose."""


def run(args: argparse.Namespace) -> int:
    """Print the facts and the advice."""
    found = facts()
    print(table(found))
    said = advice(found)
    print("\n" + "\n".join(["to change:", *(f"  - {line}" for line in said)] if said else ["nothing to change"]))
    return 0


def table(f: Facts) -> str:
    """A line for each thing."""
    peers = ", ".join(f"{name} {version}" for name, version in f.peers.items())
    lines = {
        "python": f"{f.python}, NumPy {f.numpy}, {f.system}",
        "cpu": f"{f.cpu} ({f.architecture}); vectors: {' '.join(f.vectors) or 'unknown'}",
        "cores": f"{f.cores} in the machine, {f.affinity} for this process, {f.usable} after the control group's limit",
        "blas": f"{f.blas}; {f.blas_threads} thread{'s' * (f.blas_threads != 1)} by itself",
        "memory": f"{_gib(f.memory)} in all, {_gib(f.free)} free",
        "gpu": f.gpu if isinstance(f.gpu, str) else f"{f.gpu.name}, compute capability {f.gpu.capability}; {_gib(f.gpu.memory)} in all, {_gib(f.gpu.free)} free",
        "cuda": "-" if isinstance(f.gpu, str) else f"driver {f.gpu.driver}, CuPy {f.gpu.cupy}, NVRTC {f.gpu.nvrtc}, cuBLASLt {f.gpu.cublaslt}",
        "kernels": "attached" if f.kernels else "not there",
        "peers": peers or "none: tinyllm bench --peer has nobody to time",
        "products": f"{f.products / 1e9:,.0f} GFLOP/s in fp32 on {f.usable} threads, {f.products_one / 1e9:,.0f} on one",
        "reading": f"{f.reading / 1e9:,.1f} GB/s on {f.usable} threads",
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:,.1f} GiB"
