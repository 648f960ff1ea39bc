"""`train.compile=blocks` beside engines and recomputation: the same numbers, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import make_pack, relative, small_model
from stage_setup import make_groups
from torch.distributed import FileStore  # type: ignore[attr-defined]  # not in its __all__

from onellm_dist.common.errors import UsageError
from onellm_dist.config.load import load_config
from onellm_dist.config.train_sections import OptimSection
from onellm_dist.model.compiled_blocks import compile_blocks
from onellm_dist.model.model_kernels import set_kernels
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.engine.settings import EngineSettings, make_settings
from onellm_dist.train.optim.optimizers import make_optimizer

CPU = torch.device("cpu")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = FileStore(str(tmp_path / "ranks"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrap(model: Any) -> Any:
    description = get_engine("fsdp")
    section = load_config("toy/align_image", ["engine.name=fsdp", "engine.config="]).engine
    settings = EngineSettings(
        world_size=1,
        device=CPU,
        bf16=False,
        optimizer=make_optimizer(OptimSection(lr=1e-3)),
        grad_clip=1.0,
        options=description.read_options(section, world_size=1),
    )
    return description.load().wrap(model, make_groups(model, 0.0), settings)


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_an_engine_and_recomputation_stay_around_what_is_compiled(
    monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    """Traced as for inductor, but run by torch, which takes no compiler."""
    from torch._dynamo.utils import counters

    compile_eagerly = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    torch._dynamo.reset()
    norms: list[torch.Tensor] = []
    kept: list[int] = []
    saved: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.nbytes)
        return tensor

    for compiled in (False, True):
        model = small_model(modalities=("imu",))
        set_kernels(model, kernels, "cpu")
        if compiled:
            found = compile_blocks(model, "cpu")
            assert found == {"EncoderBlock": 2, "UPMBlock": 6, "LlamaDecoderLayer": 2}
            counters.clear()
        enable_activation_checkpointing(model, "full")
        engine = wrap(model)
        losses = []
        for seed in range(3):
            saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss, _, _ = engine.forward(make_pack([("imu",), ()], [7 + seed, 5]), last=True)
            engine.backward(loss, 10 + seed)
            losses.append(loss.detach())
            norms.append(torch.tensor([engine.grad_norms().total]))
            assert engine.step(1e-3)
        norms.append(torch.stack(losses))
        kept.append(sum(saved))
    assert counters["stats"]["unique_graphs"] > 0
    own, other = norms[: len(norms) // 2], norms[len(norms) // 2 :]
    assert all(relative(b, a) < 1e-6 for a, b in zip(own, other, strict=True))
    # Every block is recomputed: what is kept is that of blocks that are not compiled.
    assert kept[1] <= 1.05 * kept[0]


def test_what_cannot_be_compiled_is_refused() -> None:
    recipe, compiled = "toy/align_image", ["train.compile=blocks"]
    for keys in (["engine.config=zero2"], ["engine.name=fsdp", "engine.config="]):
        make_settings(load_config(recipe, [*compiled, *keys]), world_size=1, device=CPU)
    rounded = load_config(recipe, [*compiled, "engine.config=zero2", "engine.frozen_weights=int8"])
    with pytest.raises(UsageError, match=r"train\.compile=blocks with engine\.frozen_weights"):
        make_settings(rounded, world_size=1, device=CPU)
    zero3 = load_config(recipe, [*compiled, "engine.config=zero3"])
    with pytest.raises(UsageError, match=r"train\.compile=blocks under DeepSpeed ZeRO-3"):
        make_settings(zero3, world_size=1, device=CPU)
    with pytest.raises(UsageError, match=r"train\.compile=blocks with .*=selective"):
        load_config(recipe, [*compiled, "train.activation_checkpointing=selective"])
