"""Write ops.npz: what PyTorch and transformers say about the ops. Run in this folder, in an environment with the `peers` extra.

cases, values      for every case of tinyllm.ops.cases, in float64: y and the gradients, all in one row; `cases` is the JSON of their shapes
rope_…             the frequencies (and the sharpness, last) of transformers' RoPE scalings
rounding           SHA-256 of bf16 and fp16 roundings of `rounding_inputs()`, NaN left out
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_backend import rounding_digest, rounding_inputs
from torch_twins import values_and_gradients

from tinyllm.ops.cases import CASES

ROPE = {  # name: (settings of transformers, length of the sequence)
    "plain": (None, None),
    "linear": (dict(rope_type="linear", factor=4.0), None),
    "ntk": (dict(rope_type="dynamic", factor=1.0), 4 * 2048),
    "llama3": (dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024), None),
    "yarn": (dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=4096), None),
    "yarn_bounds": (dict(rope_type="yarn", factor=4.0, beta_fast=20.0, beta_slow=2.0, original_max_position_embeddings=300), None),
}


def rope_frequencies(name, head_width=32, theta=500000.0):
    """transformers' inverse frequencies, and its factor on cos and sin, in one row."""
    settings, length = ROPE[name]
    config = LlamaConfig(hidden_size=4 * head_width, num_attention_heads=4, max_position_embeddings=2048)
    config.rope_parameters = dict(settings or dict(rope_type="default"), rope_theta=theta)
    if settings is None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        frequencies, sharpness = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, sharpness = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, "cpu", seq_len=length)
    return np.append(frequencies.double().numpy(), sharpness)


def rounded(precision) -> np.ndarray:
    return torch.tensor(rounding_inputs()).to({"bf16": torch.bfloat16, "fp16": torch.float16}[precision]).float().numpy()


if __name__ == "__main__":
    found = {f"{case.op}: {case.label}": values_and_gradients(case) for case in CASES}
    shapes = {name: [list(a.shape) for a in arrays] for name, arrays in found.items()}
    np.savez_compressed(
        "ops.npz",
        cases=json.dumps(shapes),
        values=np.concatenate([a.reshape(-1) for arrays in found.values() for a in arrays]),
        rounding=json.dumps({precision: rounding_digest(rounded(precision)) for precision in ("bf16", "fp16")}),
        **{f"rope_{name}": rope_frequencies(name) for name in ROPE},
    )
