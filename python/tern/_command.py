# SPDX-License-Identifier: Apache-2.0
"""The `tern` command: the program that lies in this package takes the place of Python."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    program = Path(__file__).parent / "bin" / "tern"
    if not program.exists():
        sys.exit(f"There is no {program}: this package was built without the tern command (TERN_BUILD_TOOLS=OFF).")
    os.execv(program, ["tern", *sys.argv[1:]])
