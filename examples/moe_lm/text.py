# SPDX-License-Identifier: Apache-2.0
"""Real text as bytes, and the batches that are drawn from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
SUFFIXES = {"", ".md", ".txt", ".h", ".hpp", ".rst"}


def default_paths() -> list[Path]:
    """This project's documents and interface, and the licence texts that Debian and its like bring."""
    found = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "LICENSE", "docs", "include")]
    return [path for path in (*found, Path("/usr/share/common-licenses")) if path.exists()]


def load(paths: Iterable[Path]) -> torch.Tensor:
    """All text files in `paths`, one behind the other in the order of their names: uint8."""
    files: dict[Path, None] = {}
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files.update(dict.fromkeys(file.resolve() for file in inside if file.is_file() and file.suffix in SUFFIXES))
    text = b"\n\n".join(file.read_bytes() for file in files)
    if not text:
        raise SystemExit(
            f"there is no text in {', '.join(map(str, paths)) or 'no path at all'}; name files or folders with --text"
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def draw(text: torch.Tensor, num_sequences: int, context: int, seed: int) -> torch.Tensor:
    """[num_sequences, context + 1] int64, from random places: a function of the seed alone, so that a resumed run sees what comes next."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.randint(len(text) - context - 1, (num_sequences,), generator=generator)
    return torch.stack([text[begin : begin + context + 1] for begin in begins.tolist()]).long()
