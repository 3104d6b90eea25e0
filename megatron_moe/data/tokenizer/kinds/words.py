"""jieba, the Chinese word cutter that two kinds of tokenizers stand on."""

import logging
from typing import Any

from megatron_moe.data.files import require_package


def load_jieba(wanted_by: str) -> Any:
    """The module jieba with its dictionary loaded, so that worker processes do not each report it later.

    Raises:
        UserError: it is not installed.
    """
    jieba = require_package("jieba", wanted_by)
    # It tells on standard error where its cached dictionary lies.
    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    return jieba
