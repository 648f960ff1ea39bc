"""Where the files of an ablation are, and which commands make them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common import run_files
from onellm_dist.testing.ablations.sizes import WEIGHTS, AblationSize
from onellm_dist.testing.ablations.variants import MODALITIES, Variant
from onellm_dist.testing.demo.stages import find_command

TOWERS = (sys.executable, "-m", "onellm_dist.testing.demo.toy_towers")
OWN_TOWERS = (sys.executable, "-m", "onellm_dist.testing.ablations.towers")


@dataclass(frozen=True)
class Step:
    """One command of the queue."""

    name: str
    command: Sequence[str]
    done: Path
    """A file that is there once the command has ended well."""


@dataclass(frozen=True)
class Entry:
    """One entry of the queue: a variant with a seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Name of the entry, also of its files."""
        return f"{self.variant.name}-seed{self.seed}"


@dataclass(frozen=True)
class Ablation:
    """One ablation in the folder `out`."""

    out: Path
    size: AblationSize
    ranks: int

    @property
    def toy(self) -> Path:
        """The datasets, one folder per modality."""
        return self.out / "toy"

    def get_tower(self, name: str) -> Path:
        """Weights of a pretrained tower: clip, dino or llm."""
        return self.out / "pretrained" / f"{name}.pt"

    def get_result(self, entry: Entry) -> Path:
        """The result of an entry; it is there once the entry is done."""
        return self.out / "results" / f"{entry.name}.json"

    def get_folder(self, entry: Entry) -> Path:
        """What an entry works in."""
        return self.out / "runs" / entry.name

    def get_log(self, name: str) -> Path:
        """Log of a command."""
        return self.out / "logs" / f"{name}.log"

    def list_preparation(self, encoders: Sequence[str]) -> list[Step]:
        """The datasets and the towers, which all entries share.

        Args:
            encoders: clip, dino or both.
        """
        counts = ",".join(f"{name}={count}" for name, count in self.size.train.items())
        shards = [find_command("onellm"), "shards", "build", "toyworld", str(self.toy)]
        shards += ["-o", f"train={counts}", "-o", f"test={self.size.test}"]
        shards += ["-o", f"modalities={','.join(self.size.modalities)}"]
        weak = [] if self.size.least_quality else ["--any-quality"]
        clip, dino, llm = map(self.get_tower, ("clip", "dino", "llm"))
        steps = {
            "clip": [*TOWERS, "clip", str(clip), *self.size.clip, *weak],
            "dino": [*OWN_TOWERS, "dino", str(dino), *self.size.dino],
        }
        chosen = {
            "shards": shards,
            "llm": [*TOWERS, "llm", str(llm), *self.size.llm, *weak],
            **{encoder: steps[encoder] for encoder in encoders},
        }
        return [
            Step(name, command, self.out / "pretrained" / f"{name}.done")
            for name, command in chosen.items()
        ]

    def list_steps(self, entry: Entry) -> list[Step]:
        """The commands of an entry: assemble, train, caption."""
        folder, variant = self.get_folder(entry), entry.variant
        start = folder / "start"
        upm = [f"{key}={value}" for key, value in variant.upm.items()]
        towers = [str(self.get_tower(variant.encoder)), str(self.get_tower("llm"))]
        assemble = [*OWN_TOWERS, "assemble", *towers, str(entry.seed), str(start), *upm]
        steps = [Step("assemble", assemble, folder / "assemble.done")]
        if variant.training == "separate":
            for modality in self.size.modalities:
                alone = self.size.image_steps if modality == "image" else 0
                length = alone + self.size.get_share(modality)
                run = self._train(entry, modality, start, length, {modality: 1})
                captions = self._caption(entry, modality, (modality,), modality)
                steps += [run, captions]
            return steps
        model = start
        if variant.init == "image":
            first = self._train(entry, "align_image", start, self.size.image_steps, {"image": 1})
            steps.append(first)
            if not self.size.joint_steps:
                captions = self._caption(entry, "align_image", self.size.modalities, "all")
                return [*steps, captions]
            model = folder / "align_image" / run_files.MODEL
        copied = [name for name in MODALITIES if name != "image"] if variant.init == "image" else []
        joint = self._train(entry, "joint", model, self.size.joint_steps, WEIGHTS, copied)
        return [*steps, joint, self._caption(entry, "joint", MODALITIES, "all")]

    def list_captions(self, entry: Entry) -> list[Path]:
        """The files of captions that an entry writes."""
        separate = entry.variant.training == "separate"
        parts = self.size.modalities if separate else ("all",)
        return [self.get_folder(entry) / f"captions-{part}.jsonl" for part in parts]

    def _train(
        self,
        entry: Entry,
        name: str,
        model: Path,
        steps: int,
        weights: dict[str, int],
        copied: Sequence[str] = (),
    ) -> Step:
        run = self.get_folder(entry) / name
        mixture = ", ".join(f"{{path: {m}, weight: {w}}}" for m, w in weights.items())
        command = [find_command("onellm"), "train", "toy/align_all"]
        command += [
            f"run.dir={run}",
            f"run.seed={entry.seed}",
            f"model.path={model}",
            f"model.init_from_image=[{', '.join(copied)}]",
            f"data.root={self.toy}",
            f"data.mixture=[{mixture}]",
            f"train.steps={steps}",
            f"train.encoder={'trainable' if entry.variant.trains_encoder else 'frozen'}",
            f"checkpoint.every={max(1, steps // 4)}",
            "checkpoint.keep=1",
            "train.precision=bf16",
            f"launch.ranks={self.ranks}",
        ]
        return Step(name, command, self.get_folder(entry) / f"{name}.done")

    def _caption(self, entry: Entry, run: str, modalities: Sequence[str], part: str) -> Step:
        folder = self.get_folder(entry)
        out, model = folder / f"captions-{part}.jsonl", folder / run / run_files.MODEL
        command = [sys.executable, "-m", "onellm_dist.evaluation.captioning", "--no-question"]
        command += [str(model), str(out), *(str(self.toy / name) for name in modalities)]
        return Step(f"captions-{part}", command, folder / f"captions-{part}.done")
