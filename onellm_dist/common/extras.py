"""How to install the optional packages: the package itself is not published on PyPI."""

from __future__ import annotations

from pathlib import Path


def get_install_command(extra: str | None = None) -> str:
    """Return the command that installs this package from where it came from.

    Args:
        extra: a name of `options.extras_require` in setup.cfg, such as `serve`; default: none.

    Returns:
        `pip install -e '.[serve]'` and where to run it, if the package is used from its clone;
        else `pip install 'WHEEL[serve]'`, with the wheel that was installed.
    """
    suffix = f"[{extra}]" if extra else ""
    clone = Path(__file__).resolve().parents[2]
    if (clone / "setup.cfg").is_file():
        target = f"'.{suffix}'" if extra else "."
        return f"pip install -e {target} (in the clone, {clone})"
    return f"pip install 'WHEEL{suffix}', where WHEEL is the .whl file that was installed"
