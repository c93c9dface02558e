"""Reads what everybody wrote down, and says what was against the rules of a lock.

A hold is known by what its own process saw: each answer that says `held` is a proof that the client believed in its hold at the time
`seen`, and so is the start of an unlock() that succeeded. What lies between its first and its last proof is surely a hold, as the
client understood it; a stopped process proves nothing. Etcd's side is what an observer saw: which key came and went at which revision.

The rules, for etcdlock's clients:

overlap      two holds of one name never have proofs that interleave
tokens       a later hold has a larger token
late         no proof of a hold after the observer saw the delete of its key, unless the rig itself deleted it
lost late    the loss is told before the lease runs out (not asked of a process that was stopped or killed, nor after a delete by the rig)
notice       a hold whose key or lease the rig took away knows it soon: within a second in a quiet time, else by its deadline
order        whoever was granted the lock was the first of the queue at some revision
foreign      nobody's key is deleted by another client
unknown      every token is the create revision of a key that the observer saw
bounded      a call with a limit ends by its limit and a bit (not asked of a process that was stopped)
error        no call ends with INTERNAL, FORKED, DEADLOCK or INVALID, and none says NOT_HELD of a hold
died         no client ends but by the rig
starved      after the faults everybody gets every lock
left         no key and no lease is left at the end
fence        the fenced resource never takes a smaller token than before

Etcd's own clients (Go's Mutex, `etcdctl lock`) are looked at in the same way; what they did is told, and is no violation.
"""

import json
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

SECOND = 1_000_000_000
PEERS = ("go", "etcdctl")
CONTENDER = re.compile(r"^(.+)/[0-9a-f]{1,16}(-[0-9a-f]{1,16})?$")
# A machine with much to do wakes a process late; this is no promise of the library.
SLACK = 2 * SECOND
# Row 13 of the safety model says 250 ms; here a busy machine is allowed for.
NOTICE = 1 * SECOND
# The observer hears of a delete later than the one who gets the lock by it, by as much as its own member and machine are late.
OBSERVED_LATE = SECOND // 20


@dataclass
class Hold:
    worker: str
    language: str
    name: str
    token: int
    asked: int
    granted: int
    ttl: int
    proofs: list[int] = field(default_factory=list)
    # How it ended: unlocked, lost, or nothing is known.
    end: str = "open"
    ended: int | None = None
    lost: int | None = None
    reason: str = ""

    @property
    def first(self) -> int:
        return self.proofs[0]

    @property
    def last(self) -> int:
        return self.proofs[-1]

    @property
    def peer(self) -> bool:
        return self.language in PEERS

    def __str__(self) -> str:
        return f"{self.worker} ({self.language}) on {self.name}, token {self.token}"


@dataclass
class Key:
    """A contender as the observer saw it."""

    key: str
    name: str
    created: int
    lease: int
    seen: int
    deleted: int | None = None
    deleted_at: int | None = None


@dataclass
class History:
    # For each process of a worker, its lines in order: requests, answers, events, and what the rig did to it.
    workers: dict[str, list[dict]] = field(default_factory=dict)
    observed: list[dict] = field(default_factory=list)
    faults: list[dict] = field(default_factory=list)
    writes: list[dict] = field(default_factory=list)
    end: dict = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "History":
        def lines(path: Path) -> list[dict]:
            return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

        return cls(
            workers={path.stem.removeprefix("worker-"): lines(path) for path in sorted(folder.glob("worker-*.jsonl"))},
            observed=lines(folder / "observer.jsonl"),
            faults=lines(folder / "faults.jsonl"),
            writes=lines(folder / "writes.jsonl"),
            end=json.loads((folder / "end.json").read_text()) if (folder / "end.json").exists() else {},
        )


