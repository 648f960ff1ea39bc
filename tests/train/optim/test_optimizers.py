"""Optimizers and schedules by name: what a recipe may say, and what one more costs: one file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_states import gather_full_state
from stage_setup import make_groups
from torch import distributed as dist

from onellm_dist.common import plugins
from onellm_dist.common.errors import UsageError
from onellm_dist.config.train_sections import OptimSection
from onellm_dist.train.checkpoint.state import check_optimizer
from onellm_dist.train.optim import components, optimizers, schedules
from onellm_dist.train.optim.components.sgd import Sgd
from onellm_dist.train.optim.optimizers import all_optimizers, check_optim, make_optimizer

SIGNUM = '''
"""Signum (arXiv 1802.04434)."""

import torch
from onellm_dist.train.optim.base import OptimizerComponent


class TorchSignum(torch.optim.Optimizer):
    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p]["momentum"]
                momentum.mul_(0.9).add_(p.grad, alpha=0.1)
                p -= group["lr"] * (momentum.sign() + group["weight_decay"] * p)


class Signum(OptimizerComponent):
    name = "signum"
    state_keys = ("momentum",)

    def build(self, groups):
        return TorchSignum(list(groups))


OPTIMIZER = Signum
'''


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(optimizers, "_REGISTERED", {})
    monkeypatch.setattr(schedules, "_SCHEDULES", dict(schedules._SCHEDULES))
    optimizers._load_components.cache_clear()
    yield
    optimizers._load_components.cache_clear()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_the_package_has_adamw_lion_and_sgd() -> None:
    assert list(all_optimizers()) == ["adamw", "lion", "sgd"]
    assert make_optimizer(OptimSection(lr=1.0)).state_keys == ("exp_avg", "exp_avg_sq")
    assert make_optimizer(OptimSection(lr=1.0, name="sgd")).state_keys == ("momentum_buffer",)
    assert make_optimizer(OptimSection(lr=1.0, name="lion")).state_keys == ("exp_avg",)
    without = OptimSection(lr=1.0, name="sgd", options={"momentum": 0})
    assert make_optimizer(without).state_keys == ()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "adam"}, "unknown optimizer(.|\n)*adamw, lion, sgd"),
        ({"schedule": "step"}, "unknown schedule(.|\n)*constant, cosine, linear, wsd"),
        ({"decay_from": 5}, "optim.decay_from=5 is read by optim.schedule=wsd alone"),
        ({"schedule": "wsd", "warmup_steps": 9, "decay_from": 8}, "before the end of the warm-up"),
        ({"schedule": "wsd", "decay_from": 20}, "not below train.steps=20"),
        ({"schedule": "wsd", "decay_from": 9, "decay_steps": 9}, "not below optim.decay_steps=9"),
        ({"name": "lion", "betas": (0.8, 0.9)}, "optim.betas is not read by optim.name=lion"),
        ({"name": "sgd", "betas": (0.8, 0.9)}, "optim.betas is not read by optim.name=sgd"),
        ({"name": "sgd", "options": {"momentum": 2}}, "momentum: .*less than 1"),
        ({"name": "sgd", "options": {"dampening": 0.1}}, "dampening(.|\n)*momentum, nesterov"),
        ({"options": {"momentum": 0.9}}, "optim.options of optim.name=adamw"),
    ],
)
def test_a_wrong_section_is_refused_before_ranks_start(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_optim(OptimSection(lr=1.0, **keys), steps=20)


def test_checking_a_recipe_needs_no_torch() -> None:
    """The launching process refuses a wrong recipe in well under a second."""
    import subprocess

    code = (
        "import sys\n"
        "from onellm_dist.config.schema import EngineSection\n"
        "from onellm_dist.config.train_sections import OptimSection\n"
        "from onellm_dist.train.engine.select import all_engines\n"
        "from onellm_dist.train.optim.optimizers import check_optim\n"
        "check_optim(OptimSection(lr=1.0))\n"
        "for name, engine in all_engines().items():\n"
        "    engine.check(EngineSection(name=name), bf16=True)\n"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_optimizer_of_the_package_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None
) -> None:
    (tmp_path / "signum.py").write_text(SIGNUM)
    monkeypatch.setattr(components, "__path__", [*components.__path__, str(tmp_path)])
    assert list(all_optimizers()) == ["adamw", "lion", "sgd", "signum"]
    train_and_resume(tmp_path / "checkpoint", OptimSection(lr=1e-2, name="signum"))
    monkeypatch.delitem(sys.modules, f"{components.__name__}.signum")


def test_an_optimizer_of_another_package_is_one_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other_package.py").write_text(SIGNUM)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("signum", "other_package:Signum", plugins.OPTIMIZERS)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    assert make_optimizer(OptimSection(lr=1.0, name="signum")).state_keys == ("momentum",)
    monkeypatch.delitem(sys.modules, "other_package")


def test_two_optimizers_of_one_name_are_refused() -> None:
    all_optimizers()

    class Other(Sgd):
        """Another optimizer of the same name."""

    with pytest.raises(UsageError, match="two optimizers are named sgd"):
        optimizers.register_optimizer(Other)


def test_a_schedule_is_one_function() -> None:
    @schedules.register_schedule("falling")
    def falling_rate(optim: OptimSection, step: int, end: int) -> float:
        return optim.lr * (1 - schedules.compute_progress(step, optim.warmup_steps, end))

    section = OptimSection(lr=1.0, schedule="falling", warmup_steps=2)
    check_optim(section)
    rates = [schedules.compute_learning_rate(step, section, 6) for step in range(6)]
    assert rates == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    adamw = make_optimizer(OptimSection(lr=1.0))
    sgd = make_optimizer(OptimSection(lr=1.0, name="sgd"))
    plain = make_optimizer(OptimSection(lr=1.0, name="sgd", options={"momentum": 0}))
    check_optimizer(tmp_path, {}, adamw)  # 0.1.0 wrote no name
    check_optimizer(tmp_path, {"optimizer": sgd.describe()}, sgd)
    with pytest.raises(UsageError, match=r"optim.name=adamw .*this run has optim.name=sgd"):
        check_optimizer(tmp_path, {}, sgd)
    with pytest.raises(UsageError, match=r"momentum_buffer\), .*state: none"):
        check_optimizer(tmp_path, {"optimizer": sgd.describe()}, plain)


def train_and_resume(folder: Path, optim: OptimSection) -> None:
    """Train four steps under FSDP2; two that resume after the second give the same weights."""
    from small_model import SmallModel, pack, sample, supervised

    from onellm_dist.train.checkpoint.state import load_state
    from onellm_dist.train.checkpoint.writer import save_state
    from onellm_dist.train.distributed import Distributed
    from onellm_dist.train.engine.base import Engine
    from onellm_dist.train.engine.fsdp.description import FsdpOptions
    from onellm_dist.train.engine.select import get_engine
    from onellm_dist.train.engine.settings import EngineSettings

    ranks = Distributed(0, 1, 1, torch.device("cpu"))

    def build() -> Engine:
        torch.manual_seed(0)
        model = SmallModel()
        settings = EngineSettings(
            world_size=1,
            device=ranks.device,
            bf16=False,
            optimizer=make_optimizer(optim),
            grad_clip=1.0,
            options=FsdpOptions(),
        )
        return get_engine("fsdp").load().wrap(model, make_groups(model, 0.1), settings)

    def train(engine: Engine, steps: range) -> dict[str, torch.Tensor]:
        for step in steps:
            batch = pack([sample(step, ("a",)), sample(step + 10, ("b",))])
            loss, _, _ = engine.forward(batch, last=True)
            engine.backward(loss, supervised(batch))
            assert engine.step(optim.lr)
        return gather_full_state(engine)

    engine = build()
    train(engine, range(2))
    save_state(folder, engine, ranks, {"steps_done": 2})
    straight = train(engine, range(2, 4))
    resumed = build()
    load_state(folder, resumed, ranks)
    assert resumed.optimizer_steps == 2
    again = train(resumed, range(2, 4))
    assert all(torch.equal(straight[name], again[name]) for name in straight)
