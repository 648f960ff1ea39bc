"""Media in any of the forms that programs hold them in, as the model's inputs."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import unquote_to_bytes

import numpy as np
import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.modalities import Modality, Part, all_modalities, get_modality
from onellm_dist.modalities.files import read_file_spans, read_file_value
from onellm_dist.modalities.library_faults import translate_errors

DATA_URL = "data:"


def name_modality(key: str) -> str:
    """The modality that an argument of the processor names: its name, or its plural.

    Args:
        key: the argument, such as `image` or `images`.

    Raises:
        UsageError: there is no such modality.
    """
    name = key if key in all_modalities() else key.removesuffix("s")
    if name not in all_modalities():
        raise UsageError(
            f"unknown modality {key!r}",
            "the model would ignore it.",
            f"give any of: {', '.join(all_modalities())}.",
        )
    return name


def list_media(name: str, given: Any, prompts: int) -> list[Any]:
    """One medium for each prompt.

    Args:
        name: the modality.
        given: a medium; or a list of one for each prompt, each in a list of its own or not.
        prompts: number of prompts.

    Raises:
        UsageError: there are more or fewer media than prompts.
    """
    is_list = isinstance(given, list | tuple) and not get_modality(name).is_one_medium(given)
    items = list(given) if is_list else [given]
    flat: list[Any] = []
    for item in items:
        nested = isinstance(item, list | tuple) and not get_modality(name).is_one_medium(item)
        if nested and len(item) != 1:
            raise UsageError(
                f"{len(item)} {name} inputs for one prompt",
                "the processor takes one medium of a modality for each prompt.",
                "give one for each.",
            )
        flat.append(item[0] if nested else item)
    if len(flat) != prompts:
        raise UsageError(
            f"{format_count(len(flat), f'{name} input')} for {format_count(prompts, 'prompt')}",
            "every prompt needs one input.",
            "give as many inputs as prompts.",
        )
    return flat


def read_medium(name: str, item: Any, rate: float | None = None) -> torch.Tensor:
    """One medium in any of its forms -> [*value_shape].

    Args:
        name: the modality.
        item: a path, a `data:` URL, the bytes of a file, an open file, a mapping as datasets have
            it (`bytes` or `path`), a mapping from the modality's parts to any of these, the model's
            own input as a tensor, or what the modality's `make_raw` takes.
        rate: samples per second, where an item is an array of them.

    Raises:
        UsageError: there is no such file, a URL would have to be fetched, or the item is not a
            medium.
        SampleError: the file is not readable media of its modality.
    """
    modality = get_modality(name)
    if _is_value(item, modality):
        if not item.is_floating_point():
            raise _make_item_error(name, item, "the model's input has floats, after the transform")
        return item.float()
    item = _unwrap(item)
    if isinstance(item, str | os.PathLike) and not _is_data_url(item):
        return read_file_value(modality, _find_file(name, item))
    parts = _read_parts(modality, item)
    if parts is not None:
        return modality.read_value(parts, {}, train=False, rng=np.random.default_rng(0))
    with _translate_item_errors(name, item):
        raw = _make_raw(modality, item, rate)
        return modality.make_value(raw, train=False, rng=np.random.default_rng(0))


def read_medium_spans(name: str, item: Any, most: int, rate: float | None = None) -> torch.Tensor:
    """One medium as one or several spans: [spans, *value_shape].

    Args:
        name: the modality.
        item: as of `read_medium`. A picture or a sound in memory takes as many spans as its file;
            the frames of a film take one, since how long it is is not known.
        most: the most spans that it may take.
        rate: as of `read_medium`.

    Raises:
        UsageError: as of `read_medium`.
        SampleError: as of `read_medium`.
    """
    modality = get_modality(name)
    if most <= 1 or _is_value(item, modality):
        return read_medium(name, item, rate)[None]
    item = _unwrap(item)
    if isinstance(item, str | os.PathLike) and not _is_data_url(item):
        return read_file_spans(modality, _find_file(name, item), most)[0]
    parts = _read_parts(modality, item)
    if parts is None:
        with _translate_item_errors(name, item):
            found = (modality.make_parts(form) for form in _list_forms(item, rate))
            parts = next((each for each in found if each is not None), None)
    if parts is None:
        return read_medium(name, item, rate)[None]
    rng = np.random.default_rng(0)
    with translate_errors(name):
        spans = modality.count_spans(modality.measure(parts), most)
        return torch.stack(modality.read_spans(parts, {}, spans=spans, train=False, rng=rng))


def _is_value(item: Any, modality: Modality) -> TypeGuard[torch.Tensor]:
    """Whether an item is the model's own input."""
    return isinstance(item, torch.Tensor) and tuple(item.shape) == tuple(modality.value_shape)