@dataclass
class Verdict:
    violations: list[tuple[str, str]] = field(default_factory=list)
    # What etcd's own clients did, and what is worth telling of ours.
    peers: list[tuple[str, str]] = field(default_factory=list)
    acquisitions: Counter = field(default_factory=Counter)
    outcomes: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    losses: Counter = field(default_factory=Counter)
    notice: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
    overdue: dict[str, int] = field(default_factory=dict)
    fenced: Counter = field(default_factory=Counter)
    holds: list[Hold] = field(default_factory=list)
    gaps: int = 0

    def against(self, rule: str, text: str) -> None:
        self.violations.append((rule, text))


def ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:,.0f} ms"


def check(history: History) -> Verdict:
    verdict = Verdict()
    keys, gaps = observed_keys(history.observed)
    verdict.gaps = len(gaps)
    stopped = [fault for fault in history.faults if fault["kind"] == "worker stop"]
    for worker, lines in history.workers.items():
        verdict.holds += read_worker(worker, lines, stopped, verdict)
    proven = [hold for hold in verdict.holds if hold.proofs]
    taken = taken_away(history.faults, keys)

    for hold in verdict.holds:
        verdict.acquisitions[hold.language] += 1
        if hold.lost is not None and not hold.peer:
            verdict.losses[hold.reason] += 1
    check_keys(proven, verdict.holds, keys, taken, stopped, history, gaps, verdict)
    check_overlaps(proven, keys, taken, verdict)
    check_order(verdict.holds, keys, gaps, verdict)
    check_writes(history.writes, verdict)
    check_end(history.end, verdict)
    return verdict


def observed_keys(observed: list[dict]) -> tuple[dict[tuple[str, int], Key], list[dict]]:
    """Every contender, by name and create revision; and where the observer missed something."""
    keys: dict[tuple[str, int], Key] = {}
    alive: dict[str, Key] = {}
    gaps = []
    for line in observed:
        if line["type"] == "gap":
            gaps.append(line)
            # What is still there is said again, right after this.
            alive.clear()
        match = CONTENDER.match(line.get("key", ""))
        if not match:
            continue
        if line["type"] == "put":
            known = keys.get((match[1], line["created"]))
            alive[line["key"]] = known or Key(line["key"], match[1], line["created"], int(line["lease"]), line["at"])
            keys[(match[1], line["created"])] = alive[line["key"]]
        elif line["type"] == "delete" and (key := alive.pop(line["key"], None)):
            key.deleted, key.deleted_at = line["revision"], line["at"]
    return keys, gaps


def read_worker(worker: str, lines: list[dict], stopped: list[dict], verdict: Verdict) -> list[Hold]:
    """The holds of one process, out of its requests and answers."""
    holds: dict[tuple[str, int], Hold] = {}
    names: dict[str, str] = {}
    ttls: dict[str, int] = {}
    sessions: dict[str, str] = {}
    requests: dict[int, dict] = {}
    language, killed, over = "", False, False
    stops = [(stop["from"], stop.get("to", 1 << 62)) for stop in stopped if stop["worker"] == worker]
    for line in lines:
        what = line["what"]
        if what == "start":
            language = line["language"]
        elif what == "killed":
            killed = True
        elif what == "ended":
            over = True
            if not killed and line["code"] != 0 and language not in PEERS:
                verdict.against("died", f"{worker} ({language}) ended by itself with {line['code']}")
        elif what == "request":
            requests[line["id"]] = line
            if line["do"] == "mutex":
                names[line["mutex"]], sessions[line["mutex"]] = line["name"], line["session"]
        elif what == "event" and line["event"] == "lost":
            hold = holds.get((line["mutex"], line["token"]))
            if hold and hold.end == "open":
                hold.end, hold.ended = "lost", line["at"]
            if hold:
                hold.lost, hold.reason = line["at"], reason_of(line["reason"])
        elif what == "answer":
            request = requests.pop(line["id"])
            do, kind = request["do"], line.get("kind", "ok")
            mutex = request.get("mutex", "")
            if do in ("connect", "lock", "try_lock", "unlock", "put", "close"):
                verdict.outcomes[language][f"{do}: {kind}"] += 1
            check_call(worker, language, request, line, stops, verdict)
            if do == "connect" and kind == "ok":
                ttls[request["session"]] = line["ttl"]
            if do in ("lock", "try_lock") and kind == "ok":
                token, name = line["token"], names[mutex]
                if (mutex, token) in holds:
                    verdict.against("tokens", f"{worker} ({language}) got token {token} of {name} twice")
                hold = Hold(worker, language, name, token, line["from"], line["at"], ttls.get(sessions[mutex], 0) * 1_000_000)
                holds[(mutex, token)] = hold
            if line.get("held") and (hold := holds.get((mutex, line["token"]))):
                hold.proofs.append(line["seen"])
            if do == "unlock":
                # The latest hold of this mutex; kinds that say it was held at the start of the call are a proof.
                hold = next((hold for (label, _), hold in reversed(holds.items()) if label == mutex), None)
                if hold and hold.end in ("open", "lost"):
                    if kind in ("ok", "UNAVAILABLE") and hold.end == "open":
                        hold.proofs.append(line["from"])
                        hold.end, hold.ended = "unlocked", line["from"]
                    elif kind == "LOST":
                        hold.end, hold.ended = "lost", hold.ended or line["from"]
                    elif kind == "NOT_HELD" and language not in PEERS:
                        verdict.against("error", f"{hold}: unlock() says NOT_HELD of it")
    for request in requests.values():
        verdict.outcomes[language][f"{request['do']}: unknown"] += 1
    if not over and not killed and lines:
        verdict.against("died", f"{worker} ({language}) has no end in its log")
    for hold in holds.values():
        hold.proofs.sort()
    return list(holds.values())


