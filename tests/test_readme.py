"""README says nothing that is not so: its code runs, its commands exist, its paths are there."""
import re
from pathlib import Path

from tinyllm.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def test_the_two_commands_stand_near_the_top_on_one_line_each():
    one_liners = [block.strip() for block in blocks("bash") if block.startswith("python3 -m venv")]
    assert len(one_liners) == 2 and all("\n" not in line for line in one_liners)
    assert one_liners[0].endswith("tinyllm train") and one_liners[1].endswith("pytest")
    assert README.index(one_liners[1]) < 2500


def test_the_python_code_runs():
    assert blocks("python")
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})


def test_commands_exist():
    named = set(re.findall(r"^tinyllm (\w+)", "\n".join(blocks("bash")), re.MULTILINE))
    assert named and named <= COMMANDS.keys()


def test_paths_in_the_reading_order_exist():
    tree = next(block for block in blocks("") if block.startswith("examples/"))
    folder = ROOT
    for line in tree.splitlines():
        names = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        if not line.startswith(" "):
            folder = ROOT / names.rstrip("/")
            assert folder.exists(), names
            continue
        for name in names.split(", "):
            assert (folder / name).exists() or "may be deleted" in line, f"README names {folder.name}/{name}"


def test_no_placeholder_is_left():
    assert "@@" not in README
