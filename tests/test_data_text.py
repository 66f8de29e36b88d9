import json

import pytest

from tinyllm.data import Document, read_documents, split, standard_library


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(path, **options):
    return [document.text for document in read_documents([path], **options)]


def test_text_is_kept_exactly(tmp_path):
    text = "\r\n tab\t, é, 😀,   \u2028 lone \r and\x0b end  \n\n"
    assert read(write(tmp_path / "a.txt", text)) == [text]
    assert read(write(tmp_path / "marked.txt", b"\xef\xbb\xbf" + text.encode())) == [text]
    assert read(write(tmp_path / "no_suffix", text)) == [text]


def test_one_path_is_not_read_as_a_list_of_characters(tmp_path):
    assert list(read_documents(str(write(tmp_path / "a.txt", "x")))) == [Document("x", str(tmp_path / "a.txt"))]


def test_jsonl_gives_a_document_a_line(tmp_path):
    lines = [json.dumps({"text": "één\n\u2028😀", "id": 1}), "", json.dumps({"text": ""}), '{"text": "two"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert list(read_documents([path])) == [Document("één\n\u2028😀", f"{path}:1"), Document("two", f"{path}:4")]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["text"]', "found a list"),
        ('{"txt": 1, "b": 2}', "the field 'text' is missing; fields found: 'txt', 'b'"),
        ("{}", "fields found: none"),
        ('{"text": null}', "'text' must be a string, found null"),
        ('{"text": 3.5}', "'text' must be a string, found a number"),
        ('{"text": "ab\\ud83d"}', "half of a surrogate pair at character 2"),
        (b'{"text": "\xe9"}', "not UTF-8 (byte 10 is 0xe9)"),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_field(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    for root in (path, tmp_path):  # named itself, or found in a folder
        with pytest.raises(ValueError) as caught:
            read(root)
        assert f"{path}, line 2: " in str(caught.value) and message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "holds no text"),
        (b"abc\x00def", "binary file (byte 3 is NUL)"),
        (b"caf\xe9 ol\xe9", "not UTF-8 (byte 3 is 0xe9)"),
        (b"\xef\xbb\xbfab\xff", "not UTF-8 (byte 5 is 0xff)"),
        ("text".encode("utf-16"), "UTF-16"),
        ("ends in the middle: 😀".encode()[:-1], "not UTF-8 (byte 20 is 0xf0)"),
    ],
)
def test_a_named_file_that_is_no_text_is_an_error(tmp_path, data, message):
    path = write(tmp_path / "a.txt", data)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder_without_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt: no such file or folder"):
        read(tmp_path / "nowhere.txt")
    write(tmp_path / "picture.png", "not looked at")
    write(tmp_path / "empty.txt", "")
    with pytest.raises(ValueError, match="no text in any .txt, .md, .py, .jsonl file"):
        read(tmp_path)


def test_folder_is_sorted_and_says_what_it_skips(tmp_path):
    write(tmp_path / "b.md", "b")
    write(tmp_path / "a" / "z.txt", "a/z")
    write(tmp_path / "a.txt", "a.txt")
    write(tmp_path / "c.jsonl", '{"text": "c1"}\n{"text": "c2"}\n')
    write(tmp_path / "d" / "__init__.py", "")
    write(tmp_path / "d" / "code.py", "d/code")
    write(tmp_path / "d" / "latin.txt", b"\xe9")
    write(tmp_path / "d" / "binary.txt", b"\x00")
    write(tmp_path / "d" / "data.csv", "not a kind we take")
    write(tmp_path / ".git" / "config.txt", "hidden")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    skipped = []
    assert read(tmp_path, on_skip=skipped.append) == ["a/z", "a.txt", "b", "c1", "c2", "d/code"]
    assert all(line.startswith("skipped ") for line in skipped)
    assert [name in line for name, line in zip(("binary.txt", "latin.txt", "dangling.txt"), skipped, strict=True)] == [True] * 3
    with pytest.warns(UserWarning) as warned:
        read(tmp_path)
    assert [str(warning.message) for warning in warned] == skipped


def test_standard_library_is_large_sorted_and_free_of_tests():
    documents = list(standard_library())
    sources = [document.source for document in documents]
    assert sources == [document.source for document in standard_library()]
    assert sources == sorted(sources, key=lambda source: source.split("/")) and len(set(sources)) == len(sources)
    assert "json/decoder.py" in sources and "unittest/case.py" in sources
    folders = {folder for source in sources for folder in source.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__"}
    assert not any("sysconfigdata" in source for source in sources)
    assert sum(len(document.text) for document in documents) > 5_000_000
    assert not any("\r\n" in document.text for document in documents)


def documents_of(*lengths):
    return [Document("x" * length, str(i)) for i, length in enumerate(lengths)]


def test_split_cuts_a_single_text_where_nanogpt_does():
    (train,), (val,) = split([Document("a" * 1_003_854 + "b" * 111_540, "tinyshakespeare")], 0.1, seed=7)
    assert set(train.text) == {"a"} and set(val.text) == {"b"}
    assert (len(train.text), len(val.text)) == (1_003_854, 111_540)


def test_split_keeps_documents_whole_and_in_order():
    documents = documents_of(*range(1, 200))
    train, val = split(documents, 0.1, seed=1)
    assert sorted(train + val, key=lambda document: int(document.source)) == documents
    assert train == sorted(train, key=documents.index) and val == sorted(val, key=documents.index)
    share = sum(len(document.text) for document in val) / sum(len(document.text) for document in documents)
    assert abs(share - 0.1) < 0.01
    assert split(documents, 0.1, seed=1) == (train, val)
    assert split(documents, 0.1, seed=2) != (train, val)


@pytest.mark.parametrize("seed", range(8))
def test_split_of_very_unequal_documents(seed):
    train, val = split(documents_of(1_000_000, 10), 0.1, seed)  # never the large one for validation
    assert [len(document.text) for document in val] == [10]
    assert all(split(documents_of(5, 5), fraction, seed) != ([], []) for fraction in (0.01, 0.99))
    for fraction in (0.01, 0.5, 0.99):
        train, val = split(documents_of(5, 5, 5), fraction, seed)
        assert train and val


def test_split_ignores_empty_documents_and_allows_no_validation():
    (train,), (val,) = split(documents_of(0, 10, 0), 0.3, seed=0)
    assert (len(train.text), len(val.text)) == (7, 3)
    assert split(documents_of(3, 0), 0, seed=0) == (documents_of(3), [])


@pytest.mark.parametrize(
    "lengths, fraction, message",
    [
        ((5,), -0.1, "at least 0 and less than 1, found -0.1"),
        ((5,), 1, "less than 1, found 1"),
        ((5,), float("nan"), "found nan"),
        ((), 0.1, "no text"),
        ((0, 0), 0.1, "no text"),
        ((1,), 0.5, "1 characters are too few"),
    ],
)
def test_split_errors(lengths, fraction, message):
    with pytest.raises(ValueError, match=message):
        split(documents_of(*lengths), fraction, seed=0)


def test_a_folder_that_holds_a_run_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    run = tmp_path / "runs" / "001"
    run.mkdir(parents=True)
    for name in ("config.json", "log.jsonl", "notes.txt"):
        (run / name).write_text('{"event": "step"}\n')
    assert [document.text for document in read_documents([tmp_path])] == ["text"]