REASONS = {
    "was not renewed before its deadline": "deadline",
    "expired or was revoked": "lease gone",
    "key was deleted": "key deleted",
    "guarded write found": "refused",
    "max_hold": "max_hold",
    "session was closed": "closed",
}


def reason_of(text: str) -> str:
    return next((short for words, short in REASONS.items() if words in text), text)


def check_call(worker: str, language: str, request: dict, answer: dict, stops: list, verdict: Verdict) -> None:
    if language in PEERS:
        return
    if answer.get("kind") in ("INTERNAL", "FORKED", "DEADLOCK", "INVALID"):
        verdict.against("error", f"{worker} ({language}): {request['do']} ended with {answer['kind']}: {answer['message']}")
    limit = {"lock": request.get("timeout"), "try_lock": 5000, "unlock": 5000, "put": 5000, "close": request.get("timeout", 5000)}.get(request["do"])
    if limit is None or any(start < answer["at"] and answer["from"] < end for start, end in stops):
        return
    over = answer["at"] - answer["from"] - limit * 1_000_000
    verdict.overdue[request["do"]] = max(verdict.overdue.get(request["do"], 0), over)
    if over > SLACK:
        verdict.against("bounded", f"{worker} ({language}): {request['do']} with a limit of {limit} ms ended {ms(over)} after it")


def taken_away(faults: list[dict], keys: dict) -> dict[tuple[str, int], dict]:
    """The contenders whose key or lease the rig took away, with the fault that did it."""
    leases = {fault["lease"]: fault for fault in faults if fault["kind"] == "lease revoke"}
    deletes = {(fault["name"], fault["token"]): fault for fault in faults if fault["kind"] == "key delete"}
    taken = {id: deletes[id] for id in keys if id in deletes}
    for id, key in keys.items():
        fault = leases.get(key.lease)
        # Keys that had gone before are another matter.
        if fault and (key.deleted_at is None or key.deleted_at >= fault["from"]):
            taken.setdefault(id, fault)
    # A leader that was stopped and goes on revokes leases that its successor has renewed (etcd before 3.4.31 and 3.5.13,
    # etcd-io/etcd#15247): the whole lease goes, at once, right then. The holder must hear of it like of any other delete.
    last_seen: dict[int, int] = defaultdict(int)
    for key in keys.values():
        last_seen[key.lease] = max(last_seen[key.lease], key.seen)
    for stop in (fault for fault in faults if fault["kind"] == "member stop"):
        for id, key in keys.items():
            if key.deleted_at and stop["to"] - SECOND // 2 <= key.deleted_at <= stop["to"] + 2 * SECOND and last_seen[key.lease] <= key.deleted_at:
                taken.setdefault(id, {"kind": "stopped member, which revoked the lease", "from": key.deleted_at})
    return taken


