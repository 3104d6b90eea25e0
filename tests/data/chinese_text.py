"""A small Chinese corpus made up on the spot, and the files that the data tests work on."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

_WHO = ["农民", "工程师", "老师", "学生", "记者", "医生", "司机", "画家"]
_WHERE = ["北京", "上海", "山西", "黄河边", "图书馆", "火车站", "实验室", "小镇上"]
_DOES = [
    "种下了一棵树",
    "写完了一封信",
    "讲了一个故事",
    "修好了机器",
    "等着春天",
    "读着旧书",
    "学会了新的语言",
]
_WHY = [
    "因为天气很好",
    "为了明天的会议",
    "虽然已经很晚",
    "不过没有人知道",
    "“慢一点，再慢一点”",
    "在２０２６年",
]


def documents(count: int, seed: int = 0) -> list[str]:
    """Documents of a few paragraphs; the same for the same seed."""
    random_ = random.Random(seed)

    def sentence() -> str:
        who, where, does, why = (random_.choice(part) for part in (_WHO, _WHERE, _DOES, _WHY))
        return f"{why}，{where}的{who}{does}。"

    def paragraph() -> str:
        return "".join(sentence() for _ in range(random_.randint(1, 4)))

    return ["\n".join(paragraph() for _ in range(random_.randint(1, 4))) for _ in range(count)]


def write_jsonl(path: Path, texts: Sequence[str], domains: Sequence[str] = ()) -> Path:
    """One {"text": ...} a line; with `domains`, which take turns, in a field `domain`."""
    rows = [{"text": text} for text in texts]
    if domains:
        rows = [row | {"domain": domains[number % len(domains)]} for number, row in enumerate(rows)]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path
