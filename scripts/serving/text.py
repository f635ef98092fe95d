"""Tokens that come one by one -> text that may be shown."""

from collections.abc import Sequence
from typing import Any


CONTEXT = 6  # tokens that are read again before new ones: a tokenizer may write a word's blank only behind another


class TextStream:
    """Turns a growing row of tokens into text, withholding what a later token may still change.

    Withheld is half a character, and the end of the text where it may be the beginning of a stop string. Text from a
    stop string on is dropped.

    Args:
        tokenizer: of the model.
        prompt_ids: the prompt's end is read again, and never shown.
        stop: strings.

    Attributes:
        text: shown so far.
        stopped: a stop string was found; nothing more will be shown.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids = list(prompt_ids[-CONTEXT:])
        self._known = 0  # tokens from here on ...
        self._read = len(self.ids)  # ... to here have been turned into text
        self._withheld = ""
        self.text = ""
        self.stopped = False

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """More tokens -> the text that they let be shown; `last` withholds nothing."""
        if self.stopped:
            return ""
        self.ids += token_ids
        before = self._decode(self.ids[self._known : self._read])
        after = self._decode(self.ids[self._known :])
        new = ""
        if len(after) > len(before) and (last or not after.endswith("\ufffd")):
            new = after[len(before) :]
            self._known, self._read = max(self._read - CONTEXT, 0), len(self.ids)
        pending = self._withheld + new
        for place in range(len(pending) if self.stop else 0):
            if pending.startswith(self.stop, place):
                self.stopped = True
                return self._show(pending[:place], "")
        keep = 0 if last else self._begun(pending)
        return self._show(pending[: len(pending) - keep], pending[len(pending) - keep :])

    def _begun(self, text: str) -> int:
        """Characters at the end of `text` that a stop string may begin with."""
        for length in range(min(len(text), max(map(len, self.stop), default=1) - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                return length
        return 0

    def _show(self, shown: str, withheld: str) -> str:
        self._withheld = withheld
        self.text += shown
        return shown
