"""`tinyllm data show`: what is marked as trained on is what the loss counts, and nothing of a row is hidden."""
import json
import re

import numpy as np
import pytest
from tiny_run import train

from tinyllm.cli.main import main
from tinyllm.data import IGNORE, Batch, Conversation, Document, pack, show, text_rows
from tinyllm.data.show import GIVEN, LEARNED
from tinyllm.finetune import InstructionBatches, encode_conversations
from tinyllm.tokenizer import CHAT_TOKENS, CharTokenizer, add_special_tokens, train_bpe, train_wordpiece

BPE = train_bpe(["the lower the lowest"], 262, special_tokens=["<|endoftext|>", *CHAT_TOKENS], or_fewer=True)
COLORED = re.compile(r"\x1b\[30;48;5;(\d+)m(.*?)\x1b\[0m", re.DOTALL)


def shown(batch: Batch, tokenizer=BPE, **options) -> list[str]:
    """The lines below the legend."""
    return show(tokenizer, batch.ids, batch.targets, batch.documents, **options).split("\n")[2:]


def conversation(*contents):
    return Conversation([{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)], "here")


def rows_of(conversations, packed):
    examples = encode_conversations(BPE, conversations, 40)
    return InstructionBatches(examples, 8, 0, pack([len(example) for example in examples], 40) if packed else None)


def test_a_padded_conversation():
    batch = next(rows_of([conversation("a", "b", "c", "d\n"), conversation("x", "y")], packed=False).in_order())
    assert shown(batch) == [
        "row 1: 12 inputs, 5 tokens trained on (41.7%), 0 padding (0.0%)",
        "¶<|user|>|a|<|end|>|<|assistant|>[b|<|end|>]<|user|>|c|<|end|>|<|assistant|>[d|⏎|<|end|>]", "",
        "row 2: 5 inputs, 2 tokens trained on (40.0%), 7 padding (58.3%)",
        "¶<|user|>|x|<|end|>|<|assistant|>[y|<|end|>] ░×7", "",
        "in all: 17 inputs, 7 tokens trained on (41.2%), 7 padding (29.2%)",
    ]  # fmt: skip


def test_a_packed_row_and_one_that_ends_with_a_question():
    batch = next(rows_of([conversation("a", "b", "c"), conversation("x", "y")], packed=True).in_order())
    assert shown(batch)[1] == "¶<|user|>|a|<|end|>|<|assistant|>[b|<|end|>]<|user|>|c ¶<|user|>|x|<|end|>|<|assistant|>[y|<|end|>]"


def test_text_as_windows_and_packed():
    documents = [Document("abcde", "1"), Document("xy", "2")]
    end = "<|endoftext|>"
    assert shown(text_rows(BPE, documents, 4, 9, packed=False))[1::3] == ["¶a[b|c|d|e]", f"¶e[{end}] ¶{end}[x|y|{end}]"]
    assert shown(text_rows(BPE, documents, 9, 9, packed=True))[1::3] == [f"¶{end}[a|b|c|d|e|{end}] ¶{end}[x|y|{end}]"]
    assert shown(text_rows(BPE, documents, 4, 1, packed=False))[-1].startswith("in all: 4 inputs, 4 tokens")


def test_one_document_and_other_tokenizers():
    char, pieces = CharTokenizer(["a", "b"]), train_wordpiece(["ab ab"], 99, or_fewer=True)
    assert shown(text_rows(char, [Document("abb", "1")], 9, 9, packed=False), char)[1] == "¶a[b|b] ░×6"
    assert shown(text_rows(pieces, [Document("ab b? a", "1"), Document("ab", "2")], 9, 9, packed=False), pieces)[1].startswith("¶·ab[·[UNK]|")
    with pytest.raises(ValueError, match="--pack needs a tokenizer with a token for the end of a text, which a char tokenizer has not"):
        text_rows(char, [Document("abb", "1")], 9, 9, packed=True)
    with pytest.raises(ValueError, match="1 tokens: from less than two nothing is learned"):
        text_rows(char, [Document("a", "1")], 9, 9, packed=False)


