"""Which blocks the kernels of whole modules know. Anything else, a layer of one's own above all, is computed as it is written."""
import numpy as np

from tinyllm.nn.attention import Attention
from tinyllm.nn.layers import LayerNorm, Linear, RMSNorm, storage
from tinyllm.nn.mlp import MLP, GatedMLP

INPUTS = {MLP: lambda mlp: (mlp.up,), GatedMLP: lambda mlp: (mlp.gate, mlp.up)}  # the maps into the inner width, as the activation takes them


def known(block, x) -> bool:
    """Whether the block is made of known layers alone, and its numbers are NumPy's floats of x's kind, not rounded to 16 bits in between."""
    dtype = x.data.dtype
    if dtype.char not in "fd" or block.stored is not storage("fp32") or not known_layers(block):
        return False
    arrays = [x.data, *(layer.weight.data for layers in linears_and_norms(block) for layer in layers)]
    return all(isinstance(a, np.ndarray) and a.dtype == dtype for a in arrays)


def known_layers(block) -> bool:
    """Whether the block is made of known layers alone, wherever their numbers are."""
    if type(block.attention) is not Attention or type(block.mlp) not in INPUTS:
        return False
    linears, norms = linears_and_norms(block)
    return all(type(layer) is Linear for layer in linears) and all(type(layer) in (LayerNorm, RMSNorm) for layer in norms)


def linears_and_norms(block) -> tuple[list, list]:
    """The layers that hold the weights of a block whose attention and MLP are of the known kinds; the norms of queries and keys left out."""
    a, mlp = block.attention, block.mlp
    return [a.query, a.key, a.value, a.output, mlp.down, *INPUTS[type(mlp)](mlp)], [block.attention_norm, block.mlp_norm]
