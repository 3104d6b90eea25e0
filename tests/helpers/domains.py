"""Token files whose documents have domains, made of the text of the tiny ones."""

import json
from pathlib import Path
from typing import Any

from megatron_moe.config.data import DataConfig
from megatron_moe.data.preprocess import Preprocessing, preprocess
from tests.helpers.tiny import data_flags

NAMES = ("news", "encyclopedia", "forum")


def write_domain_data(folder: Path, tiny: Path) -> dict[str, Any]:
    """Flags for `train` and `valid` in `folder`: documents of `tiny`, in domains that change at random places."""
    job = Preprocessing(data=DataConfig(tokenizer_model=str(tiny / "bpe.model")), domain_key="kind", domains=NAMES)
    for name in ("train", "valid"):
        records = [json.loads(line) for line in (tiny / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for number, record in enumerate(records):
            record["kind"] = NAMES[(number * number // 3) % 3]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        preprocess([path], folder / name, job)
    return data_flags(folder) | {"tokenizer_model": str(tiny / "bpe.model")}
