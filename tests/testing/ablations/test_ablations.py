"""The paper's ablations: what each variant trains, the queue, the tables, and one tiny real run."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.config.load import load_config
from onellm_dist.model.presets import load_model
from onellm_dist.testing.ablations import run as queue
from onellm_dist.testing.ablations.layout import Ablation, Entry, Step
from onellm_dist.testing.ablations.results import EntryResult, SplitScore, list_results
from onellm_dist.testing.ablations.run import run_ablations
from onellm_dist.testing.ablations.sizes import FULL, QUICK, SHORT, TINY, WEIGHTS, AblationSize
from onellm_dist.testing.ablations.tables import (
    build_tables,
    compute_mean_interval,
    format_tables,
)
from onellm_dist.testing.ablations.towers import assemble_variant
from onellm_dist.testing.ablations.toy_dino import (
    DinoPretraining,
    SelfDistillation,
    View,
    draw_view,
    measure_neighbours,
    pretrain_dino,
    spread,
)
from onellm_dist.testing.ablations.variants import (
    MODALITIES,
    TABLE_PARTS,
    VARIANTS,
    choose_variants,
)
from onellm_dist.testing.demo import processes
from onellm_dist.testing.demo.toy_clip import ClipPretraining, ImageBank
from onellm_dist.testing.demo.toy_llm import LLMPretraining
from onellm_dist.testing.demo.toy_towers import override


def get_runs(size: AblationSize, name: str) -> dict[str, Any]:
    """The recipes of a variant's training runs, by name."""
    ablation = Ablation(Path("/out"), size, ranks=2)
    commands = [s.command for s in ablation.list_steps(Entry(VARIANTS[name], 1))]
    return {
        config.run.dir.name: config
        for config in (load_config(Path(c[2]), c[3:]) for c in commands if c[1] == "train")
    }


@pytest.mark.parametrize("size", [FULL, SHORT, TINY], ids=["full", "short", "tiny"])
def test_every_variant_trains_what_the_paper_varies_and_nothing_else(size: AblationSize) -> None:
    assert size.joint_steps % sum(WEIGHTS.values()) == 0
    override(ClipPretraining(), size.clip)
    override(DinoPretraining(), size.dino)
    override(LLMPretraining(), size.llm)
    default = get_runs(size, "default")
    assert list(default) == ["align_image", "joint"]
    assert [str(e.path) for e in default["align_image"].data.mixture] == ["image"]
    assert default["joint"].model.path == default["align_image"].run.dir / "model"
    assert default["joint"].model.init_from_image == ("video", "audio")
    assert {run.run.seed for run in default.values()} == {1}
    assert all(run.train.encoder == "frozen" for run in default.values())
    for name in ("experts-1", "experts-7", "router-sparse", "router-constant", "encoder-dino"):
        for run, config in get_runs(size, name).items():
            same = config.to_yaml().replace(f"runs/{name}-", "runs/default-")
            assert same == default[run].to_yaml()
    trained = get_runs(size, "encoder-trained")
    assert [run.train.encoder for run in trained.values()] == ["trainable"] * 2
    random = get_runs(size, "random-init")
    assert list(random) == ["joint"] and random["joint"].model.init_from_image == ()
    assert random["joint"].model.path == Path("/out/runs/random-init-seed1/start")
    assert random["joint"].data == default["joint"].data
    # alone, a modality sees as many samples as in both stages of the default
    alone, seen = get_runs(size, "separate"), dict.fromkeys(MODALITIES, 0.0)
    for config in default.values():
        total = sum(entry.weight for entry in config.data.mixture)
        for entry in config.data.mixture:
            seen[str(entry.path)] += config.train.steps * entry.weight / total
    assert {name: run.train.steps for name, run in alone.items()} == seen
    assert all([str(e.path) for e in run.data.mixture] == [n] for n, run in alone.items())


def test_a_quick_variant_trains_images_alone() -> None:
    override(ClipPretraining(), QUICK.clip)
    override(LLMPretraining(), QUICK.llm)
    default = get_runs(QUICK, "default")
    assert list(default) == ["align_image"]
    assert default["align_image"].train.steps == QUICK.image_steps
    quick = Ablation(Path("/out"), QUICK, ranks=1)
    *_, captions = quick.list_steps(Entry(VARIANTS["router-sparse"], 1))
    assert captions.name == "captions-all" and captions.command[-1] == "/out/toy/image"
    shards = quick.list_preparation(["clip"])[0].command
    assert "modalities=image" in shards and f"train=image={QUICK.train['image']}" in shards
    names = [variant.name for variant in choose_variants((), joint=False)]
    assert "experts-1" in names and not {"separate", "random-init"} & set(names)
    with pytest.raises(UsageError, match="'random-init' needs joint training"):
        run_ablations(Path("/out"), "quick", 1, ["default", "random-init"])


