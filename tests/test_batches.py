"""Batches follow from the step alone, every token counts once, and no padding is taken for text."""
import numpy as np
import pytest
import torch

from data.batches import (PackedDocuments, TOKENS_AT_ONCE, dialogue_rows, drop_equal_pairs, drop_long_prompts,
                          eval_windows, held_out_prompts, make_rows, pack_rows, pad_left, pad_right, prompt_ids,
                          prompts_to_read, reward_batch, reward_rows, scatter_tokens, similar_lengths)
from data.tokenizer import train_bpe
from data.prepared import Documents
from runtime.options import UserError

# ---- padding -------------------------------------------------------------------------------------


def test_pad_left_pads_on_the_left():
    tokens, mask = pad_left([[5, 6, 7], [8]], 0)
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]


def test_pad_right_pads_on_the_right():
    tokens, mask = pad_right([[5, 6, 7], [8]], 9)
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]


# ---- held-out prompts ----------------------------------------------------------------------------

class Asked:
    """A data set whose held-out prompts are these."""

    template = "{prompt}"

    def __init__(self, prompts):
        self.prompts = prompts

    def records(self, stage, split):
        return [{"prompt": prompt} for prompt in self.prompts]


def drawn(prompts, n, limit=99):
    return held_out_prompts(Asked(prompts), "val", train_bpe(["a b c"] * 9, 270), limit, n)


def test_held_out_prompts_are_drawn_from_the_whole_of_a_sorted_file():
    prompts = [f"{kind} {i}" for kind in ("bad", "good") for i in range(200)]
    liked = sum(prompt.startswith("good") for prompt in drawn(prompts, 100))
    assert 30 < liked < 70


def test_the_same_prompts_are_drawn_whatever_the_order_of_the_file():
    prompts = [f"prompt {i}" for i in range(50)]
    assert drawn(prompts, 10) == drawn(prompts[::-1], 10)
    assert drawn(prompts, 10) == drawn(prompts, 20)[:10]
    assert sorted(drawn(prompts, 99)) == sorted(prompts)


def test_a_repeated_held_out_prompt_is_drawn_once_and_a_long_one_never():
    messages = [{"role": "user", "content": "b"}]
    assert sorted(map(str, drawn(["a", "a", messages, messages, "long " * 40], 9, limit=50))) == \
        sorted(map(str, ["a", messages]))


# ---- pretraining ---------------------------------------------------------------------------------

def corpus(seed=0, n=60):
    """Documents of token = document number, so that each can be recognised in a stream; parts 0 and
    1 in turn."""
    lengths = np.random.default_rng(seed).integers(3, 20, n)
    starts = np.concatenate(([0], lengths.cumsum()))
    tokens = np.repeat(np.arange(n), lengths).astype(np.uint16)
    return Documents(tokens, starts, (np.arange(n) % 2).astype(np.uint8), n_bytes=len(tokens))


def packed(**changes):
    return PackedDocuments(corpus(), **(dict(window=16, batch=4, total_tokens=3000, seed=1)
                                        | changes))


def test_a_batch_follows_from_its_step_alone():
    a, b = packed(), packed()
    late_first = [b.batch(step) for step in reversed(range(b.n_steps))][::-1]
    for step in range(a.n_steps):
        for x, y in zip(a.batch(step), late_first[step], strict=True):
            assert torch.equal(x, y)
    assert not torch.equal(packed(seed=2).batch(0)[0], a.batch(0)[0])


def stream_of(batches, i=0):
    """All inputs (i = 0) or targets (1) of a run, one after another."""
    return torch.cat([batches.batch(step)[i].flatten() for step in range(batches.n_steps)])


def test_targets_are_the_next_tokens_of_one_stream():
    batches = packed()
    inputs, targets = stream_of(batches), stream_of(batches, 1)
    assert torch.equal(inputs[1:], targets[:-1])
    assert len(inputs) == batches.n_steps * 64


def test_documents_in_a_window_are_complete_and_numbered():
    inputs, _, docs = packed().batch(3)
    assert ((inputs[:, 1:] == inputs[:, :-1]) == (docs[:, 1:] == docs[:,
                                                                      :-1])).float().mean() > 0.95
    stream, number, lengths = inputs.flatten(), docs.flatten(), np.diff(corpus().starts)
    for d in number.unique()[1:-1]:  # the first and last may be cut by the batch
        document = stream[number == d]
        assert len(document.unique()) == 1
        assert len(document) == lengths[document[0]]


