"""Published benchmarks, read from disk as they were published:

    mmlu        a folder with test/ (or val/) and dev/, a file SUBJECT_test.csv each: question, four choices, letter; no header
                hendrycks/test, Hendrycks et al. 2021: the choices are shown, the answer is a letter, dev/ has five examples a subject
    hellaswag   hellaswag_val.jsonl: activity_label, ctx_a, ctx_b, endings, label
                rowanz/hellaswag, Zellers et al. 2019: the model ranks the endings themselves
    arc         ARC-Easy-Test.jsonl and the like: question.stem, question.choices[].text and .label, answerKey
                AI2, Clark et al. 2018: the model ranks the choices' texts
    gsm8k       test.jsonl: question, answer, which ends with "#### 72"
                openai/grade-school-math, Cobbe et al. 2021: a free answer, whose last number counts

Examples for few shots are read from the published training file beside (…_train.jsonl, …-Train.jsonl, train.jsonl), in its order.
Every error names file, line and field: ValueError, or FileNotFoundError.
"""
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyllm.data.records import decode, json_records
from tinyllm.evaluate.choices import check_question
from tinyllm.evaluate.tasks import Item, Problem, Question, Task
from tinyllm.evaluate.verifiers import last_number, number_in

LETTERS = "ABCD"
KINDS = {str: "a string", list: "a list", dict: "an object"}
HELLASWAG = {"activity_label": "...", "ctx_a": "...", "ctx_b": "...", "endings": ["..."], "label": 0}  # what a line looks like
ARC = {"question": {"stem": "...", "choices": [{"text": "...", "label": "A"}]}, "answerKey": "A"}
GSM8K = {"question": "...", "answer": "... #### 72"}


def read_mmlu(path: str | os.PathLike, shots: int = 0) -> Task:
    """All subjects of test/, or of val/ where there is no test/; examples from dev/."""
    folder = Path(path)
    part = next((p for p in ("test", "val") if (folder / p).is_dir()), None)
    if part is None:
        raise FileNotFoundError(f"{folder}: expected MMLU's folder, with test/ and dev/ in it, and a file SUBJECT_test.csv for each subject")
    examples = _mmlu_part(folder, "dev") if shots else ()
    preamble = "The following are multiple choice questions (with answers) about {subject}."
    return Task("mmlu", _mmlu_part(folder, part), examples, shots, preamble)


def _mmlu_part(folder: Path, part: str) -> tuple[Question, ...]:
    files = sorted((folder / part).glob(f"*_{part}.csv"))
    if not files:
        raise FileNotFoundError(f"{folder / part}: no file named SUBJECT_{part}.csv in it")
    return tuple(question for file in files for question in _mmlu_file(file, file.stem.removesuffix(f"_{part}").replace("_", " ")))


def _mmlu_file(path: Path, subject: str) -> Iterator[Question]:
    rows = csv.reader(io.StringIO(decode(path.read_bytes(), str(path)), newline=""), strict=True)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if len(row) != 6:
                raise ValueError(f"{where}: expected 6 fields (question, A, B, C, D, answer), found {len(row)}; quote fields that hold commas")
            question, *choices, answer = row
            if answer.strip() not in tuple(LETTERS):
                raise ValueError(f"{where}: field 6, the answer, must be A, B, C or D, found {answer!r}")
            listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
            yield Question(f"{question.strip()}\n{listed}\nAnswer:", tuple(LETTERS), LETTERS.index(answer.strip()), subject)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from error


def read_hellaswag(path: str | os.PathLike, shots: int = 0) -> Task:
    """The endings as choices. Subjects are WikiHow and ActivityNet, where source_id tells."""
    return _task("hellaswag", path, shots, _hellaswag_item, HELLASWAG)


def _hellaswag_item(record: dict, where: str) -> Question:
    activity, ctx_a, ctx_b = (_field(record, name, str, where) for name in ("activity_label", "ctx_a", "ctx_b"))
    endings = tuple(_cleaned(_string(e, f"{where}: the field 'endings'")) for e in _field(record, "endings", list, where))
    label = str(record.get("label", ""))
    if not label.isdecimal():
        raise ValueError(f"{where}: the field 'label' must be a number from 0, found {label!r}; the test part is published without: use hellaswag_val.jsonl")
    source = str(record.get("source_id", "")).partition("~")[0]
    return Question(_cleaned(f"{activity}: {ctx_a} {ctx_b.capitalize()}"), endings, int(label), source)


