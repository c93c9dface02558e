"""Runs the suite: builds the drivers, starts etcd, runs every case for every language and every pair, checks docs/parity.md.

    python3 tests/suite/run.py [--write] [--only WORD ...] [--languages rust,c] [--jobs N] [--no-build]

--write writes docs/parity.md anew. --only runs what has one of the words in its title, such as "queue" or "c and node".
"""

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict

import cases
from driving import Driver, Etcd, Rig
from languages import CALLS, LANGUAGES, ROOT, shell

PARITY = ROOT / "docs/parity.md"
GO_PEER = ROOT / "target/release/examples/go-peer"
KINDS = ["TIMEOUT", "BUSY", "LOST", "NOT_HELD", "CANCELLED", "UNAVAILABLE", "DENIED", "INVALID", "CLOSED"]


class Seen:
    """What each language was seen to do."""

    def __init__(self) -> None:
        self.calls: dict[str, Counter] = defaultdict(Counter)
        self.kinds: dict[str, Counter] = defaultdict(Counter)

    def listen_to(self, driver: Driver) -> None:
        asked: dict[int, str] = {}

        def listener(what: str, line: dict) -> None:
            if what == "request":
                asked[line["id"]] = line["do"]
            elif what == "event":
                self.calls[driver.language][line["event"]] += 1
            elif "kind" in line:
                self.kinds[driver.language][line["kind"]] += 1
            else:
                self.calls[driver.language][asked.pop(line["id"])] += 1

        driver.listener = listener


def parity(languages: list[str], seen: Seen) -> str:
    """The table for docs/: a cell is there only if the call was seen to work."""
    titles = [LANGUAGES[language].title for language in languages]
    lines = [
        "# Every call in every language",
        "",
        "Written by `make test-suite WRITE=1`, which runs the same cases for every language and every pair of languages;",
        "`make test` fails when this page is out of date. A cell is here because the call was seen to work.",
        "",
        "| | " + " | ".join(titles) + " |",
        "|---|" + "---|" * len(titles),
    ]
    for call, meaning in CALLS.items():
        cells = [f"`{LANGUAGES[l].spelled[call]}`" if seen.calls[l][call] and call in LANGUAGES[l].spelled else "–" for l in languages]
        lines.append(f"| {meaning} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Blocking Python has no call to cancel a `lock()`: a signal interrupts it, such as Ctrl-C.",
        "",
        "The kinds of error that the cases have provoked, each of the same name and number everywhere:",
        "",
        "| | " + " | ".join(titles) + " |",
        "|---|" + "---|" * len(titles),
    ]
    for kind in KINDS:
        lines.append(f"| {kind} | " + " | ".join("✓" if seen.kinds[l][kind] else "–" for l in languages) + " |")
    lines += [
        "",
        "`BUSY` is an empty result where a language has one: `None` in Rust and Python, `null` in Node and Java, `nil` in Ruby. A cancelled call raises what",
        "the language has for it: `asyncio.CancelledError`, the signal's `reason` in Node.",
        "",
        "The cases:",
        "",
    ]
    for title, chosen in (
        ("Each language alone", cases.ALONE),
        ("Every ordered pair, in two processes", cases.PAIR),
        ("Beside Go's `concurrency.Mutex`, and beside `etcdctl lock`", cases.PEER),
        ("All together", cases.TOGETHER),
    ):
        lines.append(f"* **{title}**: " + "; ".join(case.__name__.replace("_", " ") for case in chosen) + ".")
    return "\n".join(lines) + "\n"


def same_messages(messages: dict) -> list[str]:
    """Bad arguments are refused by core, so the words are the same too."""
    return [f"{what}: {by_language}" for what, by_language in messages.items() if len(set(by_language.values())) != 1]


async def with_auth(etcd: Etcd) -> None:
    await etcd.asked("auth/user/add", {"name": "root", "password": "secret"})
    await etcd.asked("auth/role/add", {"name": "root"})
    await etcd.asked("auth/user/grant", {"user": "root", "role": "root"})
    await etcd.asked("auth/enable", {})


