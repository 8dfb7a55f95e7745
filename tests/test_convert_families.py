"""Real models: each family computes what `transformers` computes, and comes back tensor by tensor."""
import json
import math

import pytest
import torch

from convert.exporting import require_same_computing, their_tensors
from convert.families import FAMILIES, Config, family_of
from convert.files import open_tensors
from convert.importing import family_named, model_config, read_config, read_weights
from model import ModelConfig, Transformer
from runtime.options import UserError
from sample import generate

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
WIDE = dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GPT = dict(vocab_size=160, n_embd=64, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2,
           pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
# model_type: (configs of transformers' class with every feature on)
CASES = {
    "llama": ("Llama", dict(WIDE, attention_bias=True, mlp_bias=True, rope_theta=5e5, rope_scaling=dict(LLAMA3),
                            tie_word_embeddings=True)),
    "llama-untied": ("Llama", dict(WIDE, num_key_value_heads=4, rms_norm_eps=1e-5, tie_word_embeddings=False)),
    "mistral": ("Mistral", dict(WIDE, sliding_window=300, head_dim=24, tie_word_embeddings=False)),
    "qwen2": ("Qwen2", dict(WIDE, rope_theta=1e6, tie_word_embeddings=True, use_sliding_window=False,
                            sliding_window=32)),
    "qwen3": ("Qwen3", dict(WIDE, head_dim=32, rope_theta=1e6, tie_word_embeddings=True)),
    "gpt2": ("GPT2", dict(GPT, n_inner=96)),
    "codegen": ("CodeGen", dict(GPT, rotary_dim=8, tie_word_embeddings=False)),
}


def saved(folder, name: str, kind: str = "causal"):
    """(transformers' model with random weights of every tensor, its folder)."""
    transformers = pytest.importorskip("transformers")
    family, options = CASES[name]
    config = getattr(transformers, f"{family}Config")(**options)
    end = {"causal": "LMHeadModel" if family == "GPT2" else "ForCausalLM",
           "reward": "ForSequenceClassification"}[kind]
    if kind == "reward":
        config.num_labels = 1
    torch.manual_seed(0)
    model = getattr(transformers, family + end)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def read(folder):
    """(our model, its family, its config.json) of a folder."""
    config, tensors = read_config(folder), open_tensors(folder)
    family = family_named(config)
    return read_weights(config, family, model_config(config, family, tensors, 0), tensors).eval(), family, config


def positions(mask):
    """Real tokens before each, as generate() of transformers counts them."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def left_padded(rows: int = 4, length: int = 256):
    """(tokens, mask), each (rows, length); rows of different lengths."""
    tokens = torch.randint(3, 160, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length) >= torch.tensor([0, 5, 40, 100])[:rows, None]
    return torch.where(mask, tokens, 0), mask


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
    theirs = saved(tmp_path, name)
    ours, _, _ = read(tmp_path)
    tokens, mask = left_padded()
    with torch.no_grad():
        a = theirs(tokens, attention_mask=mask.long(), position_ids=positions(mask)).logits
        b = ours(tokens, mask)
    assert (a - b)[mask].abs().max() <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_64_greedy_tokens_are_those_of_transformers(name, tmp_path):
    theirs = saved(tmp_path, name)
    ours, _, _ = read(tmp_path)
    tokens, mask = left_padded(3, 40)
    mask[2] = True  # a row of 40 tokens at least 0 pads
    found = generate(ours, tokens, mask, 64, temperature=0)
    expected = theirs.generate(tokens, attention_mask=mask.long(), max_new_tokens=64, do_sample=False,
                               eos_token_id=None, pad_token_id=0)[:, 40:]
    assert torch.equal(found.tokens, expected)


@pytest.mark.parametrize("name", CASES)
def test_tensors_come_back_bit_for_bit(name, tmp_path):
    theirs = saved(tmp_path, name)
    ours, family, config = read(tmp_path)
    require_same_computing(family, ours.config)
    written = dict(their_tensors(ours, family, {}))
    stored = open_tensors(tmp_path)
    assert set(written) == set(stored)
    for tensor_name, tensor in written.items():
        assert torch.equal(tensor, stored[tensor_name].read()), tensor_name
    assert family_of(ours.config).write(ours.config)  # a trained child of it finds a family, too
    assert theirs.num_parameters() == ours.n_parameters()


@pytest.mark.parametrize("name", [name for name in CASES if name != "codegen"])
def test_a_reward_model_scores_as_transformers_does(name, tmp_path):
    theirs = saved(tmp_path, name, "reward")
    ours, family, _ = read(tmp_path)
    tokens, mask = left_padded(3, 60)
    with torch.no_grad():
        a = theirs(tokens, attention_mask=mask.long(), position_ids=positions(mask)).logits[:, 0]
        b = ours(tokens, mask)
    assert (a - b).abs().max() <= 1e-4
    assert set(dict(their_tensors(ours, family, {}))) == set(open_tensors(tmp_path))


def test_bfloat16_stays_bfloat16(tmp_path):
    theirs = saved(tmp_path / "float", "qwen2").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "half")
    ours, family, _ = read(tmp_path / "half")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    stored = open_tensors(tmp_path / "half")
    for name, tensor in their_tensors(ours, family, {"": "bfloat16"}):
        assert torch.equal(tensor, stored[name].read())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_reads_what_it_writes(name):
    """Without `transformers`: the config of a shape is read as that shape."""
    family = FAMILIES[name]
    own = {"gpt2": dict(norm="layer", mlp="gelu", mlp_bias=True, qkv_bias=True, out_bias=True, positions="learned"),
           "codegen": dict(norm="layer", mlp="gelu", mlp_bias=True, head_bias=True, parallel=True, rotary_dim=8,
                           tied=False), "qwen2": dict(qkv_bias=True), "qwen3": dict(qk_norm=True, head_dim=32),
           "llama": dict(rope_scaling=(8.0, 1.0, 4.0, 64.0), qkv_bias=True, out_bias=True)}
    own["moss"] = own["codegen"]
    if name == "smollm3":
        pytest.skip("is written as llama")
    c = ModelConfig(**{**dict(vocab_size=160, n_layer=2, n_head=4, n_kv_head=4, d_model=64, d_ff=256, qk_norm=False),
                       **own.get(name, {})})
    require_same_computing(family, c)
    values = {"model_type": name, "vocab_size": c.vocab_size, "tie_word_embeddings": c.tied, **family.write(c)}
    values = json.loads(json.dumps(values))
    names = {their: None for ours in Transformer(c).state_dict() for their in family.theirs(ours)}
    assert model_config(Config(values, "config.json"), family, names, c.max_len) == c


def test_our_own_models_are_qwen3s(tmp_path):
    """RMSNorm on queries and keys, SwiGLU, rotary positions, a tied head: the demo's models export."""
    c = ModelConfig(vocab_size=160, n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96)
    assert family_of(c).model_type == "qwen3"
    transformers = pytest.importorskip("transformers")
    model = Transformer(c).eval()
    model.initialise(3)
    family = family_of(c)
    config = transformers.Qwen3Config(**{"vocab_size": c.vocab_size, "tie_word_embeddings": True, **family.write(c)})
    twin = transformers.Qwen3ForCausalLM(config).eval()
    missing, unexpected = twin.load_state_dict(dict(their_tensors(model, family, {})), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    tokens, mask = left_padded()
    with torch.no_grad():
        a = twin(tokens, attention_mask=mask.long(), position_ids=positions(mask)).logits
    assert (a - model(tokens, mask))[mask].abs().max() <= 1e-4


REFUSED = {
    "yarn": ("llama", dict(rope_scaling={"rope_type": "yarn", "factor": 2.0})),
    "linear": ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})),
    "gelu": ("llama", dict(hidden_act="gelu")),
    "no_rope_layers": ("smollm3", dict(no_rope_layers=[1, 1, 1, 0])),
    "no_rope_default": ("smollm3", {}),
    "layer_types": ("qwen2", dict(layer_types=["full_attention", "sliding_attention"])),
    "quantised": ("llama", dict(quantization_config={"bits": 4})),
    "unknown": ("gemma3", {}),
    "none": (None, {}),
    "inverse": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True)),
    "upcast": ("gpt2", dict(reorder_and_upcast_attn=True)),
    "unscaled": ("gpt2", dict(scale_attn_weights=False)),
    "relu": ("gpt2", dict(activation_function="relu")),
    "three heads": ("codegen", dict(n_head=6, n_embd=96)),
    "negative": ("llama", dict(num_hidden_layers=-3)),
    "huge": ("llama", dict(hidden_size=2**50)),
    "text": ("llama", dict(hidden_size="wide")),
    "half": ("llama", dict(num_attention_heads=2.5)),
    "rope list": ("llama", dict(rope_scaling=[1, 2])),
    "partial": ("llama", dict(partial_rotary_factor=0.5)),
    "a base for each kind of layer": ("llama", dict(rope_parameters={"full_attention": {"rope_theta": 5e5}})),
    "llama3 without a factor": ("llama", dict(rope_scaling={**LLAMA3, "low_freq_factor": None})),
    "tie_word_embeddings is 'True': CodeGen's head": ("codegen", dict(tie_word_embeddings=True, rotary_dim=8)),
    "rotary_dim is 'None'": ("codegen", dict(rotary_dim=None)),
    "windows switched off": ("qwen2", dict(layer_types=["sliding_attention"] * 3, sliding_window=9)),
    "chunks": ("qwen2", dict(layer_types=["chunked_attention"], use_sliding_window=True)),
    **{f"{name} {value}": (kind, {name: value}) for value in (math.nan, math.inf, True, [3]) for kind, name in (
        ("llama", "num_hidden_layers"), ("mistral", "sliding_window"), ("llama", "rope_theta"), ("gpt2", "n_inner"),
        ("codegen", "rotary_dim"), ("qwen3", "head_dim"), ("qwen2", "vocab_size"))},
    **{f"{name} {value}": (kind, {name: value}) for value in (5, "no", {"a": 1}) for kind, name in (
        ("llama", "architectures"), ("qwen2", "layer_types"), ("smollm3", "no_rope_layers"),
        ("llama", "attention_bias"), ("qwen2", "use_sliding_window"), ("gpt2", "tie_word_embeddings"))},
    "id2label": ("llama", dict(architectures=["LlamaForSequenceClassification"], id2label=5)),
    "max_window_layers": ("qwen2", dict(use_sliding_window=True, max_window_layers="all")),
    "model_type a list": ([], {}),
    "model_type an object": ({}, {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_lies_outside_is_refused_by_name(case):
    kind, changes = REFUSED[case]
    config = Config({**WIDE, **GPT, "model_type": kind, **changes}, "config.json")
    with pytest.raises(UserError, match=f"config.json: {case if ' is ' in case else ''}") as error:
        model_config(config, family_named(config), {}, 0)
    assert "\n" not in str(error.value)


USED = dict(use_sliding_window=True, sliding_window=100, max_window_layers=2)  # of three layers


@pytest.mark.parametrize(("kind", "changes", "longest"), [
    ("mistral", dict(sliding_window=100), 100), ("mistral", dict(sliding_window=None), 8000),
    ("mistral", {}, 4096), ("qwen2", dict(sliding_window=100), 8000), ("qwen3", USED, 100),
    ("qwen2", USED | dict(max_window_layers=0), 100), ("qwen3", USED | dict(max_window_layers=3), 8000),
    ("qwen2", USED | dict(sliding_window=None), 8000), ("qwen2", dict(use_sliding_window=True), 8000),
    ("qwen2", USED | dict(layer_types=["full_attention"] * 3), 8000),
    ("qwen2", USED | dict(layer_types=["full_attention", "sliding_attention", "full_attention"]), 100)])
def test_a_window_limits_the_rows_and_is_otherwise_no_difference(kind, changes, longest):
    config = Config({**WIDE, "model_type": kind, "max_position_embeddings": 8000, **changes}, "config.json")
    assert model_config(config, FAMILIES[kind], {}, longest).max_len == longest
    with pytest.raises(UserError, match=f"rows of at most {longest} tokens"):
        model_config(config, FAMILIES[kind], {}, longest + 1)


# ---- what a config leaves out, or says twice -----------------------------------------------------

class Asked(Config):
    """A config that notes the names that it is asked for."""

    def get(self, name, default=None):
        self.names = {*getattr(self, "names", ()), name}
        return super().get(name, default)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "moss"])
