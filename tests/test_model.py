"""The Transformer's properties: what may see what, what padding and packing may change (nothing),
what a file may lose (nothing)."""
import dataclasses
import math
import resource

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from data.tokenizer import Tokenizer
from model import (ModelConfig, Transformer, attend, attention_allowed, cross_entropy_sum,
                   load_checkpoint, log_softmax, save_checkpoint, token_logprobs, weights_hash)
from reward import RewardModel
from runtime.decoding import KVCache
from runtime.device import dtype_of, pick_dtype, precision
from runtime.options import UserError
from runtime.run import NotFinite

CONFIG = ModelConfig(vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48,
                     max_len=64)


@pytest.fixture
def model() -> Transformer:
    model = Transformer(CONFIG)
    # larger than at the start of training, so that attention is far from uniform
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(5)
    return model.eval()


def tokens_of(shape, seed=0):
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(seed))


def test_a_position_does_not_see_what_follows(model):
    a, b = tokens_of((1, 12)), tokens_of((1, 12))
    b[0, 7:] = tokens_of((5,), seed=1)
    assert torch.equal(model(a)[0, :7], model(b)[0, :7])
    assert not torch.allclose(model(a)[0, 7:], model(b)[0, 7:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(model, side):
    rows = [tokens_of((n,), seed=n) for n in (3, 9, 6)]
    tokens, mask = torch.full((3, 9), 299), torch.zeros(3, 9, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, True
    logits = model(tokens, mask)
    assert torch.isfinite(logits).all()
    for i, row in enumerate(rows):
        assert torch.allclose(logits[i, mask[i]], model(row[None])[0], atol=1e-5)


def test_what_stands_in_a_pad_changes_nothing(model):
    tokens, mask = tokens_of((2, 8)), torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    other = torch.where(mask, tokens, (tokens + 7) % 300)
    assert torch.equal(model(tokens, mask)[mask], model(other, mask)[mask])


def test_a_packed_document_equals_the_document_alone(model):
    a, b = tokens_of((1, 5), seed=2), tokens_of((1, 7), seed=3)
    docs = torch.tensor([[0] * 5 + [1] * 7])
    packed = model(torch.cat((a, b), 1), docs=docs)
    assert torch.allclose(packed[0, :5], model(a)[0], atol=1e-5)
    # rotary attention knows differences of positions only
    assert torch.allclose(packed[0, 5:], model(b)[0], atol=1e-5)


@pytest.mark.parametrize("block", [0, 3, 4])
def test_cached_decoding_equals_the_full_forward(model, monkeypatch, block):
    monkeypatch.setattr(KVCache, "BLOCK", block)
    tokens = tokens_of((3, 10))
    cache, start = KVCache(CONFIG, 3, 12, blocks=block > 0), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        steps = [model.trunk(tokens[:, :4], None, None, cache)]
        for t in range(4, 10):
            span = cache.span(t + 1 + t % 3)  # positions beyond a row's own are masked
            steps.append(model.step(tokens[:, t], torch.full((3,), t), start, span, cache)[:, None])
    assert torch.allclose(torch.cat(steps, 1), model.hidden(tokens), atol=1e-5)


def test_rows_may_begin_at_different_positions_of_the_cache(model):
    tokens, lengths = tokens_of((2, 9)), torch.tensor([9, 6])
    cache = KVCache(CONFIG, 2, 12)
    start = torch.tensor([0, 2])
    with torch.no_grad():
        # The second row's token t is at position t + 2; after its end it continues with pads.
        for t in range(9):
            hidden = model.step(tokens[:, t], start + t, start, cache.span(12), cache)
            for row in range(2):
                if t < lengths[row]:
                    expected = model.hidden(tokens[row:row + 1, :t + 1])[0, -1]
                    assert torch.allclose(hidden[row], expected, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_chosen_positions_equal_those_of_the_whole_and_so_do_the_gradients(padded):
    model, tokens = Transformer(dataclasses.replace(CONFIG, n_layer=2)), tokens_of((3, 8))
    mask = torch.arange(8) < torch.tensor([[8], [5], [6]]) if padded else None
    where = torch.tensor([1, 7, 8, 12, 20])
    found = []
    for hidden in (model.hidden(tokens, mask).flatten(0, 1)[where],
                   model.hidden(tokens, mask, where=where)):
        model.zero_grad()
        (hidden * torch.arange(1., 6)[:, None]).pow(2).sum().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*found, strict=True))


def test_computing_blocks_again_changes_no_gradient():
    model, tokens, found = Transformer(CONFIG), tokens_of((2, 8)), []
    for model.recompute in (False, True):
        model.zero_grad()
        hidden = model.hidden(tokens, where=torch.tensor([3, 9]))
        hidden.pow(3).sum().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_grouped_queries_equal_repeated_keys_and_values(model):
    full = Transformer(dataclasses.replace(CONFIG, n_kv_head=4)).eval()
    state = model.state_dict()
    for name, w in model.state_dict().items():
        if "qkv" in name:
            q, k, v = w.split((32, 16, 16))
            state[name] = torch.cat((q, *(x.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
                                          for x in (k, v))))
    full.load_state_dict(state)
    tokens = tokens_of((2, 9))
    assert torch.allclose(model(tokens), full(tokens), atol=1e-5)


def test_chunked_cross_entropy_equals_the_plain_one(model):
    tokens = tokens_of((2, 20))
    plain = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(),
                            reduction="sum")
    plain.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    ours = cross_entropy_sum(model, model.hidden(tokens[:, :-1]).flatten(0, 1),
                             tokens[:, 1:].flatten(), chunk=7)
    (0.5 * ours).backward()
    assert torch.allclose(ours, plain, rtol=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, 0.5 * expected[name], rtol=1e-3, atol=1e-5), name


@torch.no_grad()
def test_log_probabilities_and_entropy_are_those_of_the_tempered_softmax(model):
    hidden, targets = torch.randn(4, CONFIG.d_model), torch.tensor([0, 3, 8, 2])
    probs = (model.head(hidden) / 0.7).softmax(-1)
    logprobs, entropy = token_logprobs(model, hidden, targets, 0.7)
    assert torch.allclose(logprobs, probs[torch.arange(4), targets].log(), atol=1e-5)
    assert torch.allclose(entropy, -(probs * probs.log()).sum(1), atol=1e-4)


def test_parameters_and_flops_are_counted(model):
    assert model.n_parameters() == sum(p.numel() for p in model.state_dict().values())
    one_layer = Transformer(dataclasses.replace(CONFIG, n_layer=1))
    more = model.flops_per_token(64) - one_layer.flops_per_token(64)
    matrices = sum(p.numel() for p in model.blocks[0].parameters() if p.dim() == 2)
    assert more == 6 * matrices + 6 * 32 * 64


def test_initialisation_follows_the_seed_and_depth():
    a, b, c = Transformer(CONFIG), Transformer(CONFIG), Transformer(CONFIG)
    c.initialise(seed=1)
    assert weights_hash(a) == weights_hash(b) != weights_hash(c)
    shrink = a.blocks[0].attention.out.weight.std() / a.blocks[0].attention.qkv.weight.std()
    assert abs(shrink - 1 / math.sqrt(2 * CONFIG.n_layer)) < 0.05


def test_bfloat16_keeps_what_must_be_exact(model):
    tokens = tokens_of((2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(tokens)
        loss = cross_entropy_sum(model, hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.dtype == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    exact = cross_entropy_sum(model, model.hidden(tokens)[:, :-1].flatten(0, 1),
                              tokens[:, 1:].flatten())
    assert abs(loss / exact - 1) < 0.02


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16_is_the_exact_one_but_for_rounding(masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 20, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    mask = torch.arange(20) >= torch.tensor([[0], [5], [19]])
    allowed = attention_allowed(mask, None) if masked else None
    g, found = torch.randn(3, 4, 20, 8, generator=generator), []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = attend(*leaves, allowed)
        found.append([y, *torch.autograd.grad(y, leaves, g.to(dtype))])
    for half, exact in zip(*found, strict=True):
        assert (half.double() - exact).norm() < 0.01 * exact.norm()


def test_dtype_auto_says_why(monkeypatch):
    monkeypatch.setattr("runtime.device.half_is_fast", lambda device: True)
    dtype, why = pick_dtype("auto", "cpu", 128, rows=64)
    assert dtype in ("float32", "bfloat16") and "ms" in why
    assert pick_dtype("bfloat16", "cpu", 64)[0] == "bfloat16"
    monkeypatch.setattr("runtime.device.half_is_fast", lambda device: False)
    assert pick_dtype("auto", "cpu", 128, rows=64) == ("float32", "this CPU has no fast products of bfloat16")


@pytest.mark.parametrize("state,fast,expected", [
    ({"dtype": "bfloat16"}, True, "bfloat16"), ({"dtype": "bfloat16"}, False, "float32"),
    ({"dtype": "float32"}, True, "float32"), ({}, True, "float32")])
def test_a_run_is_measured_in_its_own_precision_where_that_is_fast(monkeypatch, state, fast, expected):
    monkeypatch.setattr("runtime.device.half_is_fast", lambda device: fast)
    assert dtype_of(state, "cpu") == expected


@pytest.fixture(scope="module")
def tokenizer():
    """All bytes, and pairs that make up the model's vocabulary."""
    return Tokenizer([bytes([i]) for i in range(256)] + [b"a" + bytes([i]) for i in range(38)])


def test_a_checkpoint_returns_what_it_was_given(tmp_path, model, tokenizer):
    save_checkpoint(tmp_path, model, tokenizer, step=7, moments={"mean": 0.5},
                    optimizer=[{"x": torch.ones(2)}])
    loaded, tok, state = load_checkpoint(tmp_path)
    assert weights_hash(loaded) == weights_hash(model) == state["hash"]
    assert state["step"] == 7
    assert state["moments"] == {"mean": 0.5}
    assert tok.to_state() == tokenizer.to_state()
    assert loaded.config == CONFIG
    assert not loaded.training


def test_a_checkpoint_knows_its_kind(tmp_path, model, tokenizer):
    save_checkpoint(tmp_path, model, tokenizer)
    with pytest.raises(UserError, match="Transformer.*RewardModel"):
        load_checkpoint(tmp_path, cls=RewardModel)


def test_a_reward_head_that_is_not_there_is_an_error(tmp_path, tokenizer):
    save_checkpoint(tmp_path, RewardModel(CONFIG), tokenizer)
    payload = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del payload["model"]["score_head.weight"]
    torch.save(payload, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="score_head"):
        load_checkpoint(tmp_path, cls=RewardModel)


@pytest.mark.parametrize("name,value", [
    ("hash", None), ("hash", 3), ("options", []), ("template", 3), ("parents", "x"), ("step", "2"),
    ("example_prompts", 3), ("warnings", "x"), ("products", 1), ("stage", [])])
def test_a_state_whose_parts_are_of_another_kind_is_refused(tmp_path, model, tokenizer, name, value):
    save_checkpoint(tmp_path, model, tokenizer)
    payload = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    payload["state"][name] = value
    torch.save(payload, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=f"{name} is "):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("folder,command", [("sft", "train.py sft`"), ("mine", "train.py --list`")])
def test_a_missing_checkpoint_names_the_command_that_makes_it_or_those_there_are(tmp_path, folder, command):
    with pytest.raises(UserError, match=command):
        load_checkpoint(tmp_path / folder)


def test_a_misspelt_run_names_those_beside_it(tmp_path, model, tokenizer):
    save_checkpoint(tmp_path / "pretrain", model, tokenizer)
    with pytest.raises(UserError, match=f"did you mean {tmp_path / 'pretrain'}"):
        load_checkpoint(tmp_path / "pretrain2")


def test_a_folder_that_holds_runs_names_them(tmp_path, model, tokenizer):
    save_checkpoint(tmp_path / "reviews/ppo", model, tokenizer)
    with pytest.raises(UserError, match="did you mean .*reviews/ppo"):
        load_checkpoint(tmp_path / "reviews")


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, model, tokenizer):
    save_checkpoint(tmp_path, model, tokenizer)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a readable"):
        load_checkpoint(path)


def flipped(path) -> None:
    """One bit of the file's middle, as a failing disk changes it."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_the_checkpoint_before_is_taken_with_a_line_when_the_newest_is_damaged_or_gone(
        tmp_path, model, tokenizer, capsys):
    for step in (1, 2):
        save_checkpoint(tmp_path, model, tokenizer, step=step)
    assert load_checkpoint(tmp_path)[2]["step"] == 2
    assert capsys.readouterr().err == ""
    flipped(tmp_path / "checkpoint.pt")
    _, _, state = load_checkpoint(tmp_path)
    assert (state["step"], state["recovered"]) == (1, True)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "checkpoint.previous.pt of step 1, is used" in said
    (tmp_path / "checkpoint.pt").unlink()
    assert load_checkpoint(tmp_path)[2]["step"] == 1
    flipped(tmp_path / "checkpoint.previous.pt")
    with pytest.raises(UserError, match="not a readable"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_kind_is_not_damaged(tmp_path, model, tokenizer):
    for _ in range(2):
        save_checkpoint(tmp_path, model, tokenizer)
    with pytest.raises(UserError, match="holds a Transformer"):
        load_checkpoint(tmp_path, cls=RewardModel)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("where", ["weight", "optimizer"])
def test_numbers_that_are_not_finite_are_not_saved_and_the_old_files_stay(tmp_path, model, tokenizer,
                                                                          bad, where):
    for step in (1, 2):
        save_checkpoint(tmp_path, model, tokenizer, step=step)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    optimizers = [{"state": {0: {"exp_avg": torch.ones(3)}}}]
    with torch.no_grad():
        if where == "weight":
            model.blocks[1].mlp.down.weight[3, 4] = bad
        else:
            optimizers[0]["state"][0]["exp_avg"][1] = bad
    if where == "optimizer" and math.isfinite(bad):  # squares of gradients may be as large
        return save_checkpoint(tmp_path, model, tokenizer, optimizers=optimizers)
    name = "blocks.1.mlp.down.weight" if where == "weight" else "exp_avg"
    with pytest.raises(NotFinite, match=f"{name} holds numbers of magnitude"):
        save_checkpoint(tmp_path, model, tokenizer, optimizers=optimizers)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def changed(name, value):
    return lambda payload: payload["config"].update({name: value})


FORGED = {
    "weights": lambda p: p["model"]["embedding.weight"].__setitem__((3, 4), math.nan),
    "optimizer": lambda p: p["state"].update(optimizer=[{"exp_avg": torch.tensor([1, math.inf])}]),
    "layers": changed("n_layer", 10**8), "width": changed("d_model", 8 * 10**6),
    "mlp": changed("d_ff", 10**8), "positions": changed("max_len", 10**8),
    "vocabulary": changed("vocab_size", 10**8), "text": changed("d_model", "32"),
    "fraction": changed("n_head", 4.0), "negative": changed("n_layer", -1),
    "no number": changed("rope_base", math.nan), "switch": changed("tied", 1),
    "tokens": lambda p: p["tokenizer"]["ranks"].pop(),
    "no tokens": lambda p: p.update(tokenizer=None), "no tensor": lambda p: p["model"].update(
        {"norm.weight": 1.0}), "state": lambda p: p.update(state=[1, 2]),
    "shape": lambda p: p["model"].update({"norm.weight": torch.ones(33)})}


@pytest.mark.parametrize("forged", FORGED)
def test_parts_that_do_not_fit_are_refused_before_memory_is_asked_for(tmp_path, model, tokenizer,
                                                                      forged):
    save_checkpoint(tmp_path, model, tokenizer)
    payload = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    FORGED[forged](payload)
    torch.save(payload, tmp_path / "checkpoint.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="checkpoint.pt: its parts do not fit"):
        load_checkpoint(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_a_payload_that_is_no_checkpoint_is_refused(tmp_path):
    for payload in ([1], {}, {"kind": "Transformer"}, {"kind": None}, torch.ones(3)):
        torch.save(payload, tmp_path / "checkpoint.pt")
        with pytest.raises(UserError, match="checkpoint.pt"):
            load_checkpoint(tmp_path)


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, model, tokenizer, monkeypatch):
    save_checkpoint(tmp_path, model, tokenizer, step=1)

    def full(payload, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left.*previous one is kept"):
        save_checkpoint(tmp_path, model, tokenizer, step=2)
    assert load_checkpoint(tmp_path)[2]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_shape_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="n_head"):
        ModelConfig(d_model=30, n_head=4)


def test_a_row_longer_than_the_model_is_refused(model):
    with pytest.raises(UserError, match="65 tokens.*64"):
        model(tokens_of((1, 65)))


def test_every_query_sees_a_key_and_no_real_one_sees_a_pad():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    allowed = attention_allowed(mask, None)[:, 0]
    assert allowed.any(-1).all()  # a softmax over nothing is NaN
    assert not (allowed & mask[:, :, None] & ~mask[:, None, :]).any()


def test_half_precision_logits_are_normalised_in_float32():
    logits = (5 * torch.randn(64, 900, generator=torch.Generator().manual_seed(0))).bfloat16()
    targets = torch.arange(64)
    exact = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    logprobs = log_softmax(logits).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), exact, atol=1e-5)
    lm = Transformer(CONFIG)
    hidden = torch.randn(256, 32, generator=torch.Generator().manual_seed(1)) * 30
    targets = torch.arange(256) % 40
    with precision("bfloat16", "cpu"):
        loss = cross_entropy_sum(lm, hidden, targets)
    products = (hidden.bfloat16() @ lm.embedding.weight.bfloat16().T).double()
    expected = -float(products.log_softmax(-1).gather(1, targets[:, None]).sum())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_precision_lowers_matrix_products_and_nothing_else():
    w = torch.randn(8, 8)
    with precision("bfloat16", "cpu"):
        assert (w @ w).dtype == torch.bfloat16
    with precision("float32", "cpu"):
        assert (w @ w).dtype == torch.float32


def test_a_stop_before_the_renaming_keeps_the_old_checkpoint(tmp_path, tokenizer, monkeypatch):
    lm = Transformer(CONFIG)
    save_checkpoint(tmp_path, lm, tokenizer, step=1)
    order, fsync = [], model_module.os.fsync
    monkeypatch.setattr(model_module.os, "fsync", lambda f: order.append("synced") or fsync(f))

    def killed(*_):
        order.append("renamed")
        raise KeyboardInterrupt
    monkeypatch.setattr(model_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, lm, tokenizer, step=2)
    assert order == ["synced", "renamed"] and load_checkpoint(tmp_path)[2]["step"] == 1


def test_a_checkpoint_from_a_stranger_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"kind": "Transformer", "x": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="not a readable"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_parameters_of_the_demo_counted_by_hand():
    block = 192 * 3 * 192 + 192 * 192 + 192 * 2 * 512 + 512 * 192 + 2 * 192 + 2 * 48
    assert Transformer(ModelConfig()).n_parameters() == 4096 * 192 + 4 * block + 192 == 2_558_016


@pytest.mark.parametrize("change", [lambda p: p["config"].update(new=1),
                                    lambda p: p.pop("tokenizer")])
def test_a_checkpoint_of_another_version_is_one_clear_line(world, tmp_path, change):
    payload = torch.load(world.root / "sft/checkpoint.pt", weights_only=True)
    change(payload)
    torch.save(payload, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt"):
        load_checkpoint(tmp_path / "other.pt")
