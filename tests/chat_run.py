"""A run folder whose model has learned a few conversations by heart, in a second or two."""
from pathlib import Path

import numpy as np

from tinyllm.data import Conversation
from tinyllm.finetune import InstructionBatches, encode_conversations
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.optim import AdamW
from tinyllm.stages import PretrainConfig
from tinyllm.tokenizer import BPETokenizer, add_special_tokens
from tinyllm.train import TrainConfig, next_token_loss
from tinyllm.train.checkpoint import save_checkpoint
from tinyllm.train.run import Run

TOKENIZER = add_special_tokens(BPETokenizer([]))  # a token a byte
CONTEXT = 60
TALKS = [[("hi", "hello"), ("and?", "bye")], [("ho", "🙂 so")], [("and?", "no")], [("\x1b[2J", "a\x1bb")]]


def chat_run(folder: Path, steps: int = 120) -> Path:
    """Its folder: a model that answers as TALKS do."""
    run, model = Run(folder), taught(steps)
    folder.mkdir(parents=True)
    TOKENIZER.save(run.tokenizer)
    PretrainConfig(model=model.config).save(run.config)
    save_checkpoint(run.checkpoints, steps, model.state_dict(), {}, dict(config=None, evaluations=[]))
    return folder


def taught(steps: int) -> Transformer:
    model = Transformer(TransformerConfig(vocab_size=TOKENIZER.vocab_size, layers=2, heads=2, width=32, context=CONTEXT), np.random.default_rng(0))
    talks = [Conversation([message for exchange in talk for message in messages(*exchange)], "") for talk in TALKS]
    batch = InstructionBatches(encode_conversations(TOKENIZER, talks, CONTEXT), len(talks), seed=0).batch(0)
    optimizer, loss_fn = AdamW(model.named_parameters(), weight_decay=0.0), next_token_loss(TrainConfig())
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch, None).backward()
        optimizer.step(1e-2)
    return model


def messages(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
