"""tinyllm: a large language model from the derivative up, in NumPy.

    from tinyllm import Tensor, gradcheck, ops

README.md gives the order in which to read the package.
"""
from pathlib import Path

from tinyllm import ops
from tinyllm.anomaly import detect_anomaly
from tinyllm.gradcheck import gradcheck
from tinyllm.recompute import checkpoint
from tinyllm.tensor import Tensor, no_grad, op
from tinyllm.threads import threads

if Path(__file__).with_name("kernels").is_dir():  # may be deleted: then every op is computed by its definition
    import tinyllm.kernels.cpu

__version__ = "0.1.0"
__all__ = ["Tensor", "checkpoint", "detect_anomaly", "gradcheck", "no_grad", "op", "ops", "threads"]
