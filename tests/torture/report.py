"""What a run has shown, for people: torture-report.md, and a picture of who held what when, torture-report.svg."""

import json
import platform
import os
from collections import Counter, defaultdict
from html import escape
from pathlib import Path

import checker
from checker import PEERS, SECOND, History, Verdict, ms, spread

TITLES = {"rust": "Rust", "c": "C", "python": "Python", "asyncio": "asyncio", "node": "Node", "jvm": "Java", "ruby": "Ruby",
          "go": "Go's Mutex", "etcdctl": "etcdctl lock"}
RULES = {
    "overlap": "two holds of one name at once",
    "tokens": "a later hold with a smaller token",
    "late": "believed in a hold whose key was gone",
    "lost late": "told of a loss after the key was gone",
    "notice": "heard too late that its key or lease was taken away from outside",
    "order": "got the lock before somebody who was ahead in the queue",
    "foreign": "a key deleted by another client",
    "unknown": "a token without a key",
    "bounded": "a call that ended after its limit",
    "error": "an error that must not be",
    "died": "a process that ended by itself",
    "starved": "a lock that somebody never got after the faults",
    "left": "a key or a lease left at the end",
    "fence": "a stale write that the fenced resource took",
}
# Told apart also by who does not see all colours.
COLOURS = {"rust": "#b7410e", "c": "#4a6fa5", "python": "#2e8b57", "asyncio": "#8fbc5a", "node": "#c9a227", "jvm": "#8e5ea2", "ruby": "#d6336c",
           "go": "#17a2b8", "etcdctl": "#8d99ae"}
LOCKS = ["#3366cc", "#dc7633", "#229954", "#9b59b6", "#c0392b", "#7f8c8d"]
WINDOW = 60 * SECOND


def write(folder: Path) -> Verdict:
    history = History.load(folder)
    verdict = checker.check(history)
    (folder / "torture-report.md").write_text(markdown(history, verdict))
    (folder / "torture-report.svg").write_text(picture(history, verdict))
    return verdict


