"""`tinyllm data clean|dedup|report`: nothing is lost, everything is accounted for, and mistakes are one line."""
import html.parser
import json

import pytest

from tinyllm.cli import data as command
from tinyllm.cli.main import main
from tinyllm.data import CleanConfig, DedupConfig, Document, clean_into, deduplicate_into, read_documents
from tinyllm.data.curate import DocumentFiles
from tinyllm.data.report import Excerpt, Share, Table, page

ENGLISH = "It was late when the two of them reached the village, and no window was lit any more. Number {}."


@pytest.fixture
def texts(tmp_path):
    """A folder of documents, of which some are short, alike or no text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    story = " ".join(f"{word}{i}" for i, word in enumerate("once there was a king who had no daughter".split() * 10))
    (folder / "a.txt").write_text(ENGLISH.format(1) + " x@example.org <script>alert(1)</script>", encoding="utf-8")
    (folder / "b.txt").write_text("short", encoding="utf-8")
    (folder / "c.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (story, story.upper(), story + " end", "é😀 " * 20)))
    return folder


def status(capsys, *words):
    capsys.readouterr()
    try:
        code = main(["data", *map(str, words)])
    except SystemExit as stopped:
        code = stopped.code
    return (code, *capsys.readouterr())


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Tags(html.parser.HTMLParser):
    """The page's tags, and whether they close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(folder):
    tags = Tags((folder / "report.html").read_text(encoding="utf-8"))
    assert not tags.open and not tags.seen & {"script", "img", "link"} and {"table", "h1"} <= tags.seen


def test_clean(texts, tmp_path, capsys):
    out = tmp_path / "new" / "cleaned"
    code, printed, errors = status(capsys, "clean", texts, "--out", out)
    assert code == 0 and "kept: 4 documents" in printed and "dropped: 2 documents" in printed and "email" in printed
    assert "c.txt: this is UTF-16" in errors and errors.count("\n") == 1
    kept, dropped = records(out / "kept.jsonl"), records(out / "dropped.jsonl")
    assert [r["source"] for r in kept] == [f"{texts}/a.txt", *(f"{texts}/d.jsonl:{i}" for i in (1, 2, 3))]
    assert kept[0]["text"] == ENGLISH.format(1) + " [email] <script>alert(1)</script>"
    assert [(r["text"], r["rule"]) for r in dropped] == [("short", "min_characters"), ("é😀 " * 20, "max_signs")]
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["rules"]["email"]["documents"] == 1 and report["rules"]["min_characters"]["examples"][0]["source"] == f"{texts}/b.txt"
    assert len(report["skipped"]) == 1 and report["settings"]["min_characters"] == 30
    assert sum(rule["documents"] for name, rule in report["rules"].items() if name[:4] in ("min_", "max_")) == len(dropped)
    assert report["kept"] == {"documents": 4, "characters": sum(len(r["text"]) for r in kept)}
    check_page(out)
    assert [d.text for d in read_documents([out / "kept.jsonl"])] == [r["text"] for r in kept]


def test_dedup(texts, tmp_path, capsys):
    code, printed, _ = status(capsys, "dedup", texts, "--out", tmp_path / "out", "--threshold", "0.7")
    assert code == 0 and "1 exact and 1 near duplicates, in 1 clusters" in printed
    kept, dropped = records(tmp_path / "out" / "kept.jsonl"), records(tmp_path / "out" / "dropped.jsonl")
    assert len(kept) == 4 and [(r["rule"], r["duplicate_of"]) for r in dropped] == [("exact", f"{texts}/d.jsonl:1"), ("near", f"{texts}/d.jsonl:1")]
    assert dropped[0]["found"] == 1 and 0.7 <= dropped[1]["found"] < 1
    assert sorted(r["text"] for r in kept + dropped) == sorted(d.text for d in read_documents([texts], on_skip=str))
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["exact"], report["near"], report["largest"][0]["size"]) == (1, 1, 3)
    check_page(tmp_path / "out")


def test_report(texts, tmp_path, capsys):
    (tmp_path / "questions.txt").write_text(ENGLISH.format(1), encoding="utf-8")
    code, printed, _ = status(capsys, "report", texts, "--out", tmp_path / "out", "--benchmark", tmp_path / "questions.txt", "--words", 5)
    assert code == 0 and "read: 6 documents" in printed and "of 1 items 1 share 5 words in a row with the data, 1 stand there whole" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["measures"]["characters"]["least"] == 5 and report["contamination"]["worst"][0]["source"] == f"{texts}/a.txt"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    check_page(tmp_path / "out")


