"""Pickles from outside, read without running anything in them: lists, dicts, numbers, text, numpy arrays of these."""

import io
import pickle
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError
from utils.storage import read_regular

MOST = 4 << 30  # bytes of a pickle


def read_pickle(path: str | Path) -> Any:
    """The object in PATH. Raises UserError naming the file, and what it asks for, if it holds anything else."""
    try:
        data = read_regular(path, MOST)
        with _bounded_memory(len(data)):
            return _Reader(io.BytesIO(data)).load()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except _Refused as refused:
        reads = "only lists, dicts, text and arrays are read from pickles"
        raise UserError(f"{path} asks for {refused}; {reads}") from None
    except Exception as error:  # a damaged pickle raises anything: EOFError, KeyError, struct.error, UnicodeError ...
        raise UserError(f"{path} is no whole pickle ({type(error).__name__}); download it again") from None


@contextmanager
def _bounded_memory(size: int) -> Iterator[None]:
    """MemoryError in the block where it takes far more memory than a pickle of SIZE bytes needs: 14 bytes can ask for
    gigabytes before the reader sees that nothing follows."""
    try:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
    except (OSError, ValueError):  # elsewhere than on Linux
        yield
        return
    wanted = now + (256 << 20) + 100 * size
    soft = wanted if limits[0] == resource.RLIM_INFINITY else min(wanted, limits[0])
    resource.setrlimit(resource.RLIMIT_AS, (soft, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class _Refused(Exception):
    pass


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocols 0 to 2 store bytes. Other codecs (some decompress) have no place here."""
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"the codec {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How protocols 0 to 2 store b"". bytes itself would allocate any number of them."""
    return b""


class _Name:
    """An allowed name. Neither it nor what lies behind it can be changed by the pickle (its BUILD sets attributes)."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a change of the reader")


class _Dtype:
    """Stands in for numpy.dtype. A real one takes its flags from the pickle, which may then hide that it holds objects:
    the bytes of the file would become pointers."""

    __slots__ = ("value",)

    def __init__(self, code: Any, *rest: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([biufSU]\d+|O8?)", code):
            raise _Refused(f"the array type {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        """(version, byte order, subtype, names, fields, size ...): only the order matters to plain types."""
        order, *structure = state[1:5]
        if any(part is not None for part in structure) or order not in ("<", ">", "|", "="):
            raise _Refused("an array of records")
        self.value = self.value.newbyteorder(order)


class _Array(np.ndarray):
    """An array whose state was checked: numpy itself takes shapes and pointers as they come."""

    def __setstate__(self, state: tuple) -> None:  # type: ignore[override]
        _version, shape, dtype, fortran, data = state
        kept = list if dtype.value.hasobject else bytes
        if not isinstance(data, kept) or not all(type(side) is int and side >= 0 for side in shape):
            raise _Refused("an array of pointers")
        super().__setstate__((1, shape, dtype.value, bool(fortran), data))  # type: ignore[arg-type]


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    """A numpy number or text; object types would hold references."""
    if dtype.value.hasobject:
        raise _Refused("a numpy scalar of objects")
    return np.frombuffer(data, dtype=dtype.value, count=1)[0]


def _ndarray(*arguments: Any) -> None:
    """Named by _reconstruct only. Called by the pickle, it would lay objects over bytes of the file."""
    raise _Refused("an array over bytes of the file")


NDARRAY = _Name(_ndarray)


def _reconstruct(kind: Any, shape: tuple, code: bytes) -> np.ndarray:
    """The empty array that the pickle then fills."""
    if kind is not NDARRAY or shape != (0,):
        raise _Refused(f"an array of type {type(kind).__name__}")
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _frombuffer(data: Any, dtype: _Dtype, shape: tuple, order: Any, *rest: Any) -> np.ndarray:
    """How protocol 5 stores an array."""
    if dtype.value.hasobject:
        raise _Refused("a numpy buffer of objects")
    return np.frombuffer(data, dtype=dtype.value).reshape(shape, order=order).view(_Array)


# numpy's modules have two names: before and since numpy 2.
ALLOWED: dict[tuple[str, str], _Name] = {
    ("_codecs", "encode"): _Name(_encode),
    ("__builtin__", "bytes"): _Name(_no_bytes),
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): _Name(_Dtype),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Name(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Name(_scalar) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Name(_frombuffer) for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _Refused(f"{module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("an object outside the file")
