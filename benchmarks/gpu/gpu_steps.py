"""Training steps on one GPU: ours by stage, the reference's, each remedy on and off."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Any

import torch
from gpu_record import Record, clock, free_memory, get_peak_gib, synchronise
from gpu_workload import Setting, Workload
from torch.nn import functional

from onellm_dist.model.attention import packed_attention
from onellm_dist.model.kernel_trace import trace_attention
from onellm_dist.model.kernels.select import BACKEND_VARIABLE, forget_backend, select_backend
from onellm_dist.model.model_kernels import try_fused_kernels
from onellm_dist.model.sequence_lengths import SequenceLengths
from onellm_dist.packed import PackedBatch
from onellm_dist.planner.pack_shapes import PackShape

STAGE1 = Setting()
STAGES: dict[str, Setting] = {
    "stage I": STAGE1,
    "stage II": replace(STAGE1, present=("image", "video", "audio", "point")),
    "tune, recompute selective": replace(STAGE1, stage="tune", recompute="selective"),
    "tune, recompute full": replace(STAGE1, stage="tune", recompute="full"),
}
REMEDIES: dict[str, tuple[Setting, dict[str, str]]] = {
    "plain kernels": (replace(STAGE1, kernels="plain"), {}),
    "empty pass through the encoder": (replace(STAGE1, leaves_out_idle_passes=False), {}),
    "attention sequence by sequence": (STAGE1, {BACKEND_VARIABLE: "sdpa"}),
    "recompute selective": (replace(STAGE1, recompute="selective"), {}),
}
"""What is turned off (or, with recomputation, on) -> the setting, and its environment."""


def run_step(model: Any, batches: list[PackedBatch], work: Workload, optimizer: Any = None) -> None:
    """One step of a plain loop: what every engine on one GPU can reach at best."""
    for batch in batches:
        moved = batch.to(work.device)
        (model(packed=moved).loss / sum(batch.text_token_counts)).backward()
    if optimizer is not None:
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None


def make_optimizer(model: Any, work: Workload) -> torch.optim.Optimizer:
    """AdamW of what trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), fused=work.device.type == "cuda")


def measure_step(
    record: Record, work: Workload, name: str, setting: Setting, packs: list[PackShape]
) -> float:
    """Samples per second of a setting; a step without room for it is recorded as such."""
    free_memory()
    samples = sum(map(len, packs))
    try:
        model = work.build(setting)
        batches = [work.make_batch(pack, i) for i, pack in enumerate(packs)]
        optimizer = make_optimizer(model, work) if setting.stage == "align" else None
        seconds = clock(lambda: run_step(model, batches, work, optimizer), repeats=3, warm=1)
    except torch.OutOfMemoryError:
        record.add(name, out_of_memory=True, samples=samples, peak_gib=get_peak_gib())
        return 0.0
    record.add(
        name,
        samples_per_s=samples / seconds,
        seconds=seconds,
        micro_batches=len(packs),
        samples=samples,
        peak_gib=get_peak_gib(),
        weights_gib=sum(p.nbytes for p in model.parameters()) / 2**30,
    )
    return samples / seconds


