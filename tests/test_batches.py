"""Batches follow from the step alone, every token counts once, and no padding is taken for text."""
import numpy as np
import pytest
import torch

from data.batches import (PackedDocuments, dialogue_rows, eval_windows, fitting, judged_rows,
                          pack_rows, pad_left, pad_right, prompt_ids)
from data.bpe import train_bpe
from runtime.draws import PURPOSES, STAGES, epoch_order, key, rows_at
from runtime.options import UserError


def test_an_epoch_is_a_permutation_of_its_own():
    a, b = epoch_order(50, 0, "sft", 0), epoch_order(50, 0, "sft", 1)
    assert sorted(a) == sorted(b) == list(range(50)) and list(a) != list(b)
    assert list(a) != list(epoch_order(50, 1, "sft", 0)) and list(a) != list(epoch_order(50, 0, "ppo", 0))


def test_steps_run_through_epochs_without_gap_or_repeat():
    seen = np.concatenate([rows_at(10, 4, step, 3, "reward") for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(rows_at(10, 4, 2, 3, "reward")) == list(seen[8:12])  # asked for alone, in any order


def test_no_two_purposes_share_their_random_numbers():
    keys = [key(seed, stage, purpose, *index) for seed in (0, 1) for stage in STAGES for purpose in PURPOSES
            for index in ((), (3,), (3, 1))]
    seen = {np.random.default_rng(k).random() for k in keys}
    assert len(seen) == len(keys)


def test_padding_stands_where_it_should():
    rows = [[5, 6, 7], [8]]
    tokens, mask = pad_left(rows, 0)
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[True] * 3, [False, False, True]]
    tokens, mask = pad_right(rows, 9)
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 9]] and mask.tolist() == [[True] * 3, [True, False, False]]


def corpus(seed=0, n=60):
    """Documents of token = document number, so that each can be recognised in a stream."""
    lengths = np.random.default_rng(seed).integers(3, 20, n)
    starts = np.concatenate(([0], lengths.cumsum()))
    return np.repeat(np.arange(n), lengths).astype(np.uint16), starts, (np.arange(n) % 2).astype(np.uint8)


def packed(**changes):
    tokens, starts, part = corpus()
    settings = dict(window=16, batch=4, total_tokens=3000, seed=1) | changes
    return PackedDocuments(tokens, starts, part, **settings)


def test_a_batch_follows_from_its_step_alone():
    a, b = packed(), packed()
    late_first = [b.batch(step) for step in reversed(range(b.n_steps))][::-1]
    for step in range(a.n_steps):
        for x, y in zip(a.batch(step), late_first[step], strict=True):
            assert torch.equal(x, y)
    assert not torch.equal(packed(seed=2).batch(0)[0], a.batch(0)[0])


def test_targets_are_the_next_tokens_of_one_stream():
    batches = packed()
    inputs, targets = (torch.cat([batches.batch(s)[i].flatten() for s in range(batches.n_steps)]) for i in (0, 1))
    assert torch.equal(inputs[1:], targets[:-1]) and len(inputs) == batches.n_steps * 64


def test_documents_in_a_window_are_whole_and_numbered():
    tokens, starts, _ = corpus()
    inputs, _, docs = packed().batch(3)
    assert ((inputs[:, 1:] == inputs[:, :-1]) == (docs[:, 1:] == docs[:, :-1]))[:, :].float().mean() > 0.95
    stream, number = inputs.flatten(), docs.flatten()
    for d in number.unique()[1:-1]:  # the first and last may be cut by the batch
        document = stream[number == d]
        assert len(document.unique()) == 1 and len(document) == np.diff(starts)[document[0]]


def test_parts_get_their_shares_and_the_early_one_comes_early():
    tokens, starts, part = corpus()
    batches = packed(total_tokens=20_000, shares={0: 0.25, 1: 0.75}, early={0: 0.5})
    stream = torch.cat([batches.batch(s)[0].flatten() for s in range(batches.n_steps)])
    of_part = torch.from_numpy(part.astype(np.int64))[stream]
    assert abs((of_part == 0).float().mean() - 0.25) < 0.02
    half = len(stream) // 2
    assert (of_part[:half] == 0).float().mean() > 0.4 and (of_part[int(0.65 * len(stream)):] == 0).float().mean() < 0.01


def test_every_document_of_a_part_is_seen_before_any_is_seen_again():
    batches = packed(total_tokens=1500, shares={0: 0.0001, 1: 1.0})
    order = [d for d in batches.order if d % 2 == 1]
    first = order[:30]
    assert sorted(first) == list(range(1, 60, 2))


