"""Drop root's permission to access any file, for tests of permission errors that run as root."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3 of capabilities(7)
_OF_ANY_FILE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def rights_of_a_user() -> Iterator[None]:
    """Restrict this thread to what the modes of files and folders allow."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; x2
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] = before & ~_OF_ANY_FILE
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0