def measure_ceilings(record: Record, work: Workload) -> None:
    """What the card does at best: matrix products of the model's shapes, and copies."""
    device, dtype = work.device, work.dtype
    card: dict[str, Any] = {"name": "CPU", "torch": torch.__version__}
    if device.type == "cuda":
        card |= {
            "name": torch.cuda.get_device_name(),
            "cudnn": torch.backends.cudnn.version(),
            "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
        }
    card["attention"] = "; ".join(select_backend())
    for width in (64, 128):
        ran = trace_attention(
            device, dtype=dtype, head_width=width, causal=width == 128, with_kernels=True
        )
        card[f"attention that ran, width {width}"] = str(ran)
    card |= {f"fused {name}": what for name, what in try_fused_kernels(device, dtype).items()}
    record.add("card", **card)
    shapes = {
        "8192^3": (8192, 8192, 8192),
        "LLM, attention": (5000, 4096, 4096),
        "LLM, gate and up": (5000, 11008, 4096),
        "LLM, down": (5000, 4096, 11008),
        "UPM, attention": (30709, 1024, 1024),
        "UPM, gate and up": (30709, 2816, 1024),
        "encoder, MLP": (27499, 4096, 1024),
        "head": (1712, 32000, 4096),
    }
    rates = {}
    for name, (m, n, k) in ({"64^3": (64, 64, 64)} if work.tiny else shapes).items():
        a, b = (torch.randn(x, k, device=device, dtype=dtype) for x in (m, n))
        seconds = clock(functools.partial(functional.linear, a, b), 10, 3)
        rates[name] = 2 * m * n * k / seconds / 1e12
    record.add("matrix products, TFLOP/s", **rates)
    source = torch.empty(2**16 if work.tiny else 2**30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = clock(lambda: target.copy_(source))
    record.add("copy", tb_per_s=2 * source.numel() / seconds / 1e12)


def measure_stage1(record: Record, work: Workload) -> None:
    """The step of stage I: packs that it has seen before, packs of new shapes, larger ones."""
    measure_step(record, work, "stage I", STAGE1, work.make_stage1())
    _measure_fresh_packs(record, work)
    for images in (2,) if work.tiny else (127, 160):
        pack = work.make_captions(images, 5)
        measure_step(record, work, f"stage I, {images} images", STAGE1, [pack])


def _measure_fresh_packs(record: Record, work: Workload) -> None:
    model = work.build(STAGE1)
    optimizer = make_optimizer(model, work)
    packs = [work.make_captions(max(1, work.images - i % 5), 99 + i) for i in range(12)]
    batches = [work.make_batch(pack) for pack in packs]
    steps = [batches[i : i + 3] for i in range(0, 12, 3)]
    fresh = iter(steps)
    seconds = clock(lambda: run_step(model, next(fresh), work, optimizer), repeats=3, warm=1)
    samples = sum(len(batch.modalities) for batch in steps[-1])
    record.add("stage I, new shapes each step", samples_per_s=samples / seconds, seconds=seconds)


def measure_stages(record: Record, work: Workload) -> None:
    """Stage II and tuning."""
    for name, setting in STAGES.items():
        if name != "stage I" and record.left > 25:
            packs = work.make_stage2() if name == "stage II" else work.make_tune()
            measure_step(record, work, name, setting, packs)


def measure_reference(record: Record, work: Workload) -> None:
    """The reference's step, re-created: padded texts, plain kernels, a wait after each batch."""
    packs = work.make_reference()
    batch, samples = work.make_batch(packs[0]), len(packs[0])
    for name, stage in (
        ("LLM frozen, as the paper", "align"),
        ("LLM trains, as its code", "joint"),
    ):
        free_memory()
        try:
            model = work.build(replace(STAGE1, stage=stage, kernels="plain"))

            def step(model: Any = model) -> None:
                loss = model(packed=batch.to(work.device)).loss / samples
                loss.item()
                loss.backward()
                synchronise()
                for parameter in model.parameters():
                    parameter.grad = None

            seconds = clock(step, repeats=3, warm=1)
        except torch.OutOfMemoryError:
            record.add(f"reference: {name}", out_of_memory=True)
            continue
        found = {"samples_per_s": samples / seconds, "peak_gib": get_peak_gib()}
        ours = record.figures.get("stage I", {}).get("samples_per_s")
        if ours:
            found["ours_over_it"] = ours / found["samples_per_s"]
        record.add(f"reference: {name}", **found)
        del model, step


def measure_remedies(record: Record, work: Workload) -> None:
    """Stage I with each remedy turned off."""
    for name, (setting, environment) in REMEDIES.items():
        if record.left < 20:
            return
        before = {key: os.environ.get(key) for key in environment}
        os.environ.update(environment)
        forget_backend()
        try:
            rate = measure_step(record, work, f"with: {name}", setting, work.make_stage1())
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
            forget_backend()
        ours = record.figures.get("stage I", {}).get("samples_per_s")
        if ours and rate:
            figures = record.figures[f"with: {name}"]
            record.add(f"with: {name}", **figures, ours_over_it=ours / rate)


def measure_new_shapes(record: Record, work: Workload) -> None:
    """The variable-length attention of cuDNN on new shapes, on a known one, and ours."""
    if work.device.type != "cuda":
        return
    for name, length, heads, width, causal in (
        ("encoder", 257, 16, 64, False),
        ("UPM", 287, 16, 64, False),
        ("LLM", 150, 32, 128, True),
    ):
        try:
            record.add(f"cuDNN attention, {name}", **_compare_cudnn(length, heads, width, causal))
        except (RuntimeError, TypeError) as error:  # this torch has another form of it
            record.add(f"cuDNN attention, {name}", failed=str(error).splitlines()[0][:200])


def _compare_cudnn(length: int, heads: int, width: int, causal: bool) -> dict[str, float]:
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}

    def draw(n: int) -> list[torch.Tensor]:
        return [torch.randn(n * length, heads, width, **options) for _ in range(3)]

    def call(n: int) -> Any:
        q, k, v = draw(n)
        ends = torch.arange(0, n * length + 1, length, device="cuda", dtype=torch.int32)
        return lambda: torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, ends, ends, length, length, True, 0.0, causal, False
        )

    new = [clock(call(n), repeats=1, warm=0) for n in range(40, 52)]
    q, k, v = draw(51)
    lengths = SequenceLengths.from_lengths((length,) * 51, device=q.device)
    ours = clock(lambda: packed_attention(q, k, v, lengths, causal=causal), 10)
    return {
        "new_shape_ms": 1e3 * sorted(new)[len(new) // 2],
        "same_shape_ms": 1e3 * clock(call(51), 10),
        "ours_ms": 1e3 * ours,
    }
