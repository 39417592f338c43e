"""What goes wrong for reasons that lie with the thing that is measured, in one line."""

from __future__ import annotations


class BottleneckError(ValueError):
    """Something cannot be measured. The text says what and why in one line."""


def one_line(error: BaseException) -> str:
    """Return the type and the text of an error on one line, at most 300 characters of it.

    Examples
    --------
    >>> one_line(KeyError("images"))
    "KeyError: 'images'"
    """
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = text[:300] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
