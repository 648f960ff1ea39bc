"""`onellm shards build SOURCE --name value`: the source's options as flags, and their help."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from shard_worlds import contents, picture, write_tree

from onellm_dist.cli import main
from onellm_dist.common.errors import EXIT_DONE, EXIT_USAGE
from onellm_dist.shards import open_dataset
from onellm_dist.shards.build.arguments import expand_source_flags
from onellm_dist.shards.build.registry import all_sources, get_options

OWN = ("--option", "-o", "--workers", "--seed", "--overwrite", "--task", "--dry-run", "--help")


def code(arguments: list[str]) -> int:
    """The exit code of `onellm`."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def test_a_build_with_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = write_tree(
        tmp_path / "in", {"a.jpg": picture(1), "a.txt": "one", "b.jpg": picture(2), "b.txt": "two"}
    )
    out = tmp_path / "out"
    flags = [
        "--modality=image",
        "--max-samples",
        "1",
        "--licence",
        "CC0-1.0",
        "--check",
        "--energon",
        "no",
        "--workers",
        "1",
    ]
    assert code(["shards", "build", "folder", str(inputs), str(out), *flags]) == EXIT_DONE
    dataset = open_dataset(out)
    assert (list(contents(dataset)), len(dataset.shards()), dataset.manifest.licence) == (
        ["a", "b"],
        2,
        "CC0-1.0",
    )
    assert not (out / ".nv-meta").exists()
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"source: folder\ninputs: {inputs}\nout: {tmp_path / 'again'}\n")
    assert code(["shards", "build", str(recipe), "--split", "val"]) == EXIT_DONE
    assert open_dataset(tmp_path / "again").splits == ("val",)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--modalty", "image"],
            "source 'folder' has no option --modalty; did you mean --modality?",
        ),
        (["--split"], "--split has no value"),
        (["--split", "--shuffle"], "--split has no value"),
        (["--limit", "x"], "limit='x' is not of type int"),
    ],
    ids=["unknown", "last", "before-a-flag", "wrong-type"],
)
def test_flags_that_cannot_be_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert (
        code(
            [
                "shards",
                "build",
                "folder",
                str(write_tree(tmp_path, {"a.txt": ""})),
                str(tmp_path / "out"),
                *flags,
            ]
        )
        == EXIT_USAGE
    )
    assert message in capsys.readouterr().err


def test_what_flags_become() -> None:
    line = [
        "--overwrite",
        "cc3m-depth",
        "IN",
        "--depth-model",
        "DIR",
        "--depth-is-distance",
        "OUT",
        "-o",
        "name=x",
        "--check",
        "no",
        "--seed=3",
    ]
    assert expand_source_flags(line, OWN) == [
        "--overwrite",
        "cc3m-depth",
        "IN",
        "--option",
        "depth_model=DIR",
        "--option",
        "depth_is_distance=true",
        "OUT",
        "-o",
        "name=x",
        "--option",
        "check=no",
        "--seed=3",
    ]
    assert expand_source_flags(["nosource", "--depth-model", "x"], OWN) == [
        "nosource",
        "--depth-model",
        "x",
    ]
    assert expand_source_flags(["folder", "--", "--split"], OWN) == ["folder", "--", "--split"]


@pytest.mark.parametrize("name", sorted(all_sources()))
@pytest.mark.seconds
def test_the_help_of_every_source_explains_every_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(["shards", "build", name, "--help"]) == EXIT_DONE
    printed = capsys.readouterr().out
    flat = " ".join(printed.split())
    for option, value in get_options(all_sources()[name]).items():
        assert f"--{option.replace('_', '-')}" in printed
        assert " ".join(value.help.split()) in flat
    assert max(map(len, printed.splitlines())) <= 140


def test_the_page_on_sources_explains_every_option() -> None:
    """docs/reference/sources.md, with its generated part, names every source and option."""
    docs = Path(__file__).parents[3] / "docs"
    spec = importlib.util.spec_from_file_location("generate", docs / "hooks/generate.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.on_page_markdown((docs / "reference/sources.md").read_text(encoding="utf-8"))
    missing = [
        (s.name, o)
        for s in all_sources().values()
        for o in get_options(s)
        if f"`{o}`" not in page and f"`{o}=" not in page
    ]
    assert not missing
    assert not [s for s in all_sources() if f"`{s}`" not in page]


def test_the_commands_own_help_imports_no_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there at once; sources import torch."""
    monkeypatch.setattr(
        "onellm_dist.shards.build.arguments.all_sources",
        lambda: pytest.fail("sources were imported"),
    )
    assert code(["shards", "build", "--help"]) == EXIT_DONE
    assert "--dry-run" in capsys.readouterr().out
