"""The shapes of other families: each field keeps the properties of the Transformer, and with all of
a family's fields the network is that family's own, weight by weight."""
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model import (ModelConfig, Transformer, compared_logprobs, cross_entropy_sum, load_checkpoint,
                   next_token_loss, save_checkpoint, token_logprobs)
from data.tokenizer import Tokenizer, Vocabulary
from reward import RewardConfig, RewardModel
from runtime.decoding import KVCache
from runtime.device import precision
from runtime.optim import make_optimizers
from runtime.options import UserError
from runtime.products import LayerNorm, use_products
from sample import Decoder, generate
from tests.conftest import logprobs_of, noise
from train import PretrainOptions

SHAPE = dict(vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, max_len=64)
BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
FIELDS = {
    "head_dim": dict(head_dim=12), "norm": dict(norm="layer"), "mlp": dict(mlp="gelu"),
    "biases": BIASES, "head_bias": dict(head_bias=True, tied=False),
    "positions": dict(positions="learned"), "rotary_dim": dict(rotary_dim=4),
    "rope_scaling": dict(rope_scaling=(8.0, 1, 4, 16)), "parallel": dict(parallel=True)}
GPT2 = dict(norm="layer", mlp="gelu", positions="learned", n_kv_head=4, qk_norm=False, **BIASES)
CODEGEN = dict(norm="layer", mlp="gelu", mlp_bias=True, rotary_dim=4, parallel=True, n_kv_head=4,
               qk_norm=False, tied=False, head_bias=True)
ALL = FIELDS | {"gpt2": GPT2, "codegen": CODEGEN, "wide": CODEGEN | dict(head_dim=10)}


def shape_of(name: str) -> ModelConfig:
    return ModelConfig(**(SHAPE | ALL[name]))


