"""A real S3 server on loopback (moto), behind a proxy that breaks answers as a test asks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "glyphs"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "reader",
    "AWS_SECRET_ACCESS_KEY": "of-glyphs",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Proxy(ThreadingHTTPServer):
    """Forwards to the S3 server.

    `faults` has, by a file's name, what becomes of the next answers: "500", "cut" (half of it),
    "flip" (a bit of its end), "slow" (pauses within), "stuck" (a pause of 2 s), "whole" (no
    ranges), "deny", "lost" (done, and yet the answer is a 500), "fine". "always" behind one of them
    repeats it.
    """

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.faults: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str, str]] = []
        """(method, name of the file, range) of each request."""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, path: str) -> str:
        """What becomes of the next answer."""
        left = next((left for end, left in self.faults.items() if path.endswith(end)), [])
        if left[1:] == ["always"]:
            return left[0]
        return left.pop(0) if left else "fine"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        fault = self.server.next_fault(path)
        self.server.asked.append(
            (self.command, path.rpartition("/")[2], self.headers.get("Range", ""))
        )
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault in ("500", "deny"):
            self.send_error({"500": 500, "deny": 403}[fault])
            return
        headers = {name: value for name, value in self.headers.items() if name != "Range"}
        if fault != "whole":
            headers = dict(self.headers.items())
        headers.setdefault("Authorization", "Basic eDp5")  # moto answers whoever names himself
        upstream = HTTPConnection(*self.server.upstream)
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        if fault == "lost":
            self.send_error(500)
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = answer.headers.get("Content-Length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        self._send(data, fault)
        upstream.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _send(self, data: bytes, fault: str) -> None:
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "cut":
            data = data[: len(data) // 2]
            self.close_connection = True
        pieces = 8 if fault == "slow" else 1
        time.sleep(2.0 if fault == "stuck" else 0)
        size = -(-len(data) // pieces) or 1
        for start in range(0, len(data), size):
            time.sleep(0.1 if fault == "slow" else 0)
            self.wfile.write(data[start : start + size])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Proxy]:
    """The proxy, with an empty bucket behind it; the environment leads S3's clients to it."""
    behind = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    behind.start()
    proxy = Proxy(behind.get_host_and_port())
    thread = Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": proxy.url}).items():
                patch.setenv(name, value)
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        behind.stop()


def names_in_bucket(folder: str) -> set[str]:
    """The files under a folder of the bucket."""
    listed = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=f"{folder}/")
    return {each["Key"].rpartition("/")[2] for each in listed.get("Contents", [])}
