"""Memory of each engine, as ratios: what a rank holds between steps, and its peaks.

    python benchmarks/engines.py                                   # 1 and 4 ranks, CPU, minutes
    python benchmarks/engines.py --engines zero3 fsdp --ranks 1 4 --json found.json

The model is a OneLLM in fp32 whose LLM of 36 million weights outweighs everything else. All
measures are growth of this process's anonymous memory over what it had before the model was built
(malloc returns what is freed: see `return_freed_memory`):

    load    peak while an `align` model is built (LLM frozen, random or read from files), over the
            bytes of the whole model
    state   held after a step of `tune` (the LLM trains): weights, optimizer state and what the
            engine keeps beside them; over the same at 1 rank, and over plain torch's weights and
            state (12 bytes per weight)
    peak    within the step, over plain torch's weights, gradients and state (16 bytes per weight)
    save    peak while a checkpoint is written that training waits for, over what the rank holds

Limit: at 4 ranks a rank holds at most 0.35 of the single rank's state under ZeRO-3. Times are in
engine_speed.py.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

LIMIT = 0.35
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's `mallopt` (malloc.h)."""
WIDTH, LAYERS, VOCABULARY, STEPS = 768, 5, 512, 3
_SMALL: dict[str, Any] = {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
_ZERO3: dict[str, Any] = {
    **_SMALL,
    "stage": 3,
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_live_parameters": 8_000_000,
    "stage3_max_reuse_distance": 1_000_000,
}
"""Buckets sized for the model, as the defaults are for a 7B."""
_CPU = {"device": "cpu"}
ENGINES: dict[str, dict[str, Any] | None] = {
    "zero1": {"zero_optimization": {**_SMALL, "stage": 1}},
    "zero2": {"zero_optimization": {**_SMALL, "stage": 2}},
    "zero3": {"zero_optimization": _ZERO3},
    "zero3_offload": {
        "zero_optimization": {**_ZERO3, "offload_optimizer": _CPU, "offload_param": _CPU}
    },
    "fsdp": None,
}
SHARDS_WEIGHTS = ("zero3", "zero3_offload", "fsdp")


def main() -> int:
    """Run every engine at every number of ranks and print a table.

    Returns:
        1 if the limit is missed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--json", type=Path, help="write what was measured there too")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.engines[0], arguments.steps)
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in arguments.engines}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in arguments.ranks:
            for name in arguments.engines:  # a launch each: DeepSpeed never lets go of an engine
                found[name][ranks] = launch(Path(folder) / f"{name}-{ranks}", ranks, name)
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    return report(found)


def report(found: dict[str, dict[int, dict[str, float]]]) -> int:
    """Print the table; return 1 if the limit is missed."""
    print(
        f"{'engine':>14} ranks  load/model  state/own at 1  state/plain  peak/plain  save/state"
        "  export/model"
    )
    missed = 0
    for name, by_ranks in found.items():
        one = by_ranks.get(1)
        for ranks, m in by_ranks.items():
            model, trained = m["model_bytes"], m["trained_weights"]
            own = m["state"] / one["state"] if one else float("nan")
            print(
                f"{name:>14} {ranks:>5}  {m['load'] / model:>10.3f}  {own:>14.3f}  "
                f"{m['state'] / (12 * trained):>11.3f}  {m['peak'] / (16 * trained):>10.3f}  "
                f"{m['save'] / m['state']:>10.3f}  {m['export'] / model:>12.3f}"
            )
            missed += name in SHARDS_WEIGHTS and ranks == 4 and own > LIMIT
    return int(missed > 0)


def return_freed_memory() -> None:
    """Make glibc return freed blocks of 64 kB and more.

    Otherwise a peak of the past looks like memory that is still held.
    """
    mallopt = ctypes.CDLL(None).mallopt
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        if not mallopt(option, 65536):
            raise RuntimeError("this C library has no thresholds of malloc")


def launch(out: Path, ranks: int, name: str) -> dict[str, float]:
    """Measure an engine; each figure is that of the rank that needed most."""
    from onellm_dist.launch.local import launch_local

    out.mkdir(parents=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    code = launch_local(
        [sys.executable, str(Path(__file__).resolve()), "--worker", str(out), "--engines", name],
        ranks,
        out / "logs",
    )
    if code:
        raise SystemExit(f"{name}: {ranks} ranks failed ({code}); see {out}/logs")
    found: dict[str, float] = json.loads((out / "found.json").read_text())
    return found


def worker(out: Path, name: str, steps: int) -> None:
    """Be one rank; never returns. With one step there is no peak within a later one."""
    from onellm_dist.launch.local import end_with_parent
    from onellm_dist.launch.ranks import discover_ranks
    from onellm_dist.train.distributed import join, leave

    end_with_parent()
    return_freed_memory()
    ranks = discover_ranks()
    assert ranks is not None
    dist = join(ranks)
    train_step(build(dist, name, "tune", tiny=True)[0], 0)  # imports, and what libraries make once
    own = {**measure_load(dist, name, out), **measure_steps(dist, name, out, steps)}
    found = {key: max(other[key] for other in dist.gather(own)) for key in own}
    if dist.is_rank_zero:
        (out / "found.json").write_text(json.dumps(found))
    leave()
    os._exit(0)


def measure_load(dist: Any, name: str, out: Path) -> dict[str, float]:
    """Peak growth while a mostly frozen model is drawn at random, exported, and read again."""
    from onellm_dist.train.export.model import write_weights

    with Peak() as drawn:
        engine, model_bytes = build(dist, name, "align", tiny=False)
    with Peak() as export:
        weights = engine.full_weights()
        if dist.is_rank_zero:
            shapes = {n: (shape, dtype) for n, shape, dtype in engine.full_weight_shapes()}
            write_weights(out, weights, shapes, file_bytes=60_000_000)
        for _ in weights:
            pass
    dist.barrier()
    del engine, weights
    gc.collect()
    with Peak() as read:
        build(dist, name, "align", tiny=False, folder=out)
    gc.collect()
    return {
        "load": max(drawn.growth, read.growth),
        "export": export.growth,
        "model_bytes": model_bytes,
    }


def measure_steps(dist: Any, name: str, out: Path, steps: int) -> dict[str, float]:
    """What is held after a step, the peak within one, and while a checkpoint is written."""
    from onellm_dist.train.checkpoint.writer import save_state

    before = anonymous()
    engine, _ = build(dist, name, "tune", tiny=False)
    train_step(engine, 0)
    gc.collect()
    state = anonymous() - before
    with Peak(before) as peak:
        for step in range(1, steps):
            dist.barrier()
            train_step(engine, step)
    gc.collect()
    with Peak() as save:
        save_state(out / "checkpoint", engine, dist, {"steps_done": steps})
    trained = sum(dist.gather(sum(r.length for r in engine.ranges())))
    return {"state": state, "peak": peak.growth, "save": save.growth, "trained_weights": trained}


def build(
    dist: Any, name: str, stage: str, *, tiny: bool, folder: Path | None = None
) -> tuple[Any, int]:
    """Return (engine, bytes of the whole model in fp32)."""
    import torch

    from onellm_dist.config.train_sections import OptimSection, TrainSection
    from onellm_dist.model.weights.lazy import (
        InitialWeights,
        RandomWeights,
        SafetensorsWeights,
        build_empty_model,
        find_weight_files,
    )
    from onellm_dist.train.engine.fsdp.description import FsdpOptions
    from onellm_dist.train.engine.select import get_engine
    from onellm_dist.train.engine.settings import EngineSettings
    from onellm_dist.train.optim.groups import build_parameter_groups
    from onellm_dist.train.optim.optimizers import make_optimizer
    from onellm_dist.train.optim.rules import prepare_parameters

    torch.set_num_threads(1)
    model = build_empty_model(config(tiny))
    train = TrainSection(stage=stage, steps=1)
    plan = prepare_parameters(model, train, OptimSection(lr=1e-4), ["image"])
    groups = [group.to_torch() for group in build_parameter_groups(model, plan.rates)]
    model.train()
    weights = InitialWeights(
        RandomWeights(model, 0) if folder is None else SafetensorsWeights(find_weight_files(folder))
    )
    size = sum(4 * p.numel() for p in model.parameters())
    given = ENGINES[name]
    settings = EngineSettings(
        world_size=dist.world_size,
        device=dist.device,
        bf16=False,
        optimizer=make_optimizer(OptimSection(lr=1e-4)),
        grad_clip=1.0,
        options=FsdpOptions() if given is None else json.loads(json.dumps(given)),
    )
    engine = get_engine("fsdp" if given is None else "deepspeed").load()
    return engine.wrap(model, groups, settings, weights), size


def config(tiny: bool) -> Any:
    """The model's configuration; the tiny one has the same parts."""
    from transformers import LlamaConfig

    from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig, OneLLMVisionConfig

    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48 if tiny else WIDTH,
        intermediate_size=96 if tiny else 8 * WIDTH // 3,
        num_hidden_layers=1 if tiny else LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    return OneLLMConfig(
        vision=OneLLMVisionConfig(width=32, layers=1, heads=2, patch_size=56, output_dim=16),
        upm=OneLLMUPMConfig(experts=1, blocks=1, heads=2, ffn=64, router_hidden=32),
        text_config=text,
        modalities=("image",),
    )


def train_step(engine: Any, step: int) -> None:
    """Train on two texts and an image in one pack."""
    loss, _, _ = engine.forward(make_pack(step, 64), last=True)
    engine.backward(loss, 62)
    assert engine.step(1e-4)


def make_pack(number: int, tokens: int) -> Any:
    """Pack two texts of `tokens` in all, with an image before the first."""
    import torch

    from onellm_dist.packed import IGNORE, PackedBatch

    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, VOCABULARY, (tokens,), generator=generator)
    labels = ids.clone()
    labels[:: tokens // 2] = IGNORE
    values = {"image": torch.randn((1, 3, 224, 224), generator=generator)}
    return PackedBatch(ids, labels, (tokens // 2,) * 2, (("image",), ()), values, torch.ones(2))


class Peak(AbstractContextManager["Peak"]):
    """The largest growth of anonymous memory within the context, sampled every 2 ms.

    Args:
        base: growth is counted from here; default: what there is at the start.
    """

    def __init__(self, base: int | None = None) -> None:
        self._base = anonymous() if base is None else base
        self.growth = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.growth = max(self.growth, anonymous() - self._base)


def anonymous() -> int:
    """Bytes of this process's anonymous resident memory, without pages of files and libraries."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


if __name__ == "__main__":
    sys.exit(main())