def disturbed(faults: list[dict], worker: str, start: int, end: int) -> bool:
    """Whether anything else was going on that can keep a worker from hearing something."""
    harmless = ("lease revoke", "key delete", "compaction")
    return any(
        fault["kind"] not in harmless
        and (fault.get("worker") in (None, worker))
        # Connections need a moment to come back.
        and fault["from"] < end
        and start < fault.get("to", 1 << 62) + SECOND
        for fault in faults
    )


def check_keys(proven, holds, keys, taken, stopped, history, gaps, verdict) -> None:
    """Each hold beside its key."""
    started = next((line["at"] for line in history.observed if line["type"] == "ready"), 0)
    for hold in holds:
        key = keys.get((hold.name, hold.token))
        if key is None:
            if not gaps and hold.granted > started and not hold.peer:
                verdict.against("unknown", f"{hold}: no key was ever created at that revision")
            continue
        if key.deleted_at is None:
            continue
        fault = taken.get((hold.name, hold.token))
        note = verdict.peers.append if hold.peer else verdict.violations.append
        if fault:
            quiet = not disturbed(history.faults, hold.worker, fault["from"] - SECOND, fault["from"] + NOTICE)
            limit = NOTICE if quiet else hold.ttl
            after = max(hold.last if hold.proofs else 0, hold.lost or 0) - key.deleted_at
            if quiet and not hold.peer and hold.lost:
                verdict.notice.append(hold.lost - key.deleted_at)
            if after > limit and not was_stopped(hold, key, stopped):
                note(("notice", f"{hold}: still held {ms(after)} after the rig's {fault['kind']}{' in a quiet time' if quiet else ''}"))
            continue
        if hold.proofs and hold.last > key.deleted_at:
            note(("late", f"{hold}: still held {ms(hold.last - key.deleted_at)} after its key was gone"))
        if hold.lost is not None and hold.end == "lost":
            if hold.reason == "key deleted" and not hold.peer:
                verdict.against("foreign", f"{hold}: its key was deleted, not by itself and not by the rig")
            if not was_stopped(hold, key, stopped):
                if not hold.peer:
                    verdict.ahead.append(key.deleted_at - hold.lost)
                if hold.lost > key.deleted_at + SECOND:
                    note(("lost late", f"{hold}: told {ms(hold.lost - key.deleted_at)} after its key was gone ({hold.reason})"))


def was_stopped(hold: Hold, key: Key, stopped: list[dict]) -> bool:
    """A process that is stopped cannot be told anything."""
    return any(
        stop["worker"] == hold.worker and stop["from"] < key.deleted_at + SECOND and hold.granted < stop.get("to", 1 << 62) + SECOND
        for stop in stopped
    )


def check_overlaps(proven: list[Hold], keys, taken, verdict: Verdict) -> None:
    by_name: dict[str, list[Hold]] = defaultdict(list)
    for hold in proven:
        by_name[hold.name].append(hold)

    def end_of(hold: Hold) -> int:
        """The last proof; up to the delete only, if its key was taken away from outside: `notice` asks how soon it is told."""
        if (hold.name, hold.token) in taken:
            deleted_at = keys[(hold.name, hold.token)].deleted_at
            return min(hold.last, max(hold.first, deleted_at - OBSERVED_LATE)) if deleted_at else hold.last
        return hold.last

    for name, holds in by_name.items():
        holds.sort(key=lambda hold: hold.first)
        latest: list[Hold] = []
        largest: Hold | None = None
        for hold in holds:
            latest = [other for other in latest if end_of(other) >= hold.first]
            # Taken away before it was first heard of: it had ended before the others began.
            for other in latest if (name, hold.token) not in taken or end_of(hold) > hold.first else ():
                both = f"{other} and {hold} at once for at least {ms(min(end_of(other), end_of(hold)) - hold.first)}"
                if not other.peer and not hold.peer:
                    verdict.against("overlap", both)
                else:
                    verdict.peers.append(("overlap", f"{both}; {blame(other, hold, keys)}"))
            latest.append(hold)
            if not hold.peer:
                if largest and hold.token <= largest.token and (name, hold.token) not in taken:
                    verdict.against("tokens", f"{hold} came after {largest}")
                if not largest or hold.token > largest.token:
                    largest = hold


