"""Results that survive a kill: one JSON object a line, appended as they come, behind a line that says what they are."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]


class ForeignFile(ValueError):
    """A file of results that belongs to something else than what is asked for."""


class RowFile:
    """A results file: ``header`` says what its rows are about, and rows are added one at a time.

    Opening a file with the same header goes on where it ended. A last line that a kill cut short is dropped, since its
    row was never complete; damage anywhere else, and another header, are errors, and the file stays as it is. A second
    process that opens the file for writing is refused.

    Args:
        path: of the file; its folder is made.
        header: what must be the same for rows to belong together; JSON.
        fields: what every row has.

    Raises ValueError for a file that is damaged, in use, or has a row without one of the fields; `ForeignFile` for one
    with another header.
    """

    def __init__(self, path: str | os.PathLike[str], header: Row, fields: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.header = json.loads(json.dumps(header))
        self.rows: list[Row] = []
        self.dropped = ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115  (closed by close)
        try:
            self._lock()
            self._resume()
            for number, row in enumerate(self.rows, start=2):
                if missing := [name for name in fields if name not in row]:
                    raise ValueError(f"{self.path} is damaged: line {number} has no {missing[0]!r}")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def append(self, row: Row) -> None:
        """Add a row; it is in the file, and not in a buffer, when this returns."""
        self._write(row)
        self.rows.append(json.loads(json.dumps(row)))

    def _write(self, row: Row) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        with contextlib.suppress(ImportError):  # no such locks on Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{self.path} is in use by another process") from None

    def _resume(self) -> None:
        header, self.rows, whole, self.dropped = _read(self.path, self._file)
        if header is None:
            if not json.dumps(self.header).startswith(self.dropped):
                raise ValueError(f"{self.path} is no results file: its only line is incomplete, and not this header")
            self._file.truncate(0)
            self._write(self.header)
            return
        if header != self.header:
            raise ForeignFile(f"{self.path} holds other results: {_difference(header, self.header)}")
        self._file.truncate(whole)


def read_rows(path: str | os.PathLike[str]) -> tuple[Row, list[Row]]:
    """Header and complete rows of a results file, which is not changed. Raises ValueError where it is damaged."""
    with open(path, "rb") as file:
        header, rows, _, _ = _read(Path(path), file)
    if header is None:
        raise ValueError(f"{path} is empty: no results")
    return header, rows


def _read(path: Path, file: IO[bytes]) -> tuple[Row | None, list[Row], int, str]:
    """Header (None in an empty file), rows, the length of what is complete, and the text behind it."""
    file.seek(0)
    objects: list[Row] = []
    whole = 0
    for number, line in enumerate(_lines(file), start=1):
        if not line.endswith(b"\n"):
            return (objects[0] if objects else None), objects[1:], whole, line.decode(errors="replace")
        objects.append(_parse(path, number, line))
        whole += len(line)
    return (objects[0] if objects else None), objects[1:], whole, ""


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    return iter(file.readline, b"")


def _parse(path: Path, number: int, line: bytes) -> Row:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged, or no results file: line {number} is no JSON object")
    return value


def _difference(found: Row, wanted: Row) -> str:
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    return "; ".join(f"{key} is {found.get(key)!r}, not {wanted.get(key)!r}" for key in keys)
