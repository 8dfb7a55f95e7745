"""Sampling: what is drawn follows the stated distribution, from the stated random numbers, whatever
shares the batch."""
import copy
import dataclasses

import numpy as np
import pytest
import torch

import sample as sample_module
from data import batches
from data.records import apply_template
from model import ModelConfig, Transformer, log_softmax
from reward import RewardConfig, RewardModel
from runtime import device
from runtime.options import UserError, run_main
from sample import (Decoder, SampleOptions, ChatSession, chat, draw, filter_logits, generate, main,
                    penalise_repetition, reply_ids, uniform_numbers)
from tests.conftest import logprobs_of

needs_compiler = pytest.mark.skipif(bool(device.compiler_fault()), reason=device.compiler_fault())
CONFIG = ModelConfig(vocab_size=50, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=32,
                     max_len=40)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(12)
    return model.eval()


def prompts(lengths, seed=0):
    g, width = torch.Generator().manual_seed(seed), max(lengths)
    tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, n in enumerate(lengths):
        tokens[i, width - n:] = torch.randint(1, 50, (n,), generator=g)
        mask[i, width - n:] = True
    return tokens, mask


def plain_greedy(model, ids, n, end_id=None):
    """No cache, no batch: the whole forward for every token."""
    ids, new = list(ids), []
    for _ in range(n):
        new.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        ids.append(new[-1])
        if new[-1] == end_id:
            break
    return new


def test_greedy_equals_the_plain_uncached_forward(model):
    tokens, mask = prompts([3, 7, 5, 1])
    out = generate(model, tokens, mask, 12, temperature=0)
    for i in range(4):
        assert out.tokens[i].tolist() == plain_greedy(model, tokens[i, mask[i]].tolist(), 12)


def test_greedy_with_an_end_token_stops_there(model):
    tokens, mask = prompts([3, 7, 5, 1, 4, 2])
    free = generate(model, tokens, mask, 16, temperature=0)
    end = int(free.tokens[0, 4])
    out = generate(model, tokens, mask, 16, temperature=0, end_id=end)
    for i in range(6):
        expected = plain_greedy(model, tokens[i, mask[i]].tolist(), 16, end)
        assert out.tokens[i, out.mask[i]].tolist() == expected
        assert int(out.mask[i].sum()) == len(expected)
    assert (out.tokens[~out.mask] == 0).all() and (out.logprobs[~out.mask] == 0).all()