def of_part_0(batches):
    """For each token of a run, whether it is of part 0."""
    return torch.from_numpy(corpus().part.astype(np.int64))[stream_of(batches)] == 0


def test_parts_get_their_shares():
    flags = of_part_0(packed(total_tokens=20_000, shares={0: 0.25, 1: 0.75}))
    assert abs(flags.float().mean() - 0.25) < 0.02


def test_shares_are_relative_and_without_them_size_counts():
    natural = np.diff(corpus().starts)[::2].sum() / len(corpus().tokens)
    assert abs(of_part_0(packed(total_tokens=20_000)).float().mean() - natural) < 0.02
    assert torch.equal(stream_of(packed(shares={0: 1, 1: 3})),
                       stream_of(packed(shares={0: 0.25, 1: 0.75})))


def test_a_part_with_share_0_is_never_read():
    assert not of_part_0(packed(shares={0: 0.0, 1: 1.0})).any()


def test_an_early_part_comes_early():
    flags = of_part_0(packed(total_tokens=20_000, shares={0: 0.25, 1: 0.75}, early={0: 0.5}))
    assert flags[:len(flags) // 2].float().mean() > 0.4
    assert flags[int(0.65 * len(flags)):].float().mean() < 0.01


def test_every_document_of_a_part_is_seen_before_any_is_seen_again():
    batches = packed(total_tokens=1500, shares={0: 0.0001, 1: 1.0})
    first = [d for d in batches.order if d % 2 == 1][:30]
    assert sorted(first) == list(range(1, 60, 2))


def test_passes_count_the_part_that_is_read_most_often():
    batches = packed(total_tokens=3000, shares={0: 0.9, 1: 0.1})
    of_part = batches.order[batches.order % 2 == 0]
    assert batches.passes - 1 <= np.bincount(of_part).max() <= batches.passes


def single(length=1000):
    text = Documents(np.arange(length, dtype=np.uint16), np.array([0, length]),
                     np.zeros(1, np.uint8), length)
    return PackedDocuments(text, window=8, batch=3, total_tokens=480, seed=0)


def test_one_long_text_is_cut_into_windows_of_neighbouring_tokens():
    inputs, targets, docs = single().batch(7)
    assert torch.equal(inputs + 1, targets)
    assert (inputs[:, 1:] == inputs[:, :-1] + 1).all()
    assert not docs.any()


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 10])
def test_a_text_of_any_length_fills_its_windows(length):
    """Of the 8 tokens of a window and one more, the last target: shorter texts are repeated."""
    batches = single(length)
    inputs, targets, docs = batches.batch(19)
    assert inputs.shape == targets.shape == docs.shape == (3, 8)
    assert batches.single == (length > 8)
    assert torch.equal(targets, (inputs + 1) % length)
    assert batches.single or torch.equal(docs[:, 1:] != docs[:, :-1], inputs[:, 1:] == 0)


def test_windows_of_one_long_text_depend_on_the_step_alone():
    assert torch.equal(single().batch(7)[0], single().batch(7)[0])
    assert not torch.equal(single().batch(7)[0], single().batch(8)[0])
    assert single().n_steps == 20


@pytest.mark.parametrize("window,batch", [(16, 4), (7, 3), (1000, 2)])
def test_the_full_pass_has_every_token_as_target_once(window, batch):
    text, seen = corpus(), []
    for inputs, targets, docs, real in eval_windows(text.tokens, text.starts, window, batch):
        seen.append(targets[real])
        # documents are their own tokens here, numbered from 1
        assert (docs[real] == inputs[real] + 1).all()
    assert torch.equal(torch.cat(seen), torch.from_numpy(text.tokens[1:].astype(np.int64)))


# ---- dialogues -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["好书好看的书"] * 3, 300)


def test_long_dialogues_are_dropped_never_truncated(tokenizer):
    records = [{"prompt": "好", "response": "好"}, {"prompt": "好", "response": "好" * 50}]
    rows, dropped = dialogue_rows(records, tokenizer, "{prompt}", 30)
    assert len(rows) == dropped == 1
    assert rows[0][0][-1] == tokenizer.eom_id


@pytest.fixture(scope="module")
def packed_rows():
    """(rows, what pack_rows makes of them)."""
    rng = np.random.default_rng(0)
    rows = [(rng.integers(1, 99, n).tolist(), (rng.random(n) < .5).tolist())
            for n in rng.integers(1, 30, 40)]
    return rows, pack_rows(rows, 32)


