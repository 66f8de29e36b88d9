"""From text on disk to the integer arrays a model reads. In reading order:

records.py   the lines of a .jsonl file, and what is wrong in one
text.py      files and folders -> documents
corpus.py    the text every machine has: Python's own standard library
measures.py  what can be measured of a text without knowing its language
lines.py     in how many documents a line stands, counted in a table of fixed size
clean.py     rules that change a text or drop it, and what each of them did
minhash.py   how alike two texts are: shingles, Jaccard similarity, signatures, bands
dedup.py     which documents say the same as an earlier one
contamination.py   how much of a benchmark stands in the data
report.py    tables as a page
pages.py     what is told of cleaning, of duplicates, and of documents as they are
curate.py    documents -> a folder of better ones, with an account of the others
split.py     documents -> a training part and a validation part
atomic.py    write a file so that it is there whole or not at all
shards.py    a memory-mapped file of token ids, with a header that is checked
prepare.py   documents, a tokenizer and a folder -> train.bin and val.bin
conversations.py, labelled.py   messages for instruction tuning, texts with labels for classification
rows.py      examples in an order of their own for each epoch, padded to a rectangle
packing.py   documents of different lengths -> rows, best fit; batches of them
batches.py   tokens -> arrays (B, T): random windows, epochs, one pass over the validation part
sentences.py, masking.py   for an encoder: pairs of sentences, and rows with masked tokens
show.py      rows made visible: what is trained on, documents, padding
"""
from tinyllm.data.atomic import atomic_file
from tinyllm.data.batches import IGNORE, Batch, Epochs, RandomWindows, validation_batches
from tinyllm.data.clean import CleanConfig, Dropped, clean
from tinyllm.data.contamination import Overlap, contamination
from tinyllm.data.conversations import Conversation, append_conversation, holds_conversations, read_conversations
from tinyllm.data.corpus import standard_library
from tinyllm.data.curate import clean_into, deduplicate_into, describe_into
from tinyllm.data.dedup import DedupConfig, Duplicates, deduplicate
from tinyllm.data.labelled import Labelled, label_names, read_labelled
from tinyllm.data.masking import MaskedBatch, MaskedBatches
from tinyllm.data.packing import PackedRows, pack
from tinyllm.data.prepare import PreparedData, open_prepared, prepare
from tinyllm.data.sentences import Passages, SentencePairs, encode_sentences, sentence_pieces, split_sentences, stored_sentences
from tinyllm.data.shards import Shard, ShardHeader, open_shard, token_dtype, write_shard
from tinyllm.data.show import show, text_rows
from tinyllm.data.split import split
from tinyllm.data.text import Document, read_documents

__all__ = [
    "IGNORE",
    "Batch",
    "CleanConfig",
    "DedupConfig",
    "Conversation",
    "Document",
    "Dropped",
    "Duplicates",
    "Epochs",
    "Overlap",
    "Labelled",
    "MaskedBatch",
    "MaskedBatches",
    "PackedRows",
    "Passages",
    "PreparedData",
    "RandomWindows",
    "SentencePairs",
    "Shard",
    "ShardHeader",
    "append_conversation",
    "atomic_file",
    "clean",
    "clean_into",
    "contamination",
    "deduplicate",
    "deduplicate_into",
    "describe_into",
    "encode_sentences",
    "holds_conversations",
    "label_names",
    "open_prepared",
    "open_shard",
    "pack",
    "prepare",
    "read_conversations",
    "read_documents",
    "read_labelled",
    "sentence_pieces",
    "show",
    "split",
    "split_sentences",
    "standard_library",
    "stored_sentences",
    "text_rows",
    "token_dtype",
    "validation_batches",
    "write_shard",
]
