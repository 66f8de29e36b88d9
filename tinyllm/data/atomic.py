"""Write a file so that a reader finds the old one or the new one, whole, and never a part: not after a crash, not on a full disk.

The bytes go to a temporary file beside the target. fsync makes them durable before os.replace, which is one step for everybody
else, gives them the name; fsync of the folder makes the name durable too. Without the first fsync a power cut may leave the new name
on an empty file.
"""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to; it becomes `path` when the block ends, and leaves no trace when the block fails.

    One writer at a time: the temporary file is always `path`.tmp, so that what a killed writer leaves is overwritten by the next.
    Errors: OSError, in one line, where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # write and fsync do not say which file it was
            raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno)}") from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Windows has no such call and does not need it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
