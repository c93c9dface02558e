"""A look at etcd from outside, through its JSON gateway, and ways to wait for what one sees."""

from __future__ import annotations

import _thread
import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def until(look: Callable[[], T], seconds: float = 60) -> T:
    """What `look` says once it is true; fails when that takes longer than a hang would."""
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, f"not seen within {seconds} s"
        time.sleep(0.01)
    return seen


class Etcd:
    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(f"http://{self.endpoint}/v3/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=20) as answer:
            return dict(json.load(answer))

    @staticmethod
    def _range(name: str) -> dict[str, str]:
        start = name.encode() + b"/"
        return {"key": base64.b64encode(start).decode(), "range_end": base64.b64encode(name.encode() + b"0").decode()}

    def keys(self, name: str) -> list[str]:
        """The keys in the queue of a lock, the holder's first."""
        found = self._ask("kv/range", **self._range(name), sort_target="CREATE").get("kvs", [])
        return [base64.b64decode(entry["key"]).decode() for entry in found]

    def delete_keys(self, name: str) -> None:
        self._ask("kv/deleterange", **self._range(name))

    def revoke(self, lease: int | None) -> None:
        self._ask("lease/revoke", ID=str(lease))

    def value(self, key: str) -> bytes | None:
        found = self._ask("kv/range", key=base64.b64encode(key.encode()).decode()).get("kvs", [])
        return base64.b64decode(found[0].get("value", "")) if found else None

    def leases(self) -> int:
        return len(self._ask("lease/leases").get("leases", []))


def silent_server() -> str:
    """An address that accepts connections and says nothing."""
    server = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            held.append(server.accept()[0])

    _thread.start_new_thread(accept, ())
    return f"127.0.0.1:{server.getsockname()[1]}"


class Proxy:
    """A TCP proxy in front of a server, which can be cut: then it passes nothing on, and says nothing."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.rsplit(":", 1)
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_cut = False
        _thread.start_new_thread(self._accept, ())

    def _accept(self) -> None:
        while True:
            client = self._listener.accept()[0]
            server = socket.create_connection(self._server)
            _thread.start_new_thread(self._pass_on, (client, server))
            _thread.start_new_thread(self._pass_on, (server, client))

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.is_cut:
                    sink.sendall(data)
        except OSError:
            pass
        finally:
            sink.close()


class Program:
    """Python code in a process of its own: its lines one by one, and what it said and how it ended."""

    def __init__(self, code: str, *args: str, options: tuple[str, ...] = ()) -> None:
        command = [sys.executable, *options, "-c", code, *args]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1)

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")

    def end(self, seconds: float = 30) -> tuple[int, str, str]:
        """Exit code, the rest of the output, standard error; fails on a hang."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"the program hangs; it said: {out!r} {err!r}") from None
        return self.process.returncode, out, err
