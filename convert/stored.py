"""Tensors that lie in files: where each one is, and how its bytes become numbers.

Only what is asked for is read, one MB at a time, straight into the result. There is no memory map:
its pages count as the process's own until the system takes them back, so an import would show twice
its size, and a file that is cut short while it is mapped ends the process without a word.
"""
import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import torch
from torch import Tensor

from runtime.options import UserError
from runtime.storage import Damaged, open_plain
from runtime.terminal import reading

PIECE = 2**20  # bytes of numbers read at once; larger pieces are no faster, and leave larger holes in memory
MOST_DIMENSIONS = 8
POINTER = b"version https://git-lfs"  # how the small text begins that Git LFS leaves in place of a file
AGAIN = "it was not copied whole, or was changed: fetch it again"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a kind of tensor is stored: in blocks of `size` bytes that hold `numbers` numbers each.

    decode: bytes (N, size) uint8 -> numbers (N, numbers) of `dtype`; None: the bytes are the numbers.
    """

    name: str
    dtype: torch.dtype
    size: int
    numbers: int = 1
    decode: Callable[[Tensor], Tensor] | None = None


# by the names that safetensors gives them
PLAIN = {name: Layout(name, dtype, dtype.itemsize) for name, dtype in {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}.items()}
PLAIN["BOOL"] = Layout("BOOL", torch.bool, 1, decode=lambda raw: raw != 0)
PLAIN_OF = {layout.dtype: layout for layout in PLAIN.values()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a file. `dtype` is the stored one, or float32 if it is quantised there.

    strides: None if the numbers lie in the order of the shape, as everywhere but in some .bin files.
    """

    path: pathlib.Path
    name: str
    offset: int
    shape: tuple[int, ...]
    layout: Layout
    strides: tuple[int, ...] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def span(self) -> int:
        """Numbers from the first to the last one in the file."""
        if self.strides is None or 0 in self.shape:
            return math.prod(self.shape)
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    @property
    def n_bytes(self) -> int:
        return self.span // self.layout.numbers * self.layout.size

    def require_inside(self, start: int, end: int) -> None:
        """Damaged unless the tensor lies between these bytes of its file. Afterwards `read` allocates
        no more numbers than the file has."""
        product = math.prod(max(n, 1) for n in self.shape)  # so that [0, 2**60] is refused as well
        if (product > end // self.layout.size * self.layout.numbers or math.prod(self.shape) > self.span
                or len(self.shape) > MOST_DIMENSIONS):
            raise Damaged(f"{self.path}: tensor {self.name[:80]!r} claims more numbers than the file has: {AGAIN}")
        if not start <= self.offset <= end - self.n_bytes:
            raise Damaged(f"{self.path}: tensor {self.name[:80]!r} lies beyond the end of the file: {AGAIN}")

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor (*shape), on the CPU, as `dtype` or as it is stored. UserError if the file has
        become shorter, or unreadable, since it was opened."""
        layout, n_blocks = self.layout, self.span // self.layout.numbers
        flat = torch.empty(self.span, dtype=dtype or layout.dtype)
        at_once = PIECE // (layout.numbers * layout.dtype.itemsize)
        buffer = torch.empty(min(at_once, n_blocks) * layout.size, dtype=torch.uint8)
        with reading(self.path), open_plain(self.path, "rb", follow=True) as file:
            file.seek(self.offset)
            for first in range(0, n_blocks, at_once):
                raw = buffer[:min(at_once, n_blocks - first) * layout.size]
                if file.readinto(raw.numpy()) < len(raw):
                    raise Damaged(f"{self.path}: has become shorter since it was opened: {AGAIN}")
                values = layout.decode(raw.view(-1, layout.size)) if layout.decode else raw.view(layout.dtype)
                flat[first * layout.numbers:][:values.numel()] = values.reshape(-1)
        return flat.reshape(self.shape) if self.strides is None else flat.as_strided(
            self.shape, self.strides).contiguous()


class Tensors(Mapping[str, Stored]):
    """The tensors of a checkpoint by name, none of them read yet.

    path: the file that was opened, with shards their index. metadata: what it says besides tensors.
    """

    def __init__(self, path: pathlib.Path, entries: dict[str, Stored], metadata: dict[str, Any]):
        self.path, self.metadata, self._entries = path, metadata, entries

    def __getitem__(self, name: str) -> Stored:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def files(self) -> list[pathlib.Path]:
        """The files that the tensors lie in."""
        return sorted({entry.path for entry in self.values()})


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[tuple[IO[bytes], int]]:
    """(file, its bytes) of a file of weights; UserError if it is missing, empty, or only points to
    them."""
    with reading(path):
        if not path.exists():
            raise UserError(f"{path}: is not there: check the path, or fetch it")
    with reading(path), open_plain(path, "rb", follow=True) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if not size:
            raise Damaged(f"{path}: is empty: {AGAIN}")
        if file.read(len(POINTER)) == POINTER:
            raise Damaged(f"{path}: is a pointer of Git LFS in place of the file itself: run git lfs pull in that "
                          "folder")
        file.seek(0)
        yield file, size
