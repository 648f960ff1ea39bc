"""`onellm convert ...` as people type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import clip, llama, save_meta

from onellm_dist.cli import main
from onellm_dist.convert.registry import import_format, list_formats


def onellm(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


@pytest.mark.seconds
def test_a_model_from_parts_to_the_reference_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_meta(tmp_path / "meta", llama(), ranks=2)
    clip().save_pretrained(tmp_path / "clip")
    small = [
        "--blocks",
        1,
        "--experts",
        2,
        "--upm-heads",
        4,
        "--modality",
        "image",
        "--modality",
        "imu",
    ]
    assert (
        onellm(
            "convert",
            "assemble",
            "--llm",
            tmp_path / "meta",
            "--encoder",
            tmp_path / "clip",
            *small,
            tmp_path / "start",
        )
        == 0
    )
    assert "initialised" in capsys.readouterr().out
    assert (
        onellm("convert", "onellm", tmp_path / "start", tmp_path / "ref", "--shard-gb", 0.01) == 0
    )
    assert "parameters as reference" in capsys.readouterr().out
    heads = ["--encoder-heads", 4, "--upm-heads", 4]
    assert onellm("convert", "verify", tmp_path / "ref", tmp_path / "start", *heads) == 0
    assert "the same" in capsys.readouterr().out
    assert onellm("convert", "verify", tmp_path / "start", tmp_path / "meta") == 0, "the LLM alone"
    assert (
        onellm(
            "convert", "reference", tmp_path / "ref", tmp_path / "back", *heads, "--dtype", "bf16"
        )
        == 0
    )
    assert json.loads((tmp_path / "back" / "conversion.json").read_text())["dtype"] == "bfloat16"
    assert onellm("convert", "verify", tmp_path / "back", tmp_path / "start") == 1
    assert "bfloat16 and float32" in capsys.readouterr().out
    assert onellm("convert", "inspect", tmp_path / "back") == 0
    assert "UPM: 2 experts of 1 block, router soft" in capsys.readouterr().out


@pytest.mark.seconds
def test_wrong_usage_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "hf")
    for words, said in (
        (["hf", tmp_path / "hf", tmp_path / "out", "--to", "gguf"], "nothing writes 'gguf'"),
        (["hf", tmp_path / "hf", tmp_path / "out", "--to", "onellm"], "onellm convert assemble"),
        (["hf", tmp_path / "hf", tmp_path / "out", "--dtype", "int4"], "no such precision"),
        (["hf", tmp_path / "none", tmp_path / "out"], "no config.json"),
        (["inspect", tmp_path], "none of the known formats"),
    ):
        assert onellm("convert", *words) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(list_formats()))
@pytest.mark.seconds
def test_every_format_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert onellm("convert", name, "--help") == 0
    assert f"onellm convert {name}" in capsys.readouterr().out
    assert callable(import_format(name).open_checkpoint)
