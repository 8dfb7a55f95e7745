"""Writing with packed weights: each layer finds its own, compiled equals eager, and threads do not
mix."""
import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import ModelConfig, Transformer
from runtime.decoding import Int8Linear, KVCache, PackedLinear, decoding_copy, packed_layers, quantise_rows
from runtime.device import compiler_fault
from runtime.options import UserError
from runtime.products import use_products
from sample import Decoder, generate
from tests.conftest import TINY, equal, logprobs_of, loud, noise

CONFIG = ModelConfig(**TINY)
BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True, tied=False)
OTHERS = {"gpt2": dict(norm="layer", mlp="gelu", positions="learned", **BIASES),
          "llama": dict(rope_scaling=(8.0, 1.0, 4.0, 16), head_dim=12, **BIASES),
          "codegen": dict(norm="layer", mlp="gelu", rotary_dim=4, parallel=True, **BIASES)}
needs_compiler = pytest.mark.skipif(bool(compiler_fault()), reason=compiler_fault())


def loud_model(seed: int = 0, **changes) -> Transformer:
    model = Transformer(ModelConfig(**{**TINY, **changes}))
    model.initialise(seed)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if name.endswith("bias"):
                p.copy_(0.5 * noise(*p.shape, seed=seed + i))
    return loud(model).eval()


# ---- keys and values -----------------------------------------------------------------------------

@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("layers", [2, 15])  # 15: in groups, a graph for five of them
def test_a_cache_that_is_not_needed_any_more_is_freed_at_once(compiled, layers):
    """Not when the garbage collector runs: half a gigabyte a rollout waited for it."""
    decoder = Decoder(loud_model(n_layer=layers), compile=compiled)
    tokens, seen = torch.randint(1, 60, (2, 5)), []
    gc.collect()
    gc.disable()
    try:
        for length in (40, 60, 80):
            generate(decoder.model, tokens, torch.ones_like(tokens).bool(), length - 5, decoder=decoder)
            seen.append(weakref.ref(next(iter(decoder.caches.values())).kv.untyped_storage()))
        assert [ref() is None for ref in seen[1:]] == [True, False]  # the compiler may keep what it compiled with
    finally:
        gc.enable()


@pytest.mark.parametrize("blocks", [False, True])
def test_a_cache_shrinks_in_its_own_memory_and_takes_rows_of_another(blocks):
    cache, other = (KVCache(CONFIG, rows, 40, blocks=blocks) for rows in (5, 2))
    for kv, seed in ((cache.kv, 0), (other.kv, 1)):
        kv.copy_(noise(*kv.shape, seed=seed))
    whole, at = cache.kv.clone(), torch.tensor([3, 0, 1])
    small = cache.shrink(at)
    assert equal(small.kv, whole[:, :, at])
    smaller = small.shrink(torch.tensor([1, 2]))
    assert equal(smaller.kv, whole[:, :, [0, 1]])
    assert smaller.kv.data_ptr() == cache.kv.data_ptr()  # no more memory is taken
    smaller.put(torch.tensor([1]), other, torch.tensor([0]), 3, at=16)
    block, start = divmod(16, smaller.size)
    assert equal(smaller.kv[:, block, 1, :, start:start + 3], other.kv[:, 0, 0, :, :3])
    assert equal(smaller.kv[:, :, 0], whole[:, :, 0])


# ---- packed weights ------------------------------------------------------------------------------

@pytest.mark.parametrize("by", ["aten", "onednn"])
@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_equal_plain_ones_and_follow_the_weights(by, rows, dtype):
    weight = nn.Parameter(noise(24, 16))
    layer, x = PackedLinear(weight, dtype, rows, by), noise(rows, 1, 16, seed=3)
    for _ in range(2):
        expected = F.linear(x.to(dtype), weight.detach().to(dtype))
        assert layer(x).dtype == dtype
        assert layer(x).shape == (rows, 1, 24)
        assert torch.allclose(layer(x).float(), expected.float(),
                              atol=1e-5 if dtype == torch.float32 else 0.07)
        with torch.no_grad():
            weight.mul_(-2)
        layer.refresh()


