"""The engine: a reply is the one that `generate` writes alone, whoever joins and leaves meanwhile; its
text is cut where a stop string begins; nobody waits for a slow reader."""
import dataclasses
import itertools
import threading
import time

import pytest
import torch

import serve.batch
import serve.engine
from data.tokenizer import Tokenizer, train_bpe
from runtime import device
from runtime.options import UserError
from sample import Decoder, Sampling, generate, reply_ids
from serve.engine import Busy, Engine, Failed
from serve.replies import Reply, ReplyText

needs_compiler = pytest.mark.skipif(bool(device.compiler_fault()), reason=device.compiler_fault())
WAYS = [Sampling(), Sampling(temperature=0.7), Sampling(temperature=0), Sampling(top_p=0.6),
        Sampling(temperature=1.5, top_k=20), Sampling(repetition_penalty=1.6),
        Sampling(temperature=0.5, top_p=0.9, repetition_penalty=1.2), Sampling(temperature=2.0)]


def make(world, **settings) -> Engine:
    return Engine(str(world.root / "sft"), **{"device": "cpu", "dtype": "float32", "rows": 4, **settings})


@pytest.fixture(scope="module")
def engine(world):
    with make(world) as engine:
        yield engine


@pytest.fixture(scope="module")
def jobs(engine):
    """Prompts of 1 to 40 tokens, each with a sampling of its own."""
    g, ordinary = torch.Generator().manual_seed(0), len(engine.tokenizer.ranks)
    lengths = [3, 17, 1, 40, 5, 5, 29, 12, 2, 33, 8, 21]
    return [dict(ids=torch.randint(ordinary, (n,), generator=g).tolist(), max_tokens=10 + 7 * i % 60,
                 sampling=way, seed=i % 3, row=i)
            for i, (n, way) in enumerate(zip(lengths, itertools.cycle(WAYS), strict=False))]


def alone(engine: Engine, ids, max_tokens, sampling, seed=0, row=0) -> list[int]:
    """What `generate` writes by itself."""
    sampling = dataclasses.replace(sampling, suppress=engine.suppress)
    tokens = torch.tensor([ids])
    out = generate(engine.model, tokens, torch.ones_like(tokens, dtype=torch.bool), max_tokens, sampling=sampling,
                   seed=seed, rows=[row], end_id=engine.tokenizer.end_ids, decoder=Decoder(engine.model))
    return reply_ids(out)[0]


@pytest.fixture(scope="module")
def expected(engine, jobs):
    """The jobs' replies, each written alone."""
    return [alone(engine, **job) for job in jobs]


# ---- equal to the reply written alone ------------------------------------------------------------

@pytest.mark.parametrize("together", [1, 2, 4, 7])
def test_replies_are_those_written_alone_whoever_else_writes(world, jobs, expected, together):
    with make(world, rows=together) as engine:
        replies = [engine.submit(**job) for job in jobs]
        for job, reply, right in zip(jobs, replies, expected, strict=True):
            text, ids, finish = reply.result(60)
            assert ids == right
            assert text == engine.tokenizer.reply_text(ids)
            assert finish == ("stop" if ids[-1] in engine.tokenizer.end_ids else "length")
            assert reply.usage == (len(job["ids"]), len(ids))


