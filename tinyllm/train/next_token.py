"""The loss of language models, in pretraining and in tuning: how surprising each next token was."""
from collections.abc import Callable

from tinyllm import ops
from tinyllm.data import IGNORE, Batch
from tinyllm.nn import Transformer
from tinyllm.tensor import Tensor
from tinyllm.train.config import TrainConfig


def next_token_loss(config: TrainConfig) -> Callable[..., Tensor]:
    """loss_fn(model, batch, rng): mean cross-entropy of each next token that counts, without ever holding all scores.

    Ids, targets and documents stay NumPy arrays, wherever the model is: so they can be checked without waiting for a device.
    """

    def loss(model: Transformer, batch: Batch, rng) -> Tensor:
        hidden = model.hidden(batch.ids, documents=batch.documents, rng=rng)
        smoothing = {} if rng is None else dict(label_smoothing=config.label_smoothing, z_loss=config.z_loss)  # evaluation is plain
        return ops.linear_cross_entropy(hidden, model.output_weight, batch.targets, ignore_index=IGNORE, **smoothing)

    return loss
