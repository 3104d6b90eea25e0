"""Text that cleaning must leave alone, and strategies that make dirty text."""

from hypothesis import strategies as st

PROSE = {
    "news": (
        "新华社北京１月１日电　中国在过去一年里种下了一亿二千万棵树，比上一年多５％。\n"
        "“我们还会继续种下去。”一位不愿透露姓名的工程师说，“到２０３０年，这里会是一片森林——真正的森林。”\n"
        "据了解，这项工程始于一九七八年，覆盖十三个省（自治区、直辖市）；截至目前，已完成投资１３８０００００００００元。"
    ),
    "dialogue": "“谁？”\n“我。”\n老王推开门，看见院子里站着一个穿蓝布衫的年轻人。\n“你找谁……”他愣住了。\n“爸！！！”",
    "law": (
        "第一章　总则\n第一条　为了保护公民的合法权益，维护社会秩序，根据宪法，制定本法。\n"
        "第二条　本法适用于在中华人民共和国境内发生的赌博、诈骗、盗窃等案件；法律另有规定的，依照其规定。\n"
        "（一）情节较轻的；\n（二）情节严重的。"
    ),
    "verse": "床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。",
    "technical": (
        "在 Linux 系统上，可以用 `grep -n 'a<b' file.txt` 查找文本；如果 x<y && y>z 成立，返回 List<String>。\n"
        '    for (int i = 0; i < 10; i++) {\n        printf("%d\\n", i);  // 打印\n    }\n'
        "上面这段循环从零数到九，每次打印一个数字，再换到下一行；如果要倒着数，只需把起点和终点互换。\n"
        "版本号 3.12.1 与 C++17、C# 都不受影响，详见《计算机程序设计艺术》【第一卷】「基本算法」一章。"
    ),
    "rare": "㐂字是喜的异体，𠮷野家的𠮷字在扩展Ｂ区，𬭎和𰻝在更后面；二〇〇八年，“囧”字流行。葛󠄀城市在日本。",
    "numbers": (
        "数字在文章里到处都有，它们大多不是谁的联系方式，清洗的时候要小心，不能见到一串数字就把它遮住。\n"
        "气温是-5℃，面积①为100㎡，圆周率π≈3.14159，比例为3:2；电话号码110、119、12345人人都知道。\n"
        "书号ISBN 978-7-5322-1234-5，2010-2011年度，订单号20200101123456，价格￥1,280.50元，QQ音乐和微信支付都能用。"
    ),
    "loans": "我喜欢café里的naïve音乐，Ångström是长度单位，他叫Müller，她说“Größe”。锛是一种木工工具，这句话没有乱码。",
    "both": "乾隆皇帝登上瞭望台，著书立说，慰藉百姓，徵羽宫商，这些字简体里也有，不该改动。",
    "emoji": "今天天气真好👨‍👩‍👧，我们去公园吧🏳️‍🌈！大家都很高兴……",
}
"""Clean text of many kinds."""

DIRT = [
    "http://a.com/b?c=1", "（https://x.cn）", "www.baidu.com", "a@b.com", "＠", "13800138000", "138-0013-8000",
    "010-62345678",
    "11010519491231002X", "6222 0212 3456 7890 128", "QQ：12345678", "微信号：abc_123", "微 信", "<p>", "</p>",
    "<b>", "</b>",
    "<br/>", "<script>", "</script>", "&nbsp;", "&amp;", "lt;", "&#20013;", "<", ">", "&", "\x1b[31m", "\x08",
    "\r\n", "\x00",
    "\u200b", "\ufeff", "\ue000", "\ud800", "\ufffd", "锟斤拷", "烫烫烫", "ä½\xa0å¥½", "浣犲ソ", "\xa0",
    "\u2003", "　", " ",
    "  ", "\t", "\n", "\n\n\n", "，，", "。。。", "...", "！！！！", "————", "……", "，", "。", "：", ":",
    ",", "“", "”", "（", "）",
    "中", "文", "國語", "臺灣", "乾隆", "通 知 如 下 文 件", "标题", "第三条", "一、",
    "这是一个足够长的段落有十个以上的汉字", "abc",
    "1", "86", "-", "var _hmt=1;", "body{a:b}", "e\u0301", "⼀", "︵", "｢", "１", "Ａ", "\u0300", "가", "カ",
    "好", "x", "元",
]  # fmt: skip
"""Pieces that rules act on, and what may join them to something new."""


def dirty_text(most: int = 24) -> st.SearchStrategy[str]:
    """Pieces of dirt, prose and arbitrary characters in any order."""
    piece = st.sampled_from(DIRT) | st.sampled_from(sorted(PROSE.values())).map(lambda text: text[:40])
    anything = st.text(st.characters(exclude_categories=[]), max_size=6)
    return st.lists(piece | piece | piece | anything, max_size=most).map("".join)