def test_joining_at_other_times_changes_nothing(world, jobs, expected):
    with make(world, rows=3) as engine:
        replies = []
        for i, job in enumerate(jobs):
            replies.append(engine.submit(**job))
            if i % 2 and replies:  # the next ones join in the midst of this one
                next(iter(replies[i // 2]), None)
        assert [r.result(60)[1] for r in replies] == expected


def test_memory_for_one_row_is_enough_for_all(world, jobs, expected):
    with make(world, memory=1) as engine:
        replies = [engine.submit(**job) for job in jobs]
        assert [r.result(60)[1] for r in replies] == expected
    assert engine.batch.room == 0


def test_a_short_prompt_may_join_a_reply_that_is_long_already(world, jobs, expected, monkeypatch):
    """The cache grows to more rows than it had, and keeps as many positions as the long reply fills."""
    slowed(monkeypatch, 0.005)
    with make(world) as other:
        first = other.submit(**long_job(other))
        while len(first.ids) < 70:
            time.sleep(0.005)
        second = other.submit(**jobs[0])
        assert second.result(60)[1] == expected[0]
        assert first.result(60)[1] == other.submit(**long_job(other)).result(60)[1]


def test_equal_prompts_are_read_once(world, jobs, monkeypatch):
    read, prefill = [], serve.batch.prefill
    monkeypatch.setattr(serve.batch, "prefill", lambda model, tokens, *more: (
        read.append(len(tokens)), prefill(model, tokens, *more))[1])
    with make(world) as engine:
        with engine._work:  # all of them are there when the thread looks
            replies = [engine.submit(**jobs[0] | {"row": row}) for row in range(4)]
        ids = [r.result(60)[1] for r in replies]
        assert ids == [alone(engine, **jobs[0] | {"row": row}) for row in range(4)]
        assert ids[0] != ids[1]
    assert read == [1]


def test_prompts_of_like_length_are_read_together_and_others_apart(world, jobs, monkeypatch):
    read, prefill = [], serve.batch.prefill
    monkeypatch.setattr(serve.batch, "prefill", lambda model, tokens, mask, cache: (
        read.append(mask.sum(1).tolist()), prefill(model, tokens, mask, cache))[1])
    ids = jobs[3]["ids"]
    alike = [jobs[i] | {"ids": ids[:n]} for i, n in enumerate((9, 12, 10, 12, 40, 11))]
    with make(world, rows=6) as engine:
        with engine._work:
            replies = [engine.submit(**job) for job in alike]
        assert [r.result(60)[1] for r in replies] == [alone(engine, **job) for job in alike]
    assert read == [[9, 12, 10], [40], [11]]


@needs_compiler
def test_a_compiled_step_writes_the_same_beside_an_idle_row(world, jobs, expected, monkeypatch):
    compile_all = serve.batch.Batch._compile_all

    def one_size(batch):  # of the sizes 1 and 2: compiling takes seconds
        batch.sizes = [2]
        compile_all(batch)

    monkeypatch.setattr(serve.batch.Batch, "_compile_all", one_size)
    with make(world, rows=2, compile=True) as engine:
        replies = [engine.submit(**job) for job in jobs[:5]]
        assert [r.result(60)[1] for r in replies] == expected[:5]
        assert list(engine.batch.steps) == [2]


def test_no_control_token_is_written_but_the_end(world, engine):
    control = {*engine.tokenizer.special_ids} - {*engine.tokenizer.end_ids}
    assert control <= {*engine.suppress}
    replies = [engine.submit([5], max_tokens=100, sampling=Sampling(3.0), row=row) for row in range(8)]
    written = [r.result(60)[1] for r in replies]
    assert not control & {i for ids in written for i in ids}
    assert any(ids[-1] in engine.tokenizer.end_ids for ids in written)


# ---- texts ---------------------------------------------------------------------------------------

TEXT = "ab好aab 好吗？abc😀"


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """Single bytes and a few merges: characters are cut by the borders of tokens."""
    return train_bpe(["abab abc"] * 4, 266)


def pieces(text: ReplyText, ids: list[int]) -> tuple[list[str], bool]:
    found = []
    for i in ids:
        piece, stopped = text.add(i)
        found.append(piece)
        if stopped:
            return found, True
    return [*found, text.rest()], False


def test_pieces_are_whole_characters(letters):
    found, _ = pieces(ReplyText(letters), letters.encode(TEXT))
    assert "".join(found) == TEXT and "\ufffd" not in "".join(found)
    assert len(letters.encode(TEXT)) > len(TEXT)


def test_a_reply_that_ends_within_a_character_says_so(letters):
    found, _ = pieces(ReplyText(letters), letters.encode("a好")[:-1])
    assert "".join(found) == "a\ufffd"


@pytest.mark.parametrize("tokens", ["bytes", "merged"])
def test_a_stop_string_cuts_the_text_before_it_wherever_tokens_end(letters, tokens):
    ids = letters.encode(TEXT) if tokens == "merged" else bytes_of(letters)
    for i, j in itertools.combinations(range(len(TEXT) + 1), 2):
        stop = TEXT[i:j]
        found, stopped = pieces(ReplyText(letters, [stop]), ids)
        assert stopped and "".join(found) == TEXT[:TEXT.find(stop)]
    assert pieces(ReplyText(letters, ["abd", "吗!"]), ids)[1] is False
    assert "".join(pieces(ReplyText(letters, ["abd", "😀😀"]), ids)[0]) == TEXT


def bytes_of(tokenizer: Tokenizer) -> list[int]:
    """TEXT, a token for each byte."""
    return [tokenizer.ranks.index(bytes([b])) for b in TEXT.encode()]


@pytest.mark.parametrize("stop", [("abc", "b"), ("b", "abc"), ("aab", "ab 好", "b "), ("c", "bc", "abc")])
def test_of_several_stop_strings_the_one_that_is_complete_first_cuts(letters, stop):
    read = next(n for n in range(len(TEXT) + 1) if TEXT[:n].endswith(stop))
    longest = max((s for s in stop if TEXT[:read].endswith(s)), key=len)
    for ids in (letters.encode(TEXT), bytes_of(letters)):
        assert "".join(pieces(ReplyText(letters, stop), ids)[0]) == TEXT[:read - len(longest)]


def test_stop_strings_in_the_engine(engine, jobs):
    job = jobs[3] | {"max_tokens": 40}
    text, ids, _ = engine.submit(**job).result(60)
    for stop in {text[i:i + 3] for i in range(0, len(text) - 3, 5)}:
        reply = engine.submit(**job, stop=[stop, "never there"])
        read = "".join(reply)
        assert read == text[:text.find(stop)] and reply.finish == "stop"
        assert reply.ids == ids[:len(reply.ids)]  # no token after the stop is written


# ---- readers, queue and errors -------------------------------------------------------------------

def test_who_does_not_read_holds_up_nobody(engine, jobs):
    unread = [engine.submit(**job) for job in jobs[:3]]
    assert [engine.submit(**job).result(60)[1] for job in jobs[3:]]
    assert all(r.result(60) for r in unread)
    for r in unread:
        assert "".join(r) == r.result()[0] and r.take() == ""


def test_a_listener_hears_of_every_change(engine, jobs):
    heard, reply = threading.Semaphore(0), engine.submit(**jobs[3])
    reply.listen(heard.release)
    text = ""
    while not reply.done:
        assert heard.acquire(timeout=30)
        text += reply.take()
    assert text + reply.take() == reply.result()[0]


def slowed(monkeypatch, seconds: float = 0.02) -> None:
    step = serve.batch.decode_step
    monkeypatch.setattr(serve.batch, "decode_step", lambda *a: (time.sleep(seconds), step(*a))[1])


def long_job(engine: Engine) -> dict:
    """A request that does not end by itself within 100 tokens."""
    endless = Sampling(suppress=tuple(engine.tokenizer.end_ids))
    return dict(ids=[5, 6, 7], max_tokens=100, sampling=endless)


def test_a_cancelled_reply_frees_its_row_and_keeps_its_text(world, monkeypatch, jobs, expected):
    slowed(monkeypatch)
    with make(world, rows=1) as engine:
        first, waits, other = (engine.submit(**long_job(engine)) for _ in range(3))
        while len(first.ids) < 3:
            time.sleep(0.005)
        waits.cancel()
        first.cancel()
        text, ids, finish = first.result(30)
        assert finish == "cancelled" and 3 <= len(ids) < 100
        assert text == engine.tokenizer.reply_text(ids)
        assert waits.result(30) == ("", [], "cancelled")
        other.cancel()
        assert engine.submit(**jobs[0]).result(30)[1] == expected[0]


def test_the_queue_is_bounded(world, monkeypatch):
    slowed(monkeypatch)
    with make(world, rows=1, most_waiting=2) as engine:
        replies = [engine.submit(**long_job(engine))]
        while not replies[0].ids:
            time.sleep(0.005)
        replies += [engine.submit(**long_job(engine)) for _ in range(2)]
        with pytest.raises(Busy):
            engine.submit(**long_job(engine))
        for reply in replies:
            reply.cancel()
        assert [r.result(30)[2] for r in replies] == ["cancelled"] * 3
        assert engine.submit([5], max_tokens=2).result(30)


def test_an_error_reaches_who_waits_and_the_next_request_is_answered(world, jobs, monkeypatch, capfd, expected):
    with make(world) as engine:
        step = serve.batch.decode_step
        failing = threading.Event()

        def broken(*a):
            if failing.is_set():
                failing.clear()
                raise RuntimeError("no luck")
            time.sleep(0.005)
            return step(*a)

        monkeypatch.setattr(serve.batch, "decode_step", broken)
        replies = [engine.submit(**long_job(engine)) for _ in range(3)]
        while not all(r.ids for r in replies):
            time.sleep(0.005)
        failing.set()
        for reply in replies:
            with pytest.raises(Failed, match="RuntimeError"):
                reply.result(30)
            with pytest.raises(Failed):
                list(reply)
        assert "no luck" in capfd.readouterr().err  # for whoever runs the server
        assert engine.submit(**jobs[0]).result(30)[1] == expected[0]


def test_a_failed_prompt_ends_its_own_request(world, jobs, monkeypatch, capfd):
    with make(world) as engine:
        with monkeypatch.context() as m:
            m.setattr(serve.batch, "prefill", lambda *_: 1 / 0)
            with pytest.raises(Failed, match="ZeroDivisionError"):
                engine.submit(**jobs[0]).result(30)
        assert engine.submit(**jobs[0]).result(30)


def test_a_dead_thread_is_told_to_all(world, jobs, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def end(*_):
        raise SystemExit(3)

    engine = make(world)
    with monkeypatch.context() as m:
        m.setattr(serve.batch, "prefill", end)
        with pytest.raises(Failed, match="start the server again"):
            engine.submit(**jobs[0]).result(30)
    with pytest.raises(Failed, match="SystemExit"):
        engine.submit(**jobs[0])
    engine.close()


def test_numbers_that_are_not_finite_end_one_reply_and_no_other(world, jobs, monkeypatch, expected):
    with make(world) as engine:
        step = serve.batch.decode_step
        bad = engine.submit(**long_job(engine))
        while not bad.ids:
            time.sleep(0.001)

        def spoilt(model, token, slot, start, cache, span):
            logits = step(model, token, slot, start, cache, span)
            if len(token) == 3:
                logits[0] = cache.kv[:, :, 0] = float("nan")
            return logits

        with engine._work:
            monkeypatch.setattr(serve.batch, "decode_step", spoilt)
            others = [engine.submit(**jobs[i]) for i in (3, 0)]  # the shorter one takes the bad one's row
        with pytest.raises(UserError, match="not finite"):
            bad.result(30)
        assert [r.result(30)[1] for r in others] == [expected[3], expected[0]]


def test_closing_ends_what_is_written_and_refuses_more(world, monkeypatch):
    slowed(monkeypatch)
    engine = make(world, rows=1)
    replies = [engine.submit(**long_job(engine)) for _ in range(3)]
    engine.close()
    for reply in replies:
        with pytest.raises(Failed, match="closed"):
            reply.result(30)
    with pytest.raises(Failed, match="closed"):
        engine.submit([5], max_tokens=1)
    engine.close()  # again is harmless


def test_what_cannot_be_written_is_refused_at_once(engine):
    for wrong in (dict(ids=[], max_tokens=5), dict(ids=[5], max_tokens=0), dict(ids=[5], max_tokens=10**6),
                  dict(ids=[5] * 120, max_tokens=9), dict(ids=[5], max_tokens=5, stop=["a", ""])):
        with pytest.raises(UserError):
            engine.submit(**wrong)


def test_a_reply_s_result_may_be_late():
    with pytest.raises(TimeoutError):
        Reply(3).result(0.01)


def test_an_engine_says_what_it_is(engine, world):
    assert engine.name == f"{world.root.name}/sft" and len(engine.hash) > 8 and engine.max_len == 128
    assert not engine.bare and engine.template == world.data.template
