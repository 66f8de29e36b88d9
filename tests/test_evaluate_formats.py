"""The published files: a faithful line of each, and broken ones, whose error names file, line and field."""
import json
import re

import pytest

from tinyllm.evaluate import READERS, read_arc, read_gsm8k, read_hellaswag, read_mmlu

HELLASWAG = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he", "dataset": "activitynet", "split": "val", "split_type": "indomain", "label": 3,
    "endings": ["is using wrap.", "is ripping level tiles off.", "is holding a cube.", "starts pulling up roofing on a roof."],
    "source_id": "activitynet~v_-JhWjGDPHMY",
}  # fmt: skip
WIKIHOW = HELLASWAG | {"ctx_a": "[header] How to bake [title] Mix it. [step] Stir.", "ctx_b": "", "activity_label": "Food", "source_id": "wikihow~1",
                       "endings": ["[substeps] Go.", "Stay [title] there.", "c", "d"], "label": "1"}  # fmt: skip
ARC = {"id": "Mercury_7175875", "answerKey": "C", "question": {"stem": "Which one?", "choices": [
    {"text": "first", "label": "A"}, {"text": "second", "label": "B"}, {"text": "third", "label": "C"}]}}  # fmt: skip
NUMBERED = {"id": "x", "answerKey": "2", "question": {"stem": "Or?", "choices": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]}}
GSM8K = {"question": "Natalia sold 48 clips in April, and half as many in May. How many?",
         "answer": "She sold 48/2 = <<48/2=24>>24 in May.\nTogether 48+24 = <<48+24=72>>72.\n#### 72"}  # fmt: skip
MMLU = '"Find the degree for the given field extension Q(sqrt(2), sqrt(3)) over Q.",0,4,2,6,B\n"A ""set"", of\ntwo lines","1, 2",x,y,Ω,D\n'


def lines(path, *records, ending="\n"):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + ending for r in records), encoding="utf-8")
    return path


def mmlu(folder, content=MMLU, part="test", subject="abstract_algebra"):
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / part / f"{subject}_{part}.csv").write_text(content, encoding="utf-8", newline="")
    return folder


def test_mmlu(tmp_path):
    mmlu(mmlu(mmlu(tmp_path), "q,a,b,c,d,A\n" * 5, "dev"), "q,a,b,c,d,C\n", subject="world_history")
    task = read_mmlu(tmp_path)
    assert len(task.items) == 3 and task.examples == ()
    first, second, third = task.items
    assert first.prompt == "Find the degree for the given field extension Q(sqrt(2), sqrt(3)) over Q.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    assert (first.choices, first.answer, first.subject) == (("A", "B", "C", "D"), 1, "abstract algebra")
    assert second.prompt.startswith('A "set", of\ntwo lines\nA. 1, 2\n') and second.answer == 3 and third.subject == "world history"
    assert task.preamble_for(first) == "The following are multiple choice questions (with answers) about abstract algebra."
    mmlu(tmp_path, "q,a,b,c,d,B\n" * 5, "dev", "world_history")
    assert [e.answer for e in read_mmlu(tmp_path, 5).examples_for(third)] == [1] * 5


def test_hellaswag(tmp_path):
    task = read_hellaswag(lines(tmp_path / "hellaswag_val.jsonl", HELLASWAG, "", WIKIHOW))
    roof, food = task.items
    assert roof.prompt == "Roof shingle removal: A man is sitting on a roof. He" and roof.solution == "starts pulling up roofing on a roof."
    assert (roof.subject, food.subject) == ("activitynet", "wikihow")
    assert food.prompt == "Food: How to bake. Mix it. Stir." and food.choices == ("Go.", "Stay. there.", "c", "d") and food.answer == 1


def test_arc(tmp_path):
    lines(tmp_path / "ARC-Easy-Train.jsonl", NUMBERED, ARC)
    task = read_arc(lines(tmp_path / "ARC-Easy-Test.jsonl", ARC, NUMBERED), 2)
    assert task.items[0].prompt == "Question: Which one?\nAnswer:" and task.items[0].choices == ("first", "second", "third")
    assert [item.solution for item in task.items] == ["third", "b"] and [e.solution for e in task.examples] == ["b", "third"]


def test_gsm8k(tmp_path):
    task = read_gsm8k(lines(tmp_path / "test.jsonl", GSM8K, GSM8K | {"answer": "no steps\n#### -1,234"}, ending="\r\n"))
    assert [item.expected for item in task.items] == ["72", "-1,234"] and task.items[0].solution == GSM8K["answer"]
    assert task.verifier("So it is 72.", task.items[0].expected) and task.verifier("-1234", task.items[1].expected)


