"""How much of a file is read, on a terminal or in a log file. Without torch, which data.prepare does
not need."""
import os
import pathlib
import time
from typing import Any, BinaryIO

from tqdm import tqdm

SECONDS = 30.0  # between two lines, where there is no terminal


class FileProgress:
    """How much of an open file is read, in bytes as they are stored: a bar with rate and remaining
    time on a terminal, after a second; elsewhere a line of the same every 30 s.
    """

    def __init__(self, path: str | os.PathLike, file: BinaryIO):
        self.name, self.file = pathlib.Path(path).name, file
        self.place, self.total = 0, os.fstat(file.fileno()).st_size
        self.began = self.printed = time.perf_counter()
        self.bar = tqdm(total=self.total, desc=f"reading {self.name}", unit="B", unit_scale=True,
                        dynamic_ncols=True, delay=1, leave=False, disable=None)

    def update(self) -> None:
        """More of the file is read."""
        before, self.place = self.place, self.file.tell()
        self.bar.update(self.place - before)
        now = time.perf_counter()
        if self.bar.disable and now - self.printed >= SECONDS:
            self.printed = now
            rate = self.place / (now - self.began)
            left = tqdm.format_interval((self.total - self.place) / rate)
            print(f"reading {self.name}: {self.place / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, "
                  f"{rate / 1e6:.1f} MB/s, {left} left", flush=True)

    def __enter__(self) -> "FileProgress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
