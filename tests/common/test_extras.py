"""How to install an extra is said rightly: from the clone or a wheel, as nothing is on PyPI."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
from package_code import modules

import onellm_dist.common.extras as module
from onellm_dist.common.extras import get_install_command

PACKAGE = Path(module.__file__).parents[1]


def test_in_the_clone_it_is_installed_from_there() -> None:
    assert get_install_command("ui").startswith("pip install -e '.[ui]' (in the clone, ")
    assert get_install_command().startswith("pip install -e . (in the clone, ")


def test_without_a_clone_it_is_installed_from_the_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "onellm_dist/common/extras.py"))
    assert get_install_command("ui").startswith("pip install 'WHEEL[ui]'")


def test_messages_name_extras_that_exist_and_never_pypi() -> None:
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    texts = {name: (PACKAGE / name).read_text(encoding="utf-8") for name in modules()}
    named = {
        extra
        for text in texts.values()
        for extra in re.findall(r"get_install_command\([\"'](\w+)", text)
    }
    assert named >= {"ui", "serve", "eval", "quantise", "lora", "gguf"}
    assert named <= set(setup["options.extras_require"])
    assert [
        name for name, text in texts.items() if re.search(r"pip install.*onellm-dist", text)
    ] == []
