"""What `train.loss: dpo` cannot be combined with."""

from __future__ import annotations

from onellm_dist.config.train_sections import DPO, TrainSection


def check_pairs(
    train: TrainSection, *, pairs: bool, captions: bool, generates: bool, quantised: bool
) -> None:
    """Refuse what has no meaning, or is not built, with preference pairs.

    Args:
        train: the `train` section.
        pairs: whether samples are pairs (`data.preference_pairs`).
        captions: whether texts are captions (`data.text_format`).
        generates: whether validation generates answers (`data.validation.generate`).
        quantised: whether frozen weights are rounded (`engine.frozen_weights`).

    Raises:
        ValueError: a combination is refused.
    """
    section = train.preference
    if section is None:
        if train.dpo is not None:
            raise ValueError(f"train.dpo is read with train.loss=dpo alone, not {train.loss}")
        if pairs:
            raise ValueError("data.preference_pairs=true needs train.loss=dpo")
        return
    copies = section.reference == "copy"
    reasons = {
        f"train.loss={DPO} needs data.preference_pairs=true: it compares two answers": not pairs,
        "data.text_format=caption has no answers to compare; use conversation or chat": captions,
        "train.dpo.reference=adapter is the model without its adapters, and there is no "
        "train.lora; add it, or set train.dpo.reference=copy": not copies and train.lora is None,
        "train.dpo.reference=copy with train.lora: the model without its adapters is the "
        "reference already; set train.dpo.reference=adapter": copies and train.lora is not None,
        "train.dpo.reference=copy with engine.frozen_weights: the copy would be rounded, and the "
        "model that trains is not; set engine.frozen_weights=plain": copies and quantised,
        f"train.compile=blocks with train.loss={DPO}: compiled blocks have not been shown to give "
        "the same numbers with a reference; set train.compile=none": train.compile != "none",
        f"data.validation.generate with train.loss={DPO}: a pair has two answers; set it to "
        "0": generates,
    }
    for reason, is_wrong in reasons.items():
        if is_wrong:
            raise ValueError(reason)
