"""Write model.npz: what transformers' models say for the weights of test_nn_parity. Run in this folder, in an environment with `peers`.

For each model: its loss, the scores after the last position, and the gradients of all parameters, in our order and layout, in one row.

transformers computes norms, softmax and angles in float32 whatever the model's dtype. To compare at 1e-9, `in_float64` makes the name
float32 stand for float64 while its code runs; the code itself stays as published.
"""
import re
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2Config
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_nn_parity import MODELS, config_of, inputs

GPT2_BLOCK = {
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.query attention.key attention.value",  # one matrix for all three
    "attn.c_proj": "attention.output",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
GPT = {"transformer.wte": "embedding", "transformer.wpe": "position_embedding", "transformer.ln_f": "norm", "transformer.h.#": GPT2_BLOCK}
GPT1 = {"transformer.tokens_embed": "embedding", "transformer.positions_embed": "position_embedding", "transformer.h.#": GPT2_BLOCK}
MPT_BLOCK = {
    "norm_1": "attention_norm",
    "attn.Wqkv": "attention.query attention.key attention.value",
    "attn.out_proj": "attention.output",
    "norm_2": "mlp_norm",
    "ffn.up_proj": "mlp.up",
    "ffn.down_proj": "mlp.down",
}
MPT = {"transformer.wte": "embedding", "transformer.norm_f": "norm", "transformer.blocks.#": MPT_BLOCK}
LLAMA_BLOCK = {
    "input_layernorm": "attention_norm",
    **{f"self_attn.{theirs}": f"attention.{ours}" for theirs, ours in [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")]},
    "self_attn.o_proj": "attention.output",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
LLAMA = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head", "model.layers.#": LLAMA_BLOCK}


@contextmanager
def in_float64():
    """torch.float32, torch.float and Tensor.float() mean float64 inside."""
    kept = torch.get_default_dtype()
    with ExitStack() as stack:
        for name in ("float32", "float"):
            stack.enter_context(mock.patch.object(torch, name, torch.float64))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        torch.set_default_dtype(torch.float64)
        stack.callback(torch.set_default_dtype, kept)
        yield


def build(name):
    """transformers' model for one of MODELS, and the table from its modules' names to ours."""
    c = config_of(name)
    sizes = dict(vocab_size=c.vocab_size, bos_token_id=0, eos_token_id=0)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    gpt = dict(sizes, **off, n_positions=c.context, n_embd=c.width, n_layer=c.layers, n_head=c.heads, layer_norm_epsilon=c.norm_eps)
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt, n_inner=c.mlp_width, activation_function="gelu_new")), GPT
    if name.startswith("gpt1"):
        return transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**gpt, afn="gelu")), GPT1
    if name.startswith("mpt"):
        config = transformers.MptConfig(
            **sizes, d_model=c.width, n_heads=c.heads, n_layers=c.layers, max_seq_len=c.context, layer_norm_epsilon=c.norm_eps
        )
        return transformers.MptForCausalLM(config), MPT
    rope = dict(rope_type=c.rope_scaling or "default", rope_theta=c.rope_theta)
    if c.rope_scaling:
        rope |= dict(factor=c.rope_factor, original_max_position_embeddings=int(c.context / c.rope_factor))
    if c.rope_scaling == "llama3":
        rope |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    settings = dict(
        sizes, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_width, max_position_embeddings=c.context, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie, rope_parameters=rope, attn_implementation="sdpa",
    )  # fmt: skip
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, dict(sliding_window=c.window)),
    }
    config, model, more = kinds[name.partition(" ")[0]]
    return model(config(**settings, **more)), LLAMA


def our_names(their_name, table) -> list[str]:
    """The parameter, or the parameters side by side, that one of theirs holds."""
    module, _, kind = their_name.rpartition(".")
    if block := re.match(r"(.*?)\.(\d+)\.(.*)", module):
        prefix, number, rest = block.groups()
        return [f"blocks.{number}.{ours}.{kind}" for ours in table[f"{prefix}.#"][rest].split()]
    return [f"{table[module]}.{kind}"]


def theirs(name):
    """By transformers: the loss, the last position's scores, and each parameter's gradient, in our order and layout."""
    weights, ids, targets = inputs(name)
    with in_float64():
        model, table = build(name)
        model.eval()
        holders = {their_name: our_names(their_name, table) for their_name, _ in model.named_parameters()}
        assert sorted(n for names in holders.values() for n in names) == sorted(weights), "the models have other parameters"
        transposed = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
        with torch.no_grad():
            for their_name, p in model.named_parameters():
                value = np.concatenate([weights[n] for n in holders[their_name]])
                p.copy_(torch.tensor(value.T if their_name in transposed else value))
        scores = model(torch.tensor(ids)).logits
        assert scores.dtype == torch.float64
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.tensor(targets).flatten())
        loss.backward()
    gradients = {}
    for their_name, p in model.named_parameters():
        gradient = p.grad.numpy().T if their_name in transposed else p.grad.numpy()
        ends = np.cumsum([len(weights[n]) for n in holders[their_name]])[:-1]
        gradients |= dict(zip(holders[their_name], np.split(gradient, ends), strict=True))
    return [loss.detach().numpy(), scores.detach().numpy()[:, -1], *(gradients[n] for n in weights)]


def gemma2_attention(x, dy, weights, softcap):
    """Gemma 2's attention layer, its rotation switched off: y and the gradients of x and of the weights, in our order."""
    C, T = x.shape[-1], x.shape[1]
    H, G = 4, 2
    config = Gemma2Config(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=G, head_dim=C // H, query_pre_attn_scalar=C // H, num_hidden_layers=1,
        attn_logit_softcapping=softcap, attn_implementation="eager", sliding_window=100,
    )  # fmt: skip
    with in_float64():
        layer = Gemma2Attention(config, layer_idx=0).eval()
        ours = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
        parameters = [getattr(layer, name).weight for name in ours]
        with torch.no_grad():
            for p, name in zip(parameters, ours.values(), strict=True):
                p.copy_(torch.tensor(weights[f"{name}.weight"]))
        x = torch.tensor(x, requires_grad=True)
        still = (torch.ones(1, T, C // H), torch.zeros(1, T, C // H))
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        y = layer(x, position_embeddings=still, attention_mask=mask)[0]
        y.backward(torch.tensor(dy))
    return [y.detach().numpy(), x.grad.numpy(), *(p.grad.numpy() for p in parameters)]


if __name__ == "__main__":
    arrays = {}
    for name in MODELS:
        loss, scores, *gradients = theirs(name)
        row = np.concatenate([g.reshape(-1) for g in gradients])
        arrays |= {f"{name}: loss": loss, f"{name}: scores": scores, f"{name}: gradients": row}
    np.savez_compressed("model.npz", **arrays)