def test_packed_rows_lose_nothing(packed_rows):
    rows, (tokens, flags, docs, _) = packed_rows
    for i, (ids, learn) in enumerate(rows):
        assert tokens[docs == i].tolist() == ids
        assert flags[docs == i].tolist() == learn


def test_packed_rows_are_where_they_are_said_to_be(packed_rows):
    rows, (tokens, _, _, where) = packed_rows
    for i, (ids, _) in enumerate(rows):
        assert tokens.flatten()[where[i, :len(ids)]].tolist() == ids


def test_packed_rows_are_each_in_one_window(packed_rows):
    rows, (_, _, docs, _) = packed_rows
    for i in range(len(rows)):
        assert len((docs == i).nonzero()[:, 0].unique()) == 1


def test_little_of_packed_windows_is_padding_and_none_is_learned(packed_rows):
    _, (_, flags, docs, _) = packed_rows
    assert (docs < 0).float().mean() < .1
    assert not flags[docs < 0].any()


@pytest.mark.parametrize("most", [1, 20, 60, 150])
def test_rows_of_similar_length_are_put_together_as_far_as_they_fit(most):
    lengths = torch.from_numpy(np.random.default_rng(0).integers(1, 30, 17))
    parts = similar_lengths(lengths, most)
    assert sorted(torch.cat(parts).tolist()) == [*range(17)]
    assert all(len(part) == 1 or len(part) * int(lengths[part].max()) <= most for part in parts)
    for part, after in zip(parts, parts[1:], strict=False):
        assert int(lengths[part].max()) <= int(lengths[after].min())
        assert (len(part) + 1) * int(lengths[after].min()) > most  # no part could take one more


def test_rows_that_fit_together_keep_their_order():
    assert [part.tolist() for part in similar_lengths(torch.tensor([7, 2, 5]), 21)] == [[0, 1, 2]]
    assert similar_lengths(torch.zeros(0, dtype=torch.int64)) == []


@pytest.mark.parametrize("most", [1, 40, 500])
@pytest.mark.parametrize("block", [1, 4])
def test_each_prompt_is_read_once_and_reaches_all_its_rows(monkeypatch, most, block):
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", most)
    rows = [list(range(1, n + 1)) for n in (3, 3, 9, 2, 2, 2, 17, 3)]  # the last one does not stand beside its equals
    tokens, mask = pad_left(rows, 0)
    seen, read = {}, 0
    for part, part_mask, at, index, skip in prompts_to_read(tokens, mask, block):
        assert skip % block == 0
        assert part.shape[1] == tokens.shape[1] - skip
        read += len(part)
        for row, i in zip(at.tolist(), index.tolist(), strict=True):
            seen[row] = part[i][part_mask[i]].tolist()
    assert seen == dict(enumerate(rows))
    assert read == 5


def test_the_window_grows_to_the_longest_row():
    assert pack_rows([([1] * 50, [True] * 50)], 32)[0].shape == (1, 50)


# ---- what the reward model reads -----------------------------------------------------------------

def test_pairs_that_are_equal_once_cut_are_dropped(tokenizer):
    def pair(shared):
        return {"prompt": "好", "chosen": "书" * shared + "看", "rejected": "书" * shared + "好"}

    pairs = [pair(n) for n in (0, 4, 90)]
    kept, needed = drop_equal_pairs(pairs, tokenizer, "{prompt}", 40)
    assert kept == pairs[:2]
    for max_len, differ in ((needed, 3), (needed - 1, 2)):
        rows = [reward_rows(pairs, tokenizer, "{prompt}", max_len, field=field)
                for field in ("chosen", "rejected")]
        assert sum(a != b for a, b in zip(*rows, strict=True)) == differ
        assert len(drop_equal_pairs(pairs, tokenizer, "{prompt}", max_len)[0]) == differ


def feedback(n=200):
    return [{"prompt": "这", "response": "一二三四五六七八九十"[:2 + i % 9], "label": i % 2} for i in range(n)]


