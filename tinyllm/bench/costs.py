"""What a piece of work costs at least, in closed form: arithmetic of training, reading of decoding.

A multiplication and an addition are two operations. A product of a token's vector with a matrix of N weights takes 2·N forward and twice
that backward (for the input's gradient and for the weights'); embeddings are looked up, not multiplied. A query meets the keys up to its
own, (T + 1)/2 on average, with 2·D for the score and 2·D for the mean of the values, in each of H heads, C = H·D:

    training   6·N + 12·L·C·(T + 1)/2   per token        N: weights of the blocks, and V·C of the output head
    decoding   4·N bytes                 per step         every weight is read once, for the whole batch; 2·N in 16 bits

This is what must be done, not what is done: work that is repeated, or spent on pairs that a mask hides, makes the rate no better.

What is published as model FLOPs utilisation (MFU) counts all T keys for each query, though the mask hides half of them:

    training   6·N + 12·L·H·D·T          per token        Chowdhery et al. 2022 (PaLM), appendix B; nanoGPT's estimate_mfu
"""
from tinyllm.nn import TransformerConfig
from tinyllm.nn.describe import describe


def weights_in_products(config: TransformerConfig) -> int:
    """N: the entries of all matrices that a token's vector is multiplied with."""
    config = config.resolved()
    matrices = ("query", "key", "value", "output", "gate", "up", "down")
    biases = 1 if config.bias else 0
    blocks = 0
    for part in describe(config).parts:
        if part.name in matrices:
            outputs = int(part.shape.partition(" ")[0])
            blocks += (part.parameters - biases * outputs) * part.count
    return blocks + config.vocab_size * config.width


def training_flops(config: TransformerConfig) -> float:
    """Operations per token of a training step on full windows."""
    return 6 * weights_in_products(config) + 12 * config.layers * config.width * (config.context + 1) / 2


def model_flops(config: TransformerConfig) -> float:
    """Operations per token of a training step as MFU counts them, hidden pairs included."""
    return 6 * weights_in_products(config) + 12 * config.layers * config.width * config.context


def decoding_bytes(config: TransformerConfig) -> int:
    """Bytes of weights that each step of decoding reads."""
    return weights_in_products(config) * (4 if config.precision == "fp32" else 2)
