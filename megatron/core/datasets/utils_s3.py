"""Token files in object storage (`s3://`, `gs://`, any fsspec URL): cached index, ranged reads of tokens."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy

from megatron.core.datasets.files import write_atomically
from megatron.core.errors import DataError

S3_PREFIX = "s3://"


class S3Config(NamedTuple):
    """Where a downloaded `.idx` is kept, and how much of a `.bin` one request fetches.

    `path_to_idx_cache` None keeps the index in memory and downloads it in every process.
    """

    path_to_idx_cache: str | None
    bin_chunk_nbytes: int = 256 * 1024 * 1024


def is_object_storage_path(path: str) -> bool:
    """True for `scheme://...`, which is read through fsspec, false for a path of the local file system."""
    return "://" in path


def is_s3_path(path: str) -> bool:
    """True for `s3://...`."""
    return path.startswith(S3_PREFIX)


def parse_s3_path(path: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key."""
    if not is_s3_path(path):
        raise DataError(path, "is not an S3 path", "write s3://bucket/key")
    bucket, _, key = path[len(S3_PREFIX) :].partition("/")
    return bucket, key


def open_filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system that serves a URL, and the path inside it; for `s3://` boto3 where s3fs is missing."""
    if is_s3_path(path) and find_spec("s3fs") is None:
        try:
            import boto3
        except ImportError:
            pass  # fsspec says below what to install
        else:
            return _Boto3FileSystem(boto3.client("s3")), path
    try:
        import fsspec
    except ImportError as error:
        raise DataError(path, "object storage needs the package fsspec", "pip install fsspec") from error
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(
            path, f"no fsspec driver serves this URL ({error})", "pip install s3fs (s3://) or gcsfs (gs://)"
        ) from error


class S3Client(Protocol):
    """The methods of a boto3 S3 client that `object_exists` and callers of v0.9's helpers use."""

    def download_file(self, Bucket: str, Key: str, Filename: str) -> None:
        """Copy an object to a local file."""

    def upload_file(self, Filename: str, Bucket: str, Key: str) -> None:
        """Copy a local file to an object."""

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        """Meta data of an object."""

    def get_object(self, Bucket: str, Key: str, Range: str) -> dict[str, Any]:
        """A byte range of an object."""

    def close(self) -> None:
        """End the client."""


def object_exists(client: S3Client, path: str) -> bool:
    """Whether an `s3://` path names an object, asked through a boto3 client."""
    from botocore.exceptions import ClientError

    bucket, key = parse_s3_path(path)
    try:
        client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] == "404":
            return False
        raise
    return True


class _Boto3FileSystem:
    """What is asked of an fsspec file system here, through the client that v0.9 reads with. Paths are `s3://` URLs."""

    def __init__(self, client: S3Client) -> None:
        self._client = client

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        return object_exists(self._client, path)

    def size(self, path: str) -> int:
        """Bytes of an object; without end where the store does not say."""
        bucket, key = parse_s3_path(path)
        return int(self._client.head_object(Bucket=bucket, Key=key).get("ContentLength", sys.maxsize))

    def get_file(self, path: str, stream: BinaryIO) -> None:
        """Copy an object; boto3 downloads to a path, in parallel parts."""
        bucket, key = parse_s3_path(path)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(stream.name) or ".") as directory:
            downloaded = os.path.join(directory, "object")
            self._client.download_file(Bucket=bucket, Key=key, Filename=downloaded)
            with open(downloaded, "rb") as source:
                shutil.copyfileobj(source, stream, 1 << 24)

    def cat_file(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of an object, or as many as there are."""
        bucket, key = parse_s3_path(path)
        last = (self.size(path) if end is None else end) - 1
        response = self._client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{last}")
        return response["Body"].read()


def url_exists(path: str) -> bool:
    """Whether the URL names an object, asked through fsspec."""
    filesystem, inner = open_filesystem(path)
    return bool(filesystem.exists(inner))


def object_size_bytes(path: str) -> int:
    """Size of the object that the URL names."""
    filesystem, inner = open_filesystem(path)
    return int(filesystem.size(inner))


def maybe_download_file(s3_path: str, local_path: str) -> None:
    """Copy an object to a local file, unless a file of the same size is there."""
    filesystem, inner = open_filesystem(s3_path)
    if os.path.exists(local_path) and os.path.getsize(local_path) == int(filesystem.size(inner)):
        return
    os.makedirs(os.path.dirname(local_path) or ".", exist_ok=True)
    write_atomically(local_path, lambda stream: filesystem.get_file(inner, stream))


def local_index_path(url: str, config: S3Config) -> str:
    """The cache file of a remote index: bucket and key below the cache directory, so equal base names differ."""
    assert config.path_to_idx_cache is not None, "only called with an index cache directory"
    return os.path.join(config.path_to_idx_cache, url.partition("://")[2].lstrip("/"))


def read_object(url: str) -> numpy.ndarray:
    """The whole object as uint8."""
    filesystem, inner = open_filesystem(url)
    return numpy.frombuffer(filesystem.cat_file(inner), dtype=numpy.uint8)


class ObjectBinReader:
    """Reads ranges of one object in aligned blocks and keeps the last block.

    A request that crosses the end of its block extends that block, so every read costs at most one request.
    """

    def __init__(self, url: str, chunk_bytes: int) -> None:
        self._filesystem, self._path = open_filesystem(url)
        self._url = url
        self._chunk_bytes = chunk_bytes
        self._start = 0
        self._block = b""

    def read(self, dtype: numpy.dtype, count: int, offset: int) -> numpy.ndarray:
        """`count` items of `dtype` from byte `offset`."""
        end = offset + count * dtype.itemsize
        if offset < self._start or end > self._start + len(self._block):
            start = offset // self._chunk_bytes * self._chunk_bytes
            self._block = self._filesystem.cat_file(
                self._path, start=start, end=max(start + self._chunk_bytes, end)
            )
            self._start = start
        if end > self._start + len(self._block):
            raise DataError(self._url, f"ends before byte {end}", "upload the .bin that belongs to its .idx")
        return numpy.frombuffer(self._block, dtype=dtype, count=count, offset=offset - self._start)
