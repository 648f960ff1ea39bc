"""Several adapters over one base, side by side: the base is in memory once.

PEFT keeps the factors of all of them beside the layers; one at a time is active, or none. What an
adapter gives is then base + scaling x B A, which is what the merged model gives up to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from onellm_dist.common.errors import UsageError
from onellm_dist.model.adapters.folder import (
    check_base,
    check_names,
    check_weights,
    explain_faults,
    is_adapter,
    read_base,
)
from onellm_dist.model.adapters.lora import import_peft
from onellm_dist.model.spans.trained import describe_spans, read_saved_spans

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class NamedAdapter(NamedTuple):
    """An adapter, and the name by which it is asked for."""

    name: str
    folder: Path


def parse_adapters(items: Iterable[str]) -> list[NamedAdapter]:
    """Read `--adapter NAME=DIR` as often as it is given.

    Raises:
        UsageError: one has another form, a name is there twice, or a folder holds no adapter.
    """
    found: dict[str, NamedAdapter] = {}
    for item in items:
        name, _, folder = item.partition("=")
        if not _NAME.fullmatch(name) or not folder:
            raise UsageError(
                f"--adapter {item} is not NAME=DIR",
                "a name (letters, digits, dots, hyphens) chooses the adapter of a folder.",
                "write it like --adapter photos=runs/photos/adapter.",
            )
        if name in found:
            raise UsageError(
                f"--adapter {name} is given twice",
                "a name chooses one adapter.",
                "give each a name of its own.",
            )
        found[name] = NamedAdapter(name, Path(folder))
    for adapter in found.values():
        if not is_adapter(adapter.folder):
            raise UsageError(
                f"--adapter {adapter.name}={adapter.folder}: no adapter in this folder",
                "there is no adapter_config.json, or a whole model.",
                "give RUN_DIR/adapter; a merged model is given in place of the base.",
            )
    return list(found.values())


def check_adapters(base: Path, adapters: Sequence[NamedAdapter]) -> None:
    """Refuse adapters that were not trained over a base.

    Args:
        base: the folder of a whole model.
        adapters: the adapters.

    Raises:
        UsageError: the base is an adapter itself, or not what an adapter was trained over; or an
            adapter's weights are missing or damaged, or it was trained with other `data.spans`.
    """
    if adapters and is_adapter(base):
        raise UsageError(
            f"{base} holds an adapter",
            "adapters are added to a whole model.",
            "give the model that they were trained over, and this one with --adapter.",
        )
    for _, folder in adapters:
        check_weights(folder)
        recorded = read_base(folder, base)
        if recorded.preset is not None:
            raise UsageError(
                f"{folder}: the adapter was trained over the preset {recorded.preset}",
                f"nothing says that {base} has the weights of this preset.",
                "merge it: onellm convert adapter ADAPTER MERGED.",
            )
        check_base(folder, recorded)
        _check_spans(base, folder)


def _check_spans(base: Path, folder: Path) -> None:
    """Refuse an adapter that was trained with other `data.spans` than its base."""
    trained, own = read_saved_spans(folder), read_saved_spans(base)
    if trained is not None and own is not None and trained != own:
        raise UsageError(
            f"{folder}: the adapter was trained with the spans {describe_spans(trained)}, "
            f"{base} with {describe_spans(own)}",
            "adapters side by side read media as their base does.",
            "give the adapter's folder alone in place of the model, or merge it: "
            "onellm convert adapter ADAPTER MERGED.",
        )


class AdapterSet:
    """The adapters of a model, of which one at a time is active, or none.

    Args:
        model: a OneLLM; its layers are wrapped.
        adapters: the adapters, as `check_adapters` has them.

    Raises:
        UsageError: PEFT is not installed, or an adapter cannot be read.
        OneLLMError: an adapter does not fit the model.
    """

    def __init__(self, model: Any, adapters: Sequence[NamedAdapter]) -> None:
        wrapped: Any = None
        # PEFT's own names: those of users may have dots, which names of modules must not.
        self._inner: Mapping[str, str] = {a.name: f"set{i}" for i, a in enumerate(adapters)}
        for name, folder in adapters:
            device = str(next(model.parameters()).device)
            given = {"adapter_name": self._inner[name], "torch_device": device}
            peft = import_peft()
            with explain_faults(folder):
                if wrapped is None:
                    wrapped = peft.PeftModel.from_pretrained(model, folder, **given)
                else:
                    wrapped.load_adapter(folder, **given)
            check_names(folder, wrapped, self._inner[name])
        self._tuner: Any = None if wrapped is None else wrapped.base_model
        self._active: str | None = None
        self.select("")

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were given."""
        return list(self._inner)

    def select(self, name: str) -> None:
        """Let the model answer with an adapter.

        Args:
            name: the adapter's; "": the base alone.

        Raises:
            KeyError: there is none of this name.
        """
        inner = self._inner[name] if name else None
        if name == self._active or self._tuner is None:
            return
        if inner:
            self._tuner.set_adapter(inner)
            self._tuner.enable_adapter_layers()
        else:
            self._tuner.disable_adapter_layers()
        self._active = name
