"""Run some rows again without the other libraries, and print the difference to a committed result.

    python -m benchmarks.compare [--to benchmarks/results/half.json] [--rows crop convert] [--rounds 1] [--seconds 60]

Slower times are no error. Machines differ and are shared, so the change of the machine's own speed (reading and
writing) is printed, too.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.rows import ROOT, ROWS, SETTINGS

#: measured with the same size as here: in smaller inputs the constant cost of a job weighs more
COMMITTED = ROOT / "benchmarks" / "results" / "half.json"


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=COMMITTED, help="a result file")
    parser.add_argument("--gb", type=float, help="GB of input; default: as in the result file")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=["crop", "convert"], metavar="ROW"
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["1x2"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="skip rows that would start later than this")
    parser.add_argument(
        "--table", nargs=argparse.REMAINDER, default=[], help="further options of benchmarks.table"
    )
    options = parser.parse_args(argv)
    if not options.to.exists():
        print(
            f"{options.to} does not exist; python -m benchmarks.table --json {options.to} makes it"
        )
        return []
    before = json.loads(options.to.read_text())
    gigabytes = options.gb or before["gigabytes"]
    begun, found = time.monotonic(), []
    for row in options.rows:
        if options.seconds is not None and time.monotonic() - begun > options.seconds:
            print(f"{row} is skipped: {options.seconds:g} s have passed")
            continue
        now = table.main([
            "--gb", str(gigabytes), "--rows", row, "--rounds", str(options.rounds), "--settings", *options.settings,
            "--peers", "--memory", *options.table,
        ])  # fmt: skip
        found += differences(before, now)
    for one in found:
        print(text_of(one, before))
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds per GB of all rows and settings that both results contain."""
    old = {row["row"]: row for row in before["rows"]}
    machine = {
        name: now["machine"]["bandwidths"][name] / before["machine"]["bandwidths"][name]
        for name in ("read", "write")
    }
    found = []
    for row in now["rows"]:
        known = old.get(row["row"])
        for who in () if known is None else row["runs"].keys() & known["runs"].keys():
            pair = {
                what: [
                    table.median(one["runs"][who], what) / one["bytes"] * 1e9
                    for one in (known, row)
                ]
                for what in ("seconds", "cpu_seconds")
            }
            found.append({"row": row["row"], "who": who, "machine": machine, **pair})
    return found


def text_of(one: dict[str, Any], before: dict[str, Any]) -> str:
    """One line: before, after, the change, and the change of the machine.

    Examples
    --------
    >>> one = {"row": "crop", "who": "stem_dask 1x2", "seconds": [2, 1], "cpu_seconds": [2, 2], "machine": {"read": 1, "write": 2}}
    >>> text_of(one, {"commit": "c" * 40})
    'crop             stem_dask 1x2 2.00 -> 1.00 s per GB (-50%), CPU +0% since ccccccc; this machine reads +0%, writes +100%'
    """

    def change(pair: list[float]) -> str:
        return f"{pair[1] / pair[0] - 1:+.0%}"

    then, now = one["seconds"]
    return (
        f"{one['row']:16} {one['who']:13} {then:.2f} -> {now:.2f} s per GB ({change(one['seconds'])}), "
        f"CPU {change(one['cpu_seconds'])} since {before['commit'][:7]}; "
        f"this machine reads {one['machine']['read'] - 1:+.0%}, writes {one['machine']['write'] - 1:+.0%}"
    )


if __name__ == "__main__":
    main()
    sys.exit(0)