def table(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def languages_of(history: History) -> list[str]:
    found = {lines[0]["language"] for lines in history.workers.values() if lines}
    return [language for language in TITLES if language in found] + sorted(found - set(TITLES))


def markdown(history: History, verdict: Verdict) -> str:
    end = history.end
    languages = languages_of(history)
    ours = [language for language in languages if language not in PEERS]
    broken = Counter(rule for rule, _ in verdict.violations)
    total = sum(verdict.acquisitions[language] for language in ours)
    kinds: dict[str, list[float]] = defaultdict(list)
    for fault in history.faults:
        kinds[fault["kind"]].append((fault["to"] - fault["from"]) / SECOND)
    processes = Counter(lines[0]["language"] for lines in history.workers.values() if lines)
    outcome = lambda language, *names: sum(verdict.outcomes[language][name] for name in names)
    rows = []
    for language in languages:
        lost = sum(1 for hold in verdict.holds if hold.language == language and hold.lost is not None)
        rows.append([
            TITLES.get(language, language), processes[language], f"**{verdict.acquisitions[language]:,}**",
            outcome(language, "lock: TIMEOUT"), outcome(language, "try_lock: BUSY"), outcome(language, "lock: CANCELLED"), lost,
            sum(count for name, count in verdict.outcomes[language].items() if name.endswith(": UNAVAILABLE")),
            sum(count for name, count in verdict.outcomes[language].items() if name.endswith(": unknown")),
        ])
    peers = Counter((rule, "Go's Mutex" if "(go)" in text else "etcdctl lock") for rule, text in verdict.peers)
    text = [
        "# Torture report",
        "",
        f"{end.get('seconds', 0):,.0f} s of faults on a cluster of three etcd {end.get('etcd', '?')}; seed {end.get('seed')}. "
        f"{total:,} acquisitions by etcdlock's clients in {len(ours)} languages, beside {sum(verdict.acquisitions[l] for l in languages if l in PEERS):,} by "
        f"etcd's own clients, under {len(history.faults):,} faults: **{len(verdict.violations)} violations seen**.",
        "",
        f"    make torture SECONDS={end.get('seconds', 0):.0f} SEED={end.get('seed')}",
        "",
        "The seed decides which faults come, in which order, how hard and how long, and what the workers try; the interleaving is the machine's. "
        "The rules are in `tests/torture/checker.py`. None seen is not never.",
        "",
        "![who held what when](torture-report.svg)",
        "",
        "## Who did what",
        "",
        table(["", "processes", "acquisitions", "timed out", "busy", "cancelled", "holds lost", "unavailable", "unknown (killed)"], rows),
        "",
        "Each process has two tasks that share a session (Go's has one, since two mutexes of one Go session do not exclude each other); a killed one is started again. Names: four, one of them nested in another; Go and "
        "etcdctl use one of them.",
        "",
        "## Faults",
        "",
        table(["fault", "times", "seconds in all"], [[kind, len(times), f"{sum(times):.1f}"] for kind, times in sorted(kinds.items())]),
        "",
        "## Rules",
        "",
        table(["etcdlock's clients", "violations seen"], [[RULES[rule], broken[rule]] for rule in RULES]),
        "",
        *(f"* {rule}: {text}" for rule, text in verdict.violations[:50]),
        *([""] if verdict.violations else []),
        "## What was measured",
        "",
        f"* A hold that was lost told so before etcd deleted its key by: {spread(verdict.ahead)}.",
        f"* After the rig deleted a key or revoked a lease in a quiet time, the holder was told after: {spread(verdict.notice)}, by the observer's "
        "clock, who may see the delete later than the holder.",
        f"* Holds lost, by reason: {', '.join(f'{reason} {count}' for reason, count in verdict.losses.most_common()) or 'none'}.",
        "* The latest end of a call after its limit: "
        + ", ".join(f"{call} {ms(max(0, over))}" for call, over in sorted(verdict.overdue.items()))
        + ". (The machine had two cores and some twenty processes.)" * (os.cpu_count() == 2),
        f"* Writes to a resource that looks at the token: {verdict.fenced['fenced: accepted']:,} accepted, {verdict.fenced['fenced: stale, refused']:,} stale "
        f"ones refused. The same writes to one that does not: {verdict.fenced['unfenced: stale, accepted']:,} stale ones accepted, each of which "
        "overwrote newer data. (Some workers write without looking at `is_held()` first, on purpose.)",
        f"* The observer missed history {verdict.gaps} times, because it was compacted while the observer was cut off.",
        "",
        "## etcd's own clients in the same queue",
        "",
        "They are peers, not what is tested; this is told for the reader's own choice of a lock. Go's client has no `is_held()`: a hold is what a "
        "program can know, which is that it has locked, not unlocked, and that its session is not done.",
        "",
        table(["", "Go's Mutex", "etcdctl lock"],
              [[RULES[rule] + (" (one of them ours: its own key was there)" if rule == "overlap" else ""),
                peers[(rule, "Go's Mutex")], peers[(rule, "etcdctl lock")]] for rule in ("overlap", "late", "lost late", "notice", "order")]),
        "",
        *(f"* {rule}: {text}" for rule, text in verdict.peers[:20]),
        *([f"* … and {len(verdict.peers) - 20} more"] if len(verdict.peers) > 20 else []),
        "",
        "## Versions",
        "",
        f"etcd {end.get('etcd')}, etcdlock {end.get('versions', {}).get('rust', '?')}, etcdctl {end.get('versions', {}).get('etcdctl', '?')}, Go client "
        f"{go_client()}, Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores.",
    ]
    return "\n".join(text) + "\n"


def go_client() -> str:
    module = Path(__file__).resolve().parents[1] / "peers/go/go.mod"
    return next((line.split()[1] for line in module.read_text().splitlines() if "etcd/client/v3 " in line), "?")


def busiest(history: History, verdict: Verdict) -> tuple[int, int]:
    """The window to draw: the one with the most different faults and losses."""
    began, over = history.end.get("began", 0), history.end.get("faulted", 0) + 2 * SECOND
    if not began:
        times = [hold.granted for hold in verdict.holds] or [0]
        began, over = min(times), max(times)
    best, chosen = -1.0, began
    start = began
    while start == began or start + WINDOW <= over:
        inside = [fault for fault in history.faults if start <= fault["from"] < start + WINDOW]
        lost = sum(1 for hold in verdict.holds if hold.lost and start <= hold.lost < start + WINDOW)
        score = len({fault["kind"] for fault in inside}) + 0.2 * min(lost, 20)
        if score > best:
            best, chosen = score, start
        start += 10 * SECOND
    return chosen, min(chosen + WINDOW, max(over, chosen + SECOND))


def picture(history: History, verdict: Verdict) -> str:
    start, end = busiest(history, verdict)
    left, width, top = 150, 1430, 96
    x = lambda at: left + (min(max(at, start), end) - start) / (end - start) * width
    seen = lambda a, b: b >= start and a <= end
    holds = [hold for hold in verdict.holds if hold.proofs and seen(hold.first, hold.last)]
    names = sorted({hold.name for hold in verdict.holds})
    languages = languages_of(history)
    out: list[str] = []
    add = out.append

    def text(at_x: float, y: float, words: str, size: int = 12, anchor: str = "start", colour: str = "#222", weight: str = "normal") -> None:
        add(f'<text x="{at_x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}">{escape(words)}</text>')

    def bar(hold, y: float, height: float, colour: str, drawn: dict) -> None:
        a, b = x(hold.first), x(hold.last)
        # What falls into a pixel that is drawn already adds nothing to see.
        if b <= drawn.get(y, -1):
            return
        drawn[y] = max(b, a + 1)
        why = f"{hold.worker}, {hold.name.rsplit('/', 1)[-1]}, token {hold.token}, {ms(hold.last - hold.first)}, {hold.end}"
        title = f"<title>{escape(why)}</title>" if b - a > 4 else ""
        add(f'<rect x="{a:.1f}" y="{y:.1f}" width="{max(b - a, 1):.1f}" height="{height}" fill="{colour}">{title}</rect>' if title else
            f'<rect x="{a:.1f}" y="{y:.1f}" width="{max(b - a, 1):.1f}" height="{height}" fill="{colour}"/>')

    def cross(at: int, y: float) -> None:
        a = x(at)
        add(f'<path d="M{a - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="#d00000" stroke-width="2" fill="none"/>')

    # Faults: labelled bars, packed into as few rows as there is room for their words, and a light band through all lanes.
    rows: list[float] = []
    placed = []
    for fault in sorted((f for f in history.faults if seen(f["from"], f["to"])), key=lambda f: f["from"]):
        label = fault["kind"]
        if "members" in fault:
            label += " " + "+".join(str(member + 1) for member in fault["members"]) if len(fault["members"]) < 3 else " (all)"
        if "worker" in fault:
            label += " " + fault["worker"]
        a, b = x(fault["from"]), x(fault["to"])
        room = b + 10 if 6.3 * len(label) + 6 < b - a else max(b, a + 3) + 6.3 * len(label) + 12
        # At the right edge the label stands left of its bar.
        turned = room > left + width + 90
        first = a - 6.3 * len(label) - 8 if turned else a
        row = next((row for row, until in enumerate(rows) if until <= first), len(rows))
        room = b + 10 if turned else room
        rows[row : row + 1] = [room]
        placed.append((fault, label, a, b, row, turned))
    faults_height = 18 * max(len(rows), 1)
    locks_y = top + faults_height + 34
    lock_height = 26
    lanes_y = locks_y + len(names) * lock_height + 40
    workers = [worker for worker in sorted({w.split(".")[0] for w in history.workers}, key=lambda w: (languages.index(language_of(history, w)), w))]
    lane_height = 7 * len(names) + 7
    bottom = lanes_y + len(workers) * lane_height
    height = bottom + 92

    text(left, 30, "Who held what when", 22, weight="bold")
    shown = f"{(start - history.end.get('began', start)) / SECOND:.0f} to {(end - history.end.get('began', start)) / SECOND:.0f} s"
    text(left, 52, f"etcdlock's torture run, seed {history.end.get('seed')}, {shown} of {history.end.get('seconds', 0):.0f} s; etcd {history.end.get('etcd')}, three members; "
         f"violations seen in the whole run: {len(verdict.violations)}", 13, colour="#555")
    text(left - 12, top + 13, "faults", 13, "end", weight="bold")
    for fault, label, a, b, row, end_room in placed:
        hand = fault["kind"] in ("lease revoke", "key delete", "compaction", "leader move", "worker kill")
        colour = "#7048a8" if hand else "#a83232"
        band = max(b - a, 1.5)
        add(f'<rect x="{a:.1f}" y="{top + row * 18 + 14}" width="{band:.1f}" height="{bottom - top - row * 18 - 14}" fill="{colour}" fill-opacity="{0.35 if band < 4 else 0.07}"/>')
        add(f'<rect x="{a:.1f}" y="{top + row * 18}" width="{max(band, 3):.1f}" height="14" rx="2" fill="{colour}" fill-opacity="0.85"/>')
        inside = 6.3 * len(label) + 6 < b - a
        text(a - 4 if end_room else a + 4 + (0 if inside else max(band, 3)), top + row * 18 + 11, label, 11, "end" if end_room else "start",
             "#fff" if inside else colour)

    text(left - 12, locks_y - 8, "the locks", 13, "end", weight="bold")
    for number, name in enumerate(names):
        y = locks_y + number * lock_height
        add(f'<rect x="{left}" y="{y}" width="{width}" height="{lock_height - 6}" fill="#f3f3f0"/>')
        add(f'<rect x="{left - 150 + 8}" y="{y + 5}" width="10" height="10" fill="{LOCKS[number % len(LOCKS)]}"/>')
        text(left - 12, y + 14, name.removeprefix("/torture/"), 13, "end")
        drawn: dict = {}
        for hold in sorted((h for h in holds if h.name == name), key=lambda h: h.first):
            bar(hold, y, lock_height - 6, COLOURS.get(hold.language, "#000"), drawn)

    text(left - 12, lanes_y - 8, "the workers", 13, "end", weight="bold")
    for number, worker in enumerate(workers):
        y = lanes_y + number * lane_height
        language = language_of(history, worker)
        add(f'<rect x="{left}" y="{y}" width="{width}" height="{lane_height - 3}" fill="{"#f7f7f5" if number % 2 else "#efefec"}"/>')
        add(f'<rect x="{left - 150 + 8}" y="{y + lane_height / 2 - 7}" width="10" height="10" fill="{COLOURS.get(language, "#000")}"/>')
        text(left - 12, y + lane_height / 2 + 3, worker, 13, "end")
        for fault in history.faults:
            if fault.get("worker", "").split(".")[0] != worker or not seen(fault["from"], fault["to"]):
                continue
            if fault["kind"] == "worker stop":
                add(f'<rect x="{x(fault["from"]):.1f}" y="{y}" width="{max(1, x(fault["to"]) - x(fault["from"])):.1f}" height="{lane_height - 3}" fill="url(#stopped)"/>')
            else:
                add(f'<rect x="{x(fault["from"]) - 1.5:.1f}" y="{y}" width="3" height="{lane_height - 3}" fill="#000"/>')
        drawn = {}
        for hold in sorted((h for h in holds if h.worker.split(".")[0] == worker), key=lambda h: h.first):
            bar(hold, y + 2 + 7 * names.index(hold.name), 6, LOCKS[names.index(hold.name) % len(LOCKS)], drawn)
        for hold in verdict.holds:
            if hold.worker.split(".")[0] == worker and hold.lost is not None and start <= hold.lost <= end:
                cross(hold.lost, y + 5 + 7 * names.index(hold.name))

    step = 1 if end - start < 20 * SECOND else 5
    for second in range(0, int((end - start) / SECOND) + 1, step):
        a = x(start + second * SECOND)
        add(f'<path d="M{a:.1f} {top}V{bottom + 4}" stroke="#000" stroke-opacity="0.10"/>')
        text(a, bottom + 20, f"{(start - history.end.get('began', start)) / SECOND + second:.0f} s", 12, "middle", "#555")

    y, at = bottom + 50, left
    text(left - 12, y, "legend", 13, "end", weight="bold")
    for colour, words in [(COLOURS.get(language, "#000"), TITLES.get(language, language)) for language in languages]:
        add(f'<rect x="{at}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        text(at + 17, y, words)
        at += 17 + 8 * len(words) + 18
    y, at = bottom + 74, left
    for number, name in enumerate(names):
        words = "lock " + name.removeprefix("/torture/")
        add(f'<rect x="{at}" y="{y - 8}" width="16" height="6" fill="{LOCKS[number % len(LOCKS)]}"/>')
        text(at + 21, y, words)
        at += 21 + 7 * len(words) + 16
    add(f'<path d="M{at} {y - 9}l8 8m0 -8l-8 8" stroke="#d00000" stroke-width="2" fill="none"/>')
    text(at + 14, y, "hold lost, when the client was told")
    at += 250
    add(f'<rect x="{at}" y="{y - 11}" width="16" height="14" fill="url(#stopped)"/>')
    text(at + 22, y, "process stopped")
    at += 140
    add(f'<rect x="{at}" y="{y - 11}" width="3" height="14" fill="#000"/>')
    text(at + 9, y, "process killed, and started again")

    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 90} {height}" font-family="DejaVu Sans, Helvetica, Arial, sans-serif">'
        '<defs><pattern id="stopped" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="6" height="6" fill="#fff" fill-opacity="0.6"/><rect width="2.5" height="6" fill="#777"/></pattern></defs>'
        f'<rect width="{left + width + 90}" height="{height}" fill="#fff"/>'
    )
    return head + "\n".join(out) + "</svg>\n"


def language_of(history: History, worker: str) -> str:
    return next(lines[0]["language"] for name, lines in history.workers.items() if name.split(".")[0] == worker and lines)


if __name__ == "__main__":
    import sys

    write(Path(sys.argv[1]))
