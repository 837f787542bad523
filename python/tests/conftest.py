# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import sys
from pathlib import Path

# Before CUDA starts: streams that share one of the GPU's queues wait for each other, and there are few unless this asks for more.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

sys.path.insert(0, str(Path(__file__).parent))  # `import ranks`, in processes that are spawned too
