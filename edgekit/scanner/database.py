"""SQLite as the scanner uses it: WAL, every commit synced, errors in words."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import DataError
from edgekit.files import sync_path

__all__ = ["FULL", "Damaged", "OtherVersion", "check_database", "connect", "sqlite_errors", "sync_folder"]

#: What a full disk says (``EFBIG``: a limit on files), a failing one (``EIO``), and another program (``EBUSY``: a lock). It may
#: pass.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBUSY})

BUSY_S = 5.0  # at the start
_BUSY_MS = 50  # later: the scanning thread waits for nobody
_LARGEST_WAL = 16 << 20  # bytes; a longer one shrinks when it is next reset
_LEAST_FREE = 1 << 16  # bytes; below, SQLite's "disk I/O error" is a full disk


class Damaged(DataError):
    """A file that is no SQLite database, or not a whole one any more."""


class OtherVersion(DataError):
    """A database whose ``PRAGMA user_version`` is ``found``."""

    def __init__(self, message: str, hint: str, found: int) -> None:
        super().__init__(message, hint)
        self.found = found


def connect(path: Path, schema: str, version: int, added: str = "") -> sqlite3.Connection:
    """Open or create a database whose tables are ``schema`` (statements), usable from any thread under a lock.

    ``added``: statements for what an older file of the same version may lack (``IF NOT EXISTS``).

    WAL with ``synchronous=FULL``: a commit that returned is on disk (https://sqlite.org/pragma.html#pragma_synchronous).
    Raises `DataError` where the file is no such database (`Damaged`, `OtherVersion`), `OSError` where it cannot be written.
    """
    refuse_inside_bundle(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    with sqlite_errors(path):
        connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path, schema, version, added)
            connection.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        except sqlite3.OperationalError as error:
            connection.close()
            if "locked" not in str(error):
                raise
            raise DataError(f"{path} is in use by another process", "give each scan its own file") from None
        except BaseException:
            connection.close()
            raise
    return connection


def check_database(path: Path, version: int) -> None:
    """Whether `connect` would take the file, without writing anything. Raises `DataError`, `OSError`."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    with (
        sqlite_errors(path),
        contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection,
    ):
        _version(connection, path, version)


def _version(connection: sqlite3.Connection, path: Path, version: int) -> int:
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    if found != version and (found or tables):
        raise OtherVersion(
            f"{path} is another kind of database (version {found}, {tables} tables; wanted version {version})",
            "name a new file",
            found,
        )
    return found


def _prepare(connection: sqlite3.Connection, path: Path, schema: str, version: int, added: str) -> None:
    found = _version(connection, path, version)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    if not found:
        connection.executescript(f"BEGIN IMMEDIATE; {schema}; PRAGMA user_version={version}; COMMIT;")
    if added:
        connection.executescript(f"BEGIN IMMEDIATE; {added}; COMMIT;")
    connection.execute(f"PRAGMA journal_size_limit={_LARGEST_WAL}")
    sync_folder(path)


def sync_folder(path: Path) -> None:
    """Make the name of a new file outlive a power cut; where a file system cannot, it stays as it is."""
    with contextlib.suppress(OSError):
        sync_path(path.parent)


@contextlib.contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into the ones that the command line has words for."""
    try:
        yield
    except UnicodeDecodeError:  # sqlite3 quotes a part of the file in its words
        raise Damaged(f"{path} is no usable SQLite database: its names are damaged", "name a new file, or restore it") from None
    except sqlite3.Error as error:
        text = str(error)
        if "full" in text or ("disk I/O" in text and shutil.disk_usage(path.parent).free < _LEAST_FREE):
            raise OSError(errno.ENOSPC, text, str(path)) from None
        if "readonly" in text:
            raise PermissionError(errno.EACCES, text, str(path)) from None
        if "unable to open" in text or "disk I/O" in text:
            raise OSError(errno.EIO, text, str(path)) from None
        if "locked" in text:
            raise OSError(errno.EBUSY, "another program holds a lock on it", str(path)) from None
        raise Damaged(f"{path} is no usable SQLite database: {text}", "name a new file, or restore it") from None
