"""Openings: opening and continuation are the text, and no character or word is cut in two."""
import random
import re

import pytest

from data.openings import UNSPACED, cut_opening
from data.stages import no_records, write_stages

ALPHABETS = ["abcd efg  hi\n", "这本书很好看，。 a1", "สวัสดีครับผม ", "e\u0301a\u0308 o\u0302", "👩👍",
             "👩\u200d👧👍🏽🇩🇪🇫🇷好", "한국어 영화 ", " \t\n", "नमस्ते दुनिया "]


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    return ["".join(draw.choices(alphabet, k=draw.randrange(60))) for alphabet in ALPHABETS for _ in range(300)]


def test_opening_and_continuation_are_the_text(texts):
    for text in texts:
        assert "".join(cut_opening(text)) == text


def test_a_cut_text_has_something_on_both_sides(texts):
    cut = [cut_opening(text) for text in texts]
    assert sum(bool(opening) for opening, _ in cut) > 500
    for opening, continuation in cut:
        assert opening.strip() or not opening
        assert continuation.strip() or not opening


def test_an_opening_has_two_to_eight_words_and_at_most_a_third():
    for n in range(1, 60):
        text = " ".join(f"word{i}" for i in range(n))
        opening = cut_opening(text)[0]
        words = len(opening.split())
        assert words == 0 if n < 6 else 2 <= words <= min(8, n // 3)


def test_an_opening_of_han_has_two_to_twelve_characters():
    counts = {len(cut_opening("很" * n)[0]) for n in range(6, 200)}
    assert counts == set(range(2, 13))


def test_the_number_of_words_follows_from_the_text():
    texts = [f"{i} " + "so " * 40 for i in range(200)]
    assert {len(cut_opening(text)[0].split()) for text in texts} == set(range(2, 9))
    assert [cut_opening(text) for text in texts] == [cut_opening(text) for text in texts]


@pytest.mark.parametrize("text", ["👩\u200d👩\u200d👧" * 9 + "好" * 9, "👍🏽" * 9 + "好" * 9, "🇩🇪" * 9 + "好" * 9,
                                  "好\u0301" * 20, "ที่นี่" * 9, "好❤️" * 9])
def test_what_is_read_as_one_character_stays_whole(text):
    clusters = re.findall(r"\U0001f469\u200d\U0001f469\u200d\U0001f467|\U0001f44d\U0001f3fd|[\U0001f1e6-\U0001f1ff]{2}|"
                          r".[\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\ufe0f]*", text)
    borders = {len("".join(clusters[:i])) for i in range(len(clusters))}
    for k in range(20):  # other texts, other numbers of characters
        opening = cut_opening(text + "好" * k)[0]
        assert opening
        assert len(opening) in borders | {len(text) + i for i in range(k)}


def test_a_latin_word_in_a_chinese_text_stays_whole():
    for k in range(50):
        text = "我用iPhone15ProMax拍电影" + "真好" * (10 + k)
        opening, continuation = cut_opening(text)
        assert not (opening[-1].isascii() and continuation[0].isascii())


def test_a_few_foreign_words_do_not_change_how_a_text_is_cut():
    opening, continuation = cut_opening("The film 卧虎藏龙 is a very good film and you should see it soon")
    assert continuation[0] == " "
    assert not UNSPACED.match(opening[-1]) or opening.endswith("卧虎藏龙")


@pytest.mark.parametrize("text", ["", " ", "word", "好", "a b", "!!! ??? ... --- !!! ???", "\n\n\n"])
def test_what_is_too_short_or_no_words_is_not_cut(text):
    assert cut_opening(text) == ("", text)


# ---- records -------------------------------------------------------------------------------------

class Writer:
    """Keeps what is written."""

    def __init__(self):
        self.written = {}

    def records(self, stage, split, records):
        self.written[stage, split] = records


def test_held_out_openings_are_unseen_in_training_and_stand_once():
    records, out = no_records(), Writer()
    records["ppo", "train"] = [{"prompt": "a b"}, {"prompt": "a b"}, {"prompt": "c d"}]
    records["ppo", "val"] = [{"prompt": "a b"}, {"prompt": "e f"}, {"prompt": "e f"}]
    write_stages(out, records)
    assert out.written["ppo", "val"] == [{"prompt": "e f"}]
    assert len(out.written["ppo", "train"]) == 3


def test_the_order_of_records_does_not_depend_on_that_of_the_raw_files():
    orders = []
    for seed in range(2):
        records, out = no_records(), Writer()
        records["sft", "train"] = [{"prompt": f"a{i}", "response": " b"} for i in range(50)]
        random.Random(seed).shuffle(records["sft", "train"])
        write_stages(out, records)
        orders.append(out.written["sft", "train"])
    assert orders[0] == orders[1]
    assert orders[0] != [{"prompt": f"a{i}", "response": " b"} for i in range(50)]
