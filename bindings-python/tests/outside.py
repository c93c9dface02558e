"""A look at etcd from outside, through its JSON gateway, and ways to wait for what one sees."""

from __future__ import annotations

import base64
import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def until(look: Callable[[], T], seconds: float = 20) -> T:
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
