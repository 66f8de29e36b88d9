"""Make a model of texts do a task: answer (instruct), or tell texts apart (classify), and say what it takes a text for (predict)."""
import argparse
import json

from tinyllm import Tensor, ops
from tinyllm.cli.run_stage import add_base, run_on_base, say
from tinyllm.cli.sample import PICTURES
from tinyllm.data import read_documents
from tinyllm.finetune import LabelledBatches, encode_texts, predict
from tinyllm.stages import STAGES, load_module

ACTIONS = {"instruct": "answer in conversations", "classify": "tell texts apart by their labels"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="instruct|classify|predict")
    for name, text in ACTIONS.items():
        add_base(actions.add_parser(name, help=text, description=f"Tune a model to {text}."), STAGES[name])
    guess = actions.add_parser("predict", help="the label that a classifier gives to texts, and its probability")
    guess.add_argument("run_folder", metavar="RUN", help="folder that `tinyllm finetune classify` made")
    guess.add_argument("--text", action="append", metavar="TEXT", help="a text; several, if it is given several times")
    guess.add_argument("--data", nargs="+", metavar="FILE_OR_FOLDER", help="texts, .jsonl with a text field, or folders of them")
    guess.add_argument("--checkpoint", default="last", metavar="last|best|STEP", help="which of the run's checkpoints (default: last)")


def run(args: argparse.Namespace) -> int:
    """Tune, or predict."""
    return _predict(args) if args.action == "predict" else run_on_base(args, STAGES[args.action])


def _predict(args: argparse.Namespace) -> int:
    if not args.text and not args.data:
        raise ValueError("there is nothing to tell apart: give a --text or --data")
    if table := next((path for path in args.data or () if path.endswith(".csv")), None):
        raise ValueError(f"{table}: a .csv would be read as one text: give texts, or a .jsonl with a text field")
    model, tokenizer, config = load_module(args.run_folder, args.checkpoint)
    if config.stage != "classify":
        raise ValueError(f"{args.run_folder} is a run of another stage, {config.stage}: predict needs one of tinyllm finetune classify")
    texts = [*(args.text or []), *(document.text for document in (read_documents(args.data) if args.data else ()))]
    if empty := next((i for i, text in enumerate(texts, 1) if not text.strip()), None):
        raise ValueError(f"text {empty} of {len(texts)} is empty")
    rows = encode_texts(tokenizer, texts, config.model.context, say)
    scores = predict(model, LabelledBatches(rows, [0] * len(rows), config.train.batch, seed=0).in_order())
    for text, probabilities in zip(texts, ops.softmax(Tensor(scores)).numpy(), strict=True):
        best = int(probabilities.argmax())
        shown = json.dumps(text if len(text) <= 60 else f"{text[:57]}...", ensure_ascii=False).translate(PICTURES)
        print(f"{config.head.labels[best].translate(PICTURES):<12} {probabilities[best]:7.2%}  {shown}")
    return 0
