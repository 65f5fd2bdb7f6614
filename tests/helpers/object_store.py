"""An object store with the protocol of S3 on this machine: moto's server, in a process of its own."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
"""Environment variables of the clients; the store takes any keys."""

STARTING = 60.0  # seconds


class ObjectStore:
    """A store with an empty bucket.

    Args:
        port: of the server.
    """

    def __init__(self, port):
        from pyarrow.fs import S3FileSystem

        self.endpoint = f"127.0.0.1:{port}"
        options = {"scheme": "http", "region": "us-east-1", "access_key": "key", "secret_key": "secret"}
        self.files = S3FileSystem(endpoint_override=self.endpoint, allow_bucket_creation=True, **options)
        self.files.create_dir("bucket")

    def uri(self, path):
        """Return the URI of a path in the bucket, with the options that pyarrow takes."""
        return f"s3://bucket/{path}?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"

    def put(self, folder, path):
        """Copy the files below a folder to a path in the bucket, and return its URI."""
        for file in folder.rglob("*.*"):
            with self.files.open_output_stream(f"bucket/{path}/{file.relative_to(folder).as_posix()}") as stream:
                stream.write(file.read_bytes())
        return self.uri(path)


@contextmanager
def object_store():
    """Start a store, and stop it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env={**os.environ, **KEYS}, **pipes)
    try:
        until = time.monotonic() + STARTING
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the object store does not start"
            assert time.monotonic() < until, "the object store does not answer"
            time.sleep(0.1)
        yield ObjectStore(port)
    finally:
        server.kill()
        server.wait()
