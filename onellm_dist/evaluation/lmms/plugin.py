"""What lmms-eval's registry loads: which class is which model."""

from __future__ import annotations

from typing import Any


def describe_model() -> Any:
    """The manifest of the model `onellm` (lmms-eval 0.7)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="onellm", chat_class_path="onellm_dist.evaluation.lmms.model.LmmsModel"
    )
