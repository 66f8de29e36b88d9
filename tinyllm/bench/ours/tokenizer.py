"""Training a byte-level BPE, and encoding a text from an empty cache."""
from pathlib import Path

from tinyllm import threads
from tinyllm.tokenizer import BPETokenizer, load_tokenizer, train_bpe

CHUNK = 100_000  # characters of each text that training is given: the peers get the same


def run(settings, meter):
    """settings["what"]: train, and save what was trained; or encode with that."""
    threads(settings["threads"])
    text = Path(settings["text"]).read_bytes().decode()
    dict(train=_train, encode=_encode)[settings["what"]](text, settings, meter)


def _train(text: str, settings: dict, meter) -> None:
    for _ in range(meter.units):
        meter.start()
        chunks = (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
        tokenizer = train_bpe(chunks, settings["vocabulary"], "gpt2", (), or_fewer=True)
        meter.tick()
    tokenizer.save(settings["ours"])


def _encode(text: str, settings: dict, meter) -> None:
    trained = load_tokenizer(settings["ours"])
    for _ in range(meter.units):
        tokenizer = BPETokenizer(trained.merges, trained.pattern, ())  # its cache of pieces is empty
        meter.start()
        tokenizer.encode_ordinary(text)
        meter.tick()