def _list_forms(item: Any, rate: float | None) -> list[Any]:
    """What `make_raw` may take a signal as; with its rate first, which most modalities ignore."""
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
    timed = [{"array": item, "sampling_rate": rate}] * (rate is not None)
    if isinstance(item, torch.Tensor) and (not item.is_floating_point() or item.ndim > 2):
        item = item.numpy()
    return [item] if isinstance(item, Mapping) else [*timed, item]


def _make_raw(modality: Modality, item: Any, rate: float | None) -> Any:
    raw = item
    for form in _list_forms(item, rate):
        raw = modality.make_raw(form)
        if raw is not form:
            break
    return raw


@contextmanager
def _translate_item_errors(name: str, item: Any) -> Iterator[None]:
    """Say that an item is not a medium where a modality fails on it in a way of its own."""
    try:
        yield
    except OneLLMError:
        raise
    except (AttributeError, TypeError, IndexError, ValueError) as error:
        raise _make_item_error(name, item, str(error)) from error


def _unwrap(item: Any) -> Any:
    """What a mapping of a dataset (`{"bytes": ..., "path": ...}`) or an open file holds."""
    if isinstance(item, Mapping) and item.keys() <= {"bytes", "path"} and item:
        return item.get("bytes") if item.get("bytes") is not None else item.get("path")
    if hasattr(item, "read") and not isinstance(item, np.ndarray):
        return item.read()
    return item


def _read_parts(modality: Modality, item: Any) -> dict[str, Part] | None:
    """The parts of a medium that is given as the contents of files; None: it is not."""
    roles = {**modality.required_parts, **modality.optional_parts}
    files = item if isinstance(item, Mapping) else {next(iter(roles)): item}
    if not files.keys() <= roles.keys():
        return None
    parts: dict[str, Part] = {}
    for role, content in files.items():
        if isinstance(content, str | os.PathLike) and not _is_data_url(content):
            path = _find_file(modality.name, content)
            parts[role] = Part(path.name.partition(".")[2].lower(), path.read_bytes())
        elif (data := read_bytes(modality.name, content)) is not None:
            parts[role] = Part(roles[role][0], data)  # the bytes decide how it is read
        else:
            return None
    missing = [role for role in modality.required_parts if role not in parts]
    if missing:
        raise UsageError(
            f"{modality.name} without its {', '.join(missing)}",
            f"it is read from {' and '.join(modality.required_parts)}.",
            "give a mapping: "
            + ", ".join(f"{role!r}: FILE" for role in modality.required_parts)
            + ".",
        )
    return parts


def read_bytes(name: str, content: Any) -> bytes | None:
    """The bytes of a file that is given as such, or as a `data:` URL; None: it is neither.

    Args:
        name: the modality, for the message.
        content: anything.

    Raises:
        UsageError: the URL has no data that could be decoded.
    """
    if isinstance(content, bytes | bytearray | memoryview):
        return bytes(content)
    if not _is_data_url(content):
        return None
    head, comma, data = str(content).partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        if head.endswith(";base64"):
            return base64.b64decode(data, validate=True)
        return unquote_to_bytes(data)
    except (ValueError, binascii.Error) as error:
        raise UsageError(
            f"{name}: its data: URL cannot be decoded: {error}",
            "it is not base64 as RFC 4648 has it.",
            "encode the file again: data:TYPE;base64,DATA.",
        ) from None


def _is_data_url(content: Any) -> bool:
    return isinstance(content, str) and content[: len(DATA_URL)].lower() == DATA_URL


def _find_file(name: str, item: str | os.PathLike[str]) -> Path:
    if "://" in str(item):
        raise UsageError(f"{name}: {item} is a URL", "nothing is fetched.", "download it first.")
    path = Path(item)
    if not path.is_file():
        raise UsageError(f"no file {path}", f"it was given as {name}.", "check the path.")
    return path


def _make_item_error(name: str, item: Any, why: str) -> UsageError:
    kind = type(item).__name__
    if isinstance(item, torch.Tensor | np.ndarray):
        kind = f"{kind} of {item.dtype} and shape {tuple(item.shape)}"
    return UsageError(
        f"a {kind} is not a medium of modality {name}: {why}",
        "the model would be given something else than it was trained on.",
        f"give a file's path or bytes, or a float tensor "
        f"{list(get_modality(name).value_shape)} that the modality's transform made; pictures also "
        "as PIL.Image or array, sounds as array with sampling_rate.",
    )


def stack_media(name: str, items: Sequence[Any], rate: float | None = None) -> torch.Tensor:
    """[B, *value_shape] of B media.

    Args:
        name: the modality.
        items: the media, in any form.
        rate: as of `read_medium`.

    Raises:
        UsageError: as of `read_medium`.
        SampleError: as of `read_medium`.
    """
    return torch.stack([read_medium(name, item, rate) for item in items])
