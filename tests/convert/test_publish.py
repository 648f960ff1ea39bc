"""`onellm convert publish`: what may not leave this machine, and what is better added first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from packs import small_model

from onellm_dist.cli.convert_commands import run_publish
from onellm_dist.common.errors import UsageError
from onellm_dist.convert.publish import check_publication, make_upload_command
from onellm_dist.model import OneLLMProcessor
from onellm_dist.model.card import CARD
from onellm_dist.model.presets import load_toy_tokenizer

GOOD_CARD = """---
license: apache-2.0
datasets: [toyworld]
base_model: toy/llm
---
# A model

## Results

| VQAv2 | 71.6 |
"""


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publish") / "model"
    tokenizer = load_toy_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    small_model(words=len(tokenizer), modalities=["imu"]).save_pretrained(folder)
    OneLLMProcessor(tokenizer).save_pretrained(folder)
    (folder / CARD).write_text(GOOD_CARD)
    return folder


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "model"))


@pytest.mark.slow
def test_a_complete_folder_loads_alone_and_gets_its_command(
    complete: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_publish(complete, "me/my-model", load=True) == 0
    out = capsys.readouterr().out
    assert "ok      it loads by the Auto classes without onellm_dist, and answers" in out
    assert "missing" not in out and "wrong" not in out
    assert out.splitlines()[-1] == (
        f"to upload it: hf upload me/my-model {complete} . --repo-type model"
    )


def change_card(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / CARD).write_text(text)


CHANGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("wrong", lambda f: (f / "optimizer.pt").write_bytes(b"x"), "optimizer.pt: only safetensors"),
    ("wrong", lambda f: (f / "x.txt").symlink_to("/etc/hostname"), "x.txt is a link"),
    ("wrong", lambda f: (f / ".env").write_text("x"), ".env is hidden"),
    ("wrong", lambda f: (f / CARD).unlink(), "there is no README.md"),
    ("wrong", change_card("# A model"), "does not begin with YAML"),
    ("wrong", change_card("---\n[\n---\n"), "does not begin with YAML"),
    ("wrong", change_card("---\ntags: []\n---\n"), "names no license"),
    ("missing", change_card("---\nlicense: other\n---\n"), "needs license_name"),
    ("missing", change_card("---\nlicense: mit\n---\n"), "no figures of an evaluation"),
    ("missing", change_card("---\nlicense: mit\n---\n"), "names no datasets"),
    ("missing", change_card(GOOD_CARD + "/home/me/runs/x"), "a path of a machine: /home/me/"),
    ("wrong", change_card(GOOD_CARD + "https://me:secret12345@host/x"), "a password or key"),
    ("wrong", change_card(GOOD_CARD + "key: hf_" + "a1" * 17), "a password or key"),
    ("missing", lambda f: (f / "chat_template.jinja").unlink(), "no chat_template.jinja"),
    ("wrong", lambda f: (f / "onellm_code.py").unlink(), "there is no onellm_code.py"),
]


@pytest.mark.parametrize(("level", "change", "says"), CHANGES)
def test_what_is_wrong_or_missing_is_named(
    folder: Path, level: str, change: Callable[[Path], object], says: str
) -> None:
    change(folder)
    findings = check_publication(folder, load=False)
    assert [f.level for f in findings if says in f.what] == [level], findings


def name_code(file: str, *keys: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        inner = content
        for key in keys:
            inner = inner[key]
        inner["auto_map"] = {"AutoConfig": "others/code--x.Config"}
        path.write_text(json.dumps(content))

    return change


def add_code(file: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        text = (folder / file).read_text() if (folder / file).exists() else ""
        marker = folder.parent / "was run"
        (folder / file).write_text(f"open({str(marker)!r}, 'w').close()\n{text}")

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add_code("modeling_onellm.py"), "modeling_onellm.py: not the code of this"),
        (add_code("onellm_code.py"), "onellm_code.py: not the code of this"),
        (add_code("helper.py"), "helper.py: code that"),
        (add_code("custom_generate/generate.py"), "custom_generate/generate.py: code that"),
        (name_code("config.json"), "config.json names code of others"),
        (name_code("config.json", "text_config"), "config.json names code of others"),
        (name_code("tokenizer_config.json"), "tokenizer_config.json names code of others"),
        (name_code("video_preprocessor_config.json"), "video_preprocessor_config.json names code"),
    ],
)
def test_code_of_others_is_wrong_and_is_not_run(
    folder: Path, change: Callable[[Path], object], says: str
) -> None:
    change(folder)
    findings = check_publication(folder)
    assert [f.level for f in findings if f.what.startswith(says)] == ["wrong"], findings
    assert not any("load without" in f.what for f in findings)
    assert not (folder.parent / "was run").exists()


@pytest.mark.slow
def test_a_folder_that_does_not_load_alone_is_not_ready(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert run_publish(folder, "me/x", load=True) == 1
    out = capsys.readouterr().out
    assert "it does not load without onellm_dist: " in out
    assert "hf upload" not in out


def test_names_of_repositories_and_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the name of a repository"):
        make_upload_command(tmp_path, "me; rm -rf /")
    with pytest.raises(UsageError, match="no model in"):
        check_publication(tmp_path)
