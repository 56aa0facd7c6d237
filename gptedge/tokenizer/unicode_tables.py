"""Which characters Hugging Face's engines know, so that another Unicode version here changes no token.

`tokenizers` 0.23 mixes engines of several Unicode versions: Oniguruma and the Rust `regex` crate know version 16, the
Rust standard library 17, its normalization tables 9, its punctuation table 8. The `regex` module and `unicodedata` here
follow their own releases. What differs is listed below, found by comparing all 1,112,064 scalar values.

`disguise` and `hide` make the `regex` module see a character assigned after version 16 as unassigned: they put one that
no version assigns in its place. Both keep lengths, so what splits the result splits the original at the same places.

Not here: characters that version 16 knows and an older `regex` module does not (regex >= 2024.9 knows version 16).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cache
from itertools import accumulate

_FIRST_DISGUISE = 0x40000
_HIDDEN = "\ufdef"  # a noncharacter: unassigned for good
# What version 17 added to `char::is_numeric`, and the noncharacters that stand for it.
_NUMERIC_17 = {c: 0xFDD0 + i for i, c in enumerate([*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)])}

# Lengths of runs, in hex: assigned, unassigned, assigned, … from U+0000 up to U+EFFFF, Unicode 16. Planes 4 to 13 count
# as assigned: no version has touched them, so they need no hiding, and disguises are taken from them.
_RUNS = (
    "378 2 6 4 7 1 1 1 14 1 18d 1 26 2 32 2 3 1 37 8 1b 4 6 b 10e 1 3c 2 65 e 3b 2 31 2 f 1 1c 2 1 1 b 5 1f 1 2 5 "
    "ed 1 8 2 2 2 16 1 7 1 1 3 4 2 9 2 2 2 4 8 1 4 2 1 5 2 19 2 3 1 6 4 2 2 16 1 7 1 2 1 2 1 2 2 1 1 5 4 2 2 3 3 "
    "1 7 4 1 1 7 11 a 3 1 9 1 3 1 16 1 7 1 2 1 5 2 a 1 3 1 3 2 1 f 4 2 c 7 7 1 3 1 8 2 2 2 16 1 7 1 2 1 5 2 9 2 2 "
    "2 3 7 3 4 2 1 5 2 12 a 2 1 6 3 3 1 4 3 2 1 1 1 2 3 2 3 3 3 c 4 5 3 3 1 4 2 1 6 1 e 15 5 d 1 3 1 17 1 10 2 9 "
    "1 3 1 4 7 2 1 3 2 1 2 4 2 a 7 16 1 3 1 17 1 a 1 5 2 9 1 3 1 4 7 2 6 2 1 4 2 a 1 3 c d 1 3 1 33 1 3 1 6 4 10 "
    "2 1a 1 3 1 12 3 18 1 9 1 1 2 7 3 1 4 6 1 1 1 8 6 a 2 3 c 3a 4 1d 25 2 1 1 1 5 1 18 1 1 1 17 2 5 1 1 1 7 1 a "
    "2 4 20 48 1 24 4 27 1 24 1 f 1 d 25 c6 1 1 5 1 2 179 1 4 2 7 1 1 1 4 2 29 1 4 2 21 1 4 2 7 1 1 1 4 2 f 1 39 "
    "1 4 2 43 2 20 3 1a 6 56 2 6 2 29d 3 59 7 16 9 18 9 14 c d 1 3 1 2 c 5e 2 a 6 a 6 1a 6 59 7 2b 5 46 a 1f 1 c "
    "4 c 4 1 3 2a 2 5 b 2c 4 1a 6 b 3 3e 2 41 1 1d 2 b 6 a 6 e 2 1f 31 4d 1 a6 8 3c 3 f 3 3e 5 2b 2 b 8 2b 5 216 "
    "2 6 2 26 2 6 2 8 1 1 1 1 1 1 1 1f 2 35 1 f 1 e 2 6 1 13 2 3 1 9 1 65 1 c 2 1b 1 d 3 21 f 21 f 8c 4 29a 16 b "
    "15 714 2 20 1 15d 5 2d 1 1 5 1 2 38 7 2 e 18 9 7 1 7 1 7 1 7 1 7 1 7 1 7 1 7 1 7e 22 1a 1 59 c d6 1a 50 1 56 "
    "2 67 5 2b 1 5e 1 56 9 30 1 726d 3 37 9 15c 14 b8 8 ce 2 2 1 1 1 8 15 3b 3 a 6 38 8 46 8 c 6 74 b 1e 3 4e 1 b "
    "4 21 1 37 9 e 2 a 2 67 18 1c a 6 2 6 2 6 9 7 1 7 1 3c 4 7e 2 a 6 2ba4 c 17 4 31 4 226e 2 6a 26 7 c 5 5 1a 1 "
    "5 1 1 1 2 1 2 1 7d 10 1bd 2 36 7 1 20 2a 6 33 1 13 1 4 4 5 1 87 2 1 1 be 3 6 2 6 2 6 2 3 3 7 1 7 a 5 2 c 1 "
    "1a 1 13 1 2 1 f 2 e 22 7b 5 3 4 2d 3 58 1 d 3 1 2f 2e 82 1d 3 31 f 1c 4 24 9 1e 5 2b 5 1e 1 25 4 e 2a 9e 2 a "
    "6 24 4 24 4 28 8 34 b c 1 f 1 7 1 2 1 b 1 f 1 7 1 2 3 34 c 137 9 16 a 8 18 6 1 2a 1 9 45 6 2 1 1 2c 1 2 3 1 "
    "2 17 1 48 8 9 30 13 1 2 5 21 3 1b 5 1 40 38 4 14 2 32 1 2 5 8 1 3 1 1d 2 3 4 a 7 9 7 40 20 27 4 c 9 36 3 1d "
    "2 1b 5 1a 7 4 c 7 50 49 37 33 d 33 7 2e 8 a 6 26 3 1d 8 2 d0 1f 1 2a 1 3 2 2 10 3 37 2c 8 2a 16 1a 26 1c 14 "
    "17 9 4e 4 24 9 44 a 1 2 19 7 a 6 35 1 12 8 27 9 60 1 14 b 12 1 2f 3e 7 1 1 1 4 1 f 1 b 6 3b 5 a 6 4 1 8 2 2 "
    "2 16 1 7 1 2 1 5 1 a 2 2 2 3 2 1 6 1 5 7 2 7 3 5 b a 1 1 2 1 1 26 1 a 1 1 2 1 1 4 1 a 1 2 8 2 1d 5c 1 5 1e "
    "48 8 a a6 36 2 26 22 45 b a 6 d 13 3a 6 a 6 14 1c 1b 2 f 4 17 b9 3c 64 53 c 8 2 1 2 8 1 2 1 1e 1 2 2 c 9 a "
    "46 8 2 2e 2 b 1b 48 8 53 d 49 7 a b6 22 e a 6 9 1 2d 1 e a 1d 3 20 2 16 1 e 49 7 1 2 1 2c 3 1 1 2 1 9 8 a 6 "
    "6 1 2 1 25 1 2 1 6 7 a 136 19 7 11 1 29 3 1d 55 1 f 32 d 39b 66 6f 1 5 b c4 a4c 63 d 456 a f9b 5 247 1ab9 3a "
    "6c6 239 7 1f 1 a 4 51 1 a 6 1e 2 6 a 46 a a 1 7 1 15 5 13 1b0 3a c6 5b 65 4b 4 39 7 11 40 5 b 2 e 17f8 8 4d6 "
    "29 a 22e7 4 1 7 1 2 1 123 f 1 1d 3 2 1 e 4 8 18c 904 6b 5 d 3 9 7 a 2 8 f5c fa 6 1b4 4c 2e 2 17 9 74 3c f6 a "
    "27 2 c2 15 46 7a 14 c 14 c 57 9 19 87 55 1 47 1 2 2 1 2 2 2 4 1 c 1 1 1 7 1 41 1 4 2 8 1 7 1 1c 1 4 1 5 1 1 "
    "3 7 1 154 2 124 2 2be f 5 1 f 450 1f 6 6 d5 7 1 11 2 7 1 2 1 5 5 3e 21 1 70 2d 3 e 2 a 4 2 140 1f 11 3a 5 1 "
    "1d0 2a d6 2b 4 1 1e0 7 1 4 1 2 1 f 1 c5 2 10 29 4c 4 a 4 2 311 44 4c 3d c2 4 1 1b 1 2 1 1 2 1 1 a 1 4 1 1 1 "
    "1 6 1 4 1 1 1 1 1 1 3 1 2 1 1 2 1 1 1 1 1 1 1 1 1 1 2 1 1 2 4 1 7 1 4 1 4 1 1 1 a 1 11 5 3 1 5 1 11 34 2 10e "
    "2c 4 64 c f 2 f 1 f 1 25 a ae 38 1d d 2c 4 9 7 2 e 6 9a 3d8 4 11 3 d 3 77 4 5f 6 c 4 1 f c 4 38 8 a 6 28 8 "
    "1e 2 c 4 2 3e 154 c e 2 d 3 a 5 38 7 f 2 b 6 9 7 93 1 66 406 a6e0 20 103a 6 de 2 1682 e 1d31 f 26e 9a2 21e "
    "5e2 134b 5 1060 dc50 a0000 1 1 1e 60 80 f0 fe10 "
)

# Simple lower-case pairs that Python 3.11 (Unicode 14) lacks, and capital sigma, which `str.lower` treats by context
# and Rust's `char::to_lowercase` does not.
LOWERCASE = {0x3A3: 0x3C3, 0x1C89: 0x1C8A, 0xA7CB: 0x264, 0xA7DC: 0x19B}
LOWERCASE |= {c: c + 1 for c in (0xA7CC, 0xA7CE, 0xA7D2, 0xA7D4, 0xA7DA)}
LOWERCASE |= {c: c + 0x20 for c in range(0x10D50, 0x10D66)} | {c: c + 0x1B for c in range(0x16EA0, 0x16EB9)}

# Rust's `char::is_numeric`, in disguised text.
NUMERIC = r"[\p{N}\uFDD0-\uFDDC]"
# Rust's `char::is_whitespace`, and `\s` of all three engines.
WHITESPACE = r"\p{White_Space}"
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
# `\w` of the Rust `regex` crate, and of Oniguruma inside and outside of a class; all as the inside of a class.
RUST_WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200C\u200D"
ONIG_WORD_IN_CLASS = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}--[\u200C\u200D]]"
ONIG_WORD = ONIG_WORD_IN_CLASS + r"\u00B2\u00B3\u00B9\u00BC-\u00BE"
PUNCTUATION = (
    r"[[\p{P}!-/:-@\[-`\{-\~\u166D\U000111C9]--[\u061D\u09FD\u0A76\u0C77\u0C84\u1B4E\u1B4F\u1B7D-\u1B7F"
    r"\u2E43-\u2E5D\U00010D6E\U00010EAD\U00010F55-\U00010F59\U00010F86-\U00010F89\U000113D4-\U000113D8"
    r"\U0001144B-\U0001144F\U0001145A\U0001145B\U0001145D\U00011660-\U0001166C\U000116B9\U0001183B"
    r"\U00011944-\U00011946\U000119E2\U00011A3F-\U00011A46\U00011A9A-\U00011A9C\U00011A9E-\U00011AA2"
    r"\U00011B00-\U00011B09\U00011BE1\U00011C41-\U00011C45\U00011C70\U00011C71\U00011EF7\U00011EF8"
    r"\U00011F43-\U00011F4F\U00011FFF\U00012FF1\U00012FF2\U00016D6D-\U00016D6F\U00016E97-\U00016E9A\U00016FE2"
    r"\U0001E5FF\U0001E95E\U0001E95F]]"
)

# Characters newer than Unicode 9 that normalization changes or reorders in later versions, with whole blocks where that
# is shorter: a character that normalization does not touch may stand here, because it is a boundary in any case.
_NORMALIZED_SINCE_9 = (
    "\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0cf3\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1adf\u1ae0-\u1aff\u1df6-\u1dfa"
    "\u32ff\ua7f1-\ua7f4\ua82c\uab69\U000105c0-\U000105ff\U00010781-\U000107bf\U00010d24-\U00010d27"
    "\U00010d69-\U00010d6d\U00010eab\U00010eac\U00010efa-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85"
    "\U00011070\U0001133b\U00011380-\U000113ff\U0001145e\U00011839\U0001183a\U00011938\U0001193d\U0001193e\U00011943"
    "\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42\U00011d44\U00011d45\U00011d97\U00011f00-\U00011f5f"
    "\U00016100-\U0001613f\U00016d40-\U00016d7f\U00016ff0\U00016ff1\U0001cc00-\U0001ceff\U0001e030-\U0001e08f"
    "\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef\U0001e4d0-\U0001e5ff\U0001f16c\U0001fbf0-\U0001fbf9"
)


def disguise(text: str) -> tuple[str, dict[int, int]]:
    """The text with a stand-in for each character unknown to Unicode 16, and the table that `translate`s it back."""
    unknown = _unknown_in(text)
    if not unknown:
        return text, {}
    present = set(text)
    free = (c for c in range(_FIRST_DISGUISE, 0xE0000) if chr(c) not in present)
    table = {c: _NUMERIC_17.get(c) or next(free) for c in sorted(map(ord, unknown))}
    return text.translate(table), {stand_in: c for c, stand_in in table.items()}


def hide(text: str) -> str:
    """The text with one and the same stand-in for all of them: enough to find places in it."""
    unknown = _unknown_in(text)
    return text.translate({ord(c): _HIDDEN for c in unknown}) if unknown else text


def split_at_inert(text: str) -> list[str]:
    """Text, boundary, text, …: a boundary is one character that Hugging Face's normalization leaves alone."""
    inert = {c for c in _candidates(text, _newer_basic()) if _is_unknown(c) or _newer().match(c)}
    return re.split(f"([{re.escape(''.join(inert))}])", text) if inert else [text]


