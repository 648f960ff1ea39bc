"""Profiles of steps that the recipe or a file asks for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from onellm_dist.config.schema import TrackSection
from onellm_dist.train.callbacks.profiler import Profiler
from onellm_dist.train.records.events import Events


def test_profiles_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    device, events = torch.device("cpu"), Events(tmp_path, enabled=True)
    track = TrackSection(profile_steps=(1, 2))
    profiler = Profiler(track, tmp_path, device, events, enabled=True)
    other = Profiler(track, tmp_path, device, events, enabled=False)
    for step in range(8):
        if step == 4:
            (tmp_path / "profile").touch()
        if step == 6:
            (tmp_path / "profile").write_text("1\n")
        profiler.on_step_start(step)
        other.on_step_start(step)
        torch.ones(64, 64) @ torch.ones(64, 64)
        other.on_step_end(step)
        profiler.on_step_end(step)
    names = ["steps-00000001-00000002", "steps-00000004-00000005", "steps-00000006-00000006"]
    assert sorted(p.name for p in (tmp_path / "profiles").iterdir()) == [
        f"{name}.trace.json.gz" for name in names
    ]
    written = list(map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines()))
    assert [(e["first"], e["last"]) for e in written] == [(1, 2), (4, 5), (6, 6)]
    assert not (tmp_path / "profile").exists()
    packed = (tmp_path / "profiles" / f"{names[0]}.trace.json.gz").read_bytes()
    trace = json.loads(gzip.decompress(packed))
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 2
