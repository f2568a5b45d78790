"""Files that are whole or not there, whatever interrupts their writing, and locks between processes."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from graphprune.errors import InvalidRequestError

DRAFT_SUFFIX = ".part"

# Letters of a file's name that the one beside it begins with: with what follows, no more than systems take.
MAX_DRAFT_NAME_LETTERS = 40


def check_target_path(path: str | Path, *suffixes: str) -> Path:
    """Return where a file is to be written, once it is seen that one can be; for before the work.

    Args:
        path: of the file.
        suffixes: that it may end in; whatever, if none are given.

    Raises:
        InvalidRequestError: it ends otherwise, is a folder, or is in a folder that there is not or that
            cannot be written to.

    """
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise InvalidRequestError(f"{path} must end in {_alternatives(suffixes)}")
    if path.is_dir():
        raise InvalidRequestError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise InvalidRequestError(
            f"there is no folder {path.parent} for {path.name}; make it first"
        )
    if not os.access(path.parent, os.W_OK):
        raise InvalidRequestError(f"{path.parent} cannot be written to; name another folder")
    return path


def _alternatives(words: Sequence[str]) -> str:
    """Return words as a choice: "a", "a or b", "a, b or c"."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; what UTF-8 has no letter for, as Python spells it."""
    with open_atomically(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


@contextmanager
def open_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """Give a file to write to, that stands at `path` once all is written and on the disk, never before.

    What was written of it until a failure is removed, and what was there before stays.
    """
    with draft_file(Path(path)) as draft:
        # no writing through a link that somebody put in the draft's place; a device's path may be one
        flags = getattr(os, "O_NOFOLLOW", 0) if draft != Path(path) else 0
        with open(draft, "wb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
            yield file


@contextmanager
def draft_file(path: Path) -> Iterator[Path]:
    """Give the path of an empty file beside, for writers that take a path; see `open_atomically`.

    Its name is one that nobody knows beforehand. It has the mode of the file that it replaces, or else that
    of any new file. A link at `path` is replaced, not followed; what is no file, as `/dev/null` is not, is
    written to.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    draft = path.with_name(
        f"{path.name[:MAX_DRAFT_NAME_LETTERS]}.{secrets.token_hex(8)}{DRAFT_SUFFIX}"
    )
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    try:
        os.close(os.open(draft, flags, 0o666))
        mode = _mode_of(path) or _mode_of(draft)
        yield draft
        # content before name: the other way round a power cut leaves an empty file under the old name
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        # that of the old file; or the writer put a file of its own here
        if _mode_of(draft) != mode:
            draft.chmod(mode)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _mode_of(path: Path) -> int:
    """Return the permissions of a file, or 0 where there is none or a link."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return 0
    return stat.S_IMODE(mode) & 0o777 if stat.S_ISREG(mode) else 0


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where a system can."""
    if hasattr(os, "O_DIRECTORY"):
        with suppress(OSError):  # some file systems cannot
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


@contextmanager
def draft_folder(folder: Path, instead_of: Sequence[str] = (), last: str = "") -> Iterator[Path]:
    """Give an empty folder, whose files are moved to `folder` once all are written.

    Moving takes no space, so that a full disk leaves the folder as it was.

    Args:
        folder: where the files are to be; made if need be.
        instead_of: patterns of files there that go once the new ones are in place, unless they are new.
        last: the file that is moved last, by which readers find the others.

    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as draft_path:
        draft = Path(draft_path)
        yield draft
        files = sorted(draft.iterdir(), key=lambda file: (file.name == last, file.name))
        for file in files:
            # all content before the first name, so that a full disk shows while the old files still stand
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        for file in files:
            os.replace(file, folder / file.name)
    names = {file.name for file in files}
    for pattern in instead_of:
        for old in folder.glob(pattern):
            if old.name not in names:
                old.unlink()


@contextmanager
def try_lock(lock: Path, wait: float = 0.0) -> Iterator[bool]:
    """Say whether no other process has the lock; hold it meanwhile.

    The system gives it back when a process ends, however it ends.

    Args:
        lock: a file, made for this, that stays: who waits for it has it open, and would come to hold a
            file that is no longer there while the next one makes another.
        wait: seconds at most until another gives it back.

    """
    file_lock = FileLock(lock, timeout=wait)
    try:
        file_lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        file_lock.release()