def test_a_reward_row_is_prompt_and_reply_and_tells_whether_it_was_finished(tokenizer):
    record = feedback()[8]
    prompt, reply = prompt_ids(tokenizer, record["prompt"],
                               "「{prompt}」"), tokenizer.encode(record["response"])

    def row(**settings):
        (ids, flags), = reward_rows([record], tokenizer, "「{prompt}」",
                                    **{"max_len": 99, **settings})
        assert ids[:len(prompt)] == prompt
        assert flags == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        return ids[len(prompt):]

    assert row() == [*reply, tokenizer.eom_id]
    assert row(half=True) == reply[:len(reply) // 2]
    assert row(max_len=len(prompt) + 7) == reply[:7]  # truncated: no end token


def truncated(rows, tokenizer):
    return [ids[-1] != tokenizer.eom_id for ids, _ in rows]


def test_a_share_of_the_replies_is_truncated_and_the_two_sides_of_a_pair_alike(tokenizer):
    pairs = [r | {"chosen": r["response"], "rejected": r["response"] + "差"} for r in feedback()]
    sides = [reward_rows(pairs, tokenizer, "{prompt}", 99, field=f, prefix_share=.3,
                         rng=np.random.default_rng(4))
             for f in ("chosen", "rejected")]
    chosen, rejected = (truncated(side, tokenizer) for side in sides)
    assert chosen == rejected
    assert .2 < np.mean(chosen) < .4
    assert min(sum(flags) for _, flags in sides[0]) >= 1


def test_without_a_share_no_reply_is_truncated(tokenizer):
    assert not any(truncated(reward_rows(feedback(), tokenizer, "{prompt}", 99), tokenizer))


def test_a_reward_batch_is_padded_to_the_right():
    tokens, real, reply = reward_batch([([5, 6, 7], [False, True, True]), ([8, 9], [False, True])],
                                       "cpu")
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert real.tolist() == [[True] * 3, [True, True, False]]
    assert reply.tolist() == [[False, True, True], [False, True, False]]


def test_prompts_that_leave_no_room_are_dropped_and_counted(tokenizer, capsys):
    records = [{"prompt": "书"}, {"prompt": "书" * 200}]
    assert drop_long_prompts(records, tokenizer, "{prompt}", 50) == records[:1]
    assert "1 of 2 records left out" in capsys.readouterr().out


def test_data_without_a_prompt_that_fits_is_refused(tokenizer):
    with pytest.raises(UserError, match="none of 1 prompts fits"):
        drop_long_prompts([{"prompt": "书" * 200}], tokenizer, "{prompt}", 50)


def test_a_bare_prompt_begins_a_document(tokenizer):
    assert prompt_ids(tokenizer, "书", "x{prompt}", bare=True) == [tokenizer.eot_id,
                                                                  *tokenizer.encode("书")]


def test_a_bare_prompt_is_a_text(tokenizer):
    with pytest.raises(UserError, match="pretrained model continues a text"):
        prompt_ids(tokenizer, [{"role": "user", "content": "x"}], bare=True)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_a_first_half_is_half_of_the_replys_tokens_without_its_end(tokenizer, n):
    reply = tokenizer.encode("x" * n)
    (ids, flags), = reward_rows([{"prompt": "书", "response": "x" * n}], tokenizer, "{prompt}", 99,
                                half=True)
    assert [i for i, f in zip(ids, flags, strict=True) if f] == reply[:max(1, len(reply) // 2)]


# ---- rollouts ------------------------------------------------------------------------------------

def rollout():
    """(tokens, real, reply) of two prompts, padded to the left, and their replies, padded to the
    right."""
    tokens = torch.tensor([[0, 1, 2, 3, 0], [4, 5, 6, 7, 8]])
    real = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    return tokens, real, real & (torch.arange(5) >= 2)


def test_rows_have_their_padding_on_the_right():
    rows = make_rows(*rollout())
    assert rows.tokens[rows.real].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows.real.tolist() == [[True] * 3 + [False] * 2, [True] * 5]


def test_rows_are_as_long_as_the_longest():
    tokens, real, reply = rollout()
    assert make_rows(tokens[:1], real[:1], reply[:1]).tokens.tolist() == [[1, 2, 3]]


def test_each_reply_token_has_its_predecessor():
    rows = make_rows(*rollout())
    assert rows.targets.tolist() == [2, 3, 6, 7, 8]
    assert rows.tokens.flatten()[rows.before].tolist() == [1, 2, 5, 6, 7]


def test_scattered_values_are_in_their_tokens_columns():
    tokens, _, reply = rollout()
    values = make_rows(*rollout()).targets
    assert torch.equal(scatter_tokens(values, reply), tokens * reply)
