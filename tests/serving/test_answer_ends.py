"""What surrounds an answer: where it ends, the dtype it is computed in, files that read alike."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onellm_dist.model.llm.call import LLMSupport
from onellm_dist.model.presets import load_model
from onellm_dist.serving import generate as g
from onellm_dist.serving.media import read_files


class Scripted(torch.nn.Module):
    """A model that generates given tokens until a criterion or EOS ends it."""

    def __init__(self, config: Any, script: list[int]) -> None:
        super().__init__()
        self.config, self.script, self.device = config, script, torch.device("cpu")
        self.llm_support = LLMSupport()

    def generate(self, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
        new = ids[:, :0]
        for token in self.script[: options["max_new_tokens"]]:
            new = torch.cat([new, torch.tensor([[token]])], 1)
            if token == options["eos_token_id"] or options["stopping_criteria"](new, None).all():
                break
        return torch.cat([ids, new], 1)


@pytest.mark.parametrize(
    ("tail", "ended"), [("###", "stop string"), ("</s>", "eos"), ("", "length")]
)
def test_answers_end_at_eos_and_at_the_stop_string(tail: str, ended: str) -> None:
    model, processor = load_model(path=None, preset="toy", seed=0)
    tokenizer = processor.tokenizer
    said = tokenizer(" a red cone\n", add_special_tokens=False)["input_ids"]
    end = (
        [tokenizer.eos_token_id]
        if tail == "</s>"
        else tokenizer(tail, add_special_tokens=False)["input_ids"]
        if tail
        else []
    )
    rest = tokenizer(" Human: more", add_special_tokens=False)["input_ids"] if tail else []
    answer = g.generate(
        Scripted(model.config, [*said, *end, *rest]),
        tokenizer,
        "x",
        {},
        decoding=g.DecodingOptions(max_new_tokens=64),
    )
    assert (answer.text, answer.ended, answer.tokens) == ("a red cone", ended, len(said) + len(end))


def test_a_webp_and_a_stream_of_bytes_read_alike(tmp_path: Path) -> None:
    picture = Image.fromarray(np.full((40, 50, 3), 90, np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True)
    (tmp_path / "a.webp").write_bytes(buffer.getvalue())
    picture.save(tmp_path / "a_b.png")
    webp, png = (read_files([("image", tmp_path / f)])["image"] for f in ("a.webp", "a_b.png"))
    torch.testing.assert_close(webp, png)


def test_a_cpu_computes_in_bf16_only_where_the_model_was_saved_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "tokenizer.json").touch()
    found = {}
    for saved in ("float32", "bfloat16"):
        (tmp_path / "config.json").write_text(f'{{"dtype": "{saved}"}}')
        for able in (True, False):
            monkeypatch.setattr(
                torch.cpu,
                "get_capabilities",
                lambda able=able: {"avx512_bf16": able},
                raising=False,
            )
            found[saved, able] = g.choose_dtype(tmp_path)["dtype"]
    assert found.pop(("bfloat16", True)) == torch.bfloat16
    assert set(found.values()) == {torch.float32}
