"""A local S3, and files in stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest


@contextmanager
def local_s3(name: str) -> Iterator[str]:
    """Yield the URL of an empty bucket of a local S3 (moto's server)."""
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for key, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            environment.setenv(key, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another server
        boto3.client("s3").create_bucket(Bucket=name)
        yield f"s3://{name}"
    running.stop()


def upload(tree: Path, url: str) -> None:
    """Every file of a folder."""
    store, base = fsspec.core.url_to_fs(url)
    for path in sorted(tree.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{base}/{path.relative_to(tree).as_posix()}", path.read_bytes())


def stored(url: str) -> dict[str, bytes]:
    """Every file below a URL."""
    store, base = fsspec.core.url_to_fs(url)
    store.invalidate_cache()
    return {k.split(f"{base.lstrip('/')}/", 1)[1]: store.cat_file(k) for k in store.find(base)}
