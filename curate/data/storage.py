"""Where the bytes of inputs are: local files, and other stores through fsspec."""

import errno
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from curate.errors import CurateError, InputError, MissingDependencyError, StoreLostError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Last suffix of a file -> codec that Arrow reads as a stream."""

_DRIVERS = {
    "s3": "curate-data[s3]",
    "s3a": "curate-data[s3]",
    "gs": "curate-data[gs]",
    "gcs": "curate-data[gs]",
    "hf": "huggingface_hub",
    "abfs": "adlfs",
    "az": "adlfs",
}
# The first that a store gives: tags of the content before times.
_TAGS = ("ETag", "etag", "e_tag", "blob_id", "generation", "LastModified", "last_modified",
         "Last-Modified", "mtime", "created")  # fmt: skip
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError",
                   "ProfileNotFound", "TokenRetrievalError", "UnauthorizedSSOTokenError",
                   "DefaultCredentialsError", "RefreshError")  # fmt: skip
# Stores raise errors of their own libraries, which need not be installed here.
_STORE_LIBRARIES = (
    "botocore",
    "aiohttp",
    "gcsfs",
    "google",
    "huggingface_hub",
    "httpx",
    "requests",
)


def is_local(address: str) -> bool:
    """Whether `address` is a path on this machine."""
    return "://" not in address


def locate(address: str, **options: Any) -> tuple["AbstractFileSystem", str]:
    """The file system that `address` belongs to, and the path inside it.

    Args:
        address: local path or address in a store.
        **options: of fsspec, for the file system.

    Raises:
        MissingDependencyError: the store's driver is not installed.
        InputError: no such kind of store is known.
    """
    from fsspec.core import url_to_fs

    protocol = address.partition("://")[0] if "://" in address else "file"
    try:
        return url_to_fs(address, **options)
    except ImportError as error:
        package = _DRIVERS.get(protocol, f"an fsspec driver for {protocol}")
        raise MissingDependencyError(
            f"{address} needs a driver that is not installed: {error}",
            fix=f"pip install '{package}'",
        ) from error
    except ValueError as error:
        raise InputError(
            f"{address}: {error}", fix="use a path, s3://, gs://, hf:// or https://"
        ) from error


@contextmanager
def store_errors(address: str) -> Generator[None]:
    """Turns what a store says of missing files, rights and networks into an InputError.

    Damage inside a file (an Arrow error) passes through: see `is_damage`.
    """
    try:
        yield
    except (CurateError, pa.ArrowException):
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no {address}", fix="check the path") from error
    except OSError as error:
        if is_damage(error):
            raise
        raise _unreachable(address, error) from error
    except Exception as error:
        if not type(error).__module__.startswith(_STORE_LIBRARIES):
            raise
        raise _unreachable(address, error) from error


@contextmanager
def run_errors(address: str) -> Generator[None]:
    """The same where a run lies in the store: what may pass is told from what will not.

    Raises:
        InputError: no credentials, no rights, no bucket.
        StoreLostError: the store does not answer, or stopped in the middle.
    """
    try:
        yield
    except CurateError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {address}, or not the bucket it would lie in",
            fix="make the bucket, or correct the address",
        ) from error
    except Exception as error:
        kind, reason = type(error), f"{type(error).__name__}: {error}"
        if isinstance(error, PermissionError) or kind.__name__ in _NO_CREDENTIALS:
            raise InputError(
                f"{address} may not be used: {reason}",
                fix="check the store's credentials and their rights",
            ) from error
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        is_of_store = isinstance(error, OSError) or kind.__module__.startswith(_STORE_LIBRARIES)
        if is_full or not is_of_store:
            raise
        raise StoreLostError(
            f"{address} cannot be reached: {reason}",
            fix="run the same command again; what is finished lies in the store",
        ) from error


def is_damage(error: BaseException) -> bool:
    """Whether an error says that a file's content is broken, not that it cannot be reached.

    Arrow reports broken pages as a bare OSError without a number.
    """
    if isinstance(error, MemoryError):
        return False
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def local_stamp(path: Path) -> str:
    """Size and time of change of a local file."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def is_local_stamp(stamp: str) -> bool:
    """Whether `stamp` was made by `local_stamp`."""
    return re.fullmatch(r"\d+-\d+", stamp) is not None


def remote_stamp(info: Mapping[str, Any]) -> str:
    """What a store says to tell versions of a file apart: tag, time and size."""
    tags = [str(info[key]) for key in _TAGS if info.get(key) is not None]
    return ":".join([str(info.get("size")), *tags[:1]])


@contextmanager
def open_stream(address: str) -> Generator[Any]:
    """An input as a stream of bytes, decompressed where its suffix says that it is compressed.

    Raises:
        InputError: there is no such file, or it cannot be reached.
    """
    codec = COMPRESSIONS.get(Path(address).suffix.lower())
    system, path = locate(address)
    with store_errors(address), system.open(path, "rb") as raw:
        if codec is None:
            yield raw
        else:
            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec) as stream:
                yield stream


def _unreachable(address: str, error: BaseException) -> InputError:
    return InputError(
        f"{address} cannot be read: {type(error).__name__}: {error}",
        fix="check the path, the rights, the network and the store's credentials",
    )
