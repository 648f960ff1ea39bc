"""Losses found by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packs import make_pack, small_model

from onellm_dist.common.errors import UsageError
from onellm_dist.model.losses.registry import DEFAULT_LOSS, get_loss, list_losses, register_loss


def test_cross_entropy_is_the_default() -> None:
    logits, targets = torch.randn(5, 7), torch.arange(5)
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert DEFAULT_LOSS in list_losses()
    assert torch.equal(get_loss(DEFAULT_LOSS)(logits, targets), expected)
    model, pack = small_model(), make_pack([("imu",), ()], [6, 4])
    before = model(packed=pack).loss
    model.set_loss(DEFAULT_LOSS)
    assert torch.equal(model(packed=pack).loss, before)


def test_a_loss_of_a_module_outside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss costs one function: the model calls it on the supervised tokens alone."""
    (tmp_path / "own_loss.py").write_text(
        "def count(logits, targets):\n    return logits.float().sum(-1) * 0 + 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model, pack = small_model(), make_pack([("imu",), ()], [6, 4])
    model.set_loss("own_loss:count")
    output = model(packed=pack)
    assert output.loss.item() == 8
    assert output.nll.tolist() == [1.0] * 8
    sys.modules.pop("own_loss")


@pytest.mark.parametrize("name", ["mean", "no_module:loss", "math:no_function"])
def test_an_unknown_loss_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        get_loss(name)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register_loss(DEFAULT_LOSS)(lambda logits, targets: logits[:, 0])