def _cleaned(text: str) -> str:
    """Without WikiHow's marks, as the usual evaluation code has it (EleutherAI's lm-evaluation-harness)."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ").strip()


def read_arc(path: str | os.PathLike, shots: int = 0) -> Task:
    """The texts of the choices are ranked; a question may have three, four or five of them."""
    return _task(Path(path).stem, path, shots, _arc_item, ARC)  # there are an easy and a hard set, which are usually given together


def _arc_item(record: dict, where: str) -> Question:
    question = _field(record, "question", dict, where)
    stem, listed = _field(question, "stem", str, where, "question."), _field(question, "choices", list, where, "question.")
    labels, texts = [], []
    for number, choice in enumerate(listed):
        if not isinstance(choice, dict):
            raise ValueError(f"{where}: the field 'question.choices[{number}]' must be an object with text and label")
        texts.append(_field(choice, "text", str, where, f"question.choices[{number}]."))
        labels.append(_field(choice, "label", str, where, f"question.choices[{number}]."))
    key = _field(record, "answerKey", str, where)
    if key not in labels:
        raise ValueError(f"{where}: the field 'answerKey' is {key!r}, but the choices are labelled {', '.join(labels) or 'not at all'}")
    return Question(f"Question: {stem}\nAnswer:", tuple(texts), labels.index(key))


def read_gsm8k(path: str | os.PathLike, shots: int = 0) -> Task:
    """Worked answers as they were published, calculator annotations (<<48/2=24>>) included: examples show them to the model."""
    return _task("gsm8k", path, shots, _gsm8k_item, GSM8K, verifier=last_number, max_tokens=256, stop=("Question:",))


def _gsm8k_item(record: dict, where: str) -> Problem:
    question, solution = (_field(record, name, str, where) for name in ("question", "answer"))
    _, mark, answer = solution.rpartition("####")
    if not mark or number_in(answer) is None:
        raise ValueError(f"{where}: the field 'answer' must end with #### and a number")
    return Problem(f"Question: {question.strip()}\nAnswer:", solution.strip(), answer.strip())


def _task(name: str, path: str | os.PathLike, shots: int, item: Callable[[dict, str], Item], example: dict, **options) -> Task:
    items = _items(path, item, example)
    return Task(name, items, _items(_training_file(path), item, example) if shots else (), shots, **options)


def _items(path: str | os.PathLike, item: Callable[[dict, str], Item], example: dict) -> tuple[Item, ...]:
    """One for each line that is not empty."""
    path, found = Path(path), []
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    for _, where, record in json_records(path, example):
        found.append(item(record, where))
        if isinstance(found[-1], Question):
            check_question(found[-1], where)
    if not found:
        raise ValueError(f"{path}: there are no items in it")
    return tuple(found)


def _training_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    name = path.name
    for part, train in (("val", "train"), ("test", "train"), ("Test", "Train"), ("Dev", "Train")):
        if part in name:
            return path.with_name(name.replace(part, train))
    raise ValueError(f"{path}: examples for few shots are read from the training file beside it, which this name does not tell: keep the published names")


def _field(record: dict, name: str, kind: type, where: str, prefix: str = ""):
    if name not in record:
        raise ValueError(f"{where}: the field {prefix + name!r} is missing; fields found: {', '.join(map(repr, record)) or 'none'}")
    if not isinstance(record[name], kind):
        raise ValueError(f"{where}: the field {prefix + name!r} must be {KINDS[kind]}, found {json.dumps(record[name])[:40]}")
    return _string(record[name], f"{where}: the field {prefix + name!r}") if kind is str else record[name]


def _string(value, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must hold strings, found {json.dumps(value)[:40]}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a surrogate pair at character {error.start}; correct the record") from error
    return value


READERS: dict[str, Callable[..., Task]] = dict(mmlu=read_mmlu, hellaswag=read_hellaswag, arc=read_arc, gsm8k=read_gsm8k)
