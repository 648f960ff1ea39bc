"""The source of docs/howto/source.md, one file: found, built, verified, previewed, trained from."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from added_file import added_file
from shard_worlds import all_bytes, write_tree
from source_checks import decode_sample, get_reasons, make_tone, read_samples

from onellm_dist.cli import main
from onellm_dist.shards import build_dataset, open_dataset, sources
from onellm_dist.shards.build.registry import all_sources

PAGE = Path(__file__).parents[2] / "docs/howto/source.md"


@pytest.fixture
def _birdsong(tmp_path: Path) -> Iterator[None]:
    """The page's source is a file of shards/sources/."""
    code = re.search(
        r'```python\n(""".onellm shards build birdsong.*?)```',
        PAGE.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert code is not None
    known = set(all_sources())
    with added_file(sources, "birdsong", code[1], tmp_path / "added", all_sources.cache_clear):
        assert set(all_sources()) == {*known, "birdsong"}
        yield
    assert set(all_sources()) == known


def birds(root: Path) -> Path:
    rows = [
        "id,species,place",
        "a1,blackbird,garden",
        "a2,wren,forest",
        "a3,robin",
        "a4,owl,forest",
        "a5,lark,field",
    ]
    files: dict[str, bytes | str] = {
        f"recordings/a{i}.wav": make_tone("WAV", hertz=200.0 * i) for i in (1, 2, 4)
    }
    return write_tree(root, {**files, "birds.csv": "\n".join(rows) + "\n"})


@pytest.mark.usefixtures("_birdsong")
def test_the_pages_example(tmp_path: Path) -> None:
    inputs = birds(tmp_path / "birds")
    report = build_dataset("birdsong", inputs, tmp_path / "out", options={"max_failures": 0.5})
    dataset = open_dataset(tmp_path / "out")
    assert {k: (s["txt"], s["json"]) for k, s in read_samples(dataset).items()} == {
        "a1": ("A blackbird sings.", {"place": "garden"}),
        "a2": ("A wren sings.", {"place": "forest"}),
        "a4": ("A owl sings.", {"place": "forest"}),
    }
    assert decode_sample(dataset, "a4")["audio"].shape == (1, 128, 1024)
    assert get_reasons(report) == {
        "row-000004": "unreadable row: 2 columns where the header has 3",
        "a5": f"missing file: {inputs / 'recordings/a5.wav'}",
    }
    some = build_dataset(
        "birdsong", inputs, tmp_path / "forest", options={"max_failures": 0.5, "places": "forest"}
    )
    assert (some.samples, some.notes) == (2, ("left out knowingly: 2 x another place",))


@pytest.mark.usefixtures("_birdsong")
@pytest.mark.seconds
def test_the_pages_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    birds(tmp_path / "birds")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds/birds.csv").write_text(
        "id,species,place\na1,blackbird,garden\na2,wren,forest\n"
    )
    commands = re.findall(
        r"^onellm (shards (?:build|verify|preview) .*data/birdsong.*)$",
        PAGE.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    lines = [shlex.split(command, comments=True) for command in commands]
    assert [line[1] for line in lines] == ["build", "build", "verify", "preview"]
    for line in lines:
        with pytest.raises(SystemExit) as stop:
            main(line)
        assert stop.value.code == 0
        if "--dry-run" in line:
            assert not (tmp_path / "data").exists()
    assert "blackbird" in (tmp_path / "birds.html").read_text()
    assert "manifest.json" in all_bytes(tmp_path / "data/birdsong")
    assert "nothing was written" in capsys.readouterr().out
