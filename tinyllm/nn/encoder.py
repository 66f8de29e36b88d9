"""The encoder: every token sees those before and after it, and what is missing is read off its place. What it is pretrained with.

    [CLS] The fox lives in the [MASK] . [SEP] It eats fish . [SEP]          segments 0 0 0 … 0 1 1 … 1

    masked language model      at a chosen place, which token stood there?                     token_scores
    next sentence              does the second sentence follow the first in the text?          sentence_scores, from [CLS]

Source: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding".
"""
import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module
from tinyllm.nn.attention import Surroundings
from tinyllm.nn.config import TransformerConfig
from tinyllm.nn.layers import NORMS, Embedding, Linear, storage
from tinyllm.nn.module import Module, Parameter
from tinyllm.nn.transformer import Stack, check_shapes, drop
from tinyllm.tensor import Tensor

SEGMENTS = 2  # a row holds one sentence or two


class Encoder(Stack):
    """A bidirectional stack, BERT's with arch="bert"; pre-norm and all other choices of TransformerConfig do as well.

        x = norm(token + position + segment)          then the blocks, without a causal mask
    """

    causal = False

    def __init__(self, config: TransformerConfig, rng: np.random.Generator, dtype=np.float32):
        super().__init__(config, rng, dtype)
        config = self.config
        self.segment_embedding = Embedding(SEGMENTS, config.width, std=config.init_std, rng=rng, precision=config.precision, dtype=dtype)
        self.embedding_norm = NORMS[config.norm](config, dtype)

    def hidden(self, ids, *, segments=None, documents=None, rng: np.random.Generator | None = None) -> Tensor:
        """The last layer's vectors.     (B, T) int -> (B, T, C)

        segments : (B, T), 0 or 1: which sentence a token belongs to; by default all are 0.
        documents : (B, T) int; a token sees those with its own number only. So padding, which gets a number of its own, is seen by no
        other token; without documents all that is in a row is seen.
        rng : given in training, draws dropout.
        Raises ValueError where the shapes do not match, or T is more than the context.
        """
        check_shapes(ids, documents)
        segments = array_module(ids).zeros(ids.shape, dtype=int) if segments is None else segments
        if segments.shape != ids.shape:
            raise ValueError(f"segments have the shape {segments.shape}, ids {ids.shape}: each token needs its segment")
        positions = self._positions(ids.shape[1])
        x = self.embedding_norm(self.stored(self._embedded(ids, positions) + self.segment_embedding(segments)))
        x = self.stored(drop(x, self.config.dropout, rng))
        rotation = self._rotation(positions, array_module(self.embedding.weight.data))
        return self.stack(x, Surroundings(rotation, None, documents, rng, self.causal))


class MaskedLanguageModel(Module):
    """An encoder and the two heads that it is pretrained with; afterwards only `encoder` is kept, for a Classifier say.

        token scores        norm(gelu(h·W + b))·Eᵀ + c          E: the token embedding (or weights of its own), c: a bias per token
        sentence scores     tanh(h₁·W + b)·Wₙᵀ + bₙ             h₁: the vector of the row's first token, [CLS]
    """

    def __init__(self, config: TransformerConfig, rng: np.random.Generator, dtype=np.float32):
        self.encoder = Encoder(config, rng, dtype)
        self.config = config = self.encoder.config
        options = dict(std=config.init_std, rng=rng, precision=config.precision, dtype=dtype)
        self.transform = Linear(config.width, config.width, **options)
        self.transform_norm = NORMS[config.norm](config, dtype)
        self.head = None if config.tie else Linear(config.width, config.vocab_size, bias=False, **options)
        self.bias = Parameter(np.zeros(config.vocab_size, dtype))
        self.pooler = Linear(config.width, config.width, **options)
        self.next_sentence = Linear(config.width, 2, **options)
        self.stored = storage(config.precision)

    def forward(self, ids, **around) -> tuple[Tensor, Tensor]:
        """Token scores of all places, and sentence scores.     (B, T) int -> (B, T, V), (B, 2)         around : see Encoder.hidden"""
        hidden = self.encoder.hidden(ids, **around)
        return self.token_scores(hidden), self.sentence_scores(hidden)

    def token_scores(self, vectors: Tensor) -> Tensor:
        """What may stand at places with these vectors.     (..., C) -> (..., V)"""
        x = self.transform_norm(self.stored(ops.gelu(self.transform(vectors))))
        weight = self.encoder.embedding.weight if self.head is None else self.head.weight
        return ops.linear(x, self.stored(weight), self.stored(self.bias))

    def sentence_scores(self, hidden: Tensor) -> Tensor:
        """Whether the second sentence follows the first (0) or is any other (1).     (B, T, C) -> (B, 2)"""
        return self.next_sentence(self.stored(self.pooler(hidden[:, 0]).tanh()))
