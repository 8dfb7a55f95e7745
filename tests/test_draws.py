"""Random draws follow from (seed, stage, purpose, index, row) alone, and no two streams overlap."""
import numpy as np
import torch

from runtime.draws import (PURPOSES, STAGES, batch_indices, drawn_evenly, epoch_order, key, torch_seed,
                           uniform_numbers)


def test_an_epoch_is_a_permutation():
    assert sorted(epoch_order(50, 0, "sft", 0)) == list(range(50))


def test_epochs_seeds_and_stages_have_orders_of_their_own():
    orders = [tuple(epoch_order(50, *of)) for of in ((0, "sft", 0), (0, "sft", 1), (1, "sft", 0),
                                                     (0, "ppo", 0))]
    assert len(set(orders)) == 4


def test_batches_go_through_epochs_without_gap_or_repeat():
    seen = np.concatenate([batch_indices(10, 4, step, 3, "reward") for step in range(5)])
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))


def test_a_batch_depends_on_its_step_alone():
    seen = np.concatenate([batch_indices(10, 4, step, 3, "reward") for step in range(5)])
    assert list(batch_indices(10, 4, 2, 3, "reward")) == list(seen[8:12])


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(batch_indices(3, 6, 0, 0, "ppo")) == [0, 0, 1, 1, 2, 2]


def test_no_two_purposes_share_their_random_numbers():
    keys = [key(seed, stage, purpose, *index) for seed in (0, 1) for stage in STAGES
            for purpose in PURPOSES
            for index in ((), (3,), (3, 1))]
    assert len({np.random.default_rng(k).random() for k in keys}) == len(keys)


def test_numbers_of_stages_and_purposes_are_distinct_and_not_zero():
    for table in (STAGES, PURPOSES):
        assert len(set(table.values())) == len(table)
        assert 0 not in table.values()


def test_torch_seeds_differ_by_step():
    assert len({torch_seed(0, "reward", "dropout", step) for step in range(100)}) == 100


def test_a_rows_uniform_numbers_do_not_depend_on_its_batch():
    numbers = uniform_numbers(7, [3, 5, 3], 6)
    assert torch.equal(uniform_numbers(7, [5], 6)[0], numbers[1])
    assert torch.equal(numbers[0], numbers[2])
    assert not torch.equal(numbers[0], numbers[1])


def test_uniform_numbers_are_in_the_half_open_interval():
    numbers = uniform_numbers([1, 2], range(20), 500)
    assert numbers.dtype == torch.float32
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - .5) < .01


def test_a_longer_row_of_uniform_numbers_begins_with_the_shorter_one():
    assert torch.equal(uniform_numbers(0, [4], 9)[:, :5], uniform_numbers(0, [4], 5))


def test_records_drawn_evenly_keep_their_order_and_stand_once():
    records = list(range(1000))
    drawn = drawn_evenly(records, 100)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 100
    assert 350 < np.mean(drawn) < 650
    assert drawn_evenly(records, 10**9) == records
    assert drawn == drawn_evenly(records, 100)
