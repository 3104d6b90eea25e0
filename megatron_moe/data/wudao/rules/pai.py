"""Pai-Megatron-Patch's cleaner, for those who must match data made with it."""

import re
from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.data.wudao.rules.base import Cleaner

# Lower-case letters, !, and everything from $ to _ in ASCII: digits, capitals, brackets, quotes, ; < > \ ^ too.
_LINK = re.compile("https?://[a-z!$-_]+")
_SPACES = re.compile("  +")
_OTHERS = re.compile("[^0-9a-zA-Z\u4e00-\u9fa5 .,%*/&()+!，。、：？！（）《》“”—·•＆-]+")


@dataclass(frozen=True)
class Pai(Cleaner):
    """Deletes links, then all but one of spaces that follow each other, then every character outside of a short list.

    Character for character what `clean_text` of preprocess_wudao2.py and clean_raw_text.py does.
    """

    name: ClassVar[str] = "pai"
    source: ClassVar[str] = "Pai-Megatron-Patch, toolkits/pretrain_data_preprocessing/preprocess_wudao2.py"
    destroys: ClassVar[str] = (
        "line ends, ASCII colons, ；;\"'‘’…【】「」〇℃=<>@#, full-width digits, Han outside of U+4E00 to U+9FA5"
    )

    def clean(self, text: str) -> str:
        """Delete them."""
        return _OTHERS.sub("", _SPACES.sub(" ", _LINK.sub("", text))).strip()
