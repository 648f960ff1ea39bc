"""Metadata is in setup.cfg. This file only puts the folders users edit (launch, ds_configs, shards) into the wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("launch", "ds_configs", "shards")


class BuildWithShippedFolders(build_py):
    """Copies the top-level folders to `onellm_dist/_shipped/`, where `onellm_dist.common.resources` finds them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).resolve().parent
        for name in SHIPPED:
            target = Path(self.build_lib) / "onellm_dist" / "_shipped" / name
            shutil.copytree(root / name, target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShippedFolders})
