"""The house holds together: who may import whom, how long files and functions may be, what must be named nowhere."""
import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "tinyllm").rglob("*.py"))
LEVELS = dict(
    backend=0, config=0, threads=0, memory=0, processes=0, tokenizer=0.5, anomaly=0.5, tensor=1, recompute=1.5, data=1, ops=2, gradcheck=2,
    optim=2, nn=3, kernels=3.5, train=4, generate=4,
    finetune=5, align=5, evaluate=5, bench=5, stages=5.5, cli=6,
)  # fmt: skip
TEXT_TRUNK, MATH_TRUNK = {"tokenizer", "data"}, {"tensor", "ops", "nn", "optim", "gradcheck", "anomaly"}  # they first meet in train
ALLOWED = {"numpy", "regex", "cupy", "cuda"}  # cupy where device_module asks for it, and cuda.pathfinder, which finds its libraries
PEERS = {"torch", "transformers", "tokenizers", "tiktoken"}  # in bench/peers alone, each file a process of its own


def room(path: Path) -> str:
    """The package or top-level module that a file belongs to; "" for tinyllm/__init__.py and __main__.py."""
    name = path.relative_to(ROOT / "tinyllm").parts[0].removesuffix(".py")
    return "" if name.startswith("__") else name


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module, node
            if node.module == "tinyllm":
                yield from ((f"tinyllm.{alias.name}", node) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = room(path)
    for name, node in imports(path):
        if not name.startswith("tinyllm."):
            top = name.partition(".")[0]
            allowed = PEERS if path.parent == ROOT / "tinyllm" / "bench" / "peers" else ALLOWED
            assert top in allowed or top in sys.stdlib_module_names or top == "tinyllm", f"{path}:{node.lineno}: imports {name}"
            continue
        other = name.split(".")[1]
        if other in LEVELS and own:
            assert own == other or LEVELS[other] < LEVELS[own], f"{path}:{node.lineno}: {own} (level {LEVELS[own]}) imports {other}"
            assert not (own in TEXT_TRUNK and other in MATH_TRUNK or own in MATH_TRUNK and other in TEXT_TRUNK), f"{path}: the trunks meet"


def test_what_is_not_python_is_packed_too():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]["tinyllm"]
    packed = {path for pattern in patterns for path in (ROOT / "tinyllm").glob(pattern)}
    assert packed == {path for path in (ROOT / "tinyllm").rglob("*.*") if path.suffix not in (".py", ".pyc")}


def test_every_room_has_a_level():
    assert {room(p) for p in FILES} - {""} <= LEVELS.keys()


def test_what_a_tokenizer_is_needs_no_numpy():
    """The definitions: only their fast twins, and what hands out arrays, know array operations."""
    for name in ("bpe", "patterns", "characters", "basic", "gain", "wordpiece", "streaming", "files", "show"):
        assert "numpy" not in {name for name, _ in imports(ROOT / "tinyllm" / "tokenizer" / f"{name}.py")}, name


def test_ops_name_no_array_library():
    """Ops run on NumPy and CuPy alike: only tables that are made once on the host (positions) and the cases say np."""
    for path in (ROOT / "tinyllm" / "ops").glob("*.py"):
        if path.name not in ("positions.py", "cases.py"):
            assert "numpy" not in {name for name, _ in imports(path)}, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert source.count("\n") <= 400, f"{path}: what is its second job?"
    assert ast.get_docstring(tree), f"{path}: says nothing about itself"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1 - (ast.get_docstring(node, clean=False) or "").count("\n")
            assert length <= 60, f"{path}:{node.lineno}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_are_documented(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            decorated = any(getattr(d, "id", "") == "op" for d in getattr(node, "decorator_list", []))
            assert ast.get_docstring(node) or len(node.body) < 4, f"{path}:{node.lineno}: {node.name} has no docstring"
            assert not decorated or ast.get_docstring(node), f"{path}:{node.lineno}: op {node.name} shows no formula"


def test_nothing_is_pickled_or_switched_by_the_environment():
    for path in FILES:
        names = {name.partition(".")[0] for name, _ in imports(path)}
        assert not names & {"pickle", "marshal", "shelve"}, path
        assert "environ" not in path.read_text(encoding="utf-8"), path


def test_readme_gives_the_reading_order():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for place in ("tensor.py", "ops/", "nn/", "train/", "generate/", "tokenizer/", "data/", "optim/", "examples/"):
        assert place in readme, f"README.md does not say when to read {place}"
