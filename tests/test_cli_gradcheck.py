"""`tinyllm gradcheck`."""
import pytest

from tinyllm.cli.main import main
from tinyllm.nn.cases import LAYERS
from tinyllm.ops.cases import CASES
from tinyllm.tensor import OPS


def gradcheck(capsys, *args):
    status = main(["gradcheck", *args])
    return (status, *capsys.readouterr())


def test_chosen_names(capsys):
    status, out, err = gradcheck(capsys, "rmsnorm", "RMSNorm", "cross_entropy")
    lines = out.splitlines()
    names = [line.split()[0] for line in lines[1:-1]]
    expected = [c.op for c in CASES if c.op in ("rmsnorm", "cross_entropy")] + [c.layer.__name__ for c in LAYERS if c.layer.__name__ == "RMSNorm"]
    assert (status, err, names, lines[-1]) == (0, "", expected, "all within 1e-06")
    assert lines[0].split() == ["name", "case", "error", "worst", "element"]


def test_a_case_that_fails(capsys, monkeypatch):
    exp = OPS["exp"]
    monkeypatch.setitem(OPS, "exp", lambda x: exp(x.detach()) + x * 0.5)
    status, out, _ = gradcheck(capsys, "exp", "tanh")
    failed = [line for line in out.splitlines() if "FAILED" in line]
    assert status == 1 and len(failed) == 1 and out.endswith("\n1 failed\n")
    assert failed[0].startswith("exp ") and "FAILED: backward " in failed[0] and ", numeric " in failed[0]


def test_tolerance(capsys):
    status, out, _ = gradcheck(capsys, "silu", "--tolerance", "1e-9")
    assert status == 0 and out.endswith("all within 1e-09\n")


def test_list(capsys):
    status, out, _ = gradcheck(capsys, "--list")
    names = out.split()
    assert status == 0 and len(set(names)) == len(names)
    assert set(names) == {c.op for c in CASES} | {c.layer.__name__ for c in LAYERS}


@pytest.mark.parametrize("options, message", [
    ("rmsnrm", "gradcheck knows no op or layer 'rmsnrm'; did you mean rmsnorm? (tinyllm gradcheck --list prints all)"),
    ("exp Transformr", "gradcheck knows no op or layer 'Transformr'; did you mean Transformer?"),
    ("--tolerance small", "--tolerance"),
    ("--tolerance 1e-12", "gradcheck: the tolerance 1e-12 is below 1e-09"),
    ("--tolerance nan", "argument --tolerance: 'nan' is not a finite number"),
    ("--lits", "unknown option --lits; did you mean --list?"),
])  # fmt: skip
def test_errors_are_one_line(capsys, options, message):
    try:
        status = main(["gradcheck", *options.split()])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("tinyllm: error: ") and message in err
