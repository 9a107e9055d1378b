"""Files that survive a kill: written to a temporary name and renamed, hashed, locked, appended line by line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.cli import UserError


@contextmanager
def atomic_path(path: str | Path, fsync: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block succeeds it becomes PATH, else it is removed.

    The temporary name starts with a dot and ends in `.tmp`, so it matches no glob for images or checkpoints.
    With fsync the content reaches the disk before the name does: a power cut cannot leave PATH empty.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if fsync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, data: bytes, fsync: bool = False) -> None:
    """Write DATA to PATH so that a reader sees the old content or the new, never a part."""
    with atomic_path(path, fsync=fsync) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write VALUE as indented JSON, atomically and synced: JSON files here are small and describe expensive work."""
    atomic_write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), fsync=True)


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """Render TEMPLATE, a file below utils such as "report/report.html.j2", to PATH, atomically; returns PATH.

    Every text is escaped, and a name that the template uses but VALUES lacks is an error: a page is never half empty.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here: only pages need it, every script starts

    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    atomic_write(path, pages.get_template(template).render(**values).encode())
    return Path(path)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or damaged one is a UserError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it or restore it from a copy") from None


def append_jsonl(path: str | Path, value: Any) -> None:
    """Append VALUE as one line. A single O_APPEND write: lines of concurrent writers do not mix on a local disk.

    A torn last line (a writer killed, a full disk) is closed with a newline first, so that it spoils itself only.
    """
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(28, "No space left on device", str(path))
    finally:
        os.close(descriptor)


def read_jsonl(path: str | Path) -> list[Any]:
    """The objects of a JSON-lines file, [] if it does not exist. Lines torn by a kill are left out."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    values = []
    for line in lines:
        if line.strip():
            try:
                values.append(json.loads(line))
            except (json.JSONDecodeError, UnicodeDecodeError):
                continue
    return values


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(folder: str | Path, option: str) -> Path:
    """Create FOLDER if needed and prove that a file can be written into it; else a UserError that names OPTION."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test.{os.getpid()}.tmp"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{option}: cannot write to {folder} ({error.strerror}); choose another folder or free space"
        ) from None
    return folder


def free_bytes(path: str | Path) -> int:
    """Free bytes on the disk that holds PATH, or will hold it: the nearest folder that exists is asked."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class AlreadyOwned(Exception):
    """Another living process holds this lock."""


@contextmanager
def owner_lock(path: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on the file PATH; raise AlreadyOwned at once if a living process has it.

    The kernel releases the lock of a dead process (flock), so a `kill -9` leaves nothing to clean up. The file stays:
    removing it would let two processes lock two files of the same name.
    """
    from filelock import FileLock, Timeout

    # The fallback, a file that marks the lock, would outlive a process killed on another host.
    lock = FileLock(str(path), fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AlreadyOwned(str(path)) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        raise UserError(
            f"{path}: this file system cannot lock files ({error.strerror}); mount it with flock (Lustre: -o flock) "
            "or choose a folder on another"
        ) from None
    try:
        yield
    finally:
        lock.release()
