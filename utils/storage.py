"""Files that survive a kill, and reading that trusts nothing: bounded, regular files only, checked against a type."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from utils.cli import FULL, UserError

MOST_JSON = 256 << 20  # bytes of one JSON file; iNaturalist 2018's list of 437,513 images has 140 MB
MOST_TOML = 1 << 20  # bytes of one TOML file
MOST_JSONL = 1 << 30  # bytes of one JSON Lines file: some two million lines of a manifest
TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})[0-9a-f]{8}\.([0-9]+)\.tmp")  # .NAME.<where><random>.<process id>.tmp
DAY = 24 * 3600
RESTORE = "restore it from a copy"


# ===== writing =====

UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@contextlib.contextmanager
def atomic_path(path: str | Path, fsync: bool = False) -> Iterator[Path]:
    """Yield a temporary file in the same folder; when the block succeeds it becomes PATH, else it is removed.

    The temporary name starts with a dot and ends in `.tmp`, so it matches no glob for images or checkpoints. It cannot
    be guessed and the file is new: a symlink planted under it is never followed. With fsync the content reaches the
    disk before the name does: a power cut cannot leave PATH empty. A full disk is an OSError that names PATH, whatever
    the library that writes made of it.
    """
    path = Path(path)
    name = os.fsdecode(os.fsencode(path.name)[:200])  # with the rest no longer than the 255 bytes a name may have
    temporary = path.with_name(f".{name}.{_where()}{os.urandom(4).hex()}.{os.getpid()}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        yield temporary
        if fsync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        if number := _disk_full(error, temporary):
            raise OSError(number, os.strerror(number), str(path)) from error
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _disk_full(error: Exception, temporary: Path) -> int:
    """The errno if a full disk or quota lies behind ERROR, else 0."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in FULL else 0
    if isinstance(error, OSError | RuntimeError):  # of numpy or torch, for a short write: does the disk take more?
        try:
            with open(temporary, "ab") as file:
                file.write(bytes(1 << 20))
        except OSError as second:
            return second.errno or 0 if second.errno in FULL else 0
    return 0


