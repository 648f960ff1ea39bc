"""Which LLM families of the installed transformers are exact: the table of docs/reference/llms.md.

    python benchmarks/llm_table.py [FAMILY ...]      print rows
    python benchmarks/llm_table.py --write           write the page's table (10 minutes)

Each family is checked with the default config of its class, as a OneLLM checks its LLM.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "llms.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
COMPLETE: dict[str, dict[str, Any]] = {
    "ministral": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 8, "rope_theta": 500000.0}},
    "lfm2_moe": {
        "num_hidden_layers": 24,
        "layer_types": [
            "full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)
        ],
    },
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
}
"""What default configs lack that every published one has."""


def list_families() -> list[str]:
    """Names of all model types that have a causal LM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name != "onellm")


def check_family(name: str) -> tuple[str, str, str]:
    """(`exact`, `exact, as rows` or `refused`; how texts are generated or why it is refused)."""
    from transformers import CONFIG_MAPPING

    from onellm_dist.common.errors import MachineError, UsageError
    from onellm_dist.model.llm.check import check_llm

    try:
        config = CONFIG_MAPPING[name](**COMPLETE.get(name, {}))
        support = check_llm(config)
    except MachineError:
        raise
    except UsageError as error:
        if "cannot be used: " not in error.what:  # a library is missing here
            raise
        why = error.what.partition("cannot be used: ")[2].split("; ")[0]
        return name, "refused", why.replace("|", "\\|")[:110]
    except Exception as error:  # a default config that its own class refuses
        return name, "refused", f"no default config ({type(error).__name__})"
    way = "exact" if support.packing == "varlen" else "exact, as rows"
    generated = "in batches" if support.padding else "one prompt at a time"
    return name, way, generated if support.generation else "not possible"


def build_table(names: list[str]) -> str:
    """The rows of some families as Markdown."""
    rows = [check_family(name) for name in names]
    head = "| family (`model_type`) | packed training | generation, or why not |\n|---|---|---|\n"
    return head + "".join(f"| `{name}` | {way} | {more} |\n" for name, way, more in rows)


def main() -> None:
    """Print rows, or write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    table = build_table(arguments.families or list_families())
    if not arguments.write:
        sys.stdout.write(table)
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
