"""The wheel as it ships: in a clean environment of every CPython on this machine, with the examples."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from outside import Etcd

HERE = Path(__file__).parent
EXAMPLES = HERE.parent.parent / "examples" / "python"
WHEELS = sorted((HERE.parent.parent / "target" / "wheels").glob("etcdlock-*.whl"))

VERSIONS = ["3.10", "3.11", "3.12", "3.13", "3.14", "3.14t"]


def interpreter(version: str) -> str | None:
    """A CPython of this version that works: from pyenv, or from the PATH."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    number, free = version.rstrip("t"), version.endswith("t")
    found = [str(path / "bin" / f"python{version}") for path in sorted(root.glob(f"{number}.*")) if path.name.endswith("t") == free]
    for command in [*found, f"python{version}"]:
        try:
            subprocess.run([command, "-c", "import ssl, venv"], check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.CalledProcessError):
            continue
        return command
    return None


def output(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stderr) == (0, ""), f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel() -> Path:
    assert len(WHEELS) == 1, f"run `make install` first: {WHEELS}"
    return WHEELS[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_works_in_a_clean_environment(version: str, wheel: Path, etcd: Etcd, tmp_path: Path) -> None:
    command = interpreter(version)
    if command is None:
        pytest.skip(f"no CPython {version} on this machine")
    if version.endswith("t"):
        pytest.skip(f"CPython {version} is free-threaded, and cannot load an abi3 wheel")
    output(command, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    # The pip of this environment installs into that one, from the wheel alone.
    output(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet", "--no-index", wheel)
    for target in (etcd.endpoint, "memory:"):
        assert f"CPython {version}." in output(python, "-X", "dev", "-W", "error", HERE / "smoke.py", target)
        count = tmp_path / f"count-{target.split(':')[0]}"
        count.write_text("0")
        lines = output(python, EXAMPLES / "counter.py", target, count, 20, "lock").splitlines()
        assert int(count.read_text()) == 20 and len(lines) == 20 and " value=20 " in lines[-1]
        lines = output(python, EXAMPLES / "counter.py", target, count, 5, "nolock").splitlines()
        assert all(line.startswith("token=- ") for line in lines) and int(count.read_text()) == 25
        assert "was not free within" in output(python, EXAMPLES / "tasks.py", target)
        assert "reports sent: 3" in output(python, EXAMPLES / "worker.py", target)


def test_processes_that_count_in_one_file_lose_nothing(etcd: Etcd, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    command = [sys.executable, str(EXAMPLES / "counter.py"), etcd.endpoint, str(count), "50", "lock"]
    counters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    tokens = []
    for counter in counters:
        out, _ = counter.communicate(timeout=100)
        assert counter.returncode == 0
        tokens += [line.split()[0] for line in out.splitlines()]
    assert int(count.read_text()) == 200 and len(set(tokens)) == 200


def test_the_wheel_is_small_typed_and_needs_nothing(wheel: Path) -> None:
    assert "abi3" in wheel.name and wheel.stat().st_size < 5_000_000
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        metadata = files.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert "etcdlock/py.typed" in names and "etcdlock/_native.pyi" in names
    assert "Requires-Dist" not in metadata and "Requires-Python: >=3.10" in metadata
