"""`from_pretrained` and `save_pretrained` with folders that record checksums of their files.

What is saved also carries its code (`folder_code/`), so that `trust_remote_code=True` loads it
where this package is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from onellm_dist.common.checksums import check_folder, renew_sums
from onellm_dist.common.files import FileStamp, stamp_file
from onellm_dist.model.folder_code.files import write_code

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Weights in one file, and the index of several: a folder has one of them."""


class KeepsSums:
    """A mixin of transformers' classes: what is saved over a converted folder can be loaded."""

    code_map: ClassVar[Mapping[str, str]] = {}
    """Auto class to the file and class in a saved folder; empty: the class has no JSON for it."""

    @classmethod
    def register_for_auto_class(cls, *_: Any, **__: Any) -> None:
        """Do nothing: transformers would copy one file of the code, and all of it is saved."""

    def can_give_code(self) -> bool:
        """Whether the code of this object may be saved with it."""
        return bool(self.code_map)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does; checksums of files that are written anew are renewed.

        Args:
            save_directory: the folder.
            args: as of transformers' `save_pretrained`.
            kwargs: as of transformers' `save_pretrained`.
        """
        parent: Any = super()
        if not kwargs.get("is_main_process", True):
            return parent.save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        with renew_sums(folder):
            if self.can_give_code():
                vars(self)["auto_map"] = dict(self.code_map)
            elif self.code_map:  # null would be a map without classes to transformers
                vars(self).pop("auto_map", None)
            before = {name: stamp_file(folder / name) for name in WEIGHTS}
            found = parent.save_pretrained(save_directory, *args, **kwargs)
            _remove_old_weights(folder, before)
            if self.can_give_code():
                write_code(folder)
        return found


def _remove_old_weights(folder: Path, before: dict[str, FileStamp | None]) -> None:
    """Remove weights in one file where several were written over them, and the reverse.

    transformers 5.23 leaves them, and would load the one file, whatever is newer.
    """
    kept = [name for name in WEIGHTS if before[name] == stamp_file(folder / name)]
    if len(kept) == 1:
        (folder / kept[0]).unlink(missing_ok=True)


def check_source(source: Any, subfolder: str | None) -> None:
    """Compare the files that a model is loaded from with the checksums beside them.

    Args:
        source: as of `from_pretrained`: a folder, or a name on the Hub, which has no checksums.
        subfolder: as of `from_pretrained`.

    Raises:
        UsageError: a file was changed or damaged.
    """
    folder = Path(str(source), subfolder or "")
    if folder.is_dir():
        check_folder(folder)
