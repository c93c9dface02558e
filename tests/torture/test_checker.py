"""The checker sees each kind of violation, and none in a history without one."""

import json
import tempfile
import unittest
from pathlib import Path

import checker
import report
from checker import SECOND, History, check

A, B = "/torture/a", "/torture/b"


class Story:
    """A history, told line by line; times in milliseconds."""

    def __init__(self) -> None:
        self.history = History(observed=[{"type": "ready", "revision": 1, "at": 0}], end={"keys": [], "leases": [], "starved": {}, "began": 0, "faulted": 9 * SECOND})
        self.ids = 0

    def worker(self, worker: str, language: str = "rust", ttl: int = 5000) -> "Story":
        self.history.workers[worker] = [{"what": "start", "language": language, "at": 0}]
        self.call(worker, "connect", 0, 1, session="s", result={"ttl": ttl, "lease": "1"})
        for name in (A, B):
            self.call(worker, "mutex", 1, 1, session="s", mutex=name, name=name)
        return self

    def call(self, worker: str, do: str, start: int, end: int, result: dict | None = None, **members) -> None:
        self.ids += 1
        self.history.workers[worker].append({"what": "request", "id": self.ids, "do": do, "at": start * 1_000_000, **members})
        self.history.workers[worker].append({"what": "answer", "id": self.ids, "from": start * 1_000_000, "at": end * 1_000_000, **(result or {})})

    def key(self, name: str, token: int, start: int, lease: int = 1) -> None:
        key = f"{name}/{lease:x}-0"
        self.history.observed.append({"type": "put", "key": key, "created": token, "revision": token, "lease": str(lease), "at": start * 1_000_000})

    def gone(self, name: str, revision: int, at: int, lease: int = 1) -> None:
        self.history.observed.append({"type": "delete", "key": f"{name}/{lease:x}-0", "revision": revision, "at": at * 1_000_000})

    def grant(self, worker: str, token: int, at: int, name: str = A, **members) -> None:
        state = {"held": True, "remaining": 1000, "token": token, "seen": at * 1_000_000}
        self.call(worker, "lock", at - 1, at, mutex=name, result=state, **members)

    def state(self, worker: str, token: int, at: int, held: bool = True, name: str = A) -> None:
        self.call(worker, "state", at, at, mutex=name, result={"held": held, "remaining": 0, "token": token, "seen": at * 1_000_000})

    def unlock(self, worker: str, at: int, name: str = A, kind: str = "", took: int = 1) -> None:
        self.call(worker, "unlock", at, at + took, mutex=name, result={"kind": kind, "message": "m"} if kind else None)

    def lost(self, worker: str, token: int, at: int, reason: str = "the lease was not renewed before its deadline", name: str = A) -> None:
        event = {"what": "event", "event": "lost", "mutex": name, "token": token, "reason": reason, "at": at * 1_000_000}
        self.history.workers[worker].append(event)

    def fault(self, kind: str, start: int, end: int, **members) -> None:
        self.history.faults.append({"kind": kind, "from": start * 1_000_000, "to": end * 1_000_000, **members})

    def turn(self, worker: str, token: int, start: int, end: int, name: str = A, lease: int = 1) -> None:
        """A whole hold in good order."""
        self.key(name, token, start - 1, lease)
        self.grant(worker, token, start, name)
        self.state(worker, token, (start + end) // 2, name=name)
        self.unlock(worker, end, name)
        self.gone(name, token + 1, end + 1, lease)

    def checked(self) -> checker.Verdict:
        for lines in self.history.workers.values():
            if lines[-1]["what"] != "ended":
                lines.append({"what": "ended", "code": 0, "at": 9 * SECOND})
        return check(self.history)


class Checker(unittest.TestCase):
    def rules(self, story: Story) -> set[str]:
        return {rule for rule, _ in story.checked().violations}

    def pair(self) -> Story:
        return Story().worker("one").worker("two", "node")

    def test_a_history_in_good_order_has_no_violation(self):
        story = self.pair()
        for n in range(5):
            story.turn("one", 10 + 4 * n, 100 + 100 * n, 130 + 100 * n)
            story.turn("two", 12 + 4 * n, 140 + 100 * n, 170 + 100 * n, lease=2)
            story.turn("two", 100 + 4 * n, 100 + 100 * n, 170 + 100 * n, name=B, lease=3)
        verdict = story.checked()
        self.assertEqual(verdict.violations, [])
        self.assertEqual((verdict.acquisitions["rust"], verdict.acquisitions["node"]), (5, 10))

    def test_two_holds_at_once_are_an_overlap(self):
        story = self.pair()
        story.turn("one", 10, 100, 200)
        story.turn("two", 20, 190, 300, lease=2)
        self.assertIn("overlap", self.rules(story))

    def test_a_hold_within_another_is_an_overlap(self):
        story = self.pair()
        story.turn("one", 10, 100, 900)
        story.turn("two", 20, 190, 195, lease=2)
        self.assertIn("overlap", self.rules(story))

    def test_a_stopped_process_that_never_believed_again_overlaps_with_nobody(self):
        story = self.pair()
        story.key(A, 10, 99)
        story.grant("one", 10, 100)
        story.fault("worker stop", 150, 6000, worker="one")
        story.gone(A, 11, 5100)
        story.turn("two", 12, 5200, 5300, lease=2)
        story.state("one", 10, 6001, held=False)
        story.lost("one", 10, 6002)
        story.unlock("one", 6003, kind="LOST")
        self.assertEqual(self.rules(story), set())

    def test_a_stopped_process_that_believes_in_its_hold_afterwards_is_caught(self):
        story = self.pair()
        story.key(A, 10, 99)
        story.grant("one", 10, 100)
        story.fault("worker stop", 150, 6000, worker="one")
        story.gone(A, 11, 5100)
        story.turn("two", 12, 5200, 5300, lease=2)
        story.state("one", 10, 6001)
        self.assertEqual(self.rules(story), {"overlap", "late"})

    def test_a_smaller_token_later_is_caught(self):
        story = self.pair()
        story.turn("one", 20, 100, 200)
        story.turn("two", 10, 300, 400, lease=2)
        self.assertIn("tokens", self.rules(story))

    def test_the_same_token_twice_is_caught(self):
        story = self.pair()
        story.turn("one", 20, 100, 200)
        story.grant("one", 20, 300)
        self.assertIn("tokens", self.rules(story))

    def test_a_proof_after_the_delete_is_late(self):
        story = self.pair()
        story.key(A, 10, 99)
        story.grant("one", 10, 100)
        story.gone(A, 11, 200)
        story.state("one", 10, 201)
        self.assertEqual(self.rules(story), {"late"})

    def test_a_loss_that_is_told_after_the_delete_is_caught(self):
        story = self.pair()
        story.key(A, 10, 99)
        story.grant("one", 10, 100)
        story.gone(A, 11, 5000)
        story.lost("one", 10, 6100)
        self.assertEqual(self.rules(story), {"lost late"})

    def test_a_loss_that_is_told_before_the_delete_is_right(self):
        story = self.pair()
        story.key(A, 10, 99)
        story.grant("one", 10, 100)
        story.lost("one", 10, 4500)
        story.gone(A, 11, 5000)
        self.assertEqual(self.rules(story), set())

    def test_a_delete_by_the_rig_must_be_noticed_soon(self):
        for after, rules in ((100, set()), (1500, {"notice"})):
            story = self.pair()
            story.key(A, 10, 99, lease=7)
            story.grant("one", 10, 3000)
            story.fault("key delete", 4000, 4010, name=A, token=10, key=f"{A}/7-0", lease=7)
            story.gone(A, 11, 4005, lease=7)
            story.state("one", 10, 4000 + after)
            story.turn("two", 12, 4010, 4050, lease=2)
            story.lost("one", 10, 4001 + after, "its key was deleted from outside")
            self.assertEqual(self.rules(story), rules)

    def test_who_gets_the_lock_by_a_delete_may_know_a_little_before_the_observer(self):
        for early, rules in ((3, set()), (100, {"overlap"})):
            story = self.pair()
            story.key(A, 10, 99, lease=7)
            story.grant("one", 10, 3000)
            story.fault("key delete", 4000, 4210, name=A, token=10, key=f"{A}/7-0", lease=7)
            story.turn("two", 12, 4200 - early, 4300, lease=2)
            story.state("one", 10, 4205)
            story.gone(A, 11, 4200, lease=7)
            story.lost("one", 10, 4206, "its key was deleted from outside")
            self.assertEqual(self.rules(story), rules)

    def test_a_hold_that_had_ended_before_it_was_first_heard_of_overlaps_with_nobody(self):
        story = self.pair()
        story.key(A, 10, 99, lease=7)
        story.fault("key delete", 4000, 4010, name=A, token=10, key=f"{A}/7-0", lease=7)
        story.gone(A, 11, 4005, lease=7)
        story.turn("two", 12, 4020, 4080, lease=2)
        story.grant("one", 10, 4030)
        story.lost("one", 10, 4031, "its key was deleted from outside")
        self.assertEqual(self.rules(story), set())

    def test_a_revoke_under_a_cut_may_be_noticed_at_the_deadline_only(self):
        for after, rules in ((4000, set()), (5500, {"notice"})):
            story = self.pair()
            story.key(A, 10, 99, lease=7)
            story.grant("one", 10, 3000)
            story.fault("member cut", 3500, 9000, members=[0])
            story.fault("lease revoke", 4000, 4010, name=A, token=10, key=f"{A}/7-0", lease=7)
            story.gone(A, 11, 4005, lease=7)
            story.lost("one", 10, 4005 + after)
            self.assertEqual(self.rules(story), rules)

    def test_an_unlock_by_name_is_a_foreign_delete(self):
        story = self.pair()
        story.key(A, 10, 99)
        story.grant("one", 10, 100)
        story.gone(A, 11, 200)
        story.lost("one", 10, 205, "its key was deleted from outside")
        self.assertEqual(self.rules(story), {"foreign"})

    def test_a_lease_that_a_resumed_member_revokes_is_no_other_clients_deed(self):
        for stop, again, rules in ((True, False, set()), (False, False, {"foreign"}), (True, True, {"foreign"})):
            story = self.pair()
            story.key(A, 10, 99, lease=7)
            story.grant("one", 10, 100)
            if stop:
                story.fault("member stop", 50, 190, members=[0])
            story.gone(A, 11, 200, lease=7)
            story.lost("one", 10, 205, "its key was deleted from outside")
            if again:
                # The lease lives, so it was the key alone.
                story.turn("two", 30, 900, 950, name=B, lease=7)
            self.assertEqual(self.rules(story), rules)

    def test_getting_the_lock_before_one_who_is_ahead_is_caught_by_revision(self):
        story = self.pair()
        story.key(A, 10, 50, lease=9)
        story.turn("one", 20, 100, 200)
        story.gone(A, 90, 900, lease=9)
        self.assertEqual(self.rules(story), {"order"})

    def test_a_hand_over_in_one_transaction_is_in_order(self):
        story = self.pair()
        story.key(A, 10, 50)
        story.grant("one", 10, 60)
        story.unlock("one", 100)
        # The delete and the next ticket have one revision; the waiter between is served first.
        story.key(A, 15, 80, lease=2)
        story.gone(A, 20, 101)
        story.key(A, 20, 101, lease=3)
        story.grant("two", 15, 110)
        story.unlock("two", 120)
        story.gone(A, 25, 121, lease=2)
        story.grant("one", 20, 130)
        story.unlock("one", 140)
        story.gone(A, 26, 141, lease=3)
        self.assertEqual(self.rules(story), set())

    def test_what_the_observer_missed_is_held_against_nobody(self):
        story = self.pair()
        story.key(A, 10, 50, lease=9)
        story.history.observed.append({"type": "gap", "revision": 15, "at": 60_000_000})
        story.turn("one", 20, 100, 200)
        self.assertEqual(self.rules(story), set())

    def test_a_token_without_a_key_is_caught(self):
        story = self.pair()
        story.grant("one", 10, 100)
        story.unlock("one", 120)
        self.assertEqual(self.rules(story), {"unknown"})

    def test_a_call_far_over_its_limit_is_caught_unless_the_process_was_stopped(self):
        for stopped, rules in ((False, {"bounded"}), (True, set())):
            story = self.pair()
            story.call("one", "lock", 100, 3000, mutex=A, timeout=500, result={"kind": "TIMEOUT", "message": "m"})
            if stopped:
                story.fault("worker stop", 200, 2900, worker="one")
            self.assertEqual(self.rules(story), rules)

    def test_an_unlock_that_never_ends_in_time_is_caught(self):
        story = self.pair()
        story.key(A, 10, 99)
        story.grant("one", 10, 100)
        story.unlock("one", 200, kind="UNAVAILABLE", took=8000)
        self.assertEqual(self.rules(story), {"bounded"})

    def test_errors_that_must_not_be_are_caught(self):
        story = self.pair()
        story.call("one", "lock", 100, 110, mutex=A, result={"kind": "INTERNAL", "message": "m"})
        self.assertEqual(self.rules(story), {"error"})
        story = self.pair()
        story.turn("one", 10, 100, 200)
        story.history.workers["one"][-2:] = []
        story.unlock("one", 200, kind="NOT_HELD")
        self.assertEqual(self.rules(story), {"error"})

    def test_a_process_that_dies_by_itself_is_caught_and_a_killed_one_is_not(self):
        for what, rules in (([], {"died"}), ([{"what": "killed", "at": 4}], set())):
            story = self.pair()
            story.history.workers["one"] += [*what, {"what": "ended", "code": -9, "at": 5}]
            self.assertEqual(self.rules(story), rules)

    def test_what_is_left_and_who_starved_is_caught(self):
        story = self.pair()
        story.history.end = {"keys": ["/torture/a/1-0"], "leases": ["17"], "starved": {"one": "TIMEOUT"}}
        self.assertEqual(self.rules(story), {"left", "starved"})

    def test_a_fence_that_lets_a_smaller_token_through_is_caught(self):
        story = self.pair()
        for token, accepted in ((10, True), (20, True), (15, False), (15, True)):
            story.history.writes.append({"table": "fenced", "name": A, "token": token, "worker": "one", "accepted": accepted, "at": 0})
        self.assertEqual(self.rules(story), {"fence"})
        self.assertEqual(story.checked().fenced["fenced: stale, refused"], 1)

    def test_what_the_peers_do_is_told_and_not_held_against_us(self):
        story = Story().worker("one").worker("go-1", "go").worker("go-2", "go")
        story.key(A, 10, 99, lease=7)
        story.grant("go-1", 10, 100)
        story.gone(A, 11, 200, lease=7)
        story.turn("one", 12, 210, 400)
        story.state("go-1", 10, 300)
        story.turn("go-2", 14, 390, 500, lease=3)
        verdict = story.checked()
        self.assertEqual(verdict.violations, [])
        told = [text for rule, text in verdict.peers if rule == "overlap"]
        self.assertEqual(len(told), 2)
        self.assertIn("the key of go-1 (go) had gone 100 ms before", told[0])

    def test_the_report_and_the_picture_show_a_violation(self):
        story = self.pair()
        story.turn("one", 10, 100, 2000)
        story.turn("two", 20, 1900, 3000, lease=2)
        story.fault("worker stop", 2500, 2600, worker="two")
        story.checked()
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            for worker, lines in story.history.workers.items():
                (folder / f"worker-{worker}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            for name, lines in (("observer", story.history.observed), ("faults", story.history.faults)):
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (folder / "end.json").write_text(json.dumps(story.history.end))
            self.assertEqual([rule for rule, _ in report.write(folder).violations], ["overlap"])
            self.assertIn("| two holds of one name at once | 1 |", (folder / "torture-report.md").read_text())
            self.assertIn("violations seen in the whole run: 1", (folder / "torture-report.svg").read_text())


if __name__ == "__main__":
    unittest.main()