@pytest.mark.parametrize("by", ["aten", "onednn"])
@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("pack,dtype", [(PackedLinear, torch.float32), (PackedLinear, torch.bfloat16),
                                        (Int8Linear, torch.bfloat16)])
def test_packed_layers_add_their_bias_and_follow_it(pack, dtype, rows, by):
    weight, bias = nn.Parameter(noise(24, 16)), nn.Parameter(noise(24, seed=1))
    layer, plain = pack(weight, dtype, rows, by, bias), pack(weight, dtype, rows, by)
    for _ in range(2):
        for x in (noise(rows, 1, 16, seed=3), noise(rows, 5, 16, seed=4)):  # a step's, and a prompt's
            assert torch.equal(layer(x), plain(x) + bias.detach().to(dtype))
        with torch.no_grad():
            bias.mul_(-2)
        layer.refresh()


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("rows,width", [(1, 64), (1, 344), (8, 64), (40, 344)])
def test_products_in_int8_are_plain_ones_but_for_rounding_and_follow_the_weights(
        rows, width, vnni, monkeypatch):
    if not vnni:  # the plain fall-back
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    weight = nn.Parameter(noise(48, width))
    with torch.no_grad():
        weight[3] = 0
        weight[:, 5] *= 5  # an outlier sets the step of its row
    layer, x = Int8Linear(weight, torch.bfloat16, rows), noise(rows, 1, width, seed=3)
    for _ in range(2):
        # a step's rows, and a prompt's
        for inputs, error in ((x, 0.02), (x.repeat(1, 5, 1), 0.006)):
            expected = F.linear(inputs, weight.detach())
            found = layer(inputs)
            assert found.dtype == torch.bfloat16
            assert found.shape == expected.shape
            off = (found.float() - expected).norm() / expected.norm()
            assert off < error
            assert not found[..., 3].any()
            # a step's really are rounded: bfloat16 alone is .003 off
            assert off > 0.005 or inputs is not x
        with torch.no_grad():
            weight.mul_(-2)
        layer.refresh()


def test_rows_are_rounded_to_their_own_255_steps():
    x = torch.cat((noise(6, 40) * torch.logspace(-6, 6, 6)[:, None], torch.zeros(1, 40)))
    q, scale = quantise_rows(x)
    assert q.dtype == torch.uint8
    assert (q[:-1].int() - 128).abs().amax(1).tolist() == [127] * 6
    assert q.min() >= 1
    assert bool(((scale * (q.float() - 128) - x).abs() <= 0.501 * scale).all())
    assert bool((q[-1] == 128).all())  # a row of zeros stays one


def test_int8_is_refused_where_it_would_not_be_used():
    with pytest.raises(UserError, match="int8 is for writing on a CPU"):
        Decoder(Transformer(CONFIG).to("meta"), "int8")


def test_a_decoding_copy_shares_the_tensors_and_leaves_the_model_as_it_was():
    model = loud_model()
    packed = decoding_copy(model, torch.float32, 4)
    assert packed.embedding.weight is model.embedding.weight
    assert packed.blocks[0].mlp_norm is not model.blocks[0].mlp_norm
    assert len(packed_layers(packed)) == 4 * CONFIG.n_layer + 1
    assert packed_layers(model) == []
    assert model.output is None


@pytest.mark.parametrize("by", ["aten", "onednn"])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_layer_of_a_decoder_finds_its_own_weight(by, rows, dtype, tied):
    model = loud_model(tied=tied)
    tokens = torch.randint(1, 70, (rows, 6), generator=torch.Generator().manual_seed(0))
    use_products(model, by)
    out = generate(model, tokens, torch.ones_like(tokens).bool(), 12, dtype=dtype)
    expected = logprobs_of(model(torch.cat((tokens, out.tokens), 1))[:, 5:-1], out.tokens)
    bound = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.06}[dtype]
    assert (out.logprobs - expected).abs().mean() < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", OTHERS)
