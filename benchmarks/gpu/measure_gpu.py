"""One GPU for eight minutes: what our step costs on it, against a ceiling and the reference's step.

    python benchmarks/gpu/measure_gpu.py --out measured               # on the GPU
    python benchmarks/gpu/measure_gpu.py --tiny --out measured        # the same code on a CPU

Sections run in the order of their worth. Each figure is printed at once, and is in
`measured/figures.json` and `measured/page.html` from then on: a run that is cut off keeps what it
has. Weights and media are random; the texts are as long as LAION's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from gpu_engines import measure_engines
from gpu_kernels import measure_kernels
from gpu_record import Record, free_memory
from gpu_steps import (
    measure_ceilings,
    measure_new_shapes,
    measure_reference,
    measure_remedies,
    measure_stage1,
    measure_stages,
)
from gpu_workload import Workload

from onellm_dist.common.errors import OneLLMError
from onellm_dist.planner.hardware import find_gpus_here

BUDGET = 480.0
IMAGES = 107
Section = Callable[[Record, Workload], None]
SECTIONS: dict[str, tuple[float, Section]] = {
    "ceilings": (10, measure_ceilings),
    "stage1": (45, measure_stage1),
    "reference": (30, measure_reference),
    "stages": (60, measure_stages),
    "remedies": (80, measure_remedies),
    "kernels": (30, measure_kernels),
    "engines": (100, measure_engines),
    "new_shapes": (15, measure_new_shapes),
}
"""Name -> (seconds below which it is left out, what it measures)."""


def main() -> int:
    """Run the sections that are asked for, as long as there is time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("measured"))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds (default 480)")
    parser.add_argument(
        "--images", type=int, help=f"in a micro-batch of stage I (default {IMAGES})"
    )
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="the toy model on few samples")
    given = parser.parse_args()
    record = Record(given.out, given.budget)
    work = Workload(given.tiny, given.images or (4 if given.tiny else IMAGES))
    predicting = start_prediction(record, work)
    failed = 0
    try:
        for name in given.only:
            need, section = SECTIONS[name]
            if record.left < need * (0.05 if given.tiny else 0.5):
                print(f"{name}: left out, {record.left:.0f} s are left", flush=True)
                continue
            failed += run_section(record, work, name, section)
        compare(record, predicting)
    finally:
        predicting.kill()
        predicting.wait()
    record.add("done", seconds=record.seconds, failed_sections=failed)
    return int(failed > 0)


def run_section(record: Record, work: Workload, name: str, section: Section) -> bool:
    """Measure a section and return if it failed: a failure is recorded, and the others continue."""
    try:
        section(record, work)
    except Exception as error:  # a figure less, and not all that follow
        traceback.print_exc()
        record.add(f"failed: {name}", error=f"{type(error).__name__}: {error}"[:300])
        return True
    finally:
        free_memory()
    return False


def start_prediction(record: Record, work: Workload) -> subprocess.Popen[bytes]:
    """Let the planner count beside the measurement."""
    try:
        gpu = find_gpus_here()[0].kind
    except OneLLMError:
        gpu = "h100"
    script = Path(__file__).with_name("predict_gpu.py")
    command = [sys.executable, str(script), "--out", str(record.out / "predicted.json")]
    command += ["--gpu", gpu, "--images", str(work.images), *(["--tiny"] if work.tiny else [])]
    return subprocess.Popen(command)


def compare(record: Record, predicting: subprocess.Popen[bytes]) -> None:
    """Put outcomes beside what the planner says."""
    try:
        predicting.wait(timeout=max(1.0, record.left))
    except subprocess.TimeoutExpired:
        print("the prediction is not done: some stages are left out", flush=True)
    file = record.out / "predicted.json"
    predicted: Mapping[str, Mapping[str, float]] = (
        json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    )
    for name, said in predicted.items():
        found = record.figures.get(name, {})
        if "samples_per_s" not in found:
            continue
        record.add(
            f"predicted and measured: {name}",
            samples_per_s_predicted=said["samples_per_s"],
            samples_per_s=found["samples_per_s"],
            samples_per_s_ratio=found["samples_per_s"] / said["samples_per_s"],
            peak_gib_predicted=said["peak_gib"],
            peak_gib=found["peak_gib"],
            mfu=said["flops"] / found["seconds"] / (said["peak_tflops"] * 1e12),
        )


if __name__ == "__main__":
    raise SystemExit(main())