def test_a_row_of_nothing():
    assert shown(Batch(np.zeros((1, 3), int), np.full((1, 3), IGNORE)))[:2] == ["row 1: 0 inputs, 0 tokens trained on (0.0%), 3 padding (100.0%)", "░×3"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_colours_tell_the_loss(packed, seed):
    """The tokens in the colours of those trained on are the batch's targets, in order; all others are inputs; none is left out."""
    draw = np.random.default_rng(seed)
    conversations = [conversation(*("".join(draw.choice(list("abc lower"), draw.integers(1, 6))) for _ in range(draw.integers(2, 5)))) for _ in range(6)]
    for batch in rows_of(conversations, packed).in_order():
        lines = show(BPE, batch.ids, batch.targets, batch.documents, color=True).split("\n")[1:]
        painted = [(int(shade), text.replace("·", " ")) for line in lines for shade, text in COLORED.findall(line)]
        assert [text for shade, text in painted if shade in LEARNED] == [BPE.token_bytes(i).decode() for i in batch.targets[batch.targets != IGNORE].tolist()]
        given = [(row[t - 1] if t else IGNORE) == IGNORE for row in batch.targets for t in range(len(row))]
        first = np.diff(batch.documents, axis=1, prepend=IGNORE - 1) != 0 if packed else np.arange(batch.ids.shape[1]) == 0
        used = (batch.ids != 0) | (batch.targets != IGNORE)
        inputs = batch.ids[used & (np.reshape(given, batch.ids.shape) | first)]
        assert [text for shade, text in painted if shade in GIVEN] == [BPE.token_bytes(i).decode() for i in inputs.tolist()]


# ---- the command ----


@pytest.fixture
def place(tmp_path):
    train_bpe(["the lower the lowest"], 260).save(tmp_path / "t.json")
    records = [{"messages": conversation("a", "b").messages}, {"messages": conversation("c", "d" * 9).messages}]
    (tmp_path / "chat.jsonl").write_text("\n" + "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (tmp_path / "text.jsonl").write_text('{"text": "ab"}\n{"text": "cde"}\n', encoding="utf-8")
    (tmp_path / "short.txt").write_text("fgh", encoding="utf-8")
    return tmp_path


def command(capsys, place, *words):
    capsys.readouterr()
    try:
        code = main(["data", "show", *(str(place / word) if "." in word else word for word in words)])
    except SystemExit as stopped:
        code = stopped.code
    return (code, *capsys.readouterr())


def test_command(place, capsys):
    code, out, err = command(capsys, place, "chat.jsonl", "--tokenizer", "t.json")
    assert (code, err) == (0, "") and "¶<|user|>|a|<|end|>|<|assistant|>[b|<|end|>] ░×8" in out and "in all: 18 inputs, 12 tokens" in out
    assert "row 2" not in command(capsys, place, "chat.jsonl", "--tokenizer", "t.json", "--rows", "1")[1]
    assert "░" not in command(capsys, place, "chat.jsonl", "--tokenizer", "t.json", "--pack", "--context", "18")[1].partition("\n")[2]
    code, out, err = command(capsys, place, "text.jsonl", "short.txt", "--tokenizer", "t.json", "--context", "5")
    assert (code, err) == (0, "") and "¶a[b|<|endoftext|>] ¶<|endoftext|>[c|d|e]" in out and "\x1b" not in out
    assert "\x1b[30;48;5;" in command(capsys, place, "short.txt", "--tokenizer", "t.json", "--color", "always")[1]


def test_what_is_cut_is_said(place, capsys):
    code, out, err = command(capsys, place, "chat.jsonl", "--tokenizer", "t.json", "--context", "6")
    assert code == 0 and err.count("\n") == 1 and "of 2 conversations, 0 lost their oldest messages and 1 their end" in err


def test_context_of_a_run(place, capsys, tmp_path):
    run = train(tmp_path, "--steps", 2)
    (place / "fox.txt").write_text("the quick brown fox jumps over lazy dogs", encoding="utf-8")
    code, out, _ = command(capsys, place, "fox.txt", "--tokenizer", str(run))
    assert code == 0 and "row 1: 16 inputs" in out


@pytest.mark.parametrize("words, message", [
    (["chat.jsonl", "short.txt", "--tokenizer", "t.json"], "chat.jsonl holds conversations and"), (["no.txt", "--tokenizer", "t.json"], "no such file or folder"),
    (["short.txt", "--tokenizer", "no.json"], "there is no tokenizer file"), (["short.txt"], "--tokenizer"),
    (["short.txt", "--tokenizer", "t.json", "--context", "0"], "--context is 0: it must be at least 1"),
    (["short.txt", "--tokenizer", "t.json", "--rows", "0"], "--rows is 0: it must be at least 1"),
    (["bad.jsonl", "--tokenizer", "t.json"], "bad.jsonl, line 1: not valid JSON"),
    (["late.jsonl", "--tokenizer", "t.json"], "late.jsonl, line 2: messages[0].role is missing"),
    (["chat.jsonl", "--tokenizer", "char.json"], "a char tokenizer has no special tokens"),
    (["chat.jsonl", "--tokenizer", "t.json", "--context", "2"], "none of 2 conversations has an answer"),
])  # fmt: skip
def test_mistakes_are_one_line(words, message, place, capsys):
    (place / "bad.jsonl").write_text("{", encoding="utf-8")
    (place / "late.jsonl").write_text((place / "chat.jsonl").read_text().splitlines()[1] + '\n{"messages": [{"content": "x"}]}\n', encoding="utf-8")
    CharTokenizer(["a"]).save(place / "char.json")
    code, out, err = command(capsys, place, *words)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err and not out


def test_tokens_of_a_chat_are_added_as_in_training(place, capsys):
    assert "<|assistant|>" not in (place / "t.json").read_text()
    before = (place / "t.json").read_bytes()
    assert command(capsys, place, "chat.jsonl", "--tokenizer", "t.json")[0] == 0
    assert (place / "t.json").read_bytes() == before and add_special_tokens(BPE).to_json() == BPE.to_json()
