"""Time of an optimizer step by engine, over plain torch on the same cores at the same moment.

    python benchmarks/engine_speed.py                     # every engine at 1 and 4 ranks, ten min
    python benchmarks/engine_speed.py --engines zero3 fsdp --ranks 2 --json found.json

Every rank has two models: one under the engine, and a whole one that plain torch trains on the
same packs, alone, with the same AdamW and no communication. Their steps take turns, so both meet
the same load of the machine. The figure is the median of the ratios of neighbouring steps, with
its quartiles. 1 would be an engine that costs nothing; below 1 is possible, since an engine steps
a share of the optimizer only.

The model is that of engines.py (36 million weights, fp32, `tune`: the LLM trains). `--tokens` per
pack decide how much there is to compute for each byte that is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import ENGINES, build, config, make_pack

PAIRS = 9
TOKENS = 512


def main() -> int:
    """Run every engine at every number of ranks and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 4])
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help=f"in a rank's pack (default {TOKENS})"
    )
    parser.add_argument("--json", type=Path, help="write the ratios there too")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.engines[0], arguments.tokens)
    found: dict[str, dict[int, list[float]]] = {name: {} for name in arguments.engines}
    print(f"{'engine':>14} ranks  step/plain  (quartiles)  plain s")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in arguments.ranks:
            for name in arguments.engines:  # a launch each: DeepSpeed never lets go of an engine
                ratios, plain = launch(
                    Path(folder) / f"{name}-{ranks}", ranks, name, arguments.tokens
                )
                found[name][ranks] = ratios
                low, middle, high = statistics.quantiles(ratios, n=4)
                print(
                    f"{name:>14} {ranks:>5}  {middle:>10.2f}  {low:.2f} to {high:.2f}  "
                    f"{plain:>7.2f}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    return 0


def launch(out: Path, ranks: int, name: str, tokens: int) -> tuple[list[float], float]:
    """Return ratios of neighbouring steps and the median seconds of plain torch's, of rank 0."""
    from onellm_dist.launch.local import launch_local

    out.mkdir(parents=True)
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--worker",
        str(out),
        "--engines",
        name,
        "--tokens",
        str(tokens),
    ]
    code = launch_local(command, ranks, out / "logs")
    if code:
        raise SystemExit(f"{name}: {ranks} ranks failed ({code}); see {out}/logs")
    pairs: list[tuple[float, float]] = json.loads((out / "found.json").read_text())
    return [own / plain for own, plain in pairs], statistics.median(plain for _, plain in pairs)


def worker(out: Path, name: str, tokens: int) -> None:
    """Be one rank; never returns."""
    import torch

    from onellm_dist.launch.local import end_with_parent
    from onellm_dist.launch.ranks import discover_ranks
    from onellm_dist.train.distributed import join, leave

    end_with_parent()
    ranks = discover_ranks()
    assert ranks is not None
    torch.set_num_threads(1)
    dist = join(ranks)
    engine, _ = build(dist, name, "tune", tiny=False)
    plain = plain_step()

    def own(batch: Any) -> None:
        loss, _, _ = engine.forward(batch, last=True)
        engine.backward(loss, tokens * dist.world_size)
        assert engine.step(1e-4)

    def seconds(step: Callable[[Any], None], batch: Any) -> float:
        dist.barrier()
        started = time.perf_counter()
        step(batch)
        dist.barrier()
        return time.perf_counter() - started

    pairs = []
    for number in range(PAIRS + 1):
        batch = make_pack(number * dist.world_size + dist.rank, tokens)
        pairs.append((seconds(own, batch), seconds(plain, batch)))
    if dist.is_rank_zero:
        (out / "found.json").write_text(json.dumps(pairs[1:]))  # the first makes buffers
    leave()
    os._exit(0)


def plain_step() -> Callable[[Any], None]:
    """Build a step of plain torch over a whole model of this rank's own."""
    import torch

    from onellm_dist.config.train_sections import OptimSection, TrainSection
    from onellm_dist.model.initialisation import initialise
    from onellm_dist.model.onellm import OneLLMForConditionalGeneration
    from onellm_dist.train.optim.groups import build_parameter_groups
    from onellm_dist.train.optim.rules import prepare_parameters

    model = OneLLMForConditionalGeneration(config(tiny=False))
    initialise(model, 0)
    train = TrainSection(stage="tune", steps=1)
    plan = prepare_parameters(model, train, OptimSection(lr=1e-4), ["image"])
    groups = [group.to_torch() for group in build_parameter_groups(model, plan.rates)]
    model.train()
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        (model(packed=batch).loss / len(batch.input_ids)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    sys.exit(main())
