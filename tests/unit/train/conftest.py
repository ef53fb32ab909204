"""One thread: on a busy machine models this small spend most of their time waiting for their own threads."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
