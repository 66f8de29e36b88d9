"""Every op, on every case of the table, against finite differences: float64, every element, random upstream gradient, 1e-6."""
import pytest

from tinyllm.gradcheck import gradcheck
from tinyllm.ops.cases import CASES
from tinyllm.tensor import OPS


def test_every_op_has_a_case():
    assert set(OPS) == {case.op for case in CASES}


def test_labels_are_distinct():
    names = [(case.op, case.label) for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.label}")
def test_backward_agrees_with_finite_differences(case):
    report = gradcheck(case.function, *case.arrays())
    assert report, report