@pytest.mark.parametrize(
    "words, message",
    [
        (["clean", "MISSING", "--out", "OUT"], "MISSING: no such file or folder"),
        (["clean", "TEXTS", "--out", "TEXTS/out"], "is read from there, and must stay as it is; name another folder"),
        (["dedup", "TEXTS/a.txt", "--out", "TEXTS"], "is read from there"),
        (["clean", "TEXTS", "--out", "OUT", "--max-digits", "1.5"], "--max-digits is 1.5: it must be at most 1"),
        (["clean", "TEXTS", "--out", "OUT", "--max-digit", "1"], "unknown option --max-digit"),
        (["dedup", "TEXTS", "--out", "OUT", "--bands", "0"], "--bands is 0: it must be at least 1"),
        (["dedup", "TEXTS"], "--out"),
        (["report", "TEXTS", "--out", "OUT", "--benchmark", "MISSING"], "MISSING: no such file or folder"),
        (["report", "TEXTS", "--out", "OUT", "--words", "0"], "at least one word"),
        (["clear", "TEXTS"], "invalid choice"),
        (["clean", "BROKEN", "--out", "OUT"], "line 2: not valid JSON"),
    ],
)
def test_mistakes_are_one_line(words, message, texts, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text('{"text": "fine, and long enough to be kept by all the rules"}\n{"text": \n')
    places = {"TEXTS": texts, "OUT": tmp_path / "out", "MISSING": tmp_path / "MISSING", "BROKEN": tmp_path / "broken.jsonl"}
    for name, path in places.items():
        words = [word.replace(name, str(path)) if word.startswith(name) else word for word in words]
    code, out, err = status(capsys, *words)
    assert code == 2 and err.count("\n") == 1 and message in err.replace(str(tmp_path) + "/", "")
    assert sorted(path.name for path in texts.iterdir()) == ["a.txt", "b.txt", "c.txt", "d.jsonl"]  # nothing came to what was given


def test_what_a_broken_record_stops_leaves_earlier_results_alone(texts, tmp_path, capsys):
    out = tmp_path / "out"
    status(capsys, "dedup", texts, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (texts / "z.jsonl").write_text("{")
    for action in ("clean", "dedup", "report"):
        assert status(capsys, action, texts, "--out", out)[0] == 2
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_documents_that_change_between_two_readings(tmp_path):
    class Growing(list):
        def __iter__(self):
            yield from list.__iter__(self)
            self.append(Document(f"another one {len(self)}", "new"))

    with pytest.raises(ValueError, match="have changed while they were read"):
        deduplicate_into(tmp_path, Growing([Document("one", "a")]), DedupConfig())
    with pytest.raises(ValueError, match="read twice"):
        deduplicate_into(tmp_path, iter([Document("one", "a")]), DedupConfig())
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_reading(texts):
    calls = []
    files = DocumentFiles([texts], lambda done, total: calls.append((done, total)))
    assert len(list(files)) == 6 and calls == [*((i, None) for i in range(1, 7)), (6, 6)]
    calls.clear()
    next(iter(files))
    assert calls == [(1, 6), (1, 1)]  # given up after the first
    (texts / "z.jsonl").write_text("{")
    calls.clear()
    with pytest.raises(ValueError, match="not valid JSON"):
        list(files)
    assert calls[-2:] == [(6, 6), (6, 6)]


def test_progress_is_a_line_that_goes_away(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "PROGRESS", 0)
    quiet = status(capsys, "clean", texts, "--out", tmp_path / "quiet")[2]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    code, out, err = status(capsys, "clean", texts, "--out", tmp_path / "out")
    assert code == 0 and "\rread: 6 documents\x1b[K\r\x1b[K\rread: 1 of 6 documents\x1b[K" in err
    assert err.endswith("\r\x1b[K" + quiet) and "\r" not in quiet
    (texts / "z.jsonl").write_text("{")
    assert "documents\x1b[K\r\x1b[Ktinyllm: error: " in status(capsys, "dedup", texts, "--out", tmp_path / "new")[2]


def test_nothing_left(tmp_path):
    figures = clean_into(tmp_path, [Document("a", "x")], CleanConfig())
    assert (figures["kept"]["documents"], figures["dropped"]["documents"]) == (0, 1) and (tmp_path / "kept.jsonl").read_bytes() == b""


def test_cells():
    text = page("T & t", [Table("H", "", ["a"], [[1234567, 0.123456, Share(0.25), Excerpt("<b>\n"), "<i>"]]), Table("None", "", ["a"], [])])
    for piece in ("T &amp; t", ">1,234,567<", ">0.1235<", "25.00%", "&lt;b&gt;\n", "&lt;i&gt;", "<p>None.</p>"):
        assert piece in text