@cache
def _where() -> str:
    """Eight hex digits for this machine's run and process space: only there does a process id mean anything."""
    found = [os.uname().nodename]
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        found += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return f"{zlib.crc32(' '.join(found).encode()):08x}"


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that killed processes left in FOLDER: dead here, or a day old if made elsewhere.

    A file of this very process id counts as dead: call it before writing (containers give every run the same id).
    """
    for path in Path(folder).glob(".*.tmp"):
        if found := TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # its writer has just ended
                here = found[1] == _where()
                if not _lives(int(found[2])) if here else time.time() - path.lstat().st_mtime > DAY:
                    path.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def atomic_write(path: str | Path, data: bytes, fsync: bool = False) -> None:
    """Write DATA to PATH so that a reader sees the old content or the new, never a part."""
    with atomic_path(path, fsync=fsync) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write VALUE as indented JSON, atomically and synced: JSON files here are small and describe expensive work."""
    atomic_write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), fsync=True)


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """Render TEMPLATE, a file below utils such as "report/report.html.j2", to PATH, atomically; returns PATH.

    In HTML every text is escaped. A name that the template uses but VALUES lacks is an error: no page is half empty.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here: only pages need it, every script starts

    loader = FileSystemLoader(Path(__file__).parent)
    html = template.endswith(".html.j2")
    how: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    pages = Environment(loader=loader, autoescape=html, keep_trailing_newline=not html, **how)
    atomic_write(path, readable(pages.get_template(template).render(**values)).encode())
    return Path(path)


def readable(text: str) -> str:
    """TEXT with a mark for each character that no page should hold: controls, directions, halves of a pair."""
    return UNREADABLE.sub("\ufffd", text)


def append_jsonl(path: str | Path, *values: Any, fsync: bool = False) -> None:
    """Append each of VALUES as one line, all in a single O_APPEND write: lines of concurrent writers do not mix.

    A torn last line (a writer killed, a full disk) is closed with a newline first, so that it spoils itself only.
    Where the disk has no room for all of it nothing is left of it, and the OSError names PATH.
    """
    data = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
    try:
        status = os.fstat(descriptor)
        _refuse_special(status, path)
        if status.st_size and os.pread(descriptor, 1, status.st_size - 1) != b"\n":
            data = b"\n" + data
        written = os.write(descriptor, data)
        if written != len(data):
            end = os.lseek(descriptor, 0, os.SEEK_CUR)
            if os.fstat(descriptor).st_size == end:  # nobody else has appended since
                os.ftruncate(descriptor, end - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if fsync:
            os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


# ===== reading back =====


def open_regular(path: str | Path) -> BufferedReader:
    """PATH for reading if it is a regular file; OSError, which names it, for a FIFO or device: they may never end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    try:
        _refuse_special(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most MOST bytes; OSError, which names PATH, for anything else."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"{size:,} bytes, more than the {most:,} that are read", str(path))
        data = file.read(most + 1)  # files of /proc and /sys say that they have 0 bytes
        if len(data) > most:
            raise OSError(errno.EFBIG, f"more than the {most:,} bytes that are read", str(path))
        return data


def _refuse_special(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_json(path: str | Path, kind: Any = dict[str, Any], remedy: str = RESTORE) -> Any:
    """The value of a JSON file, checked against KIND: a msgspec.Struct, `dict[str, int]`, `list` ...

    UserError for a missing, damaged or huge file and one of another type: what is wrong and where, and REMEDY.
    """
    try:
        return _decode(_read(path, MOST_JSON, remedy), msgspec.json.Decoder(kind))
    except msgspec.ValidationError as error:
        what, at = what_and_where(error)
        raise UserError(f"{path}: {what}{f' at {at}' if at else ''}; {remedy}") from None
    except _DAMAGE as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path} is not valid JSON ({reason}); {remedy}") from None


def read_jsonl(path: str | Path, kind: Any = dict[str, Any], option: str = "") -> list[Any]:
    """The lines of a JSON Lines file that are of KIND; [] if the file does not exist.

    Damaged lines, torn by a kill or of another type, are left out; how many, is said on stderr if an OPTION reads them.
    """
    if not Path(path).exists():
        return []
    decoder, values = msgspec.json.Decoder(kind), []
    lines = [line for line in _read(path, MOST_JSONL).split(b"\n") if line.strip()]
    for line in lines:
        with contextlib.suppress(*_DAMAGE):
            values.append(_decode(line, decoder))
    if option and len(values) < len(lines):
        print(f"{option}: {path}: {len(lines) - len(values)} damaged lines are left out", file=sys.stderr)
    return values


_DAMAGE = (msgspec.DecodeError, ValueError, RecursionError)


def _decode(data: bytes, decoder: msgspec.json.Decoder) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        if b"NaN" not in data and b"Infinity" not in data:  # which Python writes and JSON does not know
            raise
        return msgspec.convert(json.loads(data), decoder.type)


def what_and_where(error: msgspec.ValidationError) -> tuple[str, str]:
    """Of a value that is of another type: ("expected int, got str", "$.rows[0]"), the place "" if it is the whole."""
    what, _, at = str(error).replace("`", "").partition(" - at ")
    return what[:1].lower() + what[1:], at


def _read(path: str | Path, most: int, remedy: str = RESTORE) -> bytes:
    try:
        return read_regular(path, most)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from None


def read_toml(path: str | Path, where: str, example: str) -> dict[str, Any]:
    """The content of a TOML file that people write; UserError that opens with WHERE and may point to an EXAMPLE."""
    import tomllib  # here: start-up time

    try:
        return tomllib.loads(read_regular(path, MOST_TOML).decode())
    except FileNotFoundError:
        raise UserError(f"{where}: no such file; {example} to start from") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid TOML ({error})") from None


def sha256_bytes(data: bytes | memoryview) -> str:
    """The SHA-256 of DATA as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """The SHA-256 of VALUE as JSON: equal values have the same, whatever the order of their keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True).encode())


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, read in pieces: what `sha256sum` prints."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ===== folders and locks =====


def require_writable(folder: str | Path, option: str) -> Path:
    """Create FOLDER if needed, free it of leftovers and prove that it can be written to; else UserError with OPTION."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # has no name that could be guessed, or be left behind
            probe.write(b"x")
            probe.flush()
        remove_leftovers(folder)
    except OSError as error:
        remedy = "choose another folder or free space"
        raise UserError(f"{option}: cannot write to {folder} ({error.strerror}); {remedy}") from None
    return folder


def free_bytes(path: str | Path) -> int:
    """Free bytes on the disk that holds PATH, or will hold it: the nearest folder that exists is asked."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class AlreadyOwned(Exception):
    """Another living process holds this lock."""


@contextlib.contextmanager
def owner_lock(path: str | Path, wait: bool | str = False) -> Iterator[None]:
    """Hold an exclusive lock on the file PATH; if a living process has it, WAIT for it or raise AlreadyOwned at once.

    A WAIT in words is printed first. The kernel releases the lock of a dead process (flock), so a `kill -9` leaves
    nothing to clean up. The file stays: removing it would let two processes lock two files of the same name.
    """
    from filelock import FileLock, Timeout

    # The fallback, a file that marks the lock, would outlive a process killed on another host.
    lock = FileLock(str(path), fallback_to_soft=False)
    try:
        lock.acquire(timeout=-1 if wait is True else 0)
    except Timeout:
        if not wait:
            raise AlreadyOwned(str(path)) from None
        print(wait, flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        remedy = "mount it with flock (Lustre: -o flock) or choose a folder on another"
        raise UserError(f"{path}: this file system cannot lock files ({error.strerror}); {remedy}") from None
    try:
        yield
    finally:
        lock.release()
