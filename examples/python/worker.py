"""A job that every web worker could run, and exactly one of them does: worker.py TARGET [RUNS]

Each worker process calls run_once_everywhere() on its own schedule. The lock keeps the others out
while one is at it. What makes the result safe even if this process is paused in the middle is the
token: the report is written through the hold, which etcd refuses once the lock has passed on, and
the database, here SQLite, refuses a token that is smaller than the last one it has seen.
"""

import sqlite3
import sys

import etcdlock


def send_report(database: sqlite3.Connection, hold: etcdlock.Hold) -> None:
    with database:
        accepted = database.execute(
            "UPDATE reports SET sent = sent + 1, token = :token WHERE token < :token", {"token": hold.token}
        ).rowcount
    if not accepted:
        raise etcdlock.LockLost(f"the database has seen a later token than {hold.token}")
    hold.put("/demo/report/last", f"token {hold.token}")


def run_once_everywhere(session: etcdlock.Session, database: sqlite3.Connection) -> bool:
    hold = session.mutex("/demo/report").try_lock()
    if hold is None:
        return False  # another worker is at it
    with hold:
        hold.on_lost(lambda reason: print("stop:", reason, file=sys.stderr))
        send_report(database, hold)
    return True


def main(target: str, runs: int) -> None:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE reports (sent INTEGER, token INTEGER)")
    database.execute("INSERT INTO reports VALUES (0, 0)")
    with etcdlock.connect(target, ttl=10) as session:
        for _ in range(runs):
            print("sent" if run_once_everywhere(session, database) else "another worker is at it", flush=True)
    print("reports sent: {}, last token: {}".format(*database.execute("SELECT sent, token FROM reports").fetchone()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "memory:", int(sys.argv[2]) if len(sys.argv) > 2 else 3)
