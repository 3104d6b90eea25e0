"""The special tokens of a tokenizer and their ids, the same for every vocabulary that this project builds.

| id | token | stands for |
|---|---|---|
| 0 | `<unk>` | nothing: with byte fallback it is never made |
| 1, 2 | `<s>`, `</s>` | begin and end of a sequence, for recipes that use them |
| 3 | `<pad>` | padding |
| 4 | `<eod>` | the end of a document; generation stops here |
| 5, 6 | `<sep>`, `<mask>` | for fine-tuning tasks |
| 7-10 | `<\\|system\\|>`, `<\\|user\\|>`, `<\\|assistant\\|>`, `<\\|end\\|>` | roles of a chat, and the end of a turn |
| 11-31 | `<\\|reserved_0\\|>` ... | free, for what comes later (`--reserved-tokens`) |
| then | the newline, user symbols, 256 bytes, the learned pieces | text |

Ids before the newline are control symbols: no text becomes one of them, even if it spells it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.config.base import UserError

UNKNOWN, BEGIN, END, PAD = "<unk>", "<s>", "</s>", "<pad>"
END_OF_DOCUMENT = "<eod>"
SYSTEM, USER, ASSISTANT, END_OF_TURN = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTROL_SYMBOLS = (END_OF_DOCUMENT, "<sep>", "<mask>", SYSTEM, USER, ASSISTANT, END_OF_TURN)
# With these the control symbols fill the ids 0-31.
RESERVED_TOKENS = 21
_MOST_RESERVED = 4096
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# SentencePiece writes a space as U+2581 and skips text with U+2585, its mark for unknown characters.
SPACE_MARK, UNKNOWN_MARK = "\u2581", "\u2585"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') -%}"
    "{{- raise_exception('role ' + message['role'] + ': must be system, user or assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""A chat as text, for transformers: `<|user|>question<|end|><|assistant|>answer<|end|>`."""


@dataclass(frozen=True)
class Symbols:
    """Which symbols a vocabulary has beside its learned pieces.

    Attributes:
        reserved: control symbols without a meaning yet.
        user: pieces that text becomes wherever it spells them, never split or merged with their neighbours.

    Raises:
        UserError: too many reserved ones, or a user symbol that cannot be one.
    """

    reserved: int = RESERVED_TOKENS
    user: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.reserved <= _MOST_RESERVED:
            raise UserError(f"--reserved-tokens {self.reserved}: must be from 0 to {_MOST_RESERVED}")
        taken = {UNKNOWN, BEGIN, END, PAD, *self.control, *BYTES}
        for symbol in self.user:
            where = f"--user-symbols {symbol!r}"
            if symbol in taken:
                raise UserError(f"{where}: is there already, as a control symbol or given twice")
            if not symbol or any(c.isspace() or c in "\0\ufffd" + SPACE_MARK + UNKNOWN_MARK for c in symbol):
                raise UserError(f"{where}: must be text without spaces, newlines, NUL, U+2581, U+2585 and U+FFFD")
            try:
                symbol.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"{where}: must be text, not halves of surrogate pairs") from error
            taken.add(symbol)

    @property
    def control(self) -> tuple[str, ...]:
        """The control symbols after the first four, in the order of their ids."""
        return (*CONTROL_SYMBOLS, *(f"<|reserved_{number}|>" for number in range(self.reserved)))

    @property
    def count(self) -> int:
        """Ids that no learned piece can have: all symbols, the newline and the bytes."""
        return 4 + len(self.control) + 1 + len(self.user) + len(BYTES)

    def ids(self) -> dict[str, int]:
        """Every special token, the newline and every user symbol, with its id."""
        return {name: number for number, name in enumerate(self._in_order())}

    def _in_order(self) -> Sequence[str]:
        return (UNKNOWN, BEGIN, END, PAD, *self.control, "\n", *self.user)
