"""Training a byte-level BPE and encoding with it, by Hugging Face's tokenizers, which uses all its threads for many texts at once."""
import os
from pathlib import Path

CHUNK = 100_000  # characters of each text that training is given
PIECE = 20_000  # characters of each text that is encoded: many, so that its threads have enough to share


def run(settings, meter):
    """settings["what"]: train, and save what was trained; or encode with that."""
    os.putenv("RAYON_NUM_THREADS", str(settings["threads"]))  # read when the package first needs threads; it has no function for it
    import tokenizers

    meter.notes["version"] = tokenizers.__version__
    text = Path(settings["text"]).read_bytes().decode()
    dict(train=_train, encode=_encode)[settings["what"]](tokenizers, text, settings, meter)


def _train(tokenizers, text, settings, meter):
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for _ in range(meter.units):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = split
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=settings["vocabulary"], initial_alphabet=split.alphabet(), show_progress=False
        )
        meter.start()
        tokenizer.train_from_iterator((text[i : i + CHUNK] for i in range(0, len(text), CHUNK)), trainer)
        meter.tick()
    tokenizer.save(settings["theirs"])


def _encode(tokenizers, text, settings, meter):
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    for _ in range(meter.units):
        tokenizer = tokenizers.Tokenizer.from_file(settings["theirs"])  # its cache is empty
        meter.start()
        tokenizer.encode_batch(pieces)
        meter.tick()
