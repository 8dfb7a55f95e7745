"""Texts without a prompt, cut into opening words and a continuation: how a plain text becomes a task.
"""
import re
import unicodedata

from data.hashing import text_hash

# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, Han.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
                      "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
WORDS, CHARACTERS = (2, 8), (2, 12)  # of an opening
JOINER = "\u200d"  # makes one picture of the two beside it
EXTENDS = re.compile("[\u200c\u200d\u1160-\u11ff\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
FLAG = re.compile("[\U0001f1e6-\U0001f1ff]")  # two of them are a flag


def cut_opening(text: str) -> tuple[str, str]:
    """(opening, continuation) of a text; together they are the text. ("", text) if it is too short.

    The opening has 2 to 8 words (2 to 12 characters of a script without spaces), a number that
    follows from the text, but at most a third of it. The continuation keeps the space that it begins
    with. The cut is never inside a word or inside what is read as one character.

    >>> cut_opening("One two three four five six.")
    ('One two', ' three four five six.')
    """
    letters = sum(map(str.isalpha, text))
    unspaced = 2 * len(UNSPACED.findall(text)) > letters
    shortest, longest = CHARACTERS if unspaced else WORDS
    borders = [i for i in range(1, len(text))
               if text[i].isspace() and not text[i - 1].isspace() and text[i:].strip()
               or unspaced and ends_character(text, i)] if letters else []
    n = shortest + text_hash("opening " + text) % (longest - shortest + 1)
    n = min(n, (len(borders) + 1) // 3)
    return (text[:borders[n - 1]], text[borders[n - 1]:]) if n >= shortest else ("", text)


def ends_character(text: str, i: int) -> bool:
    """Whether text[:i] ends with a complete character, no space, and not inside a word of a script
    that has spaces."""
    before, after = text[i - 1], text[i]
    if before.isspace() or before == JOINER or EXTENDS.match(after):
        return False
    if unicodedata.category(after)[0] == "M":  # an accent, a vowel sign
        return False
    if FLAG.match(before) and FLAG.match(after):
        run = len(re.search(f"{FLAG.pattern}+$", text[:i])[0])
        return run % 2 == 0
    both = before.isalnum() and after.isalnum()
    return not (both and not UNSPACED.match(before) and not UNSPACED.match(after))