def blame(one: Hold, other: Hold, keys) -> str:
    """Who of two believed in a hold whose key had gone."""
    wrong = []
    for hold in (one, other):
        key = keys.get((hold.name, hold.token))
        if key and key.deleted_at is not None and key.deleted_at < hold.last:
            wrong.append(f"the key of {hold.worker} ({hold.language}) had gone {ms(hold.last - key.deleted_at)} before")
    return "; ".join(wrong) or "both keys were there"


def check_order(holds: list[Hold], keys: dict[tuple[str, int], Key], gaps, verdict: Verdict) -> None:
    """By revision alone: whoever was granted the lock was the first of the queue at some revision."""
    # Where the observer missed deletes nothing can be said of keys that were alive then.
    missed = max((gap["revision"] for gap in gaps), default=0)
    by_name: dict[str, list[Key]] = defaultdict(list)
    for key in sorted(keys.values(), key=lambda key: key.created):
        by_name[key.name].append(key)
    granted = {(hold.name, hold.token): hold for hold in holds}
    for name, queue in by_name.items():
        # The revision from which everybody before was gone; a key that never went stands there for ever.
        free_from = 0
        for key in queue:
            hold = granted.get((name, key.created))
            end = key.deleted if key.deleted is not None else 1 << 62
            if hold and key.created > missed and free_from >= end:
                what = f"{hold}: was granted, but somebody before it stood in the queue until revision {free_from}, and it left at {end}"
                if hold.peer:
                    verdict.peers.append(("order", what))
                else:
                    verdict.against("order", what)
            if key.deleted is not None or key.created > missed:
                free_from = max(free_from, end)


def check_writes(writes: list[dict], verdict: Verdict) -> None:
    highest: dict[tuple[str, str], int] = {}
    for write in writes:
        id = (write["table"], write["name"])
        before = highest.get(id, 0)
        stale = write["token"] < before
        if write["accepted"]:
            verdict.fenced[f"{write['table']}: {'stale, accepted' if stale else 'accepted'}"] += 1
            if write["table"] == "fenced" and stale:
                verdict.against("fence", f"{write['name']}: token {write['token']} was accepted after {before}")
            highest[id] = max(before, write["token"])
        else:
            verdict.fenced[f"{write['table']}: stale, refused"] += 1


def check_end(end: dict, verdict: Verdict) -> None:
    for who, why in end.get("starved", {}).items():
        verdict.against("starved", f"{who}: {why}")
    for key in end.get("keys", []):
        verdict.against("left", f"the key {key}")
    for lease in end.get("leases", []):
        verdict.against("left", f"the lease {int(lease):x}")


def spread(values: list[int]) -> str:
    """Median and extremes in ms."""
    if not values:
        return "–"
    return f"median {statistics.median(values) / 1e6:,.0f} ms, least {min(values) / 1e6:,.0f} ms, most {max(values) / 1e6:,.0f} ms (of {len(values)})"


def main() -> None:
    import sys

    verdict = check(History.load(Path(sys.argv[1])))
    print(f"{sum(verdict.acquisitions.values())} acquisitions, {len(verdict.violations)} violations")
    for rule, text in verdict.violations:
        print(f"  {rule}: {text}")
    print(f"etcd's own clients: {len(verdict.peers)}")
    for rule, text in verdict.peers:
        print(f"  {rule}: {text}")
    raise SystemExit(bool(verdict.violations))


if __name__ == "__main__":
    main()