def stirred(model, seed: int = 0):
    """Far from where training starts: attention is not uniform, no bias is 0, no norm is 1."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.dim() == 2:
                p.mul_(5)
            else:
                p.add_(0.3 * noise(*p.shape, seed=seed + i))
    return model


def made(name: str) -> Transformer:
    return stirred(Transformer(shape_of(name))).eval()


def tokens_of(*shape, seed=0):
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(seed))


# ---- each field, and the families' sets of them --------------------------------------------------

@pytest.mark.parametrize("name", FIELDS)
def test_each_field_changes_the_network(name):
    plain = stirred(Transformer(ModelConfig(**SHAPE | dict(tied=name != "head_bias")))).eval()
    model, tokens = made(name), tokens_of(1, 40)
    shared = {n: t for n, t in plain.state_dict().items()
              if n in model.state_dict() and t.shape == model.state_dict()[n].shape}
    model.load_state_dict(shared, strict=False)
    assert not torch.allclose(model(tokens), plain(tokens), atol=1e-2)


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(name, block, monkeypatch):
    monkeypatch.setattr(KVCache, "BLOCK", block)
    model, tokens = made(name), tokens_of(3, 10)
    cache, start = KVCache(model.config, 3, 12, blocks=block > 0), torch.zeros(3, dtype=torch.int64)
    steps = [model.trunk(tokens[:, :4], None, None, cache)]
    for t in range(4, 10):
        hidden = model.step(tokens[:, t], torch.full((3,), t), start, cache.span(t + 1), cache)
        steps.append(hidden[:, None])
    assert torch.allclose(torch.cat(steps, 1), model.hidden(tokens), atol=1e-4)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_rows_may_begin_at_different_positions_of_the_cache(name):
    model, tokens, start = made(name), tokens_of(2, 9), torch.tensor([0, 2])
    cache = KVCache(model.config, 2, 12)
    for t in range(9):
        hidden = model.step(tokens[:, t], start + t, start, cache.span(12), cache)
        assert torch.allclose(hidden, model.hidden(tokens[:, :t + 1])[:, -1], atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_padded_row_and_a_packed_document_equal_the_row_alone(name, side):
    model, rows = made(name), [tokens_of(n, seed=n) for n in (3, 9, 6)]
    tokens, mask = torch.full((3, 9), 299), torch.zeros(3, 9, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, True
    padded = model(tokens, mask)
    docs = torch.tensor([[0] * 3 + [1] * 9 + [2] * 6])
    packed = model(torch.cat(rows)[None], docs=docs)
    for i, row in enumerate(rows):
        alone = model(row[None])[0]
        assert torch.allclose(padded[i, mask[i]], alone, atol=1e-4)
        assert torch.allclose(packed[docs == i], alone, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_chosen_positions_recomputation_and_onednn_change_no_gradient(name):
    model, tokens, found = made(name), tokens_of(3, 8), []
    mask, where = torch.arange(8) < torch.tensor([[8], [5], [6]]), torch.tensor([1, 7, 8, 12, 20])
    for chosen, products, model.recompute in ((False, "aten", False), (True, "aten", False),
                                              (True, "onednn", False), (True, "aten", True)):
        use_products(model, products)
        model.zero_grad()
        hidden = (model.hidden(tokens, mask, where=where) if chosen else
                  model.hidden(tokens, mask).flatten(0, 1)[where])
        token_logprobs(model, hidden, torch.arange(5))[0].sum().backward()
        found.append([hidden.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-3)
                   for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_every_weight_learns_and_matrices_alone_are_muons(name):
    model = Transformer(shape_of(name))
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert all(p.dim() == 2 and sum(rows) == len(p) for p, rows in model.matrix_parameters())
    for optimizer in ("muon", "adamw"):
        optimizers = make_optimizers(model, PretrainOptions(optimizer=optimizer))
        tokens = tokens_of(4, 33)
        next_token_loss(model, tokens[:, :-1], tokens[:, 1:], None).backward()
        for step in optimizers:
            step.step()
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


def test_learned_positions_are_drawn_as_embeddings_are():
    table = Transformer(ModelConfig(positions="learned")).position_embedding.weight
    assert abs(float(table.detach().std()) - 0.02) < 0.001


@pytest.mark.parametrize("name", ALL)
def test_checkpoints_and_reward_models_keep_the_shape(name, tmp_path, tokenizer):
    model = made(name)
    save_checkpoint(tmp_path, model, tokenizer)
    loaded = load_checkpoint(tmp_path)[0]
    assert loaded.config == model.config
    tokens = tokens_of(2, 9)
    assert torch.equal(loaded(tokens), model(tokens))
    reward = RewardModel(model.config)
    reward.backbone.load_state_dict(model.state_dict())
    save_checkpoint(tmp_path, reward.eval(), tokenizer)
    again = load_checkpoint(tmp_path, cls=RewardModel)[0]
    assert isinstance(again.config, RewardConfig)
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    assert torch.equal(again.backbone.hidden(tokens, mask), model.hidden(tokens, mask))


@pytest.fixture(scope="module")
def tokenizer():
    from data.tokenizer import Tokenizer
    return Tokenizer([bytes([i]) for i in range(256)] + [b"a" + bytes([i]) for i in range(38)])


# ---- single parts --------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("products", ["aten", "onednn"])
def test_chunked_cross_entropy_with_a_bias_equals_the_plain_one(dtype, products):
    model = made("head_bias")
    use_products(model, products)
    hidden = noise(40, 32).requires_grad_()
    targets, found = tokens_of(40), []
    leaves = [hidden, model.output.weight, model.output.bias]
    with precision(dtype, "cpu"):
        for loss in (F.cross_entropy(model.head(hidden).float(), targets, reduction="sum"),
                     cross_entropy_sum(model, hidden, targets, chunk=7)):
            found.append([loss, *torch.autograd.grad(0.5 * loss, leaves)])
    error = 1e-4 if dtype == "float32" else 0.02
    for plain, ours in zip(*found, strict=True):
        assert (ours - plain).norm() <= error * plain.norm()


@torch.no_grad()
def test_log_probabilities_hold_the_heads_bias():
    model, hidden, targets = made("head_bias"), noise(6, 32), torch.arange(6)
    expected = logprobs_of(hidden @ model.output.weight.T + model.output.bias, targets)
    assert torch.allclose(token_logprobs(model, hidden, targets)[0], expected, atol=1e-5)
    silent = made("head_bias")
    silent.output.bias.zero_()
    ours, other, kl = compared_logprobs((model, silent), (hidden, hidden), targets)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(ours, other, atol=1e-2)
    assert bool((kl > 0).all())


def test_flops_count_the_heads_bias_and_the_heads_width():
    flops = {name: made(name).flops_per_token(64) for name in ("head_bias", "head_dim")}
    untied = Transformer(ModelConfig(**SHAPE | dict(tied=False))).flops_per_token(64)
    assert flops["head_bias"] == untied + 6 * 300
    # K 8 -> 12: (H + 2 G) 4 rows of qkv and H 4 columns of out, of 32; 6 H K T for attention
    assert flops["head_dim"] == untied + 2 * (6 * (8 + 4) * 4 * 32 + 6 * 4 * 4 * 64)


def test_layer_norm_computes_in_float32():
    norm, x = LayerNorm(32, 1e-5), 100 + noise(50, 32)
    exact = F.layer_norm(x.double(), (32,), eps=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), exact, atol=1e-4)
    half, exact = x.bfloat16(), F.layer_norm(x.bfloat16().double(), (32,), eps=1e-5)
    for layer in (norm, LayerNorm(32, 1e-5).bfloat16()):  # a decoder's norms keep float32 weights
        assert layer(half).dtype == torch.bfloat16
        assert (layer(half).double() - exact).abs().max() < 0.02


@pytest.mark.parametrize("changes,message", [
    (dict(norm="batch"), "norm is 'batch': use rms or layer"),
    (dict(mlp="relu"), "mlp is 'relu': use swiglu or gelu"),
    (dict(positions="alibi"), "positions is 'alibi': use rotary or learned"),
    (dict(norm=1), "norm is 1"), (dict(parallel=1), "parallel is 1"), (dict(head_dim=-2), "head_dim"),
    (dict(head_dim=7), "must be even"), (dict(rotary_dim=3), "must be even"),
    (dict(rotary_dim=10), "at most the first"), (dict(head_dim=8.0), "head_dim is 8.0"),
    (dict(head_bias=True), "head_bias needs tied False"),
    (dict(rope_scaling=(8, 1, 4)), "give four positive numbers"),
    (dict(rope_scaling=(8, 4, 1, 64)), "low below high"),
    (dict(rope_scaling=(8, 1, float("nan"), 64)), "rope_scaling"),
    (dict(rope_scaling=(8, 1, True, 64)), "rope_scaling"),
    (dict(rope_scaling=("8", 1, 4, 64)), "rope_scaling"),
    (dict(rope_scaling=8.0), "rope_scaling is 8.0"),
    (dict(d_model=30, n_head=4, n_kv_head=4), "unless head_dim is given"),
    (dict(head_dim=8, n_kv_head=3), "n_kv_head")])
def test_fields_that_do_not_fit_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        ModelConfig(**SHAPE | changes)
    assert len(str(error.value).splitlines()) == 1


def test_configs_saved_before_or_as_json_are_read():
    old = ModelConfig(**SHAPE)
    assert (old.head_dim, old.norm, old.rope_scaling) == (8, "rms", ())
    listed = ModelConfig(**SHAPE, rope_scaling=[8.0, 1, 4, 16])
    assert listed == ModelConfig(**dataclasses.asdict(listed))
    assert listed.rope_scaling == (8.0, 1, 4, 16)
    assert ModelConfig(**SHAPE | dict(d_model=30, head_dim=8)).head_dim == 8


# ---- the families' own networks ------------------------------------------------------------------

TINY = dict(vocab_size=300, n_layer=2, n_head=4, d_model=32, max_len=256, qk_norm=False)
LLAMAS = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
              tie_word_embeddings=False)
# wavelengths of 6, 20, 63 and 199 tokens: one kept, two mixed, one scaled
SCALING = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0,
               high_freq_factor=4.0, original_max_position_embeddings=64)


def from_gpt2(w: dict) -> dict:
    """Its matrices are stored (in, out)."""
    ours = {"embedding.weight": w["transformer.wte.weight"],
            "position_embedding.weight": w["transformer.wpe.weight"]}
    names = {"ln_1": "attention_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out",
             "ln_2": "mlp_norm", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = w[f"transformer.ln_f.{kind}"]
        for i in range(2):
            for theirs, name in names.items():
                tensor = w[f"transformer.h.{i}.{theirs}.{kind}"]
                ours[f"blocks.{i}.{name}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor
    return ours


def from_llama(w: dict) -> dict:
    """Llama, Qwen2 and Qwen3: ours stack q, k and v, and gate and up."""
    ours = {"embedding.weight": w["model.embed_tokens.weight"], "norm.weight": w["model.norm.weight"],
            "output.weight": w["lm_head.weight"]}
    names = {"input_layernorm": ["attention_norm"], "post_attention_layernorm": ["mlp_norm"],
             "self_attn.q_proj self_attn.k_proj self_attn.v_proj": ["attention.qkv"],
             "self_attn.o_proj": ["attention.out"], "self_attn.q_norm": ["attention.q_norm"],
             "self_attn.k_norm": ["attention.k_norm"],
             "mlp.gate_proj mlp.up_proj": ["mlp.gate_up"], "mlp.down_proj": ["mlp.down"]}
    for i in range(2):
        for theirs, (name,) in names.items():
            for kind in ("weight", "bias"):
                keys = [f"model.layers.{i}.{part}.{kind}" for part in theirs.split()]
                if keys[0] in w:
                    ours[f"blocks.{i}.{name}.{kind}"] = torch.cat([w[key] for key in keys])
    return ours


def from_codegen(w: dict) -> dict:
    """Its rows are four shards of q, v, k; a head's first dimensions are rotated in neighbouring
    pairs."""
    pairs = torch.tensor([0, 2, 1, 3])  # rotary_dim 4: the halves of our pairs
    ours = {"embedding.weight": w["transformer.wte.weight"]}
    names = {"ln_1": "attention_norm", "mlp.fc_in": "mlp.up", "mlp.fc_out": "mlp.down"}
    for i in range(2):
        layer = f"transformer.h.{i}."
        q, v, k = w[layer + "attn.qkv_proj.weight"].view(4, 3, 8, 32).unbind(1)
        heads = [t.reshape(4, 8, 32).clone() for t in (q, k, v)]
        for t in heads[:2]:
            t[:, :4] = t[:, pairs]
        ours[f"blocks.{i}.attention.qkv.weight"] = torch.cat([t.reshape(32, 32) for t in heads])
        ours[f"blocks.{i}.attention.out.weight"] = w[layer + "attn.out_proj.weight"]
        for theirs, name in names.items():
            for kind in ("weight", "bias"):
                ours[f"blocks.{i}.{name}.{kind}"] = w[f"{layer}{theirs}.{kind}"]
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = w[f"transformer.ln_f.{kind}"]
        ours[f"output.{kind}"] = w[f"lm_head.{kind}"]
    return ours


# family: (its configuration, its fields, our fields, how weights are copied)
OWN = {
    "gpt2": ("GPT2", dict(vocab_size=300, n_positions=256, n_embd=32, n_layer=2, n_head=4),
             TINY | GPT2 | dict(d_ff=128, norm_eps=1e-5), from_gpt2),
    "llama": ("Llama", LLAMAS | dict(attention_bias=True, mlp_bias=True, rope_parameters=SCALING,
                                     rms_norm_eps=1e-5),
              TINY | BIASES | dict(d_ff=48, n_kv_head=2, tied=False, norm_eps=1e-5, rope_base=100.0,
                                   rope_scaling=(8.0, 1.0, 4.0, 64)), from_llama),
    "qwen2": ("Qwen2", LLAMAS | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
              TINY | dict(d_ff=48, n_kv_head=2, tied=False, rope_base=1e6, qkv_bias=True), from_llama),
    "qwen3": ("Qwen3", LLAMAS | dict(head_dim=16, rope_parameters=dict(rope_type="default",
                                                                       rope_theta=1e6)),
              TINY | dict(d_ff=48, n_kv_head=2, tied=False, rope_base=1e6, head_dim=16, qk_norm=True),
              from_llama),
    "codegen": ("CodeGen", dict(vocab_size=300, n_positions=256, n_ctx=256, n_embd=32, n_layer=2,
                                n_head=4, rotary_dim=4, tie_word_embeddings=False),
                TINY | CODEGEN | dict(d_ff=128, norm_eps=1e-5), from_codegen)}


@pytest.mark.parametrize("family", OWN)
@torch.no_grad()
def test_the_network_is_the_familys_own(family):
    transformers = pytest.importorskip("transformers")
    kind, theirs, fields, copied = OWN[family]
    config = getattr(transformers, f"{kind}Config")(**theirs)
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    own = stirred(getattr(transformers, kind + suffix)(config).float().eval())
    model = Transformer(ModelConfig(**fields)).eval()
    model.load_state_dict(copied(own.state_dict()))  # strict: all names, all shapes
    tokens, mask = tokens_of(4, 256), torch.arange(256) >= torch.tensor([[0], [1], [100], [250]])
    expected = own(tokens, attention_mask=mask.long(),
                   position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)).logits
    logits = model(tokens, mask)
    assert float(expected[mask].std()) > 0.3  # not near a uniform distribution
    assert float((logits - expected)[mask].abs().max()) < 1e-4


def test_rows_without_a_token_are_never_written(tmp_path):
    """Neither sampled nor likely in what is scored; their weights stay."""
    model = Transformer(ModelConfig(**(SHAPE | dict(vocab_size=300))))
    own = Vocabulary.own(256)
    tokenizer = Tokenizer([bytes([i]) for i in range(256)], vocabulary=dataclasses.replace(own, rows=300))
    with torch.no_grad():  # the rows that no token has would be the likeliest
        model.embedding.weight[270:] = 3 * model.embedding.weight[:1]
        model.embedding.weight[:1] *= 3
    save_checkpoint(tmp_path, model, tokenizer)
    loaded, _, _ = load_checkpoint(tmp_path)
    assert torch.equal(loaded.embedding.weight, model.embedding.weight)
    tokens = torch.zeros(40, 3, dtype=torch.int64)
    for compile in (False, True):
        decoder = Decoder(loaded, compile=compile)
        replies = generate(loaded, tokens, torch.ones_like(tokens).bool(), 20, decoder=decoder)
        assert int(replies.tokens.max()) < 262
    with torch.no_grad():
        hidden = loaded.hidden(tokens)[:, -1]
        logprobs, entropy = token_logprobs(loaded, hidden, torch.full((40,), 299))
    assert logprobs.max() < -1000
    assert entropy.isfinite().all()