def test_one_long_text_is_cut_at_random_and_reproducibly():
    tokens = np.arange(1000, dtype=np.uint16)
    a = PackedDocuments(tokens, np.array([0, 1000]), np.zeros(1, np.uint8), window=8, batch=3, total_tokens=480, seed=0)
    assert a.n_steps == 20 and a.single
    inputs, targets, _ = a.batch(7)
    assert torch.equal(inputs + 1, targets) and torch.equal(inputs, a.batch(7)[0]) and not torch.equal(inputs,
                                                                                                       a.batch(8)[0])


@pytest.mark.parametrize("window,batch", [(16, 4), (7, 3), (1000, 2)])
def test_the_full_pass_has_every_token_as_target_once(window, batch):
    tokens, starts, _ = corpus()
    seen = []
    for inputs, targets, docs, real in eval_windows(tokens, starts, window, batch):
        seen.append(targets[real])
        assert (docs[real] == inputs[real] + 1).all()  # documents are their own tokens here, numbered from 1
    assert torch.equal(torch.cat(seen), torch.from_numpy(tokens[1:].astype(np.int64)))


def test_long_dialogues_are_left_out_never_cut():
    tokenizer = train_bpe(["你好，世界"] * 3, 270)
    records = [{"prompt": "好", "response": "好"}, {"prompt": "好", "response": "好" * 50}]
    rows, left_out = dialogue_rows(records, tokenizer, "{prompt}", 30)
    assert len(rows) == left_out == 1 and rows[0][0][-1] == tokenizer.eom_id


def test_packed_rows_lose_nothing_and_are_found_again():
    rng = np.random.default_rng(0)
    rows = [(rng.integers(1, 99, n).tolist(), (rng.random(n) < .5).tolist()) for n in rng.integers(1, 30, 40)]
    tokens, flags, docs, where = pack_rows(rows, 32)
    for i, (ids, learn) in enumerate(rows):
        assert tokens.flatten()[where[i, :len(ids)]].tolist() == ids == tokens[docs == i].tolist()
        assert flags[docs == i].tolist() == learn
        assert len((docs == i).nonzero()[:, 0].unique()) == 1  # whole, in one window
    assert (docs < 0).float().mean() < .1 and not flags[docs < 0].any()
    assert pack_rows([([1] * 50, [True] * 50)], 32)[0].shape == (1, 50)


# ---- what the reward model reads -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["好书好看的书"] * 3, 300)


def judged(n=200):
    return [{"prompt": "这", "response": "一二三四五六七八九十"[:2 + i % 9], "label": i % 2} for i in range(n)]


def test_a_judged_row_is_prompt_and_reply_and_says_whether_it_was_finished(tokenizer):
    record = judged()[8]
    prompt, reply = prompt_ids(tokenizer, record["prompt"], "「{prompt}」"), tokenizer.encode(record["response"])

    def row(**settings):
        (ids, flags), = judged_rows([record], tokenizer, "「{prompt}」", **{"max_len": 99, **settings})
        assert ids[:len(prompt)] == prompt and flags == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        return ids[len(prompt):]

    assert row() == [*reply, tokenizer.eom_id]
    assert row(half=True) == reply[:len(reply) // 2]
    assert row(max_len=len(prompt) + 7) == reply[:7]  # cut: no end token


def test_a_share_of_the_replies_is_cut_and_the_two_sides_of_a_pair_alike(tokenizer):
    pairs = [r | {"chosen": r["response"], "rejected": r["response"] + "差"} for r in judged()]
    sides = [judged_rows(pairs, tokenizer, "{prompt}", 99, field=f, prefix_share=.3, rng=np.random.default_rng(4))
             for f in ("chosen", "rejected")]
    cut = [[ids[-1] != tokenizer.eom_id for ids, _ in side] for side in sides]
    assert cut[0] == cut[1] and .2 < np.mean(cut[0]) < .4
    assert not any(ids[-1] != tokenizer.eom_id for ids, _ in judged_rows(judged(), tokenizer, "{prompt}", 99))
    assert min(sum(flags) for _, flags in sides[0]) >= 1


def test_prompts_that_leave_no_room_are_left_out_and_counted(tokenizer, capsys):
    records = [{"prompt": "书"}, {"prompt": "书" * 200}]
    assert fitting(records, tokenizer, "{prompt}", 50) == records[:1]
    assert "1 of 2 records left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of 1 prompts fits"):
        fitting(records[1:], tokenizer, "{prompt}", 50)


def test_a_bare_prompt_begins_a_document(tokenizer):
    assert prompt_ids(tokenizer, "书", "x{prompt}", bare=True) == [tokenizer.eot_id, *tokenizer.encode("书")]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_a_first_half_is_half_of_the_replys_tokens_without_its_end(tokenizer, n):
    reply = tokenizer.encode("x" * n)
    (ids, flags), = judged_rows([{"prompt": "书", "response": "x" * n}], tokenizer, "{prompt}", 99, half=True)
    assert [i for i, f in zip(ids, flags, strict=True) if f] == reply[:max(1, len(reply) // 2)]
