"""The model, from its layers up. Reading order:

module       parameters by walking attributes          layers      Linear, Embedding, norms
config       every choice of a transformer             mlp         GELU MLP, SwiGLU
cache        keys and values of earlier tokens         attention   the attention layer
transformer  blocks, the decoder                       encoder     both ways: masked tokens, next sentences
describe     parameters, FLOPs and memory before a run
freeze       which weights are learned                 lora        adapters beside frozen weights
classifier   scores of classes from a model's vectors vocabulary  rows for new tokens
cases        the table of layers with which gradients are checked                 device_memory   that memory on a GPU
"""
from tinyllm.nn.attention import Attention
from tinyllm.nn.cache import KVCache
from tinyllm.nn.classifier import Classifier
from tinyllm.nn.config import ARCHITECTURES, TransformerConfig
from tinyllm.nn.encoder import Encoder, MaskedLanguageModel
from tinyllm.nn.freeze import freeze, unfreeze
from tinyllm.nn.layers import Embedding, LayerNorm, Linear, RMSNorm
from tinyllm.nn.lora import LoRA, LoRAConfig, LoRALinear, merge_adapters
from tinyllm.nn.mlp import MLP, GatedMLP
from tinyllm.nn.module import Module, Parameter
from tinyllm.nn.transformer import Block, Stack, Transformer
from tinyllm.nn.vocabulary import grow_vocabulary
