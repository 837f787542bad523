# SPDX-License-Identifier: Apache-2.0
"""_c.py says in ctypes what tern.h says in C: the same enums, structs and functions."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import tern
from tern import _c
from tern._library import lib

HEADER = Path(__file__).parents[2] / "include" / "tern" / "tern.h"
# C name: Python class, where the names do not simply translate.
ENUMS = {"tern_dtype": _c.DType}
C_TYPES = {
    "size_t": ctypes.c_size_t,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "uint8_t": ctypes.c_uint8,
}


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.removeprefix("tern_").split("_"))


@pytest.fixture(scope="module")
def header() -> str:
    if not HEADER.exists():
        pytest.skip(f"{HEADER} is not here")
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    return re.sub(r"TERN_(SIZE_OF\(\w+\)|ZERO|ENUM_TYPE)", "", text)


def test_enums(header: str) -> None:
    found = re.findall(r"typedef enum (\w+)\s*\{(.*?)\}", header, flags=re.DOTALL)
    assert len(found) > 10
    for name, body in found:
        python = ENUMS.get(name) or getattr(_c, camel(name))
        values = {key: int(value) for key, value in re.findall(r"(\w+)\s*=\s*(\d+)", body)}
        # TERN_LAYOUT_RANK_MAJOR -> RANK_MAJOR: the prefix is what all have in common, up to an underscore.
        in_c = {value: key for key, value in values.items()}
        assert {member.value for member in python} == set(in_c), name
        for member in python:
            assert in_c[member.value].endswith("_" + member.name), (name, member)


def test_structs(header: str) -> None:
    found = re.findall(r"typedef struct (\w+)\s*\{(.*?)\}\s*\w+;", header, flags=re.DOTALL)
    assert len(found) > 14
    for name, body in found:
        python = getattr(_c, camel(name))
        fields = [line.split() for line in body.split(";") if line.strip()]
        names = [re.sub(r"[*\[].*", "", words[-1].lstrip("*")) for words in fields]
        assert names == [field[0] for field in python._fields_], name
        size = 0
        for words, (field, kind) in zip(fields, python._fields_):
            declared = " ".join(words)
            expected = (
                8 if "*" in declared or "_fn" in declared else ctypes.sizeof(C_TYPES.get(words[0], ctypes.c_int32))
            )
            if words[0] == "tern_failure":
                expected = ctypes.sizeof(_c.Failure)
            if count := re.search(r"\[(\d+)\]", declared):
                expected *= int(count.group(1))
            assert ctypes.sizeof(kind) == expected, (name, field)
            size = max(size, getattr(python, field).offset + expected)
        assert ctypes.sizeof(python) == (size + 7) // 8 * 8 or name == "tern_failure"


def test_functions(header: str) -> None:
    declared = re.findall(r"TERN_API [^(;]*?\b(tern_\w+)\(([^)]*)\)", header)
    assert {name for name, _ in declared} == set(_c.FUNCTIONS)
    for name, arguments in declared:
        count = 0 if arguments.strip() == "void" else arguments.count(",") + 1
        assert len(_c.FUNCTIONS[name][1]) == count, name


def test_versions_agree() -> None:
    assert lib.tern_version() == _c.VERSION
    assert tern.__version__ == "0.1.0"
