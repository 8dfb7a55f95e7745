"""Byte-pair encoding: the vocabulary is the one of the definition."""
from collections import Counter

import pytest
import regex

from data.tokenizer import train_bpe, train_chars
from data.tokenizer import PATTERN, SPECIAL_TOKENS
from runtime.options import UserError
from tests.conftest import made_up_reviews


def test_merges_follow_the_most_frequent_pair():
    tokenizer = train_bpe(["abab abab cdab"], 256 + 6 + 2)
    assert tokenizer.ranks[256:] == [b"ab", b"abab"]


def test_training_equals_the_definition():
    """Counting all pairs again for every merge gives the vocabulary of the incremental counts."""
    texts = made_up_reviews(False)[:150] + ["aaaaa aaa aaaa", "banana bandana"]
    words = [[bytes([b]) for b in piece.encode()] for t in texts
             for piece in regex.findall(PATTERN, t)]
    ranks = [bytes([b]) for b in range(256)]
    while len(ranks) < 330:
        counts = Counter(pair for w in words for pair in zip(w, w[1:], strict=False))
        best = min(counts, key=lambda p: (-counts[p], ranks.index(p[0]), ranks.index(p[1])))
        if best[0] + best[1] not in ranks:
            ranks.append(best[0] + best[1])
        for w in words:
            i = 0
            while i + 1 < len(w):
                if (w[i], w[i + 1]) == best:
                    w[i:i + 2] = [best[0] + best[1]]
                i += 1
    assert train_bpe(texts, 330 + 6).ranks == ranks


def test_the_vocabulary_has_the_size_asked_for():
    tokenizer = train_bpe(made_up_reviews(True), 400)
    assert tokenizer.n_vocab == len(tokenizer.ranks) + len(SPECIAL_TOKENS) == 400


def test_too_little_text_gives_a_smaller_vocabulary_and_says_so(capsys):
    assert train_bpe(["ab ab"], 400).n_vocab < 300
    assert "only" in capsys.readouterr().err


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(UserError, match="262"):
        train_bpe(["x"], 261)


def test_the_order_of_the_texts_does_not_matter():
    texts = made_up_reviews(True)
    assert train_bpe(texts[::-1], 350).ranks == train_bpe(texts, 350).ranks


def test_characters_are_numbered_in_order():
    tokenizer = train_chars("hello")
    assert tokenizer.encode("hole") == [1, 3, 2, 0]
    assert tokenizer.decode([1, 3, 2, 0]) == "hole"


def test_unknown_characters_are_refused():
    with pytest.raises(UserError, match="z"):
        train_chars("hello").encode("hez")
