"""Conversion of values that JSON cannot represent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """Replace each float that is not finite by None, also inside mappings and sequences.

    Examples
    --------
    >>> finite({"loss": float("nan"), "top1": [0.5, float("inf")]})
    {'loss': None, 'top1': [0.5, None]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
