"""The exported model is what transformers reads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import ONE_RANK, OneRank, OneRankEngine
from safetensors import SafetensorError

from onellm_dist.common.checksums import read_sums
from onellm_dist.common.errors import UsageError
from onellm_dist.train.export.model import write_weights


@pytest.mark.parametrize(
    ("dtype", "file_bytes", "files"),
    [(torch.float32, 5_000_000_000, 1), (torch.bfloat16, 2_000_000, 4)],
)
def test_weights_are_written_as_transformers_reads_them(
    tmp_path: Path, dtype: torch.dtype, file_bytes: int, files: int
) -> None:
    from onellm_dist.model.onellm import OneLLMForConditionalGeneration
    from onellm_dist.model.presets import load_model

    model, _ = load_model(path=None, preset="toy", seed=2, dtype=dtype)
    state = {name: p.detach() for name, p in model.named_parameters()}
    write_weights(
        tmp_path,
        iter(state.items()),
        {n: (tuple(p.shape), p.dtype) for n, p in state.items()},
        file_bytes,
    )
    model.config.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model*.safetensors"))) >= files
    assert (tmp_path / "model.safetensors.index.json").is_file() == (files > 1)
    again = OneLLMForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert all(
        torch.equal(p, state[name]) and p.dtype == dtype for name, p in again.named_parameters()
    )
    with pytest.raises(RuntimeError, match="expected one"):
        write_weights(tmp_path, iter([("other", torch.zeros(1))]), {"one": ((1,), torch.float32)})


def test_an_exported_model_has_a_card_and_checksums(tmp_path: Path) -> None:
    """As `RUN/model`: `sha256sum --check SHA256SUMS` finds every file as it was written."""
    from onellm_dist.model.presets import load_model
    from onellm_dist.train.export.model import export_model

    model, processor = load_model(path=None, preset="toy", seed=2)
    engine: Any = OneRankEngine(model)
    export_model(tmp_path / "model", engine, model, processor, ONE_RANK, notes={"stage": "tune"})
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(words in card for words in ("- stage: tune", "| llm |", "## Licences", "## Use"))
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(
        command, cwd=tmp_path / "model", check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["config.json: OK", "model.safetensors: OK"]
    assert read_sums(tmp_path / "model").keys() == {"config.json", "model.safetensors"}


def test_a_disk_that_refuses_in_the_words_of_safetensors_is_no_wait_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its errors are not OSError: rank 0 says it failed, whatever the class."""
    from onellm_dist.model.presets import load_model
    from onellm_dist.train.export import model as export

    def refuse(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "write_weights", refuse)
    model, processor = load_model(path=None, preset="toy", seed=2)
    engine: Any = OneRankEngine(model)
    with pytest.raises(export.ExportError, match="No space left on device"):
        export.export_model(tmp_path / "model", engine, model, processor, ONE_RANK, notes={})
    assert not (tmp_path / "model").exists()


def test_what_is_no_fault_of_the_disk_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where gathering fails, the other ranks are in it: rank 0 may not wait for them elsewhere."""
    from onellm_dist.model.presets import load_model
    from onellm_dist.train.export import model as export

    class Broken(OneRankEngine):
        def full_weights(self, *wants: Any) -> Iterator[tuple[str, torch.Tensor]]:
            yield next(super().full_weights(*wants))
            raise RuntimeError("out of memory while gathering")

    class Listening(OneRank):
        asked = 0

        def broadcast(self, value: Any) -> Any:
            self.asked += 1
            return value

    model, processor = load_model(path=None, preset="toy", seed=2)
    broken: Any = Broken(model)
    whole: Any = OneRankEngine(model)
    ranks: Any = Listening()
    with pytest.raises(RuntimeError, match="while gathering"):
        export.export_model(tmp_path / "model", broken, model, processor, ranks, notes={})
    assert not ranks.asked

    def refuse(*_: object) -> None:
        raise ValueError("a fault of the program")

    monkeypatch.setattr(export, "_write_configs", refuse)
    with pytest.raises(ValueError, match="of the program"):
        export.export_model(tmp_path / "model", whole, model, processor, ranks, notes={})
    assert ranks.asked


@pytest.mark.seconds
def test_the_export_keeps_the_generation_settings_of_its_source(tmp_path: Path) -> None:
    """All end tokens, through training and conversion, also where transformers would not save."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    from onellm_dist.convert.conversion import convert
    from onellm_dist.model.presets import load_model
    from onellm_dist.model.weights.lazy import open_model
    from onellm_dist.train.export.model import export_model

    settings = {"eos_token_id": [2, 7, 9], "temperature": 0.6, "do_sample": False, "own": [1]}
    model, processor = load_model(path=None, preset="toy", seed=2)
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "generation_config.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="invalid"):
        GenerationConfig.from_dict(dict(settings)).save_pretrained(tmp_path / "other")
    opened, processor, _ = open_model(path=tmp_path / "source", preset=None, seed=0)
    assert opened.generation_config.eos_token_id == [2, 7, 9]
    engine: Any = OneRankEngine(model)
    export_model(tmp_path / "model", engine, opened, processor, ONE_RANK)
    convert("onellm", tmp_path / "model", tmp_path / "again", to="onellm", quiet=True)
    convert("onellm", tmp_path / "again", tmp_path / "llm", to="hf", quiet=True)
    for name in ("model", "again", "llm"):
        assert json.loads((tmp_path / name / "generation_config.json").read_text()) == settings
    loaded, _ = load_model(path=tmp_path / "again", preset=None, seed=0)
    assert loaded.generation_config.eos_token_id == [2, 7, 9]
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", trust_remote_code=False)
    assert llm.generation_config.eos_token_id == [2, 7, 9]
    path.write_text("[")
    with pytest.raises(UsageError, match=r"generation_config\.json is not a JSON object"):
        open_model(path=tmp_path / "source", preset=None, seed=0)
