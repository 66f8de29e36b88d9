"""The loss of language models, in pretraining and in tuning: how surprising each next token was."""
from collections.abc import Callable

from tinyllm import ops
from tinyllm.backend import array_module
from tinyllm.data import IGNORE, Batch
from tinyllm.nn import Transformer
from tinyllm.tensor import Tensor
from tinyllm.train.config import TrainConfig


def next_token_loss(config: TrainConfig) -> Callable[..., Tensor]:
    """loss_fn(model, batch, rng): mean cross-entropy of each next token that counts, without ever holding all scores.

    Ids and targets stay NumPy arrays, wherever the model is: so they can be checked without waiting for a device.
    """

    def loss(model: Transformer, batch: Batch, rng) -> Tensor:
        documents = None if batch.documents is None else array_module(model.embedding.weight.data).asarray(batch.documents)
        hidden = model.hidden(batch.ids, documents=documents, rng=rng)
        smoothing = {} if rng is None else dict(label_smoothing=config.label_smoothing, z_loss=config.z_loss)  # evaluation is plain
        return ops.linear_cross_entropy(hidden, model.output_weight, batch.targets, ignore_index=IGNORE, **smoothing)

    return loss
