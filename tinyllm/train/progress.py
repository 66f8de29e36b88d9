"""What a person sees while a model trains: one line that is always up to date, and at the end the curve of the loss."""
import shutil
import sys
from typing import TextIO

SHOWN = 3  # figures on the line


class Progress:
    """An observer of the loop that keeps one line up to date on a terminal, and prints a line per evaluation elsewhere.

    steps : updates in all.      sample : called after an evaluation, returns a short text of the model's; may be None.     unit : what is counted.
    """

    def __init__(self, steps: int, sample=None, stream: TextIO | None = None, unit: str = "tokens"):
        self.steps, self.sample, self.unit = steps, sample, "tok" if unit == "tokens" else unit
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.val_loss: float | None = None
        self.figures: dict[str, float] = {}  # of the newest evaluation and rollout, besides the loss
        self.smooth: dict[str, float] = {}
        self.first: dict | None = None
        self.last: dict | None = None

    def __call__(self, record: dict) -> None:
        getattr(self, f"_{record['event']}")(record)

    def _step(self, record):
        self.first = self.first or record
        kept = 0.9 ** (record["step"] - self.last["step"] if self.last else 1)  # a running mean over steps, however many have a record
        for name in ("loss", "tokens_per_second"):
            if record[name] is not None:
                self.smooth[name] = kept * self.smooth.get(name, record[name]) + (1 - kept) * record[name]
        self.last = record
        if self.live:
            columns = shutil.get_terminal_size((120, 24)).columns  # a line that wraps could not be written over
            self.stream.write("\r" + self._line(record)[: columns - 1] + "\x1b[K")
            self.stream.flush()

    def _line(self, record) -> str:
        pace = (record["seconds"] - self.first["seconds"]) / max(record["step"] - self.first["step"], 1)
        left = duration((self.steps - record["step"]) * pace) if pace else "?"
        norm = "overflow" if record["grad_norm"] is None else f"{record['grad_norm']:.2f}"
        val = "     -" if self.val_loss is None else f"{self.val_loss:6.3f}"
        figures = "".join(f"{name} {figure(value)}  " for name, value in list(self.figures.items())[:SHOWN])
        return (
            f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  loss {self.smooth.get('loss', float('nan')):6.3f}  val {val}  {figures}"
            f"lr {record['lr']:.1e}  grad {norm}  {self.smooth['tokens_per_second']:7,.0f} {self.unit}/s  {left} left"
        )

    def _evaluation(self, record):
        self.val_loss = record["val_loss"]
        self.figures |= {name: value for name, value in record.items() if name not in ("event", "step", "seconds", "val_loss")}
        if self.live:
            self.stream.write("\r\x1b[K")
        if record["step"] == 0:
            known = ([] if self.val_loss is None else [f"validation loss {self.val_loss:.3f}"]) + [f"{n} {figure(v)}" for n, v in self.figures.items()]
            print(f"before training: {', '.join(known)}", file=self.stream)
        else:
            print(self._line(self.last), file=self.stream)
            if self.sample is not None and record["step"] < self.steps:
                print(f"    {self.sample()}", file=self.stream)
        self.stream.flush()

    def _rollout(self, record):
        self.figures |= {name: record[name] for name in ("reward", "length")}

    def _checkpoint(self, record):
        pass  # said at the end; in between it would only push the samples away


def figure(value: float) -> str:
    """A share, a length or a loss in four digits or so: 0.934, 12.5, 310."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """71.3 -> "1:11"; 4000 -> "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def loss_curve(training: list[tuple[int, float]], validation: list[tuple[int, float]], width: int = 64, height: int = 12) -> str:
    """A picture in characters of loss over steps: · training (averaged over each column), o validation."""
    points = training + validation
    if not points:
        return "(no steps)"
    last = max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    span = high - low or 1.0
    rows = [[" "] * width for _ in range(height)]
    columns: dict[int, list[float]] = {}
    for step, loss in training:
        columns.setdefault(round(step / max(last, 1) * (width - 1)), []).append(loss)
    averaged = [(x, sum(losses) / len(losses)) for x, losses in columns.items()]
    marks = [(x, loss, "·") for x, loss in averaged] + [(round(s / max(last, 1) * (width - 1)), loss, "o") for s, loss in validation]
    for x, loss, mark in marks:
        rows[round((high - loss) / span * (height - 1))][x] = mark
    labels = [f"{high - span * i / (height - 1):8.3f} " if i % 4 == 0 or i == height - 1 else " " * 9 for i in range(height)]
    lines = [label + "|" + "".join(row).rstrip() for label, row in zip(labels, rows, strict=True)]
    axis = " " * 9 + "+" + "-" * width
    return "\n".join([*lines, axis, f"{'0':>11}{'step':^{width - 8}}{last:>6,}", f"{'':10}· training   o validation"])
