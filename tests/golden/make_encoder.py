"""Record the loss, scores and gradients of transformers' BERT and pre-norm RoBERTa: python make_encoder.py, where torch and transformers are.

The library has no pre-norm BERT, so BERT's heads stand on the pre-norm RoBERTa's encoder, which is made with two segments.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from make_model import in_float64
from transformers.models.bert.modeling_bert import BertPreTrainingHeads
from transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm import RobertaPreLayerNormModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_encoder_parity import MODELS, batch_of, model_of

from tinyllm.data import IGNORE

LAYER = {  # of BERT
    "attention.self.query": "attention.query", "attention.self.key": "attention.key", "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output", "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.up", "output.dense": "mlp.down", "output.LayerNorm": "mlp_norm",
}  # fmt: skip
PRE_NORM_LAYER = {theirs: ours for theirs, ours in LAYER.items() if "LayerNorm" not in theirs} | {
    "attention.LayerNorm": "attention_norm", "intermediate.LayerNorm": "mlp_norm",
}  # fmt: skip
OUTSIDE = {
    "embeddings.word_embeddings": "encoder.embedding", "embeddings.position_embeddings": "encoder.position_embedding",
    "embeddings.token_type_embeddings": "encoder.segment_embedding", "embeddings.LayerNorm": "encoder.embedding_norm",
    "LayerNorm": "encoder.norm", "pooler.dense": "pooler", "cls.predictions.transform.dense": "transform",
    "cls.predictions.transform.LayerNorm": "transform_norm", "cls.seq_relationship": "next_sentence", "cls.predictions": "",
}  # fmt: skip


def our_name(name: str) -> str:
    """What one of their parameters is called here."""
    module, _, kind = name.rpartition(".")
    if module.startswith("encoder.layer."):
        number, rest = module.removeprefix("encoder.layer.").split(".", 1)
        return f"encoder.blocks.{number}.{(LAYER | PRE_NORM_LAYER)[rest]}.{kind}"
    return f"{OUTSIDE[module]}.{kind}".removeprefix(".")


class WithHeads(torch.nn.Module):
    """BertForPreTraining on any encoder of its family; its parameters' names begin with the encoder's or with cls."""

    def __init__(self, encoder, config):
        super().__init__()
        self.body, self.cls = encoder, BertPreTrainingHeads(config)
        self.cls.predictions.decoder.weight = encoder.embeddings.word_embeddings.weight
        self.cls.predictions.decoder.bias = self.cls.predictions.bias

    def forward(self, positions, **inputs):
        hidden, pooled = self.body(**inputs, **positions)[:2]
        return self.cls(hidden, pooled)


def build(name, c):
    """transformers' model with c's shapes, and what it must be told about positions."""
    settings = dict(
        vocab_size=c.vocab_size, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.mlp_width,
        max_position_embeddings=c.context, layer_norm_eps=c.norm_eps, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        hidden_act="gelu", pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    config = transformers.BertConfig(**settings)
    if name == "bert":
        return WithHeads(transformers.BertModel(config), config), {}
    encoder = RobertaPreLayerNormModel(transformers.RobertaPreLayerNormConfig(**settings, type_vocab_size=2))
    return WithHeads(encoder, config), dict(position_ids=torch.arange(8)[None])  # RoBERTa itself would count from behind the padding's id


def theirs(name):
    """By transformers: the same as the test's `ours`."""
    mine, batch = model_of(name), batch_of()
    weights = {ours: p.data for ours, p in mine.named_parameters()}
    with in_float64():
        model, positions = build(name, mine.config)
        model.eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None  # else the vector of id 0 would get no gradient
        parameters = {our_name(n.removeprefix("body.")): p for n, p in model.named_parameters()}
        assert sorted(parameters) == sorted(weights), "the models have other parameters"
        with torch.no_grad():
            for ours, p in parameters.items():
                p.copy_(torch.tensor(weights[ours]))
        real = torch.tensor(batch.documents == 0)
        tokens, sentences = model(
            positions, input_ids=torch.tensor(batch.ids), token_type_ids=torch.tensor(batch.segments), attention_mask=real.long()
        )
        assert tokens.dtype == torch.float64
        masked = torch.nn.functional.cross_entropy(tokens.flatten(0, 1), torch.tensor(batch.targets).flatten(), ignore_index=IGNORE)
        loss = masked + torch.nn.functional.cross_entropy(sentences, torch.tensor(batch.labels))
        loss.backward()
    gradients = [parameters[ours].grad.numpy() for ours in weights]
    return [loss.detach().numpy(), tokens.detach().numpy()[real.numpy()], sentences.detach().numpy(), *gradients]


if __name__ == "__main__":
    np.savez_compressed("encoder.npz", **{name: np.concatenate([a.reshape(-1) for a in theirs(name)]) for name in MODELS})