def peers() -> list[str]:
    found = []
    if shutil.which("go"):
        subprocess.run(["go", "build", "-o", str(GO_PEER), "."], cwd=ROOT / "tests/peers/go", check=True)
        found.append("go")
    else:
        print("suite: without Go's Mutex: go is not installed")
    if shutil.which(os.environ.get("ETCDCTL_BIN", "etcdctl")) or (ROOT / ".venv/bin/etcdctl").exists():
        found.append("etcdctl")
    else:
        print("suite: without etcdctl: it is not installed")
    return found


async def run(options, languages: list[str], peers: list[str]) -> int:
    seen, messages, failures, done, skipped = Seen(), {}, [], Counter(), Counter()
    slots = asyncio.Semaphore(options.jobs)
    async with Rig() as etcd, Rig() as locked_etcd:
        await with_auth(locked_etcd)
        # Two processes of each language, which all cases share and keep busy.
        first = {l: await Driver.start(l) for l in languages}
        second = {l: await Driver.start(l) for l in languages}
        for driver in (*first.values(), *second.values()):
            seen.listen_to(driver)
        number = iter(range(1_000_000))

        async def one(case, who: str, *arguments) -> None:
            title = f"{case.__name__.replace('_', ' ')} ({who})"
            if options.only and not any(word in title for word in options.only):
                return
            place = cases.Place(etcd, locked_etcd, f"/suite/{next(number)}", messages, peers)
            async with slots:
                start = time.monotonic()
                try:
                    why = await asyncio.wait_for(case(*arguments, place), 120)
                    (skipped if why else done)[case.__name__] += 1
                    if why:
                        print(f"  skipped: {title}: {why}")
                except Exception as error:
                    failures.append(title)
                    print(f"  FAILED: {title}, after {time.monotonic() - start:.1f} s")
                    traceback.print_exception(error)
                if options.verbose:
                    print(f"  {time.monotonic() - start:6.2f} s  {title}")

        everything = [one(case, l, first[l]) for case in cases.ALONE for l in languages]
        everything += [one(case, f"{a} and {b}", first[a], second[b]) for case in cases.PAIR for a in languages for b in languages]
        everything += [one(case, f"{l} and {kind}", second[l], kind) for case in cases.PEER for l in languages for kind in peers]
        everything += [one(case, "all", first) for case in cases.TOGETHER]
        start = time.monotonic()
        await asyncio.gather(*everything)
        print(f"suite: {done.total()} runs of {len(done)} cases in {time.monotonic() - start:.0f} s, {len(languages)} languages: {', '.join(languages)}")
        for driver in (*first.values(), *second.values()):
            if driver.dead:
                failures.append(f"a {driver.language} driver died")
            await driver.end()
    failures += [f"the same mistake, other words: {difference}" for difference in same_messages(messages)]
    if failures:
        print(f"suite: {len(failures)} failed:", *failures, sep="\n  ")
        return 1
    if options.only:
        return 0
    page = parity(languages, seen)
    start = page.index("| |")
    print("", page[start : page.index("\n\n", start)], "", sep="\n")
    if options.write:
        PARITY.write_text(page)
    elif len(languages) == len(LANGUAGES) and len(peers) == 2 and (not PARITY.exists() or PARITY.read_text() != page):
        print("suite: docs/parity.md is out of date: run `make test-suite WRITE=1` and commit it")
        return 1
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--languages", default="")
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    if not options.no_build:
        shell("cargo build --release --locked --quiet -p etcdlock-rig")
    languages = []
    for name, language in LANGUAGES.items():
        if options.languages and name not in options.languages.split(","):
            continue
        if why := language.missing():
            print(f"suite: without {language.title}: {why}")
            continue
        if not options.no_build:
            language.make()
        languages.append(name)
    raise SystemExit(asyncio.run(run(options, languages, peers())))


if __name__ == "__main__":
    main()
