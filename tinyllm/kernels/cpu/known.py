"""Which blocks the kernels of whole modules know. Anything else, a layer of one's own above all, is computed as it is written."""
import numpy as np

from tinyllm.nn.attention import Attention
from tinyllm.nn.layers import LayerNorm, Linear, RMSNorm, storage
from tinyllm.nn.mlp import MLP, GatedMLP

INPUTS = {MLP: lambda mlp: (mlp.up,), GatedMLP: lambda mlp: (mlp.gate, mlp.up)}  # the maps into the inner width, as the activation takes them


def known(block, x) -> bool:
    """Whether the block is made of these layers alone, and its numbers are NumPy's floats of x's kind, not rounded to 16 bits in between."""
    attention, mlp, dtype = block.attention, block.mlp, x.data.dtype
    if type(attention) is not Attention or type(mlp) not in INPUTS:
        return False
    linears = [attention.query, attention.key, attention.value, attention.output, mlp.down, *INPUTS[type(mlp)](mlp)]
    norms = [block.attention_norm, block.mlp_norm]
    if any(type(layer) is not Linear for layer in linears) or any(type(layer) not in (LayerNorm, RMSNorm) for layer in norms):
        return False
    arrays = [x.data, *(layer.weight.data for layer in linears + norms)]
    return dtype.char in "fd" and all(isinstance(a, np.ndarray) and a.dtype == dtype for a in arrays) and block.stored is storage("fp32")
