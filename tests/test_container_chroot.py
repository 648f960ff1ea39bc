"""The steps of the image, run in a chroot of the system that it starts from, and its command.

What a machine without a container daemon can do: Debian's own files, no package of this machine.
Nothing of the machine changes; mounts end with the processes that see them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from test_container import DOCKERFILE, ROOT, read_instructions

pytestmark = pytest.mark.soak
SUITES = {"debian:12-slim": "bookworm"}
MIRROR = "http://deb.debian.org/debian"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PIP_OF_USER = str(Path.home() / ".config" / "pip" / "pip.conf")
HOST_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", PIP_OF_USER)
"""How this machine reaches the registries: a daemon's builds have it too."""
IN_CHROOT = """
mount --bind /dev "$1/dev" && mount -t proc proc "$1/proc" && shift && exec chroot "$@"
"""
TRAINS = """
onellm --help >/dev/null
onellm shards build toyworld toy -o train=8 -o test=2
onellm train toy/align_image data.root=toy train.steps=2 data.global_batch=4 launch.ranks=1 \
    run.dir=run
"""


def run(command: list[str | Path], **options: object) -> None:
    done = subprocess.run(
        command,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"


def get_debootstrap(folder: Path) -> Mapping[str, str]:
    """Unpack Debian's debootstrap, without installing it; returns the environment that it needs."""
    if shutil.which("debootstrap"):
        return {}
    folder.mkdir()
    try:
        run(["apt-get", "download", "debootstrap"], cwd=folder)
    except AssertionError as error:
        pytest.skip(f"debootstrap cannot be had: {error}")
    run(["dpkg", "-x", next(folder.glob("*.deb")), folder])
    return {
        "DEBOOTSTRAP_DIR": str(folder / "usr/share/debootstrap"),
        "PATH": f"{folder / 'usr/sbin'}:{os.environ['PATH']}",
    }


def copy_checkout(target: Path) -> None:
    """What git knows of this checkout."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


class Image:
    """A system in a folder, and what its Dockerfile has set so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workdir = "/"
        self.environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(Path.home()),
            **{n: v for n, v in os.environ.items() if n.startswith("PIP_")},
        }

    def use_network_of_host(self) -> None:
        """The image's own certificates come with its packages: those of the host lie elsewhere."""
        for name in HOST_FILES:
            if Path(name).exists():
                target = self.folder / name.strip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(name, target)
        if Path(CERTIFICATES).exists():
            shutil.copy(CERTIFICATES, self.folder / "host.crt")
            self.environment |= {"PIP_CERT": "/host.crt", "SSL_CERT_FILE": "/host.crt"}

    def run(self, script: str) -> None:
        """Run a script of shell inside, as RUN does."""
        inside = f"cd {shlex.quote(self.workdir)} && {script}"
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"]
        run(
            [*command, "sh", "-ec", IN_CHROOT, "sh", self.folder, self.folder, "sh", "-ec", inside],
            env=self.environment,
            timeout=3600,
        )

    def follow(self, word: str, rest: str) -> None:
        """Do what an instruction says."""
        if word == "RUN":
            self.run(rest)
        elif word == "WORKDIR":
            self.workdir = rest
            (self.folder / rest.strip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            copy_checkout(self.folder / self.workdir.strip("/"))
        elif word == "ENV":
            name, _, value = rest.partition("=")
            self.environment[name] = value.replace("$PATH", self.environment["PATH"])
        else:
            assert word in ("FROM", "ARG", "ENTRYPOINT", "CMD"), f"{DOCKERFILE}: {word}"


@pytest.mark.skipif(os.getuid() != 0, reason="chroot needs root")
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="debootstrap comes from Debian")
def test_the_steps_of_the_image_run_in_a_chroot_and_its_command_trains(tmp_path: Path) -> None:
    instructions = read_instructions()
    environment = get_debootstrap(tmp_path / "debootstrap")
    image = Image(tmp_path / "image")
    suite = SUITES[dict(instructions)["FROM"]]
    try:
        run(
            ["debootstrap", "--variant=minbase", suite, image.folder, MIRROR],
            env={**os.environ, **environment},
        )
        image.use_network_of_host()
        for word, rest in instructions:
            image.follow(word, rest)
        assert dict(instructions)["ENTRYPOINT"] == '["onellm"]'
        image.run(TRAINS)
        assert (image.folder / image.workdir.strip("/") / "run" / "model").is_dir()
    finally:
        shutil.rmtree(image.folder, ignore_errors=True)  # 8 GB
