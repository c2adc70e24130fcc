"""What went wrong, in words for a user."""

from __future__ import annotations

import errno

_NAMES = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)
_MEMORY = ("out of memory", "allocate memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has no memory left for what was asked."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _MEMORY)


def is_about_name(error: BaseException) -> bool:
    """Whether a file system takes a file but not its name."""
    return isinstance(error, OSError) and error.errno in _NAMES


def sentence(error: BaseException) -> str:
    """The message in one line, or the kind of an error that has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(text: object) -> str:
    """A text as a terminal can show it: what cannot be printed, or would steer the terminal, is escaped."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))
