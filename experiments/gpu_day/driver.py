"""Rows of work, each a process of its own, until the budget ends; what is there is kept, and another call resumes.

    FOLDER/rows/NAME.json   how a row ended, what it found, and what it was asked
    FOLDER/logs/NAME.log    what it printed
    FOLDER/table.md         the table of all rows

A row never ends the others: its error is its result. It has the time that its limit and the budget leave; when that is
over, or a signal ends the day, all its processes end.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import jobs, results
from lcm_jax import files

LEAST_S = 45  # of budget, with which a row is begun
TRIES = 2  # of a row that was cut; then those that have not been tried go first
DONE, FAILED, CUT, BEGUN, UNFIT, ABSENT = "done", "failed", "cut", "begun", "does not fit", "not installed"
ANSWERED = (DONE, UNFIT)  # nothing is left to find out

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One piece of work.

    Attributes:
      name: of its files, too.
      command: of the process.
      read: folder of the day, log -> what it found: {"result": a line for the table, "error": if it failed, ...}.
        Called also after a failure; it raises OSError or a kind of ValueError or LookupError if nothing is there.
      limit_s: seconds it may take at most.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[Path, str], dict[str, Any]]
    limit_s: float = 900.0


@dataclasses.dataclass(frozen=True)
class Day:
    """Where rows are kept, and what they share.

    Attributes:
      folder: of the results.
      settings: as versions of packages; a row that was measured with others is measured again.
      code: a hash of the sources; rows that were measured with others are marked.
      environment: of the processes, besides this one's.
    """

    folder: Path
    settings: Mapping[str, Any]
    code: str
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def path(self, row: Row) -> Path:
        return self.folder / "rows" / f"{row.name}.json"

    def log(self, row: Row) -> Path:
        return self.folder / "logs" / f"{row.name}.log"

    def asked(self, row: Row) -> dict[str, Any]:
        """What a row is, wherever the folder and the interpreter are."""
        command = [part.replace(str(self.folder), "FOLDER") for part in row.command[1:]]
        return {"command": command, "settings": dict(self.settings)}

    def kept(self, row: Row) -> dict[str, Any] | None:
        """What an earlier call has of a row; None: nothing, or it was asked something else."""
        path = self.path(row)
        found = json.loads(path.read_text()) if path.exists() else None
        return found if found and found["asked"] == self.asked(row) else None

    def keep(self, row: Row, found: Mapping[str, Any]) -> None:
        files.write_atomic(self.path(row), results.to_json({"row": row.name, **found, "asked": self.asked(row)}, 2))


def order(rows: Sequence[Row], day: Day) -> list[Row]:
    """The rows that are to be run: new ones and those that were cut in their order, then those that failed."""

    def turn(row: Row) -> int | None:
        found = day.kept(row)
        if found is None or (found["status"] not in ANSWERED and found["code"] != day.code):
            return 0
        if found["status"] in ANSWERED:
            return None
        return int(found["status"] not in (CUT, BEGUN) or found["tries"] >= TRIES)

    turns = [(turn(row), row) for row in rows]
    return [row for number in (0, 1) for found, row in turns if found == number]


def run(rows: Sequence[Row], day: Day, budget_s: float, say: Say) -> bool:
    """Runs what is left of the rows. Returns whether all of them are answered.

    Raises:
      LcmError: another call is at work in the folder.
    """
    deadline = time.monotonic() + budget_s
    with jobs.held(day.folder):
        left = order(rows, day)
        say(f"{len(rows) - len(left)} of {len(rows)} rows are there")
        for row in left:
            seconds = min(row.limit_s, deadline - time.monotonic() - jobs.GRACE_S)
            if seconds < min(LEAST_S, row.limit_s):
                say("the budget is used up; the same command resumes")
                break
            say(row.name)
            found = attempt(row, day, seconds)
            say(f"  {found['status']}: {found.get('error') or found.get('result', '')}")
            write_table(rows, day)
        write_table(rows, day)
        return all((day.kept(row) or {}).get("status") in ANSWERED for row in rows)


def attempt(row: Row, day: Day, seconds: float) -> dict[str, Any]:
    """Runs a row and keeps what it found."""
    before = day.kept(row) or {"tries": 0}
    found: dict[str, Any] = {"status": BEGUN, "tries": before["tries"] + 1, "code": day.code, "seconds": None}
    day.keep(row, found)  # so that a row which takes the whole machine down is not begun for ever
    begun = time.monotonic()
    code = jobs.run(row.command, day.log(row), day.environment, seconds)
    found["seconds"] = round(time.monotonic() - begun, 1)
    text = day.log(row).read_text(errors="replace")
    try:
        found |= row.read(day.folder, text)
    except (OSError, ValueError, LookupError):
        if code == 0:
            found["error"] = "it ended well, but what it should have written is not there"
    if code is None:
        found |= {"status": CUT, "error": f"not finished in {seconds:.0f} s"}
    elif code or "error" in found:
        found.setdefault("error", jobs.last_error(text) or f"exit code {code}")
        found["status"] = kind_of(found["error"])
    else:
        found["status"] = DONE
    day.keep(row, found)
    return found


def kind_of(error: str) -> str:
    """The status that an error means."""
    if re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|does not fit|memory of the devices is too small", error):
        return UNFIT
    return ABSENT if re.search(r"No module named|is not installed", error) else FAILED


def table(rows: Sequence[Row], day: Day) -> str:
    """Markdown of all rows in their order."""
    lines, others = [], False
    for row in rows:
        found = day.kept(row) or {"status": "missing", "seconds": None, "code": day.code}
        others |= found["code"] != day.code
        status = "cut" if found["status"] == BEGUN else found["status"]
        seconds = "" if found["seconds"] is None else f"{found['seconds']:.0f}"
        cells = [row.name, status + "*" * (found["code"] != day.code), seconds, found.get("result", "")]
        lines.append([*cells, found.get("error", "").replace("|", "/")])
    note = "\n\\* measured with other sources of lcm_jax; remove its file in rows/ to measure it again.\n"
    return results.table(("row", "status", "seconds", "result", "error"), lines) + note * others


def write_table(rows: Sequence[Row], day: Day) -> None:
    files.write_atomic(day.folder / "table.md", table(rows, day))
