"""Pickles from outside, read without running anything in them: lists, dicts, numbers, text, numpy arrays of these."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError


def load(path: str | Path) -> Any:
    """The object in PATH. Raises UserError naming the file, and what it asks for, if it holds anything else."""
    try:
        with open(path, "rb") as file:
            return _Reader(file).load()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except _Refused as refused:
        raise UserError(
            f"{path} asks for {refused}; only lists, dicts, text and arrays are read from pickles"
        ) from None
    except Exception as error:  # a damaged pickle raises anything: EOFError, KeyError, struct.error, UnicodeError ...
        raise UserError(f"{path} is no whole pickle ({type(error).__name__}); download it again") from None


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


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    """A numpy number or text; object types would hold references."""
    if dtype.hasobject:
        raise _Refused("a numpy scalar of objects")
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _reconstruct(kind: type, shape: tuple, code: bytes) -> np.ndarray:
    """The empty array that the pickle then fills."""
    if kind is not np.ndarray:
        raise _Refused(f"an array of type {kind}")
    return np.ndarray.__new__(np.ndarray, shape, code)  # type: ignore[arg-type]


def _frombuffer(data: Any, dtype: np.dtype, shape: tuple, order: str, *rest: Any) -> np.ndarray:
    """How protocol 5 stores an array."""
    if dtype.hasobject:
        raise _Refused("a numpy buffer of objects")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]


# numpy's modules have two names: before and since numpy 2.
ALLOWED = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _Refused(f"{module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("an object outside the file")
