"""From a trained model to text. Read in this order:

    samplers.py    temperature, top-k, top-p, penalties …: pure functions of logits; and the draw itself
    settings.py    SamplingConfig: what can be chosen
    window.py      what the model sees of growing texts: padding, cache, and the context's end
    decode.py      the decode loop, by its definition, and for a batch with a cache
    beam.py        beam search
    text.py        prompts in, text out: whole characters, stop strings, reasons to end
    reply.py       the next message of a conversation
    chat.py        a conversation that goes on
"""

from tinyllm.generate.beam import Beam, beam_search
from tinyllm.generate.chat import Chat
from tinyllm.generate.decode import Decoding, Step, generate, generate_naive
from tinyllm.generate.reply import replies, stream_replies
from tinyllm.generate.samplers import SAMPLERS
from tinyllm.generate.settings import SamplingConfig
from tinyllm.generate.text import Completion, Piece, complete, stream

__all__ = [
    "SAMPLERS", "Beam", "Chat", "Completion", "Decoding", "Piece", "SamplingConfig", "Step", "beam_search", "complete", "generate", "generate_naive",
    "replies", "stream", "stream_replies",
]