def test_logprobs_are_those_of_the_training_forward(model):
    tokens, mask = prompts([3, 6, 2])
    out = generate(model, tokens, mask, 10, temperature=0.8, end_id=7, seed=3)
    for i in range(3):
        row = torch.cat((tokens[i, mask[i]], out.tokens[i, out.mask[i]]))
        n = int(mask[i].sum())
        expected = log_softmax(model(row[None])[0, n - 1:-1], 0.8).gather(1, row[n:, None])[:, 0]
        assert torch.allclose(out.logprobs[i, out.mask[i]], expected, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("rows", [2, 12])
def test_int8_writes_nearly_the_same_distribution(model, rows, compiled):
    tokens, mask = prompts([1 + i % 6 for i in range(rows)])
    decoder = Decoder(model, "int8", compile=compiled)
    out = generate(model, tokens, mask, 12, seed=3, decoder=decoder)
    whole, seen = torch.cat((tokens, out.tokens), 1), torch.cat((mask, out.mask), 1)
    with torch.no_grad():
        expected = logprobs_of(model(whole, seen)[:, tokens.shape[1] - 1:-1], out.tokens)
    gap = (out.logprobs - expected).abs().mean()
    assert 1e-4 < gap < 0.05  # not exact, and not far off


def test_a_reply_depends_on_seed_and_row_only(model):
    tokens, mask = prompts([4, 4, 4, 4])
    tokens[:] = tokens[0]
    whole = generate(model, tokens, mask, 8, seed=5)
    alone = generate(model, tokens[:1], mask[:1], 8, seed=5, rows=[2])
    assert torch.equal(whole.tokens[2], alone.tokens[0])
    assert torch.equal(generate(model, tokens, mask, 8, seed=5, batch_size=3).tokens, whole.tokens)
    assert not torch.equal(whole.tokens[0], whole.tokens[1])  # other rows draw other numbers
    assert not torch.equal(generate(model, tokens, mask, 8, seed=6).tokens, whole.tokens)


def test_draws_follow_the_distribution():
    u = torch.from_numpy(np.random.default_rng(0).random(20_000, np.float32))
    # three blocks; the first and the last tokens of blocks, and a block without any weight
    probs = torch.zeros(150)
    probs[[0, 63, 128, 149]] = torch.tensor([0.5, 0.2, 0.1, 0.2])
    counts = torch.bincount(draw(3 * probs.expand(20_000, 150), u), minlength=150) / 20_000
    assert torch.allclose(counts, probs, atol=0.012)
    assert (counts[probs == 0] == 0).all()


def test_the_two_steps_of_a_draw_equal_one_search_through_the_cumulated_weights():
    weights = torch.rand(200, 300, generator=torch.Generator().manual_seed(1),
                         dtype=torch.float64) ** 8
    u = torch.rand(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.searchsorted(weights.cumsum(1), u[:, None] * weights.sum(1, keepdim=True),
                                  right=True)[:, 0]
    assert torch.equal(draw(weights, u), expected)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_pick_possible_tokens(u):
    for probs in ([0.0, 0.0, 1.0, 0.0], [0.0, 0.4, 0.6, 0.0]):
        token = int(draw(torch.tensor([probs]), torch.tensor([u])))
        assert probs[token] > 0
    wide = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert draw(wide, torch.full((64,), u)).max() < 5000


def test_uniform_numbers_belong_to_a_row():
    a, b = uniform_numbers(1, [0, 1, 2], 6), uniform_numbers(1, [2, 7], 6)
    assert torch.equal(a[2], b[0]) and not torch.equal(a[0], a[1])
    assert (a >= 0).all() and (a < 1).all()


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = lambda x: torch.isfinite(x)[0].tolist()  # noqa: E731
    assert kept(filter_logits(logits, top_k=2)) == [False, True, False, True]
    assert kept(filter_logits(logits, top_p=0.4)) == [False, True, False, False]
    assert kept(filter_logits(logits, top_p=0.69)) == [False, True, False, True]
    assert kept(filter_logits(logits, top_p=0.71)) == [False, True, True, True]
    # the likeliest always stays
    assert kept(filter_logits(logits, top_p=1e-9)) == [False, True, False, False]


def test_filtered_logprobs_belong_to_the_distribution_drawn_from(model):
    tokens, mask = prompts([4, 4])
    out = generate(model, tokens, mask, 1, top_k=1, seed=0)
    assert torch.allclose(out.logprobs, torch.zeros(2, 1))  # the one token left has probability 1


def test_repetition_penalty_lowers_seen_tokens_of_either_sign():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_suppressed_tokens_are_never_written(model):
    tokens, mask = prompts([3] * 8)
    free = generate(model, tokens, mask, 12, seed=1)
    banned = free.tokens.flatten().bincount().topk(5).indices.tolist()
    out = generate(model, tokens, mask, 12, seed=1, suppress=banned)
    assert not set(out.tokens.flatten().tolist()) & set(banned)


def test_bad_requests_are_refused(model):
    tokens, mask = prompts([5])
    with pytest.raises(UserError, match="exceed the model's 40"):
        generate(model, tokens, mask, 36)
    with pytest.raises(UserError, match="empty prompt"):
        generate(model, tokens, torch.zeros_like(mask), 4)


def test_rows_that_end_do_not_disturb_the_others(model):
    tokens, mask = prompts([4] * 30, seed=9)
    free = generate(model, tokens, mask, 20, seed=2)
    # a frequent token: rows end one after another
    end = int(free.tokens.flatten().bincount().argmax())
    out = generate(model, tokens, mask, 20, seed=2, end_id=end)
    for i in range(30):
        row = free.tokens[i].tolist()
        n = row.index(end) + 1 if end in row else 20
        assert out.tokens[i, :n].tolist() == row[:n] and int(out.mask[i].sum()) == n


@pytest.mark.parametrize("settings", [{"temperature": .7}, {"temperature": 1.3, "top_k": 6},
                                      {"top_p": .6},
                                      {"repetition_penalty": 3.0}])
def test_every_token_is_drawn_from_the_stated_distribution_by_the_rows_own_numbers(model, settings):
    tokens, mask = prompts([3, 6, 2])
    out, u = generate(model, tokens, mask, 10, seed=3, **settings), uniform_numbers(3, range(3), 10)
    s = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0} | settings
    for i in range(3):
        ids = tokens[i, mask[i]].tolist()
        for t in range(10):
            seen = torch.zeros(1, 50, dtype=torch.bool)
            seen[0, ids] = True
            logits = penalise_repetition(model(torch.tensor([ids]))[:, -1], seen,
                                         s["repetition_penalty"])
            logps = log_softmax(filter_logits(logits / s["temperature"], s["top_k"], s["top_p"]))
            assert int(out.tokens[i, t]) == int(draw(logps.exp(), u[i, t:t + 1]))
            logp = float(logps[0, out.tokens[i, t]])
            assert float(out.logprobs[i, t]) == pytest.approx(logp, abs=1e-4)
            ids.append(int(out.tokens[i, t]))


def test_tokens_are_announced_as_they_are_written(model):
    tokens, mask = prompts([4] * 6, seed=9)
    announced = {i: [] for i in range(6)}

    def announce(rows: torch.Tensor, new: torch.Tensor) -> None:
        for row, token in zip(rows.tolist(), new.tolist(), strict=True):
            announced[row].append(token)

    end = int(generate(model, tokens, mask, 20, seed=2).tokens.flatten().bincount().argmax())
    out = generate(model, tokens, mask, 20, seed=2, end_id=end, on_token=announce)
    assert announced == {i: out.tokens[i, out.mask[i]].tolist() for i in range(6)}


def test_another_model_may_write_in_between(model):
    tokens, mask = prompts([4, 6])
    expected = generate(model, tokens, mask, 10, dtype="bfloat16")  # its weights are packed
    other = Transformer(CONFIG)

    def interrupt(*_) -> None:
        generate(other, tokens[:1], mask[:1], 2, dtype="bfloat16")

    out = generate(model, tokens, mask, 10, dtype="bfloat16", on_token=interrupt)
    assert torch.equal(out.tokens, expected.tokens)


def test_a_decoder_of_another_model_is_refused(model):
    with pytest.raises(ValueError, match="another model"):
        generate(model, *prompts([3]), 4, decoder=Decoder(Transformer(CONFIG)))


def test_what_weights_gone_wrong_left_in_the_cache_is_forgotten(model):
    """A prompt that takes a free row reads, masked, positions that only older calls have written.
    """
    model, (tokens, mask) = copy.deepcopy(model), prompts([4, 6, 2] * 6)
    plain = generate(model, tokens, mask, 20)
    settings = dict(end_id=int(plain.tokens.flatten().bincount().argmax()), batch_size=3)
    expected = generate(model, tokens, mask, 20, **settings)
    good = copy.deepcopy(model.state_dict())
    decoder = Decoder(model)
    with torch.no_grad():
        model.embedding.weight.fill_(torch.nan)
    decoder.refresh()
    with pytest.raises(UserError, match="not finite"):
        generate(model, tokens, mask, 20, batch_size=3, decoder=decoder)
    model.load_state_dict(good)
    decoder.refresh()
    out = generate(model, tokens, mask, 20, decoder=decoder, **settings)
    assert torch.equal(out.tokens, expected.tokens)
    assert torch.equal(out.logprobs, expected.logprobs)


SETTINGS = [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 2.0},
            {"dtype": "bfloat16"}, {"dtype": "int8"}]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_model_whose_numbers_are_not_finite_is_refused(model, number, settings):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.blocks[-1].mlp.down.weight[0, 0] = number
    with pytest.raises(UserError, match="probabilities of the next token.*not finite"):
        generate(broken, *prompts([3, 5]), 4, **settings)