def without(record, name):
    return {k: v for k, v in record.items() if k != name}


BROKEN = [
    ("hellaswag", (HELLASWAG, without(HELLASWAG, "endings")), "line 2: the field 'endings' is missing; fields found: 'ind'"),
    ("hellaswag", (HELLASWAG | {"endings": "one"},), "line 1: the field 'endings' must be a list, found \"one\""),
    ("hellaswag", (HELLASWAG | {"endings": ["a", 3]},), "line 1: the field 'endings' must hold strings, found 3"),
    ("hellaswag", (HELLASWAG | {"label": ""},), "line 1: the field 'label' must be a number from 0, found ''"),
    ("hellaswag", (HELLASWAG | {"label": 4},), "line 1: the answer is number 4 of 4 choices"),
    ("hellaswag", (HELLASWAG, "{"), "line 2: not valid JSON"),
    ("hellaswag", ("[1]",), "line 1: expected an object with a field 'activity_label', found a list"),
    ("hellaswag", (), "there are no items in it"),
    ("arc", (ARC, "", ARC | {"answerKey": "E"}), "line 3: the field 'answerKey' is 'E', but the choices are labelled A, B, C"),
    ("arc", (ARC | {"question": "Which?"},), "line 1: the field 'question' must be an object, found \"Which?\""),
    ("arc", (ARC | {"question": {"choices": []}},), "line 1: the field 'question.stem' is missing; fields found: 'choices'"),
    ("arc", (ARC | {"question": {"stem": "s", "choices": [{"text": "a"}]}},), "the field 'question.choices[0].label' is missing"),
    ("arc", (ARC | {"question": {"stem": "s", "choices": [3]}},), "the field 'question.choices[0]' must be an object"),
    ("arc", (ARC | {"question": {"stem": "\ud800", "choices": []}},), "the field 'question.stem' holds half of a surrogate pair"),
    ("gsm8k", (GSM8K | {"answer": "72"},), "line 1: the field 'answer' must end with #### and a number"),
    ("gsm8k", (GSM8K | {"answer": "#### many"},), "line 1: the field 'answer' must end with #### and a number"),
    ("gsm8k", (GSM8K, without(GSM8K, "question")), "line 2: the field 'question' is missing; fields found: 'answer'"),
]


@pytest.mark.parametrize(("kind", "records", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_lines(tmp_path, kind, records, message):
    path = lines(tmp_path / "test.jsonl", *records)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        READERS[kind](path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "message"), [
    ("a,b,c\n", "line 1: expected 6 fields (question, A, B, C, D, answer), found 3"),
    ("q,a,b,c,d,A\nq,a,b,c,d,e,A\n", "line 2: expected 6 fields (question, A, B, C, D, answer), found 7"),
    ("q,a,b,c,d,E\n", "line 1: field 6, the answer, must be A, B, C or D, found 'E'"),
    ('q,a,b,c,d,A\n"q,a\n', "not valid CSV"),
    ("", "no items"),
])  # fmt: skip
def test_broken_mmlu(tmp_path, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_mmlu(mmlu(tmp_path, content))


def test_files_that_are_not_there(tmp_path):
    for kind, reader in READERS.items():
        with pytest.raises(FileNotFoundError, match="expected MMLU's folder" if kind == "mmlu" else "no such file"):
            reader(tmp_path / "missing.jsonl")
    with pytest.raises(FileNotFoundError, match="dev: no file named SUBJECT_dev.csv"):
        read_mmlu(mmlu(tmp_path), 5)
    with pytest.raises(FileNotFoundError, match=re.escape("train.jsonl: no such file")):
        read_gsm8k(lines(tmp_path / "test.jsonl", GSM8K), 2)
    with pytest.raises(ValueError, match="keep the published names"):
        read_gsm8k(lines(tmp_path / "mine.jsonl", GSM8K), 2)
    lines(tmp_path / "train.jsonl", GSM8K)
    with pytest.raises(ValueError, match="gsm8k: 2 shots were asked for, but there are 1 examples: ask for fewer"):
        read_gsm8k(tmp_path / "test.jsonl", 2)


def test_other_encodings(tmp_path):
    (tmp_path / "test.jsonl").write_bytes('{"question": "Straße"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"test.jsonl, line 1: not UTF-8 \(byte 18 is 0xdf\)"):
        read_gsm8k(tmp_path / "test.jsonl")
