"""A few real texts that every comparison of a model or a tokenizer with its twin reads. All are free of copyright.

Chinese and English prose, verse, program code, and what tokenizers treat in ways of their own: runs of spaces, tabs,
digits, characters outside the basic plane, and text that spells special tokens.
"""

from collections.abc import Sequence

from megatron_moe.data.tokenizer.kinds.null import NullTokenizer
from megatron_moe.data.tokenizer.load import Tokenizer

SHADOW = """我与父亲不相见已二年余了，我最不能忘记的是他的背影。那年冬天，祖母死了，父亲的差使也交卸了，正是祸不单行\
的日子，我从北京到徐州，打算跟着父亲奔丧回家。到徐州见着父亲，看见满院狼藉的东西，又想起祖母，不禁簌簌地流下眼泪。父亲说，\
“事已如此，不必难过，好在天无绝人之路！”
回家变卖典质，父亲还了亏空；又借钱办了丧事。这些日子，家中光景很是惨淡，一半为了丧事，一半为了父亲赋闲。\
丧事完毕，父亲要到南京谋事，我也要回北京念书，我们便同行。
"""
SPRING = """晋太元中，武陵人捕鱼为业。缘溪行，忘路之远近。忽逢桃花林，夹岸数百步，中无杂树，芳草鲜美，落英缤纷。\
渔人甚异之，复前行，欲穷其林。林尽水源，便得一山，山有小口，仿佛若有光。便舍船，从口入。初极狭，才通人。复行数十步，豁然开朗。\
土地平旷，屋舍俨然，有良田美池桑竹之属。阡陌交通，鸡犬相闻。其中往来种作，男女衣着，悉如外人。黄发垂髫，并怡然自乐。
床前明月光，疑是地上霜。举头望明月，低头思故乡。
"""
ALICE = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: \
once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and \
what is the use of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), \
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when \
suddenly a White Rabbit with pink eyes ran close by her.
"""
ADDRESS = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in \
Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, \
testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great \
battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for those who \
here gave their lives that that nation might live. It is altogether fitting and proper that we should do this.
"""
CODE = '''def primes(limit: int) -> list[int]:
    """All primes below `limit`."""
    sieve = bytearray([1]) * limit
    sieve[:2] = b"\\0\\0"
    for number in range(2, int(limit ** 0.5) + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, limit, number)))
    return [number for number, prime in enumerate(sieve) if prime]


if __name__ == "__main__":
\tprint(primes(1_000)[-1], 3.14159e-10, 0xFF)  # 997
'''
ODD = (
    "1234567890 2026年11月22日 12:30　￥1,299.00  50%\n\n\n   three   spaces\t\ttabs \r\n"
    "<|user|>你好<|end|><s></s><eod><|endoftext|> ▁ \U0001f600 \U00020000 naïve café e\u0301 ｆｕｌｌ half － — … “”‘’"
    " Привет مرحبا 안녕 こんにちは \u200b\n "
)
TEXTS = (SHADOW, ALICE, SPRING, CODE, ADDRESS, ODD)
LONGEST = 192
_ROWS_WITHOUT_TEXT = 4
# Of the linear congruential generator of Numerical Recipes, chapter 7.
_MULTIPLIER, _INCREMENT = 1664525, 1013904223


def proof_ids(tokenizer: Tokenizer, vocab_size: int, max_positions: int) -> list[list[int]]:
    """The documents that a conversion is proved on, as ids: the texts, and a row of ids from all over the vocabulary.

    Args:
        tokenizer: the model's. One that knows no text gives rows of ids drawn by a fixed rule.
        vocab_size: ids there are.
        max_positions: of the model.
    """
    longest = min(max_positions, LONGEST)
    spread = [index * vocab_size // longest for index in range(longest)]
    if isinstance(tokenizer, NullTokenizer):
        return [*_drawn(vocab_size, longest), spread]
    rows = [tokenizer.encode(text)[:longest] for text in TEXTS]
    return [*(row for row in rows if row), spread]


def comparison_texts(tokenizer: Tokenizer) -> list[str]:
    """What two tokenizers must give the same ids for: the texts, each cut at odd places, and the vocabulary's own
    pieces in groups."""
    texts = list(TEXTS)
    texts += [text[start::3] for text in TEXTS for start in range(3)]
    texts += [text[start : start + 37] for text in TEXTS for start in range(0, len(text), 37)]
    size = tokenizer.vocab_size
    pieces = [tokenizer.decode([index]) for index in range(0, size, max(1, size // 4096))]
    return texts + ["".join(pieces[start : start + 32]) for start in range(0, len(pieces), 32)]


def _drawn(vocab_size: int, longest: int) -> Sequence[list[int]]:
    rows, state = [], 1
    for _ in range(_ROWS_WITHOUT_TEXT):
        row = []
        for _ in range(longest):
            state = (_MULTIPLIER * state + _INCREMENT) % 2**32
            row.append(state * vocab_size >> 32)
        rows.append(row)
    return rows