def test_the_tables_of_the_paper_are_whole() -> None:
    named = {name for part in TABLE_PARTS for name in part.rows}
    assert named == set(VARIANTS) and all("default" in part.rows for part in TABLE_PARTS)
    router = {kind: VARIANTS[f"router-{kind}"].upm for kind in ("constant", "sparse")}
    assert router == {kind: {"router": kind} for kind in router}


@pytest.mark.seconds
def test_an_assembled_variant_has_its_towers_and_its_own_upm(tmp_path: Path) -> None:
    toy: Any = load_model(path=None, preset="toy", seed=5)[0]
    torch.save(toy.encoder.state_dict(), tmp_path / "e.pt")
    torch.save(toy.llm.state_dict(), tmp_path / "l.pt")
    made: list[Any] = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        assemble_variant(tmp_path / "e.pt", tmp_path / "l.pt", seed, out, {"experts": 5})
        made.append(load_model(path=out, preset=None, seed=0)[0])
    first, second = made
    assert len(first.upm.experts) == 5 and tuple(first.config.modalities) == MODALITIES
    assert torch.equal(first.encoder.patches.weight, toy.encoder.patches.weight)
    assert torch.equal(first.llm.lm_head.weight, toy.llm.lm_head.weight)
    weights = [m.upm.experts[0].blocks[0].feed_forward.up.weight for m in (first, second)]
    assert not torch.equal(*weights)


def make_result(variant: str, seed: int, image: int, audio: int = 50) -> EntryResult:
    right = {"image": image, "video": 50, "audio": audio}
    scores = {m: {"test_held_out": SplitScore(100, n, n / 100)} for m, n in right.items()}
    return EntryResult(variant, seed, scores, 1.0)


def test_only_a_clear_difference_confirms_or_contradicts_the_paper() -> None:
    image = {"default": (80, 82, 84), "random-init": (60, 61, 65), "experts-1": (90, 93, 94)}
    image["router-constant"] = (70, 95, 81)
    results = [
        make_result(name, seed, value)
        for name, values in image.items()
        for seed, value in enumerate(values)
    ]
    found = {
        row.title: row.cells["image"].agreement
        for table in build_tables(results)
        for row in table.rows
    }
    assert found["random"] == "as in the paper" and found["1"] == "against the paper"
    assert found["constant"] == "not clear" and found["soft"] == ""
    assert [table.part.title for table in build_tables(results)] == [
        "Initialisation",
        "Experts",
        "Router",
    ]
    text = format_tables(build_tables(results))
    assert "| random | 3 | 62.0 [" in text and "98.8 | 65.6 | 57.6 | 53.1 |" in text
    # differences are paired by seed: each seed of the default was 1 higher
    paired = [make_result("separate", seed, v - 1, 49) for seed, v in enumerate((80, 82, 84))]
    row = build_tables([*results, *paired])[0].rows[0]
    assert row.cells["image"].difference is not None
    assert row.cells["image"].difference.low == row.cells["image"].difference.high == -1
    # one seed has an interval of its own and no difference
    single = build_tables([make_result("default", 0, 80), make_result("separate", 0, 20)])[0]
    cell = single.rows[0].cells["image"]
    assert cell.difference is None and cell.agreement == "" and cell.score.low < 20
    assert build_tables([make_result("default", 0, 80)]) == []
    # what was not trained is said
    alone = [replace(r, scores={"image": r.scores["image"]}) for r in results]
    assert "| not trained | not trained | 98.8 |" in format_tables(build_tables(alone))


