"""Writes target/bench/results.json into docs/performance.md as a table, and puts the picture beside it."""

import json
import pathlib
import shutil
import sys

root = pathlib.Path(__file__).parent.parent
results = json.loads((root / "target/bench/results.json").read_text())
page = root / "docs/performance.md"
note = sys.argv[1] if len(sys.argv) > 1 else ""


def number(value, digits):
    return "" if value is None else f"{value:,.{digits}f}"


lines = [note, "", "| work | client | median | p99 | x put | x Go |", "|---|---|---:|---:|---:|---:|"]
last = None
for r in results:
    name = "" if r["name"] == last else r["name"]
    last = r["name"]
    if "median" not in r:
        lines.append(f"| {name} | {r['client']} | failed | | | |")
        continue
    unit = {"us": "us", "bytes": "bytes"}.get(r["unit"], "")
    digits = 1 if r["unit"] == "us" and r["median"] < 100 else 0
    p99 = f"{number(r['p99'], 0)} {unit}" if "p99" in r else ""
    lines.append(
        f"| {name} | {r['client']} | {number(r['median'], digits)} {unit} | {p99} "
        f"| {number(r.get('ratio_to_put'), 2)} | {number(r.get('ratio_to_go'), 3)} |"
    )
before, rest = page.read_text().split("<!-- figures -->")
after = rest.split("<!-- end of figures -->")[1]
page.write_text(before + "<!-- figures -->\n" + "\n".join(lines) + "\n<!-- end of figures -->" + after)
shutil.copy(root / "target/bench/hand-over.svg", root / "docs/hand-over.svg")
