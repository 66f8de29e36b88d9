"""From text on disk to the integer arrays a model reads. In reading order:

text.py      files and folders -> documents
corpus.py    the text every machine has: Python's own standard library
split.py     documents -> a training part and a validation part
atomic.py    write a file so that it is there whole or not at all
shards.py    a memory-mapped file of token ids, with a header that is checked
prepare.py   documents, a tokenizer and a folder -> train.bin and val.bin
batches.py   tokens -> arrays (B, T): random windows, epochs, one pass over the validation part
"""
from tinyllm.data.atomic import atomic_file
from tinyllm.data.batches import IGNORE, Batch, Epochs, RandomWindows, validation_batches
from tinyllm.data.corpus import standard_library
from tinyllm.data.prepare import PreparedData, open_prepared, prepare
from tinyllm.data.shards import Shard, ShardHeader, open_shard, token_dtype, write_shard
from tinyllm.data.split import split
from tinyllm.data.text import Document, read_documents

__all__ = [
    "IGNORE",
    "Batch",
    "Document",
    "Epochs",
    "PreparedData",
    "RandomWindows",
    "Shard",
    "ShardHeader",
    "atomic_file",
    "open_prepared",
    "open_shard",
    "prepare",
    "read_documents",
    "split",
    "standard_library",
    "token_dtype",
    "validation_batches",
    "write_shard",
]
