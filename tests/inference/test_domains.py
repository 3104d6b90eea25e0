"""Which domain a text is of: by field, by flag, by name or number."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.config.base import UserError
from megatron_moe.config.model import ModelConfig
from megatron_moe.inference.domains import TokenDomains, text_domains

MODEL = ModelConfig(num_domains=3, domain_names=("news", "books", "forum"))
NAMELESS = ModelConfig(num_domains=2)
PLAIN = ModelConfig()


def rows(folder: Path, *domains: object) -> Path:
    """A file of lines; a domain of None is none."""
    lines = [{"text": "x"} | ({} if domain is None else {"domain": domain}) for domain in domains]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_field_comes_before_the_flag(tmp_path: Path) -> None:
    file = rows(tmp_path, "books", None, 2, "0")
    assert text_domains(4, MODEL, "news", file) == [1, 0, 2, 0]
    assert text_domains(2, MODEL, "forum") == [2, 2]
    assert text_domains(2, NAMELESS, "1") == [1, 1]
    assert text_domains(2, ModelConfig(num_domains=1), None) == [0, 0]


def test_models_without_domains_ignore_fields_of_that_name_only(tmp_path: Path) -> None:
    """Other fields of a line were never looked at; a flag is."""
    assert text_domains(1, PLAIN, None, rows(tmp_path, "anything")) is None
    assert text_domains(1, PLAIN, None) is None
    with pytest.raises(UserError, match="--domain: domain 'news', but the model was trained without domains; leave it"):
        text_domains(1, PLAIN, "news")


@pytest.mark.parametrize("domain", ["sports", 3, -1, True, 1.0, [0]])
def test_unknown_domains_are_named(tmp_path: Path, domain: object) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl line 2: domain .*; must be a number from 0 to 2, or one of news"):
        text_domains(2, MODEL, None, rows(tmp_path, 0, domain))


def test_a_domain_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"line 2: no field 'domain', and the model tells 3 domains apart \(news, books"
    ):
        text_domains(2, MODEL, None, rows(tmp_path, 0, None))
    with pytest.raises(UserError, match="--domain: the model tells 2 domains apart; give one"):
        text_domains(1, NAMELESS, None)


def test_tokens_of_a_file() -> None:
    domains = TokenDomains(np.array([2, 0, 1], np.uint16), np.array([3, 1, 2], np.int32))
    whole = [2, 2, 2, 0, 1, 1]
    for start in range(6):
        for stop in range(start, 7):
            assert domains.stretch(start, stop - start).tolist() == whole[start:stop]
