"""Damaged metrics.jsonl and expert_load.jsonl: one line that names the file, or the right numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.checkpoint.layout import LATEST_FILE, checkpoint_folder, latest_iteration
from megatron_moe.config.base import UserError
from megatron_moe.data.rows import read_rows
from megatron_moe.training.reporting import truncate_after
from tests.helpers.fuzzing import Guard, check_message, damaged, examples, in_child

METRICS: list[dict[str, Any]] = [
    {"step": step, "lm_loss": 7.0 / step, "step_seconds": 0.1, "tokens_per_second": 1e3, "consumed_tokens": 64 * step}
    for step in range(1, 5)
]
METRICS.insert(2, {"step": 2, "eval_lm_loss": 5.0, "eval_perplexity": math.exp(5.0)})
LOADS: list[dict[str, Any]] = [
    {"step": step, "layer": layer, "tokens": [8, 8, 4, 12], "dropped": 0, "recycled": 2}
    for step in range(1, 5)
    for layer in (2, 4)
]
ODD = [
    None,
    -1,
    0,
    1,
    2**53,
    2**63,
    10**400,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "3",
    [],
    {},
    True,
    [1],
    [[]],
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_like(rows: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    """Valid rows of which a few values are odd or missing, or damaged bytes."""
    change = st.tuples(
        st.integers(0, len(rows) - 1),
        st.sampled_from(sorted({key for row in rows for key in row})),
        st.one_of(st.sampled_from(ODD), st.just(...), st.lists(st.sampled_from(ODD), max_size=5)),
    )

    def odd(changes: list[tuple[int, str, Any]]) -> bytes:
        changed = [dict(row) for row in rows]
        for place, key, value in changes:
            if value is ...:
                changed[place].pop(key, None)
            else:
                changed[place][key] = value
        return lines(changed)

    return st.one_of(
        st.lists(change, min_size=1, max_size=3).map(odd),
        damaged(lines(rows), header=400),
        st.sampled_from([b"", b"\n", b"[]\n", b"null\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"9" * 5000 + b"\n"]),
    )


def test_files_of_a_run(tmp_path: Path) -> None:
    in_child(fuzz_run, tmp_path)


def fuzz_run(guard: Guard, folder: Path) -> None:
    from tools import plot_run, summarize_run

    metrics, loads = folder / "metrics.jsonl", folder / "expert_load.jsonl"
    picture = folder / "run.png"
    metrics.write_bytes(lines(METRICS))
    plot_run.main(["--run", str(folder), "--output", str(picture)])
    guard.limit_memory()
    done: list[str] = []

    @examples(25)
    @given(st.one_of(st.just(lines(METRICS)), rows_like(METRICS)), st.one_of(st.just(lines(LOADS)), rows_like(LOADS)))
    def check(metrics_content: bytes, loads_content: bytes) -> None:
        guard.start(metrics_content + b"\n--\n" + loads_content)
        metrics.write_bytes(metrics_content)
        loads.write_bytes(loads_content)
        for name, use in (
            ("summary", lambda: summarize_run.summarize(folder, 6.0, 6.5)),
            ("picture", lambda: plot_run.main(["--run", str(folder), "--output", str(picture)])),
        ):
            try:
                use()
            except UserError as error:
                check_message(error)
                continue
            done.append(name)
        for path in (metrics, loads):
            before = path.read_bytes()
            try:
                truncate_after(path, 2)
            except UserError as error:
                check_message(error)
                continue
            assert before.startswith(path.read_bytes())
            assert all(row["step"] <= 2 for row in read_rows(path))

    check()
    assert {"summary", "picture"} <= set(done)


def test_the_name_of_the_newest_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path, 7)
    folder.mkdir()

    @examples(200)
    @given(
        st.one_of(
            st.binary(max_size=30),
            st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass")),
            st.text("0123456789 \n\u00b2\u0663\uff17", max_size=30).map(str.encode),
            damaged(b"7\n"),
        )
    )
    def check(content: bytes) -> None:
        (tmp_path / LATEST_FILE).write_bytes(content)
        try:
            found = latest_iteration(tmp_path)
        except UserError as error:
            check_message(error)
            return
        assert found == 7
        assert content.strip().lstrip(b"0") == b"7"

    check()


@pytest.mark.parametrize("content", ["\u00b2", "\u0667", "9" * 5000, "-7", "7.0", "0x7", "seven"])
def test_what_is_no_step(content: str, tmp_path: Path) -> None:
    (tmp_path / LATEST_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="expected the number of a step"):
        latest_iteration(tmp_path)