def test_models_of_other_families_write_what_they_would_score(family, dtype):
    model = loud_model(**OTHERS[family])
    tokens = torch.randint(1, 70, (9, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) >= torch.arange(9)[:, None] % 4
    decoder = Decoder(model, dtype)
    assert len(packed_layers(decoder.model_for(9))) == 4 * CONFIG.n_layer + 1
    for _ in range(2):
        out = generate(model, tokens, mask, 12, decoder=decoder)
        rows, real = torch.cat((tokens, out.tokens), 1), torch.cat((mask, out.mask), 1)
        expected = logprobs_of(model(rows, real)[:, 5:-1], out.tokens)
        bound = {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.1}[dtype]
        assert (out.logprobs - expected)[out.mask].abs().mean() < bound
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * noise(*p.shape))
        decoder.refresh()


# ---- compiled equals eager -----------------------------------------------------------------------

def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5])
def test_a_compiled_decoder_writes_the_same_with_one_graph_for_all_lengths_and_weights(rows):
    model = loud_model()
    decoder, before = Decoder(model, compile=True), graphs()
    for length, seed in ((4, 1), (9, 2), (70, 3)):  # in 2 blocks of the cache, and in 3
        tokens = torch.randint(1, 70, (rows, length), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(tokens).bool()
        mask[-1, :length // 2] = rows == 1
        fast = generate(model, tokens, mask, 20, seed=seed, decoder=decoder)
        plain = generate(model, tokens, mask, 20, seed=seed)
        assert torch.equal(fast.tokens, plain.tokens)
        assert torch.allclose(fast.logprobs, plain.logprobs, atol=1e-4)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * noise(*p.shape, seed=seed))
        decoder.refresh()
    assert graphs() - before == 1


@needs_compiler
@pytest.mark.parametrize("family,rows", [("gpt2", 1), ("llama", 5), ("codegen", 5)])
def test_compiled_decoders_of_other_families_write_the_same_as_weights_change(family, rows):
    model = loud_model(**OTHERS[family])
    decoder, before = Decoder(model, compile=True), graphs()
    tokens = torch.randint(1, 70, (rows, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(20) >= torch.arange(rows)[:, None] % 4
    for seed in (1, 2):
        fast = generate(model, tokens, mask, 20, seed=seed, decoder=decoder)
        plain = generate(model, tokens, mask, 20, seed=seed)
        assert torch.equal(fast.tokens, plain.tokens)
        assert torch.allclose(fast.logprobs, plain.logprobs, atol=1e-4)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * noise(*p.shape, seed=seed))
        decoder.refresh()
    assert graphs() - before == 1


@needs_compiler
def test_weights_of_another_type_are_another_step():
    """On a CPU no guard would notice that the graph of float32 norms is given bfloat16 ones."""
    model = loud_model()
    tokens = torch.randint(1, 70, (3, 5), generator=torch.Generator().manual_seed(0))
    settings = dict(seed=1, mask=torch.ones(3, 5, dtype=torch.bool), max_new_tokens=16)
    generate(model, tokens, decoder=Decoder(model, "bfloat16", compile=True), **settings)
    half = copy.deepcopy(model).bfloat16()
    fast = generate(half, tokens, decoder=Decoder(half, compile=True), **settings)
    logits = half(torch.cat((tokens, fast.tokens), 1))[:, 4:-1]
    assert (fast.logprobs - logprobs_of(logits, fast.tokens)).abs().mean() < 0.1


@needs_compiler
def test_compiled_rows_are_refilled_and_dropped_as_eager_ones_are():
    model, before = loud_model(), graphs()
    tokens = torch.randint(1, 70, (44, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(7) >= torch.arange(44)[:, None] % 5  # prompts of 3 to 7 tokens
    # 12 prompts wait; below 9 rows, those go on alone
    settings = dict(end_id=3, seed=4, batch_size=32)
    fast = generate(model, tokens, mask, 40, decoder=Decoder(model, compile=True), **settings)
    plain = generate(model, tokens, mask, 40, **settings)
    assert torch.equal(fast.tokens, plain.tokens)
    assert torch.allclose(fast.logprobs, plain.logprobs, atol=1e-4)
    assert plain.mask.sum(1).unique().numel() > 5
    assert graphs() - before == 2  # of 32 rows, and of 8


# ---- threads -------------------------------------------------------------------------------------

PROMPT = torch.arange(8)[None] + 5
SETTINGS = [("float32", False), ("bfloat16", False), ("int8", False),
            *(pytest.param(dtype, True, marks=needs_compiler)
              for dtype in ("float32", "bfloat16", "int8"))]


def in_threads(*works) -> list[BaseException]:
    """Run the functions at once, one thread each; what they raised."""
    errors = []

    def run(work) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("dtype,compiled", SETTINGS)
def test_two_models_in_two_threads_write_what_each_writes_alone(dtype, compiled, replies=40):
    models = [loud_model(seed, n_layer=1) for seed in (1, 2)]
    for model in models:
        use_products(model, "onednn")
    decoders = [Decoder(model, dtype, compile=compiled) for model in models]
    mask = torch.ones_like(PROMPT).bool()
    together = [[], []]

    def write(i: int, seed: int) -> torch.Tensor:
        return generate(models[i], PROMPT, mask, 24, seed=seed, decoder=decoders[i]).tokens

    def work(i: int) -> None:  # the first call of each compiles, while the other does
        together[i] += [write(i, seed) for seed in range(replies)]

    assert in_threads(lambda: work(0), lambda: work(1)) == []
    for i in (0, 1):
        alone = [write(i, seed) for seed in range(replies)]
        assert sum(not torch.equal(a, b) for a, b in zip(alone, together[i], strict=True)) == 0
    assert not torch.equal(together[0][0], together[1][0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_an_eager_model_writes_the_same_while_another_thread_compiles(dtype):
    model, mask, meanwhile = loud_model(), torch.ones_like(PROMPT).bool(), []

    def write() -> None:
        meanwhile.append(generate(model, PROMPT, mask, 24, seed=1, dtype=dtype))

    def backend(graph, inputs):  # torch.compile calls it in the middle of its work
        assert in_threads(write) == []
        return graph.forward

    write()
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    alone, beside = meanwhile
    assert torch.equal(beside.tokens, alone.tokens)
    assert torch.equal(beside.logprobs, alone.logprobs)


def test_calls_without_a_decoder_do_not_mix_in_threads():
    models = [loud_model(1), loud_model(2, n_layer=1)]
    mask, together = torch.ones_like(PROMPT).bool(), [[], []]

    def work(i: int) -> None:
        together[i] += [generate(models[i], PROMPT, mask, 16, seed=seed).tokens
                        for seed in range(10)]

    assert in_threads(lambda: work(0), lambda: work(1)) == []
    for i in (0, 1):
        alone = [generate(models[i], PROMPT, mask, 16, seed=seed).tokens for seed in range(10)]
        assert all(map(torch.equal, alone, together[i]))


def test_one_decoder_in_two_threads_is_an_error():
    model, mask = loud_model(), torch.ones_like(PROMPT).bool()
    decoder, inside, leave = Decoder(model), threading.Event(), threading.Event()

    def first() -> None:  # waits in its first token until the second thread has tried
        def hold(*_) -> None:
            inside.set()
            leave.wait(30)
        generate(model, PROMPT, mask, 2, decoder=decoder, on_token=hold)

    def second() -> None:
        inside.wait(30)
        try:
            generate(model, PROMPT, mask, 2, decoder=decoder)
        finally:
            leave.set()

    errors = in_threads(first, second)
    assert [type(error) for error in errors] == [ValueError]
    assert "writing already" in str(errors[0])


def test_a_decoder_is_free_again_after_a_call_and_after_an_error():
    model, mask = loud_model(), torch.ones_like(PROMPT).bool()
    decoder = Decoder(model)

    def fail(*_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPT, mask, 4, decoder=decoder, on_token=fail)
    generate(model, PROMPT, mask, 4, decoder=decoder)
    with pytest.raises(ValueError, match="inside on_token"):
        generate(model, PROMPT, mask, 4, decoder=decoder,
                 on_token=lambda *_: generate(model, PROMPT, mask, 4, decoder=decoder))
