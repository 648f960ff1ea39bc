"""Results of the check of LLMs in the user's cache: what they depend on, and what is never kept."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from llm_families import tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from onellm_dist.common.errors import MachineError, OneLLMError, UsageError
from onellm_dist.model.llm import attention as llm_attention
from onellm_dist.model.llm import check as llm_check
from onellm_dist.model.llm import probe as llm_probe
from onellm_dist.model.llm.call import LLMSupport
from onellm_dist.model.llm.check import check_llm
from onellm_dist.model.llm.check_cache import LIBRARIES, get_library_versions


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No result is known yet."""
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path))
    monkeypatch.setattr(llm_check, "_CHECKED", {})
    return tmp_path / "llm_check"


LIMITED = LLMSupport(packing="rows", position_limit=128)


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The family of each LLM that is tried; BERT is refused, others have LIMITED."""
    found: list[str] = []

    def try_copies(values: Any, config_class: Any) -> Any:
        found.append(config_class.model_type)
        return "a token sees the tokens after it" if found[-1] == "bert" else LIMITED

    monkeypatch.setattr(llm_check, "_try_copies", try_copies)
    return found


def check_again(config: Any) -> Any:
    """As another process would."""
    llm_check._CHECKED.clear()
    return check_llm(config)


def test_results_are_kept_for_this_user_and_versions(
    fresh: Path, tries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("llama")
    first = check_llm(config)
    (kept,) = fresh.iterdir()
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    assert check_again(config) == first and len(tries) == 1
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert check_again(config) == first and len(tries) == 2
    for number, name in enumerate(("mamba_ssm-2.2.dist-info", "mamba_ssm-2.3.dist-info")):
        site = tmp_path / name
        (site / name).mkdir(parents=True)
        version = name.split("-")[1].removesuffix(".dist")
        (site / name / "METADATA").write_text(f"Name: mamba-ssm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(site)
        assert get_library_versions()["mamba_ssm"] == version
        assert check_again(config) == first and len(tries) == 3 + number
    assert kept.is_file() and len(list(fresh.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "old form"])
def test_a_damaged_result_is_found_again(fresh: Path, tries: list[str], damage: str) -> None:
    config = tiny_config("opt")
    first = check_llm(config)
    assert first == LIMITED
    (kept,) = fresh.iterdir()
    content = json.loads(kept.read_text())
    new = {
        "cut": "{",
        "flip": kept.read_text().replace("128", "129"),
        "old form": json.dumps(content["result"]),
    }
    kept.write_text(new[damage])
    assert check_again(config) == first and len(tries) == 2


def test_a_refusal_names_the_file_that_keeps_it(fresh: Path, tries: list[str]) -> None:
    config = tiny_config("bert", type_vocab_size=2)
    with pytest.raises(UsageError, match="LLM bert cannot be used: a token sees") as found:
        check_llm(config)
    (kept,) = fresh.iterdir()
    assert f"remove {kept}" in found.value.do
    with pytest.raises(UsageError) as again:
        check_again(config)
    assert str(again.value) == str(found.value) and len(tries) == 1
    kept.unlink()
    with pytest.raises(UsageError):
        check_again(config)
    assert len(tries) == 2


def _raise(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def _fail_to_allocate(*args: Any, **kwargs: Any) -> Any:
    return torch.empty(10**15)  # what torch really raises


def _fail_behind_another(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("the layer failed") from MemoryError("no room")


FAULTS: dict[str, tuple[Callable[..., Any], type[OneLLMError], str]] = {
    "memory": (_raise(MemoryError("no room")), MachineError, "MemoryError: no room.*free memory"),
    "torch": (_fail_to_allocate, MachineError, "allocate.*free memory"),
    "cause": (_fail_behind_another, MachineError, "MemoryError: no room"),
    "disk": (_raise(OSError(5, "Input/output error")), MachineError, "Input/output error"),
    "import": (_raise(ImportError("no fla")), UsageError, "ImportError: no fla.*install or repair"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_of_the_machine_is_reported_as_what_it_is(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    fail, error_class, words = FAULTS[fault]
    monkeypatch.setattr(llm_probe, "no_init_weights", fail)
    with pytest.raises(error_class, match=re.compile(words, re.DOTALL)) as found:
        check_llm(tiny_config("llama"))
    assert "LLM llama could not be checked" in found.value.what
    assert not fresh.exists() and not llm_check._CHECKED


@pytest.mark.slow
def test_a_failure_of_the_machine_is_no_result(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it happens: the family is not refused, and no slower way is chosen."""
    config = tiny_config("gpt2")
    real = llm_probe.Reference.run

    def run(self: Any, ids: torch.Tensor) -> Any:
        return _fail_to_allocate() if len(ids) > 64 else real(self, ids)

    for place, name, fail in (
        (llm_attention, "packed_attention", _fail_to_allocate),
        (transformers.GPT2LMHeadModel, "generate", _fail_to_allocate),
        (llm_probe.Reference, "run", run),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(MachineError, match="could not be checked"):
                check_llm(config)
        assert not fresh.exists()
    support = check_llm(config)
    assert (support.packing, support.generation, support.position_limit) == ("varlen", True, 128)


def test_every_library_of_transformers_causal_lms_is_known() -> None:
    """What their code imports, or takes from a package that may be installed."""
    folder = Path(transformers.__file__).parent
    named = r'_with_fallback\(\s*"\w+",\s*(?:package=)?"(\w+)"'
    imported = r"^ +(?:from|import) (\w+)[\w.]*(?: import|$)"
    found: set[str] = set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for path in (folder / "models" / family.replace("-", "_")).glob("modeling_*.py"):
            text = path.read_text(encoding="utf-8")
            found |= set(re.findall(named, text)) | set(re.findall(imported, text, re.MULTILINE))
    assert {"mamba_ssm", "causal_conv1d", "fla", "mambapy", "xlstm"} <= found
    assert found - {"torch", "transformers"} - sys.stdlib_module_names <= LIBRARIES.keys()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_costs_time_alone(fresh: Path) -> None:
    fresh.parent.chmod(0o500)
    assert check_llm(tiny_config("llama")).packing == "varlen"


def test_a_cache_that_is_a_file_costs_time_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tries: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(llm_check, "_CHECKED", {})
    assert check_llm(tiny_config("llama")) == LIMITED and len(tries) == 1