@pytest.mark.parametrize("temperature,compiled", [
    (1e-40, False), (1e-45, False), (1e-300, False), pytest.param(1e-40, True, marks=needs_compiler)])
def test_a_temperature_at_which_numbers_overflow_is_refused(model, temperature, compiled):
    with pytest.raises(UserError, match="not finite.*--temperature is too near 0"):
        generate(model, *prompts([3, 5]), 4, temperature=temperature,
                 decoder=Decoder(model, compile=compiled))


def test_a_small_temperature_is_nearly_greedy(model):
    greedy, cold = (generate(model, *prompts([3, 5]), 6, temperature=t) for t in (0, 1e-20))
    assert torch.equal(greedy.tokens, cold.tokens)


def test_no_token_of_a_broken_model_is_announced(model):
    broken, announced = copy.deepcopy(model), []
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        generate(broken, *prompts([3]), 4, on_token=lambda *new: announced.append(new))
    assert announced == []


def test_dropout_is_refused_while_sampling():
    noisy = Transformer(dataclasses.replace(CONFIG, dropout=.1)).train()
    with pytest.raises(ValueError, match="dropout"):
        generate(noisy, *prompts([3]), 4)


def test_bfloat16_is_used_where_asked_for_and_stays_near(model, monkeypatch):
    tokens, mask = prompts([5, 3])
    seen, real = [], sample_module.prefill
    monkeypatch.setattr(sample_module, "prefill", lambda *a: seen.append(a[3].kv.dtype) or real(*a))
    exact, half = (generate(model, tokens, mask, 1, seed=0, dtype=d)
                   for d in ("float32", "bfloat16"))
    assert 0 < float((exact.logprobs - half.logprobs).abs().max()) < .1
    assert half.logprobs.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("batch_size", [12, 5])