def test_a_key_that_is_missing_counts_as_in_the_class(name):
    transformers = pytest.importorskip("transformers")
    family, cls = FAMILIES[name], type(transformers.AutoConfig.for_model(name))
    config = Asked({**WIDE, **GPT, "use_sliding_window": True, "no_rope_layers": [1, 1, 1], **family.defaults}, "c")
    family.read(config)
    of_class = {key: getattr(cls, key, None) for key in config.names - {"rope_scaling"}}
    of_class |= {"rope_theta": cls.default_theta} if "rope_theta" in config.names else {}
    sizes = WIDE | GPT | {"intermediate_size": 0}  # without them there is no model
    of_class = {key: value for key, value in of_class.items() if value not in (None, False, "silu", "gelu_new", 1)
                and (key not in sizes or key in family.defaults)}
    assert of_class == {key: value for key, value in family.defaults.items() if value is not False
                        and key != "tie_word_embeddings"}
    assert cls.tie_word_embeddings == family.defaults.get("tie_word_embeddings", False)


SHORT = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
ROPES = {  # what is changed in a config of transformers 5; the base and the original length that count
    "the inner base": (dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_theta=1e4), 5e5, None),
    "the outer base": (dict(rope_parameters={"rope_type": "default"}, rope_theta=5e5), 5e5, None),
    "no base": (dict(rope_parameters=None), 1e4, None),
    "the older scaling with a base": (dict(rope_parameters=None, rope_scaling={**LLAMA3, "rope_theta": 5e5}), 5e5, 64),
    "the older scaling alone counts": (dict(rope_parameters={**LLAMA3, "rope_theta": 5e5},
                                            rope_scaling={"rope_type": "default"}), 1e4, None),
    "an empty older scaling": (dict(rope_parameters={**LLAMA3, "rope_theta": 5e5}, rope_scaling={}), 5e5, 64),
    "the outer length": (dict(rope_parameters=None, rope_scaling=LLAMA3, original_max_position_embeddings=128),
                         1e4, 128),
    "no length": (dict(rope_parameters={**SHORT, "rope_theta": 1e4}), 1e4, 512),
    "type": (dict(rope_parameters=None, rope_scaling={"type": "default"}, rope_theta=3e4), 3e4, None),
}


@pytest.mark.parametrize("case", ROPES)
def test_positions_are_those_of_transformers_where_keys_contradict_each_other(case, tmp_path):
    changes, base, length = ROPES[case]
    saved(tmp_path, "llama-untied")
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if changes.get(name, 0) is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, family, read_config = read(tmp_path)
    assert (ours.config.rope_base, (*ours.config.rope_scaling, None, None, None, None)[3]) == (base, length)
    tokens, mask = left_padded()
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        a = theirs(tokens, attention_mask=mask.long(), position_ids=positions(mask)).logits
        assert (a - ours(tokens, mask))[mask].abs().max() <= 1e-4
    # and again in what an export says, by the names of either generation
    again = family.fields(Config({**read_config, **family.write(ours.config)}, "config.json"))
    older = {k: v for k, v in family.write(ours.config).items() if k != "rope_parameters"}
    for found in (again, family.fields(Config(older, "config.json"))):
        assert (found["rope_base"], found.get("rope_scaling", ())) == (base, ours.config.rope_scaling)
