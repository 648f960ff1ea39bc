"""Metadata is in setup.cfg; this file only puts the files that users edit into the wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    "launch/hostfile",
    "launch/.deepspeed_env",
    "launch/*.sh",
    "launch/recipes/**/*.yaml",
    "launch/slurm/*.sbatch",
    "ds_configs/*",
    "shards/*.yaml",
    "shards/README.md",
)
"""By pattern, so that data which users built below these folders stays out."""


class BuildWithShippedFolders(build_py):
    """Copies the files to `onellm_dist/_shipped/`, where `common.resources` finds them."""

    def run(self) -> None:
        """Build as usual, then copy; an editable install reads the checkout itself."""
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).resolve().parent
        for pattern in SHIPPED:
            for source in root.glob(pattern):
                relative = source.relative_to(root)
                target = Path(self.build_lib) / "onellm_dist" / "_shipped" / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithShippedFolders})
