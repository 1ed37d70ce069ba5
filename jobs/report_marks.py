"""Which stretches of a text stand in another one too, word for word."""

import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from curate.report.document import Mark

_MOST_CHARS = 200_000
"""Of a text; what is behind is not looked at."""
_NO_SPACES = ("CJK UNIFIED", "CJK COMPAT", "HIRAGANA", "KATAKANA", "THAI ", "LAO ", "KHMER ",
              "MYANMAR ")  # fmt: skip


class _Word(NamedTuple):
    text: str
    start: int
    end: int
    size: float
    """Of a letter of a script without spaces half a word."""


def shared_marks(text: str, other: str, *, words: int, kind: str) -> list[Mark]:
    """The stretches of `text` that lie in runs of so many words which `other` has too.

    Words are compared as the scorer `leakage` does: compatibility forms, capitals and punctuation
    make no difference, and in scripts without spaces two letters count as a word.

    Args:
        text: that is shown.
        other: that it is compared with.
        words: length of a run; where `other` has fewer, its own.
        kind: of the marks.

    Returns:
        In order, not overlapping; places are those of `text`.
    """
    own, theirs = (list(_words(each[:_MOST_CHARS])) for each in (text, other))
    if not own or not theirs:
        return []
    length = min(_run_length(own, words), _run_length(theirs, words), len(theirs))
    known = {run for _, run in _runs(theirs, length)}
    found: list[Mark] = []
    for at, run in _runs(own, length):
        if run not in known:
            continue
        start, end = own[at].start, own[at + length - 1].end
        if found and start <= found[-1].end + 1:
            found[-1] = Mark(start=found[-1].start, end=max(end, found[-1].end), kind=kind)
        else:
            found.append(Mark(start=start, end=end, kind=kind))
    return found


def _run_length(words: list[_Word], count: int) -> int:
    """How many entries make up so many words of this text."""
    return round(count / (sum(word.size for word in words) / len(words)))


def _runs(words: list[_Word], length: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    for at in range(len(words) - length + 1):
        yield at, tuple(word.text for word in words[at : at + length])


def _words(text: str) -> Iterator[_Word]:
    """Letters, marks and digits that stand together, and each letter of scripts without spaces."""
    start = 0
    letters: list[str] = []
    for at, char in enumerate(text):
        kind = unicodedata.category(char)[0]
        alone = kind == "L" and unicodedata.name(char, "").startswith(_NO_SPACES)
        if letters and (alone or kind not in "LMN"):
            yield _Word("".join(letters), start, at, 1.0)
            letters = []
        if alone:
            yield _Word(char, at, at + 1, 0.5)
        elif kind in "LMN":
            if not letters:
                start = at
            letters += unicodedata.normalize("NFKC", char).lower()
    if letters:
        yield _Word("".join(letters), start, len(text), 1.0)
