"""The list of events names every event that the package writes, with all its fields."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import onellm_dist.train
from onellm_dist.report.incidents import ROUTINE_EVENTS
from onellm_dist.train.records.event_fields import EVENT_FIELDS

TRAIN = Path(onellm_dist.train.__file__).parent
NOT_STORED = {"message", "warning"}


def find_writes() -> Iterator[tuple[str, set[str]]]:
    """Name and fields of every event that is written somewhere in `train/`."""
    for path in TRAIN.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func)
            name = node.args[0]
            writes = called.endswith((".write", "_write_event", "write_event"))
            events = "vents" in called or "write_event" in called
            if writes and events and isinstance(name, ast.Constant):
                yield str(name.value), {k.arg for k in node.keywords if k.arg} - NOT_STORED


def test_every_event_and_field_is_in_the_list() -> None:
    written: dict[str, set[str]] = {}
    for name, fields in find_writes():
        written.setdefault(name, set()).update(fields)
    assert written.keys() == EVENT_FIELDS.keys()
    assert not {
        name: fields - set(EVENT_FIELDS[name].fields)
        for name, fields in written.items()
        if fields - set(EVENT_FIELDS[name].fields)
    }


def test_the_report_knows_no_other_events() -> None:
    assert set(ROUTINE_EVENTS) <= EVENT_FIELDS.keys()
