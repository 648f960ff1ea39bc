"""A distributed trainer for OneLLM: one multimodal LLM for eight modalities (arXiv 2312.03700).

The names below are loaded when they are first used: `import onellm_dist` alone imports no other
library.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()]:
    # `python -m onellm_dist...` (the deepspeed launcher, torchrun): Python has put the working
    # directory before its own library, where a random.py of the user's would be found first.
    sys.path.append(sys.path.pop(0))

if TYPE_CHECKING:
    from onellm_dist.config.load import load_config
    from onellm_dist.config.schema import RunConfig
    from onellm_dist.data.corpus import Corpus
    from onellm_dist.data.loader import Loader
    from onellm_dist.data.plan import Plan
    from onellm_dist.model.configuration import OneLLMConfig
    from onellm_dist.model.onellm import OneLLMForConditionalGeneration
    from onellm_dist.model.processing.processor import OneLLMProcessor
    from onellm_dist.shards import as_webdataset, build_dataset, open_dataset
    from onellm_dist.train.callbacks.base import Callback
    from onellm_dist.train.records.metrics import Metric
    from onellm_dist.train.state import Outcome
    from onellm_dist.train.trainer import Trainer

    __version__: str

_HOMES = {
    "Callback": "onellm_dist.train.callbacks.base",
    "Corpus": "onellm_dist.data.corpus",
    "Loader": "onellm_dist.data.loader",
    "Metric": "onellm_dist.train.records.metrics",
    "OneLLMConfig": "onellm_dist.model.configuration",
    "OneLLMForConditionalGeneration": "onellm_dist.model.onellm",
    "OneLLMProcessor": "onellm_dist.model.processing.processor",
    "Outcome": "onellm_dist.train.state",
    "Plan": "onellm_dist.data.plan",
    "RunConfig": "onellm_dist.config.schema",
    "Trainer": "onellm_dist.train.trainer",
    "as_webdataset": "onellm_dist.shards",
    "build_dataset": "onellm_dist.shards",
    "load_config": "onellm_dist.config.load",
    "open_dataset": "onellm_dist.shards",
}
"""Public name to the module that defines it."""

__all__ = [
    "Callback",
    "Corpus",
    "Loader",
    "Metric",
    "OneLLMConfig",
    "OneLLMForConditionalGeneration",
    "OneLLMProcessor",
    "Outcome",
    "Plan",
    "RunConfig",
    "Trainer",
    "__version__",
    "as_webdataset",
    "build_dataset",
    "load_config",
    "open_dataset",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _find_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _find_version() -> str:
    """Return the version of the installed package; setup.cfg is where it is written down."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("onellm-dist")
    except PackageNotFoundError:
        return "not installed"
