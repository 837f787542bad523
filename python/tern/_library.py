# SPDX-License-Identifier: Apache-2.0
"""Finds and loads libtern: the one named by TERN_LIBRARY, else the one in this package, else the system's.

Calls through ctypes.CDLL release the GIL, so that other Python threads run while one waits for other ranks.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from . import _c
from .errors import UnsupportedError

SONAME = "libtern.so.0"


def _path() -> str:
    named = os.environ.get("TERN_LIBRARY")
    if named:
        return named
    own = Path(__file__).parent / "lib" / SONAME
    return str(own) if own.exists() else SONAME


def _load() -> ctypes.CDLL:
    path = _path()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(
            f"Tern's library could not be loaded: {error}. Install Tern with pip, or set TERN_LIBRARY to a {SONAME}."
        ) from error
    for name, (result, arguments) in _c.FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            raise UnsupportedError(
                f"{path} has no {name}: it is older than this Python package; install both together."
            )
        function.restype = result
        function.argtypes = arguments
    return library


lib = _load()


def direct(name: str) -> Any:
    """The function without the look at the types of its arguments, for calls whose arguments are objects of ctypes already."""
    return ctypes.CFUNCTYPE(ctypes.c_int32)((name, lib))


tern_dispatch, tern_combine = direct("tern_dispatch"), direct("tern_combine")
