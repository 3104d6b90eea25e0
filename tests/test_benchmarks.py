"""The benchmarks run to their end and print both sides; what they measure is no test's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.chinese_text import documents, write_jsonl
from tests.data.dedup.near_copies import random_documents

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size", "stock_is"),
    [("tiny-cpu", 4.3, "this package's layers"), ("tiny-equal", 3.4, "megatron-core's GPTModel")],
)
def test_train_step_prints_both_sides_and_that_they_agree(model: str, size: float, stock_is: str) -> None:
    command = [sys.executable, "benchmarks/train_step.py", "--model", model, "--steps", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    head, product, ours, stock, ratio, difference = done.stdout.splitlines()
    assert head.startswith(f"{model}: {size} M parameters")
    assert f"stock: {stock_is}" in head
    assert "GFLOP/s" in product
    for name, line in (("ours", ours), ("stock", stock)):
        assert line.split()[0] == name
        assert all(unit in line for unit in ("ms", "tokens/s", "GiB"))
    assert ratio.split()[0] == "ratio"
    # The same mathematics on both sides, or the ratio means nothing.
    assert float(difference.split()[-1]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--profile", "--eager"], ["--bf16"]], ids=" ".join)
def test_moe_prints_every_side_and_that_their_first_losses_agree(flags: list[str]) -> None:
    command = [sys.executable, "benchmarks/moe.py", "--shape", "tiny", "--steps", "1", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    half = "--bf16" in flags
    sides = ["ours", "megatron-core", *(["mixtral autocast", "mixtral masters"] if half else ["mixtral"])]
    assert f"M parameters: {' / '.join(['0.2'] * len(sides))}" in done.stdout
    for side in sides:
        variants = [side] if side == "ours" else [f"{side}, {kind} AdamW" for kind in ("plain", "fused")]
        for variant in variants:
            assert any(line.startswith(f"  {variant} ") and "tokens/s" in line for line in done.stdout.splitlines())
        (losses,) = (line for line in done.stdout.splitlines() if line.startswith(f"  losses of {side}:"))
        # Equal weights, tokens and mathematics: or the ratio means nothing. bf16 keeps 8 bits of every activation.
        assert float(losses.split()[-1]) < (2e-3 if half else 1e-5), losses
    assert ("mixtral eager, fused AdamW" in done.stdout) == ("--eager" in flags)
    assert ("expert GEMMs" in done.stdout and "AdamW   " in done.stdout) == ("--profile" in flags)


@pytest.mark.slow
def test_dedup_rates_prints_every_side_and_what_is_found(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = random_documents(300, 500, seed=1)
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    command = [sys.executable, "benchmarks/dedup_rates.py", "--corpus", str(corpus), "--megabytes", "1"]
    rates = subprocess.run([*command, "--repeats", "1"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert rates.returncode == 0, rates.stderr
    for side in ("ours: text to exact key, bands and sketch", "rensa RMinHash", "datatrove", "a set of strings"):
        assert any(side in line and line.endswith("MB/s") for line in rates.stdout.splitlines()), side
    more = ["--quality", "--originals", "200", "--scale", "3000"]
    found = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    (top,) = (line.split() for line in found.stdout.splitlines()[:20] if line.startswith("  0.95 to 1.00"))
    assert top[-2] == "100.0%"
    assert "3,000 documents: " in found.stdout


@pytest.mark.slow
def test_tokenizer_prints_both_sides_and_that_their_ids_agree(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", documents(500))
    command = [sys.executable, "benchmarks/tokenizer.py", "--corpus", str(corpus), "--megabytes", "0.1"]
    command += ["--vocab-size", "700", "--repeats", "1", "--lines", "500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    head, _, bare, ours, ratio, ids = done.stdout.splitlines()
    assert head.startswith("0.1 MB of text, 700 pieces")
    for name, line in (("bare", bare), ("ours", ours)):
        assert line.startswith(name)
        assert "CPU s" in line
        assert "x the text" in line
    assert ratio.startswith("ours / bare:")
    assert ids == "ids of the export and of SentencePiece: 0 of 500 lines differ"


@pytest.mark.slow
def test_preprocess_prints_all_sides_and_that_their_files_agree(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", documents(500))
    command = [
        sys.executable,
        "benchmarks/preprocess.py",
        "--input",
        str(corpus),
        "--vocab-size",
        "860",
        "--rounds",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    head, _, *rows, peer, bare, serial, same = done.stdout.splitlines()
    assert head.startswith("corpus.jsonl: 0.")
    assert [row.split()[0] for row in rows] == ["ours", "peer", "bare"]
    assert peer.startswith("ours / peer: ")
    assert bare.startswith("ours / bare: ")
    assert serial.startswith("work of the main process")
    # The same work on both sides, or the ratio means nothing.
    assert same == "same .bin and .idx as the peer: yes"


@pytest.mark.slow
def test_data_prints_every_side_of_the_cleaner(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "wudao").mkdir(parents=True)
    texts = documents(300)
    lines = [json.dumps({"text": text, "dataType": "新闻"}, ensure_ascii=False) for text in texts]
    (corpus / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    records = [{"id": number, "dataType": "新闻", "content": text} for number, text in enumerate(texts)]
    (corpus / "wudao" / "part-00000.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    command = [sys.executable, "benchmarks/data.py", "--corpus", str(corpus), "--texts", "all"]
    command += ["--only", "cleaning", "rules"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[1] for line in done.stdout.splitlines() if line.startswith("| all")]
    assert rows == ["orjson + zstd", "PAI's design"] + [
        f"ours, {name}" for name in ("pai", "wudao-default, no dedup", "wudao-default, exact", "wudao-default, near")
    ]
    costs = [line for line in done.stdout.splitlines() if line.startswith("| ") and line.endswith(" |")]
    assert any(line.startswith("| whitespace | ") for line in costs)
    assert any(line.startswith("| whole recipe | ") for line in costs)


@pytest.mark.slow
def test_routers_prints_a_line_for_each(tmp_path: Path) -> None:
    kinds = ("新闻", "评论", "诗词", "小说")
    for split, seed in (("train", 0), ("heldout", 1)):
        rows = [{"text": text, "dataType": kinds[i % 4]} for i, text in enumerate(documents(400, seed=seed))]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    command = [sys.executable, "benchmarks/routers.py", "--corpus", str(tmp_path), "--output", str(tmp_path / "out")]
    command += ["--routers", "base", "random-routed", "--seeds", "1", "--steps", "2", "--workers", "1"]
    command += ["--vocab-size", "860", "--eval-iters", "1", "--speed-rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| topk", "| base", "| random-routed"]
    for row in rows:
        assert 5 < float(row[1]) < 8
        assert float(row[-1].rstrip(" |").replace(",", "")) > 0
    # Shared out equally: 2,048 tokens over 8 and over 16 experts.
    assert float(rows[1][3]) == 0.0


@pytest.mark.slow
def test_attention_reuse_prints_every_side() -> None:
    command = [sys.executable, "benchmarks/attention_reuse.py", "--layers", "4", "--hidden-size", "64"]
    command += ["--seq-length", "32", "--passes", "2", "--threads", "1", "--prob", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, *sides, fused, explicit = done.stdout.splitlines()
    assert [line.split()[0] for line in sides] == ["fused", "explicit", "reuse"]
    assert [line.split("; ")[1].split("%")[0] for line in sides] == ["100.0", "100.0", "25.0"]
    assert "processor time" in fused
    assert "processor time" in explicit


@pytest.mark.slow
def test_convert_prints_both_directions_and_that_what_comes_back_is_equal(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/convert.py", "--gigabytes", "0.05", "--hidden-size", "256"]
    command += ["--output", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    head, *rows, bound, same = done.stdout.splitlines()
    assert "layers of 256" in head
    assert [row.split()[0] for row in rows] == ["copy", "to-hf", "from-hf"]
    assert all("x copy" in row and "PSS" in row for row in rows)
    assert bound.startswith("largest tensor 0.02 GB")
    assert same == "what came back is equal byte for byte"
    assert not (tmp_path / "work").exists()
