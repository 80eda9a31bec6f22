"""A file behind a server that gives parts of it, as a stream that can seek: what is not read is not downloaded."""

import io
from collections.abc import Callable
from typing import IO, Any

FIRST_BYTES, MOST_BYTES = 2**18, 2**23
"""Bytes asked for at once: little for who only wants a look, then doubling, for few round trips."""


class TooFarError(Exception):
    """Who only has a look would have to read on and on. Neither an OSError nor a ValueError: the file is not to blame."""


class RangeFile(io.RawIOBase):
    """Reads by ranges.

    Args:
        num_bytes: size of the whole.
        fetch: the bytes from a start up to, not including, a stop; at least one of them.
    """

    def __init__(self, num_bytes: int, fetch: Callable[[int, int], bytes]) -> None:
        self._num_bytes, self._fetch = num_bytes, fetch
        self._position, self._wanted_bytes = 0, FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if start + offset != self._position:
            self._position, self._wanted_bytes = max(start + offset, 0), FIRST_BYTES
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + min(len(buffer), self._wanted_bytes), self._num_bytes)
        if stop <= self._position:
            return 0
        data = self._fetch(self._position, stop)
        buffer[: len(data)] = data
        self._position += len(data)
        self._wanted_bytes = min(self._wanted_bytes * 2, MOST_BYTES)
        return len(data)


def open_ranges(num_bytes: int, fetch: Callable[[int, int], bytes]) -> IO[bytes]:
    """A buffered stream over a RangeFile."""
    return io.BufferedReader(RangeFile(num_bytes, fetch), MOST_BYTES)
