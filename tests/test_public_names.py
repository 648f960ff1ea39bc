"""The public face of the package: lazy, complete, and free of torch until it is used."""

from __future__ import annotations

import subprocess
import sys

import onellm_dist


def test_every_public_name_is_there() -> None:
    for name in onellm_dist.__all__:
        assert getattr(onellm_dist, name) is not None
    assert set(onellm_dist.__all__) <= set(dir(onellm_dist))
    assert onellm_dist.Trainer.__name__ == "Trainer"
    assert onellm_dist.__version__[0].isdigit()


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(onellm_dist, "Trainr")


def test_the_import_alone_loads_no_library() -> None:
    code = (
        "import sys, onellm_dist; "
        "print([m for m in ('torch', 'numpy', 'transformers', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
