"""The table of docs/models.md, from the worker's registry. `--write` puts it into the page."""

import sys
from pathlib import Path

from tilefleet_worker.families import FAMILIES, Family
from tilefleet_worker.quant_config import QUANTISATIONS
from tilefleet_worker.rope_config import ROPE_KINDS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- generated: hack/models_table.py -->\n", "<!-- end -->\n"


def table() -> str:
    lines = ["| family | architectures in config.json | beyond Llama |", "|---|---|---|"]
    for family in FAMILIES:
        names = ", ".join(f"`{name}`" for name in family.architectures)
        lines.append(f"| {family.title} | {names} | {', '.join(features(family)) or 'nothing'} |")
    lines += [
        "",
        f"Rotary embeddings: {', '.join(ROPE_KINDS)}. Weights: float32, bfloat16, float16",
    ]
    lines[-1] += f"; {'; '.join(QUANTISATIONS)}."
    return "\n".join(lines) + "\n"


def features(family: Family) -> list[str]:
    told = {
        "bias of queries, keys and values": family.qkv_bias is True,
        "norms of queries and keys": family.qk_norm,
        "sliding windows": family.windows.__name__ != "no_windows",
        "two rotary embeddings": family.ropes.__name__ != "one_rope",
        "normed outputs": family.sandwich_norms,
        "norm weights stored less 1": family.norm_offset == 1.0,
        "scaled embeddings": family.scaled_embedding,
        "mixture of experts": family.experts is not None,
        "text part of a larger model": bool(family.text_key),
    }
    return [text for text, true in told.items() if true]


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    made = before + BEGIN + table() + END + rest.split(END)[1]
    if "--write" in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    elif made != page:
        print("docs/models.md is not what the registry says: run hack/models_table.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
