"""`tinyllm tokenizer train|encode|decode|show`, through its own parser."""

import argparse
import io
import re
import sys

import pytest

from tinyllm.cli import tokenizer as command
from tinyllm.tokenizer import BPETokenizer, CharTokenizer, WordPieceTokenizer, load_tokenizer, train_bpe

TEXT = "the lower the lowest the slower é 😉\n" * 20


def tokenizer_command(*argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(arg) for arg in argv]))


@pytest.fixture
def saved(tmp_path):
    train_bpe([TEXT], 272).save(tmp_path / "tok.json")
    return tmp_path / "tok.json"


def feed(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_train(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    assert tokenizer_command("train", tmp_path / "a.txt", "--vocab-size", 272, "--pattern", "gpt2", "--out", tmp_path / "tok.json") == 0
    assert "272 ids: 256 bytes, 15 merges, 1 special" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "tok.json").fingerprint() == train_bpe([TEXT], 272, "gpt2").fingerprint()


def test_train_characters(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    tokenizer_command("train", tmp_path / "a.txt", "--kind", "char", "--out", tmp_path / "tok.json")
    assert isinstance(load_tokenizer(tmp_path / "tok.json"), CharTokenizer)
    assert f"{len(set(TEXT))} ids" in capsys.readouterr().out


def test_train_wordpiece(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    words = ["train", tmp_path / "a.txt", "--kind", "wordpiece", "--out", tmp_path / "tok.json"]
    tokenizer_command(*words, "--vocab-size", 28, "--cased", "--special", "<a>", "--characters", 12)
    tokenizer = load_tokenizer(tmp_path / "tok.json")
    assert isinstance(tokenizer, WordPieceTokenizer) and tokenizer.vocab_size == 28 and not tokenizer.lower_case and "<a>" in tokenizer.special_tokens
    assert re.search(r"28 ids: 6 special, (\d+) that go on with a word, (\d+) that begin one", capsys.readouterr().out)
    tokenizer_command("show", tmp_path / "tok.json", "the lower é")
    assert capsys.readouterr().out.startswith("·the|·low|er|·é\n4 tokens for 12 bytes: ")
    with pytest.raises(ValueError, match="too small"):
        tokenizer_command(*words, "--vocab-size", 7)
    assert load_tokenizer(tmp_path / "tok.json").vocab_size == 28


def test_train_refuses_too_large_a_vocabulary_and_keeps_the_old_file(tmp_path, saved):
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8")
    before = saved.read_bytes()
    with pytest.raises(ValueError, match="more than this text can give"):
        tokenizer_command("train", tmp_path / "a.txt", "--vocab-size", 9999, "--out", saved)
    assert saved.read_bytes() == before


def test_encode_then_decode_is_the_same_bytes(saved, capsysbinary, monkeypatch):
    data = TEXT.encode() + b"\xff\x00\r\n"
    feed(monkeypatch, data)
    tokenizer_command("encode", saved, "-")
    ids = capsysbinary.readouterr().out
    feed(monkeypatch, ids)
    tokenizer_command("decode", saved)
    assert capsysbinary.readouterr().out == data
    tokenizer_command("decode", saved, 116, 104)
    assert capsysbinary.readouterr().out == b"th"


def test_encode_special_tokens(saved, capsys):
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>': add --special allow .* or --special text"):
        tokenizer_command("encode", saved, "a<|endoftext|>")
    tokenizer_command("encode", saved, "a<|endoftext|>", "--special", "allow")
    tokenizer_command("encode", saved, "<|", "--special", "text")
    assert capsys.readouterr().out == "97 271\n60 124\n"


@pytest.mark.parametrize("word", ["-1", "1.5", "x", "²"])
def test_decode_wants_whole_numbers(saved, word, monkeypatch):
    feed(monkeypatch, word.encode())
    with pytest.raises(ValueError, match="whole number"):
        tokenizer_command("decode", saved, "-")


def test_decode_unknown_id(saved):
    with pytest.raises(ValueError, match="id 272 is not in this tokenizer"):
        tokenizer_command("decode", saved, 272)


def test_show_names_pieces_and_merges(saved, capsys):
    tokenizer_command("show", saved, "lower<|endoftext|> é\x00")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines()[0].endswith("|<|endoftext|>|·é|\\x00")
    assert "l + o = " in out and "lo|w|e|r" in out and "·|\\xc3|\\xa9" in out


def test_show_in_colours(saved, capsys):
    tokenizer_command("show", saved, "lower", "--color", "always")
    assert "\x1b[30;48;5;" in capsys.readouterr().out


def test_show_characters(tmp_path, capsys):
    CharTokenizer.train(["ab\n"]).save(tmp_path / "tok.json")
    tokenizer_command("show", tmp_path / "tok.json", "a\nb")
    assert capsys.readouterr().out == "a|⏎|b\n3 tokens for 3 bytes: 1 0 2\n"


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no tokenizer file"):
        tokenizer_command("encode", tmp_path / "tok.json", "x")


def test_special_tokens_of_ones_own(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    special = ["--special", "<a>", "--special", "<b>"]
    tokenizer_command("train", tmp_path / "a.txt", "--vocab-size", 260, *special, "--out", tmp_path / "tok.json")
    tokenizer = load_tokenizer(tmp_path / "tok.json")
    assert isinstance(tokenizer, BPETokenizer) and tokenizer.special_tokens == {"<a>": 258, "<b>": 259}
