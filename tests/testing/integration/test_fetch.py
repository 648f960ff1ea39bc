"""Packages by name, through the real pip and apt-get, from packages made here."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from onellm_dist.testing.integration.fetch import PackageCache, PackageUnavailableError


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_media-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_media/a.txt", "hello")
        wheel.writestr(
            "tiny_media-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-media\nVersion: 1.0\n",
        )
        wheel.writestr(
            "tiny_media-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("tiny_media-1.0.dist-info/RECORD", "")
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    return folder


def test_a_wheel_is_downloaded_once_and_read_without_being_installed(
    index: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    cache = PackageCache(tmp_path / "cache", log=lines.append)
    assert cache.read_pypi("tiny-media==1.0", "tiny_media/a.txt") == b"hello"
    with pytest.raises(PackageUnavailableError, match=r"no file tiny_media/b\.txt"):
        cache.read_pypi("tiny-media==1.0", "tiny_media/b.txt")
    assert lines == ["fetching tiny-media==1.0 from PyPI"]
    shutil.rmtree(index)
    assert (
        PackageCache(tmp_path / "cache").read_pypi("tiny-media==1.0", "tiny_media/a.txt")
        == b"hello"
    ), "a later run finds it"


def test_a_package_that_pip_cannot_find_is_tried_once(index: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    cache = PackageCache(tmp_path / "cache", log=lines.append)
    for _ in range(2):
        with pytest.raises(
            PackageUnavailableError, match=r"tiny-media==9\.9.*No matching distribution"
        ):
            cache.read_pypi("tiny-media==9.9", "x")
    assert len(lines) == 1


def test_a_python_without_pip_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "python: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(PackageUnavailableError, match=r"tiny-media==1\.0: .*No module named pip"):
        PackageCache(tmp_path / "cache").pypi("tiny-media==1.0")


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no dpkg-deb on this machine")
def test_a_debian_package_is_unpacked_without_being_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\n"
        "Maintainer: x <x@example.org>\nDescription: x\n"
    )
    (tree / "usr" / "share").mkdir(parents=True)
    (tree / "usr" / "share" / "crow.flac").write_bytes(b"caw")
    subprocess.run(
        ["dpkg-deb", "--build", str(tree), str(tmp_path / "tiny_1_all.deb")],
        check=True,
        capture_output=True,
    )
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    known = f'[ "$name" = tiny ] && exec cp {tmp_path}/tiny_1_all.deb .'
    script = f'for name; do :; done\n{known}\necho "E: Unable to locate $name" >&2\nexit 100\n'
    apt.write_text("#!/bin/sh\n" + script)
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}{os.pathsep}{os.environ['PATH']}")
    cache = PackageCache(tmp_path / "cache")
    assert cache.read_debian("tiny", "usr/share/crow.flac") == b"caw"
    with pytest.raises(PackageUnavailableError, match="no file usr/share/dog"):
        cache.read_debian("tiny", "usr/share/dog.flac")
    with pytest.raises(PackageUnavailableError, match="Unable to locate other"):
        cache.debian("other")


def test_without_apt_debian_packages_are_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageUnavailableError, match="no apt-get here"):
        PackageCache(tmp_path / "cache").read_debian("tiny", "x")