def _unknown_in(text: str) -> set[str]:
    return set() if text.isascii() else {c for c in _candidates(text, _unknown_basic()) if _is_unknown(c)}


def _candidates(text: str, basic: re.Pattern[str]) -> set[str]:
    """Characters to look at one by one. A class of plane 0 scans 7 ns a character, one of all planes 1,400 ns."""
    return set(text) if basic.search(text) is not None else set(_ASTRAL.findall(text))


def _is_unknown(character: str) -> bool:
    return bisect_right(_edges(), ord(character)) % 2 == 1


@cache
def _edges() -> list[int]:
    """Where runs end: code points after an odd number of edges are unassigned."""
    return list(accumulate(int(run, 16) for run in _RUNS.split()))


@cache
def _unknown_basic() -> re.Pattern[str]:
    """Matches one character of plane 0 that Unicode 16 does not know."""
    runs = zip(_edges()[::2], _edges()[1::2], strict=True)
    return re.compile(f"[{''.join(f'{chr(start)}-{chr(end - 1)}' for start, end in runs if start < 0x10000)}]")


@cache
def _newer() -> re.Pattern[str]:
    return re.compile(f"[{_NORMALIZED_SINCE_9}]")


@cache
def _newer_basic() -> re.Pattern[str]:
    plane_0 = re.sub("[\U00010000-\U0010ffff]-?", "", _NORMALIZED_SINCE_9)
    return re.compile(f"[{plane_0}{_unknown_basic().pattern[1:-1]}]")


_ASTRAL = re.compile("[\U00010000-\U0010ffff]")
