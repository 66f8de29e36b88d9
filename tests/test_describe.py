"""What `describe` predicts against what happens: parameters exactly, products as they are counted while they run, memory as measured."""
import gc
import tracemalloc

import numpy as np
import pytest
from by_definition import plain_ops

from tinyllm import ops
from tinyllm.backend import random_stream
from tinyllm.cli.main import main
from tinyllm.nn import ARCHITECTURES, Transformer, TransformerConfig
from tinyllm.nn.config import GATED, PLAIN, POSITIONS
from tinyllm.nn.describe import describe
from tinyllm.optim import AdamW
from tinyllm.stages import PretrainConfig
from tinyllm.tensor import no_grad
from tinyllm.train.config import TrainConfig


@pytest.fixture(autouse=True)
def by_definition():
    """Predictions are of the ops as they are defined; kernels keep less, and write products into buffers of their own."""
    with plain_ops():
        yield


def loss_of(model, batch, rng=None):
    c = model.config
    ids = random_stream(0, "ids").integers(0, c.vocab_size, (batch, c.context + 1))
    return ops.linear_cross_entropy(model.hidden(ids[:, :-1], rng=rng), model.output_weight, ids[:, 1:])


CHOICES = [
    dict(arch="gpt2"),
    dict(arch="gpt2", bias=False),
    dict(arch="gpt2", tie=False, kv_heads=1, norm="rmsnorm"),
    dict(arch="llama"),
    dict(arch="llama", kv_heads=2, qk_norm=True, bias=True, norm="layernorm"),
    dict(arch="llama", norm_placement="post", tie=False),
    dict(arch="llama", precision="bf16", window=3, softcap=5.0, dropout=0.1, recompute=True, attention="tiled"),
    *(dict(positions=kind) for kind in POSITIONS),
    *(dict(mlp=kind, mlp_width=20) for kind in (*PLAIN, *GATED)),
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_parameters_are_exact(choices):
    config = TransformerConfig(**(dict(vocab_size=31, layers=3, heads=4, width=24, context=10) | choices))
    model = Transformer(config, np.random.default_rng(0))
    description = describe(config)
    sizes = {name: p.size for name, p in model.named_parameters()}
    assert description.parameters == sum(sizes.values())
    for part, module in [("token embedding", "embedding"), ("query", "query"), ("down", "down"), ("attention norm", "attention_norm")]:
        found = sum(size for name, size in sizes.items() if name.split(".")[-2] == module)
        assert sum(p.parameters * p.count for p in description.parts if p.name == part) == found


class Counted(np.ndarray):
    """An array that adds up the multiplications and additions of all matrix products that it and its descendants take part in."""

    done = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            options["out"] = tuple(x.view(np.ndarray) if isinstance(x, Counted) else x for x in out)
        y = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.done += 2 * y.size * plain[0].shape[-1]
        return out[0] if out is not None else y.view(Counted) if isinstance(y, np.ndarray) else y


@pytest.mark.parametrize("choices", [
    dict(arch="gpt2"),
    dict(arch="llama", kv_heads=2, tie=False),
    dict(arch="llama", attention="tiled", context=300, layers=1),
    dict(arch="llama", attention="tiled", context=270, window=100),
    dict(arch="llama", layers=1, recompute=True),
    dict(arch="gpt2", layers=3, recompute=True, attention="tiled", context=200),
], ids=str)  # fmt: skip
def test_flops_are_those_of_the_products_that_run(choices):
    config = TransformerConfig(**(dict(vocab_size=50, layers=2, heads=4, width=32, context=40) | choices))
    model, description = Transformer(config, np.random.default_rng(0)), describe(config, 2)
    for _, p in model.named_parameters():
        p.data = p.data.view(Counted)
    products = [p for p in description.parts if "norm" not in p.name and p.name != "position embedding"]
    tokens = 2 * config.context
    Counted.done = 0
    with no_grad():
        loss_of(model, 2)
    assert Counted.done == pytest.approx(sum(p.flops * p.count for p in products) * tokens, rel=1e-12)
    Counted.done = 0
    loss_of(model, 2).backward()
    rest = sum(p.flops * p.count * (p.passes + (config.recompute and p.in_block)) for p in description.parts if p not in products)
    assert Counted.done == pytest.approx((description.flops_per_token - rest) * tokens, rel=1e-12)
    assert rest < 0.1 * description.flops_per_token


BASE = dict(vocab_size=512, layers=2, heads=4, width=64, context=128)
MEASURED = [
    dict(arch="gpt2"),
    dict(arch="llama", kv_heads=1, qk_norm=True),
    dict(arch="llama", attention="tiled"),
    dict(arch="llama", attention="tiled", precision="bf16", context=192, window=32),
    dict(arch="gpt2", recompute=True, dropout=0.1),
    dict(arch="llama", layers=1, recompute=True),
    dict(arch="gpt2", norm_placement="post", mlp="relu2"),
    dict(arch="llama", dropout=0.1, softcap=30.0),
    dict(arch="gpt2", precision="fp16", tie=False),
    dict(arch="llama", vocab_size=16384, layers=1, precision="bf16", tie=False),
    dict(arch="llama", positions="alibi", mlp="geglu", mlp_width=1024),
    dict(arch="gpt2", mlp="relu", mlp_width=16, heads=8, context=192),
]


@pytest.mark.parametrize("choices", MEASURED, ids=str)
def test_memory_is_as_predicted(choices):
    """Activations to 3 %, the peak of a training step to 10 %, the weights' state to 3 %. (Nodes and other small objects come on top.)"""
    config, batch = TransformerConfig(**(BASE | choices)), 3
    description = describe(config, batch)
    rng = np.random.default_rng(1) if config.dropout else None
    loss_of(Transformer(config, np.random.default_rng(0)), 1, rng).backward()  # what is made once, on the first call
    gc.collect()
    tracemalloc.start()
    try:
        model = Transformer(config, np.random.default_rng(0))
        optimizer = AdamW(model.named_parameters())
        state = tracemalloc.get_traced_memory()[0]
        loss = loss_of(model, batch, rng)
        held = tracemalloc.get_traced_memory()[0] - state
        loss.backward()
        optimizer.step(1e-3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert description.state_bytes == pytest.approx(state, rel=0.03)
    assert description.activation_bytes == pytest.approx(held, rel=0.03, abs=30_000)
    assert description.peak_bytes == pytest.approx(peak, rel=0.1)


def test_memory_of_tiled_attention_is_linear_in_the_context():
    def grown(attention):
        held = [describe(TransformerConfig(context=T, attention=attention)).activation_bytes / T for T in (256, 2048)]
        return held[1] / held[0]

    assert grown("tiled") == pytest.approx(1, abs=0.01) and grown("naive") > 3


def described(capsys, *args):
    status = main(["describe", *args])
    return (status, *capsys.readouterr())


def test_table(capsys):
    status, out, err = described(
        capsys, *"--arch llama --layers 4 --heads 4 --width 128 --context 64 --vocab-size 65 --batch 12".split()
    )
    assert (status, err) == (0, "")
    rows = {line[:20].strip(): line for line in out.splitlines()}
    assert rows["total"].split()[1] == "800,000"
    assert rows["gate"].split() == ["gate", "344", "x", "128", "4", "176,128", "352,256", "0"]
    assert rows["head"].split()[:5] == ["head", "65", "x", "128", "(tied)"]
    assert "for 768 tokens" in out and "(12 windows of 64)" in out
    assert max(map(len, out.splitlines())) < 120


def test_table_of_every_choice(capsys):
    for arch in ARCHITECTURES:
        options = "--qk-norm --kv-heads 1 --dropout 0.1 --recompute --norm-placement post --positions learned --no-tie --precision fp16"
        status, out, _ = described(capsys, "--arch", arch, *options.split())
        assert status == 0 and "block inputs" in out and "position embedding" in out and "final norm" not in out


def test_a_run(capsys, tmp_path):
    """The saved model and batch; another batch where one is given."""
    model = TransformerConfig(vocab_size=300, layers=1, heads=2, width=16, context=8)
    PretrainConfig(model=model, train=TrainConfig(batch=3)).checked().save(tmp_path / "config.json")
    options = "--vocab-size 300 --layers 1 --heads 2 --width 16 --context 8 --batch".split()
    assert described(capsys, str(tmp_path)) == described(capsys, *options, "3")
    assert described(capsys, str(tmp_path), "--batch", "5") == described(capsys, *options, "5")


@pytest.mark.parametrize("options, message", [
    ("--heads 6", "--heads 6 does not divide --width 160"),
    ("--heads 32", "--positions rope turns pairs, but width / heads is 5: it must be even"),
    ("--kv-heads 4", "--kv-heads 4 does not divide --heads 5"),
    ("--arch lama", "--arch is 'lama': it takes gpt2, llama, bert; did you mean llama?"),
    ("--layers 0", "--layers is 0: it must be at least 1"),
    ("--vocab-size 0", "--vocab-size is 0: it must be at least 1"),
    ("--batch -1", "--batch is -1: it must be at least 1"),
    ("--width many", "argument --width: "),
    ("--vocab-size many", "argument --vocab-size: 'many' is not a whole number"),
    ("--widht 8", "did you mean --width?"),
    ("nowhere", "so nowhere is not a run folder"),
    ("nowhere --layers 2", "a run or settings, not both: leave out --layers or nowhere"),
    ("nowhere --vocab-size 2", "leave out --vocab-size or nowhere"),
])  # fmt: skip
def test_errors_are_one_line(capsys, options, message):
    try:
        status = main(["describe", *options.split()])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("tinyllm: error: ") and message in err
