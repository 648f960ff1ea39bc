"""What the host needs for a micro-batch by engine: CPU time and ATen calls, before and after.

    python benchmarks/host_time.py                   # twelve processes, about four minutes
    python benchmarks/host_time.py --engines plain fsdp --json found.json

The model has the layers of onellm-7b (24 blocks in the encoder, 3 x 8 in the UPM, 32 in the LLM) at
tiny widths and one short sample, so that a micro-batch of stage I costs next to nothing but calls.
`before` is 0.1.0 as far as options bring it back: every linear layer of ZeRO-3 gathered alone,
DeepSpeed's hooks as they are, frozen weights of FSDP2 sharded, plain kernels, and every pass
through the encoder. `after`: blocks gathered as one (`leaf_module`), quicker hooks
(`quicken_hooks`), frozen weights resident, fused kernels, and no pass that a run never needs. What
has no option (fewer views around attention, say) is in both. Each figure is the least CPU time of a
forward, or of a backward, in 30 rounds: what else runs on the machine, or on its host, only adds to
it. Each state is measured twice, in the order before, after, after, before. A GPU computes
meanwhile, so that the host must not take longer.

Fused kernels are Python functions on a CPU, which a GPU runs compiled: their calls count as one
each. One rank alone has no one to wait for: with several, collectives cost more, before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENGINES = ("plain", "fsdp", "zero3")
LIMITS = {"zero3": 0.55, "fsdp": 0.70}
"""CPU time after over before."""
CALLS_LIMIT = 0.70
"""ATen calls after over before, without an engine."""
CLOUDS_LIMIT_MS = 0.2
ROUNDS, TEXT, WIDTH = 15, 17, 32
LAYERS = {"encoder": 24, "expert": 8, "llm": 32}
"""Those of onellm-7b, whose UPM has three experts."""


def main() -> int:
    """Measure, print a table, and return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument(
        "--kernels", default="fused", choices=("fused", "plain"), help="those of `after`"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, state, out = arguments.worker
        changed, own = state == "after", Path(out).parent
        measured = measure(name, changed=changed, folder=own, kernels=arguments.kernels)
        Path(out).write_text(json.dumps(measured))
        return 0
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.engines:
            turns: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
            for turn, state in enumerate(("before", "after", "after", "before")):
                # A process each: DeepSpeed never lets go.
                out = Path(folder) / f"{name}-{turn}" / f"{state}.json"
                out.parent.mkdir()  # ranks meet there
                command = [sys.executable, __file__, "--kernels", arguments.kernels]
                command += ["--worker", name, state, str(out)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                turns[state].append(json.loads(out.read_text()))
            found[name] = {state: summarise(measured) for state, measured in turns.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    return report(found)


def summarise(turns: list[dict[str, Any]]) -> dict[str, float]:
    """The least of the rounds of all turns, and their medians."""
    found: dict[str, float] = {"calls": turns[0]["calls"]}
    for key in ("forward_ms", "backward_ms", "clouds_ms"):
        rounds = [value for turn in turns for value in turn[key]]
        found |= {key: min(rounds), f"median_{key}": statistics.median(rounds)}
    return found


def report(found: dict[str, dict[str, dict[str, float]]]) -> int:
    """Print the table; return 1 if a limit is missed."""
    print(f"{'':8} {'forward + backward, CPU ms':>34} {'':>6}  {'ATen calls':>16} {'':>6}")
    missed = []
    for name, states in found.items():
        before, after = states["before"], states["after"]
        times = [s["forward_ms"] + s["backward_ms"] for s in (before, after)]
        calls = [s["calls"] for s in (before, after)]
        parts = [f"{s['forward_ms']:.0f} + {s['backward_ms']:.0f}" for s in (before, after)]
        print(
            f"{name:8} {parts[0]:>15} -> {parts[1]:>15} {times[1] / times[0]:6.2f}  "
            f"{calls[0]:6.0f} -> {calls[1]:6.0f} {calls[1] / calls[0]:6.2f}"
        )
        medians = [s["median_forward_ms"] + s["median_backward_ms"] for s in (before, after)]
        print(f"{'':8} {'of medians':>34} {medians[1] / medians[0]:6.2f}")
        if times[1] / times[0] > LIMITS.get(name, 1.0):
            missed.append(f"{name}: time")
        if name == "plain" and calls[1] / calls[0] > CALLS_LIMIT:
            missed.append("calls")
        if after["clouds_ms"] > CLOUDS_LIMIT_MS:
            missed.append(f"{name}: empty clouds")
    clouds = min(states["after"]["clouds_ms"] for states in found.values())
    print(f"no clouds in a micro-batch: {clouds:.3f} ms of the point tokenizer")
    print(
        f"limits: time {LIMITS}, calls {CALLS_LIMIT} (plain), empty clouds {CLOUDS_LIMIT_MS} ms: "
        + (f"MISSED: {', '.join(missed)}" if missed else "met")
    )
    return 1 if missed else 0


def measure(name: str, *, changed: bool, folder: Path, kernels: str = "fused") -> dict[str, Any]:
    """Measure an engine in this process, alone as rank 0 of 1; all rounds.

    Args:
        name: of the engine; `plain`: none.
        changed: whether what makes the host faster is on.
        kernels: `train.kernels` where it is on.
        folder: for the file in which ranks meet.
    """
    import torch

    torch.set_num_threads(1)
    forward, backward = build(name, changed=changed, folder=folder, kernels=kernels)
    backward(forward(make_pack(0)))  # buffers, traces of ZeRO-3
    calls = count_calls(lambda: backward(forward(make_pack(1))))
    forwards, backwards = [], []
    for number in range(ROUNDS):
        batch = make_pack(2 + number)
        started = time.process_time()
        loss = forward(batch)
        middle = time.process_time()
        backward(loss)
        forwards.append(1000 * (middle - started))
        backwards.append(1000 * (time.process_time() - middle))
    return {
        "forward_ms": forwards,
        "backward_ms": backwards,
        "calls": calls,
        "clouds_ms": time_empty_clouds(),
    }


def count_calls(run: Callable[[], Any]) -> int:
    """Operations of torch that a function calls, those of its backward included."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation
            self.calls = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counter = Counter()
    with counter:
        run()
    return counter.calls


def time_empty_clouds() -> list[float]:
    """CPU milliseconds of the point tokenizer, forward and backward, in packs without clouds."""
    import torch

    from onellm_dist.modalities import get_modality
    from onellm_dist.modalities.point import PointTokenizer

    empty = torch.zeros((0, *get_modality("point").value_shape))
    tokenizer, times = PointTokenizer(WIDTH), []
    for _ in range(50):
        started = time.process_time()
        tokenizer(empty).sum().backward()
        times.append(1000 * (time.process_time() - started))
    return times


def make_config() -> Any:
    """The layers of onellm-7b at tiny widths."""
    from transformers import LlamaConfig

    from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig, OneLLMVisionConfig

    return OneLLMConfig(
        vision=OneLLMVisionConfig(width=WIDTH, layers=LAYERS["encoder"], heads=2, output_dim=16),
        upm=OneLLMUPMConfig(
            experts=3, blocks=LAYERS["expert"], heads=2, ffn=2 * WIDTH, router_hidden=WIDTH
        ),
        text_config=LlamaConfig(
            vocab_size=97,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS["llm"],
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        ),
    )


def make_pack(number: int) -> Any:
    """One picture with its caption."""
    import torch

    from onellm_dist.modalities import all_modalities
    from onellm_dist.packed import IGNORE, PackedBatch

    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 97, (TEXT,), generator=generator)
    labels = ids.clone()
    labels[0] = IGNORE
    values = {
        name: torch.zeros(
            (int(name == "image"), *modality.value_shape), dtype=modality.loader_dtype
        )
        for name, modality in all_modalities().items()
    }
    return PackedBatch(
        ids,
        labels,
        (TEXT,),
        (("image",),),
        values,
        torch.ones(1),
        supervised=(labels != IGNORE).nonzero().squeeze(1),
    )


def build(
    name: str, *, changed: bool, folder: Path, kernels: str
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward of a pack to its loss, and the backward of that.

    Args:
        name: as of `measure`.
        changed: as of `measure`.
        folder: as of `measure`.
        kernels: as of `measure`.
    """
    from onellm_dist.config.train_sections import OptimSection, TrainSection
    from onellm_dist.model.initialisation import initialise
    from onellm_dist.model.modality_tokens import find_idle_passes
    from onellm_dist.model.model_kernels import set_kernels
    from onellm_dist.model.onellm import OneLLMForConditionalGeneration
    from onellm_dist.model.weights.lazy import InitialWeights, RandomWeights, build_empty_model
    from onellm_dist.train.optim.groups import build_parameter_groups
    from onellm_dist.train.optim.rules import prepare_parameters

    if name == "plain":
        model = OneLLMForConditionalGeneration(make_config())
        initialise(model, 0)
    else:
        model = build_empty_model(make_config())
    plan = prepare_parameters(
        model, TrainSection(stage="align", steps=1), OptimSection(lr=1e-4), ["image"]
    )
    if changed:
        model.idle_passes = find_idle_passes(model, {"image"})
        set_kernels(model, kernels, "cpu")
    model.train()
    if name == "plain":
        return (lambda batch: model(packed=batch).loss), (lambda loss: loss.backward())
    groups = [group.to_torch() for group in build_parameter_groups(model, plan.rates)]
    weights = InitialWeights(RandomWeights(model, 0))
    engine = wrap(name, model, groups, weights, changed=changed, folder=folder)
    return (
        lambda batch: engine.forward(batch, last=True)[0],
        lambda loss: engine.backward(loss, TEXT - 1),
    )


def wrap(name: str, model: Any, groups: Any, weights: Any, *, changed: bool, folder: Path) -> Any:
    """Shard the model over this one rank."""
    import torch
    from torch.distributed import FileStore  # type: ignore[attr-defined]  # not in its __all__

    from onellm_dist.config.schema import EngineSection
    from onellm_dist.config.train_sections import OptimSection
    from onellm_dist.train.engine.deepspeed import engine as deepspeed_engine
    from onellm_dist.train.engine.select import get_engine
    from onellm_dist.train.engine.settings import EngineSettings
    from onellm_dist.train.optim.optimizers import make_optimizer

    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    store = FileStore(str(folder / f"{name}-{changed}.ranks"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    section = EngineSection(
        name="fsdp" if name == "fsdp" else "deepspeed",
        config=None if name == "fsdp" else Path("zero3_leaves" if changed else "zero3"),
    )
    description = get_engine(section.name)
    if not changed:
        vars(deepspeed_engine)["quicken_hooks"] = lambda model: None
    settings = EngineSettings(
        world_size=1,
        device=torch.device("cpu"),
        bf16=False,
        optimizer=make_optimizer(OptimSection(lr=1e-4)),
        grad_clip=1.0,
        options=description.read_options(section, world_size=1),
        frozen_resident=name == "fsdp" and changed,
    )
    return description.load().wrap(model, groups, settings, weights)


if __name__ == "__main__":
    sys.exit(main())