def test_intervals_are_students() -> None:
    found = compute_mean_interval([1.0, 2.0, 4.0])
    half = 4.303 * (7 / 3) ** 0.5 / 3**0.5  # Student's table: two degrees of freedom, 97.5%
    assert (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half), abs=1e-3)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replace the commands by ones that append to a log and write captions; returns the log."""
    log = tmp_path / "ran"

    def make(name: str, done: Path, code: str = "") -> Step:
        text = f"open({str(log)!r}, 'a').write({name + chr(10)!r})\n{code}"
        return Step(name, [sys.executable, "-c", text], done)

    def prepare(self: Ablation, encoders: Sequence[str]) -> list[Step]:
        return [make(name, self.out / "pretrained" / f"{name}.done") for name in encoders]

    def steps(self: Ablation, entry: Entry) -> list[Step]:
        folder = self.get_folder(entry)
        captions = [
            json.dumps(
                {
                    "key": str(i),
                    "modality": modality,
                    "split": "test_held_out",
                    "reference": "a dog",
                    "prediction": "a dog" if i < 3 else "a cat",
                }
            )
            for modality, i in itertools.product(MODALITIES, range(4))
        ]
        broken = f"import os, sys; os.path.exists({str(tmp_path / 'broken')!r}) and sys.exit(3)"
        write = (
            f"open({str(folder / 'captions-all.jsonl')!r}, 'w').write({chr(10).join(captions)!r})"
        )
        return [
            make(f"{entry.name} train", folder / "train.done"),
            make(f"{entry.name} caption", folder / "caption.done", f"{broken}\n{write}"),
        ]

    monkeypatch.setattr(Ablation, "list_preparation", prepare)
    monkeypatch.setattr(Ablation, "list_steps", steps)
    monkeypatch.setattr(processes, "POLL_S", 0.01)
    monkeypatch.setattr(queue, "handle_termination", lambda handler: None)
    return log


def test_the_queue_resumes_in_the_middle_of_an_entry_and_grows(
    commands: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "broken").touch()
    only = ["default", "experts-1"]
    assert run_ablations(out, "tiny", 1, only) == 1
    assert commands.read_text().splitlines() == [
        "clip",
        "default-seed0 train",
        "default-seed0 caption",
        "experts-1-seed0 train",
        "experts-1-seed0 caption",
    ]
    (tmp_path / "broken").unlink()
    assert run_ablations(out, "tiny", 1, only) == 0
    assert commands.read_text().splitlines()[5:] == [
        "default-seed0 caption",
        "experts-1-seed0 caption",
    ]
    assert run_ablations(out, "tiny", 2, [*only, "encoder-dino"]) == 0
    assert len(commands.read_text().splitlines()) == 7 + 1 + 2 * 4, "done ones are not run again"
    results = list_results(out)
    assert [(r.variant, r.seed) for r in results if r.variant == "default"] == [
        ("default", 0),
        ("default", 1),
    ]
    assert results[0].scores["audio"]["test_held_out"] == SplitScore(4, 3, 0.75 + 0.25 * 0.5)
    assert not list((out / "runs").iterdir()), "models are removed once they are scored"
    page = (out / "report.html").read_text()
    assert "Table 7c" in page and "108.7" in page and "Too small" in page
    with pytest.raises(UsageError, match="size tiny"):
        run_ablations(out, "full", 1)
    with pytest.raises(UsageError, match="unknown variant 'experts-9'"):
        run_ablations(out, "tiny", 1, ["experts-9"])
    with pytest.raises(UsageError, match="not empty"):
        run_ablations(tmp_path, "tiny", 1)


def test_towers_that_cannot_be_made_end_the_queue(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Step("clip", [sys.executable, "-c", "raise SystemExit('weak')"], tmp_path / "x")
    monkeypatch.setattr(Ablation, "list_preparation", lambda self, encoders: [broken])
    with pytest.raises(OneLLMError, match="weak"):
        run_ablations(tmp_path / "out", "tiny", 1)
    assert not commands.exists()


@pytest.fixture(scope="module")
def bank() -> ImageBank:
    return ImageBank("pretrain", 48, seed=5)


def test_a_hidden_patch_reaches_the_student_by_nothing_but_its_place(bank: ImageBank) -> None:
    encoder = load_model(path=None, preset="toy", seed=1)[0].encoder
    recipe = DinoPretraining(kept=32)
    both = SelfDistillation(encoder, recipe)
    rng = np.random.default_rng(0)
    view = draw_view(bank, np.arange(4), recipe, rng)
    assert 0.2 < float(view.hidden.float().mean()) < 0.6 and view.values.shape == (4, 32, 588)
    noise = torch.where(view.hidden[..., None], torch.randn(view.values.shape), view.values)
    other = View(noise, view.chosen, view.hidden)
    with torch.no_grad():
        student = [both._look(encoder, both.head.hidden, v) for v in (view, other)]
        teacher = [both._look(encoder, None, v) for v in (view, other)]
    torch.testing.assert_close(*student)
    assert not torch.allclose(teacher[0], teacher[1])


def test_targets_use_every_prototype() -> None:
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8) * 3
    shares = spread(logits / 10, 0.1)
    torch.testing.assert_close(shares.sum(1), torch.ones(64))
    assert float(shares.sum(0).min()) > 4 and float(logits.argmax(1).unique().numel()) < 5


@pytest.mark.slow
def test_pretraining_without_captions_learns_and_does_not_collapse(bank: ImageBank) -> None:
    model: Any = load_model(path=None, preset="toy", seed=1)[0]
    recipe = DinoPretraining(images=16 * 24, batch=16, kept=48, warmup=4)
    losses = pretrain_dino(model.encoder, recipe, bank)
    assert len(losses) == 24 and np.mean(losses[-4:]) < 0.9 * losses[0]
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert 0 <= measure_neighbours(model.encoder, bank) <= 1


@pytest.mark.soak
def test_a_tiny_queue_from_shards_to_the_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    only = ["default", "separate", "router-sparse", "encoder-trained", "encoder-dino"]
    assert run_ablations(out, TINY.name, 1, only) == 0
    found = {r.variant: r for r in list_results(out)}
    assert set(found) == set(only)
    for result in found.values():
        assert {s.n for splits in result.scores.values() for s in splits.values()} == {TINY.test}
    page = (out / "report.html").read_text()
    assert all(title in page for title in ("Table 7a", "Table 7d", "Table 8"))