def test_a_prompt_that_gets_several_replies_is_read_once(model, monkeypatch, batch_size, compiled):
    """Each reply is what its prompt gets alone, whatever stands beside it and whichever rows are free."""
    tokens, mask = (x.repeat_interleave(4, 0) for x in prompts([5, 3, 7]))
    read, real = [], sample_module.prefill
    monkeypatch.setattr(sample_module, "prefill", lambda m, t, *more: read.append(len(t)) or real(m, t, *more))
    together = generate(model, tokens, mask, 9, seed=3, end_id=7, batch_size=batch_size,
                        decoder=Decoder(model, compile=compiled))
    assert read == [3] if batch_size == 12 else read[0] == 2 and max(read) <= 2
    for i in range(12):
        alone = generate(model, tokens[i:i + 1], mask[i:i + 1], 9, seed=3, end_id=7, rows=[i])
        assert torch.equal(together.tokens[i], alone.tokens[0])
        assert torch.allclose(together.logprobs[i], alone.logprobs[0], atol=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("batch_size", [8, 5])
def test_replies_do_not_depend_on_how_many_prompt_tokens_are_read_at_once(model, monkeypatch, batch_size, compiled):
    """Short prompts beside long ones are read without the columns that they leave empty."""
    tokens, mask = prompts([31, 3, 5, 21, 3, 27, 1, 18])
    settings = dict(seed=3, end_id=7, batch_size=batch_size)
    expected = generate(model, tokens, mask, 9, **settings)
    read, real = [], sample_module.prefill
    monkeypatch.setattr(sample_module, "prefill", lambda m, t, *more: read.append(t.shape) or real(m, t, *more))
    for most in (1, 30, 80):
        monkeypatch.setitem(batches.TOKENS_AT_ONCE, "cpu", most)
        out = generate(model, tokens, mask, 9, decoder=Decoder(model, compile=compiled), **settings)
        assert torch.equal(out.tokens, expected.tokens)
        assert torch.allclose(out.logprobs, expected.logprobs, atol=1e-5)
    assert sum(rows * length for rows, length in read) < 3 * 8 * 31
    assert {length for _, length in read} == {31, 15}  # whole blocks of 16 are left out


END, PATTERN = 49, ["FTT", "TTF", "TFT", "FFF", "TFF", "FFT"]


def test_the_mask_ends_at_the_first_end_token(model, monkeypatch):
    """anchors.md: first end index per row [1, 0, 0, 3, 0, 2]."""
    def logits(token):  # token 8 r + t says: row r, step t
        after = [END if x != END and (PATTERN[x // 8] + "FFFFF")[x % 8] == "T"
                 else min(x + 1, END - 1)
                 for x in token.tolist()]  # rows that have ended are computed on
        return torch.nn.functional.one_hot(torch.tensor(after), 50).float() * 100
    monkeypatch.setattr(sample_module, "prefill", lambda m, tokens, mask,
                        cache: logits(tokens[:, -1]))
    monkeypatch.setattr(sample_module, "decode_step", lambda m, token, *_: logits(token))
    tokens = torch.arange(0, 48, 8)[:, None]
    out = generate(model, tokens, torch.ones_like(tokens).bool(), 3, end_id=END)
    ended = (out.tokens == END) & out.mask
    assert [int(row.int().argmax()) if row.any() else 3 for row in ended] == [1, 0, 0, 3, 0, 2]
    assert out.mask.sum(1).tolist() == [2, 1, 1, 3, 1, 3] and (out.tokens[~out.mask] == 0).all()


def test_best_of_scores_the_very_ids_that_were_sampled(model):
    judge = RewardModel(RewardConfig(**dataclasses.asdict(CONFIG))).eval()
    tokens, mask = prompts([4, 2, 3])
    out = generate(model, tokens, mask, 8, end_id=7, seed=1)
    ids = [t[m].tolist() for t, m in zip(tokens, mask, strict=True)]
    for i, score in enumerate(judge.scores(ids, reply_ids(out)).tolist()):
        row = torch.tensor([ids[i] + out.tokens[i, out.mask[i]].tolist()])
        reply = torch.arange(row.shape[1])[None] >= len(ids[i])
        assert score == pytest.approx(float(judge(row, torch.ones_like(reply), reply)[0]), abs=1e-5)


def test_a_prompt_that_is_too_long_is_one_clear_line(world, capsys):
    words = ["--from", str(world.root / "sft"), "--prompt", "好" * 400]
    assert run_main(sample_module.main, words) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: a prompt of")
    assert "exceed the model's 128" in message
    assert message.count("\n") == 1


# ---- the command line ----------------------------------------------------------------------------

def test_control_tokens_other_than_the_end_are_never_written(world, monkeypatch):
    session = ChatSession(str(world.root / "sft"), SampleOptions(device="cpu"))
    samplings, real = [], sample_module.reply_to
    monkeypatch.setattr(sample_module, "reply_to",
                        lambda *a, **k: samplings.append(k["sampling"]) or real(*a, **k))
    _, replies = session.texts([session.ids("好")] * 3)
    control = set(session.tokenizer.special_ids) - {session.tokenizer.eom_id}
    assert set(samplings[0].suppress) == control
    assert not set(replies.tokens[replies.mask].tolist()) & control


def test_a_chat_puts_the_template_around_its_first_line_alone_and_outlives_a_long_one(
        world, monkeypatch, capsys):
    session = ChatSession(str(world.root / "sft"), SampleOptions(device="cpu"))
    lines, asked = ["书", "好" * 400, "好"], []

    def typed(_) -> str:
        if not lines:
            raise EOFError  # Ctrl-D
        return lines.pop(0)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(session, "stream", lambda ids, rows, before: asked.append(ids) or "答")
    chat(session)
    turns = [{"role": "user", "content": apply_template(world.data.template, "书")},
             {"role": "assistant", "content": "答"}, {"role": "user", "content": "好"}]
    assert asked == [session.tokenizer.render_chat(turns[:n], reply=True)[0] for n in (1, 3)]
    assert "too long" in capsys.readouterr().out


def test_a_chat_without_input_is_refused(world, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="input is closed"):
        main(["--chat", f"--from={world.root / 'sft'}"])
