"""Every layer's gradients, of its input and of all its parameters, against finite differences in float64; and that the check bites."""
import importlib
import pkgutil

import numpy as np
import pytest

import tinyllm.nn
from tinyllm import ops
from tinyllm.gradcheck import gradcheck
from tinyllm.nn import GatedMLP, Linear, Module, RMSNorm, Transformer
from tinyllm.nn.attention import Attention
from tinyllm.nn.cases import LAYERS
from tinyllm.nn.transformer import Block

KINDS = ("gpt2", "llama")  # whole models that are checked element by element; the others along random directions


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: f"{case.layer.__name__}: {case.label}")
def test_backward_agrees_with_finite_differences(case):
    whole = case.layer is Transformer and case.label not in KINDS
    report = case.check(**(dict(method="projection", directions=4) if whole else {}))
    assert report, report


def subclasses(kind):
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_module_has_a_case():
    for module in pkgutil.iter_modules(tinyllm.nn.__path__, "tinyllm.nn."):
        importlib.import_module(module.name)
    known = {kind for kind in subclasses(Module) if kind.__module__.startswith("tinyllm.nn.")}  # later stages check their own
    assert known == {case.layer for case in LAYERS}
    assert {case.label for case in LAYERS if case.layer is Transformer} >= set(KINDS)


def test_labels_are_distinct():
    names = [(case.layer, case.label) for case in LAYERS]
    assert len(set(names)) == len(names)


def test_every_parameter_is_checked(monkeypatch):
    """Of every case, each parameter and each input stands in the report."""
    monkeypatch.setattr("tinyllm.nn.cases.gradcheck", lambda *args, **options: gradcheck(*args, method="projection", directions=1, **options))
    for case in LAYERS:
        layer = case.make(np.random.default_rng(0))
        names = [f"input {i}" for i in range(len(case.inputs))] + [name for name, _ in layer.named_parameters()]
        assert [r.name for r in case.check().inputs] == names


def without_input_gradient(self, x, rng=None):
    return ops.linear(x.detach(), self.weight, self.bias)


def without_bias_gradient(self, x, rng=None):
    return ops.linear(x, self.weight, self.bias.detach() if self.bias is not None else None)


def without_norm_factor(self, x):
    """The root mean square taken for a constant."""
    r = (x.detach() * x.detach()).mean(axis=-1, keepdims=True) + self.eps
    return x * r**-0.5 * self.weight


def without_gate(self, x, rng=None):
    return self.down(self.activation(self.gate(x).detach(), self.up(x)))


def without_skip(self, x, around, layer):
    x = x.detach() + self.attention(self.attention_norm(x), around, layer)
    return x + self.mlp(self.mlp_norm(x))


def without_values(self, x, around, layer):
    B, T, C = x.shape
    q, k = (self._turned(self._heads(part(x)), None, around) for part in (self.query, self.key))
    y = self.attend(q, k, self._heads(self.value(x)).detach(), **self.settings)
    return self.output(y.swapaxes(1, 2).reshape(B, T, C))


@pytest.mark.parametrize("kind, fault, label, worst", [
    (Linear, without_input_gradient, "bias", "input 0"),
    (Linear, without_bias_gradient, "bias", "bias"),
    (RMSNorm, without_norm_factor, "plain", "input 0"),
    (GatedMLP, without_gate, "swiglu", "gate.weight"),
    (Attention, without_values, "grouped, RoPE", "value.weight"),
])  # fmt: skip
def test_a_fault_in_a_layer_is_found(monkeypatch, kind, fault, label, worst):
    """The same values, a wrong gradient."""
    case = next(case for case in LAYERS if case.layer is kind and case.label == label)
    monkeypatch.setattr(kind, "forward", fault)
    report = case.check()
    assert not report
    assert next(r for r in report.inputs if r.name == worst).error > 0.01


@pytest.mark.parametrize("kind, fault", [(Linear, without_bias_gradient), (RMSNorm, without_norm_factor), (Block, without_skip)])
def test_a_fault_in_a_layer_is_found_in_the_whole_model(monkeypatch, kind, fault):
    monkeypatch.setattr(kind, "_pre" if kind is Block else "forward", fault)
    case = next(case for case in LAYERS if case.layer is Transformer and case.label == ("gpt2" if kind is Linear else "llama"))
    assert not case.check(method="projection", directions=2)
