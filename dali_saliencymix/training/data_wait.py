"""How long a training may wait for its data."""

from __future__ import annotations

STARVING_SHARE = 0.2  # of its time: from here on the loader starves the step
