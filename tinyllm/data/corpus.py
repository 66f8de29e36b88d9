"""Real text that every machine has, so that nothing needs a download: the sources of Python's own standard library.

About ten million characters of code and of documentation written by many hands. The text differs a little from one Python version
to the next; on one installation it is always the same.
"""
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyllm.data.records import decode
from tinyllm.data.text import Document, files_below

LEFT_OUT = {
    "test", "tests", "idle_test",  # tests: long lists of odd cases
    "encodings",  # tables of character codes
    "site-packages", "dist-packages",  # what was installed later
    "__pycache__",
}
MACHINE_SPECIFIC = "_sysconfigdata"  # start of the name of a file that holds the paths and compiler flags of this build


def standard_library(on_skip: Callable[[str], None] = warnings.warn) -> Iterator[Document]:
    """The .py files of the standard library as documents, sorted by path; Document.source is the path below the library's folder.

    Line endings become "\\n": here they depend on the installer, not on an author. on_skip gets one line for every file that is
    not UTF-8 (none in today's Pythons). Raises FileNotFoundError where Python came without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = files_below(root, (".py",), LEFT_OUT)
    if not files:
        raise FileNotFoundError(f"{root}: this Python came without the sources of its standard library; name your own text with --data")
    for path in files:
        if path.name.startswith(MACHINE_SPECIFIC):
            continue
        try:
            text = decode(path.read_bytes(), str(path))
        except ValueError as error:
            on_skip(f"skipped {error}")
            continue
        if text:
            yield Document(text.replace("\r\n", "\n"), path.relative_to(root).as_posix())
