"""GGUF files: metadata of every type, tensors of the six types that are read, equal bit for bit to the
gguf package's; a damaged or hostile file is refused in one line."""
import json
import math
import os
import pathlib
import re
import struct

import numpy as np
import pytest
import torch

from convert import stored
from convert.exporting import export_model
from convert.files import open_tensors
from convert.gguf import LAYOUTS, OTHERS, gguf_config, read_gguf
from convert.importing import import_model
from runtime.options import UserError
from tests.conftest import equal, noise
from tests.test_convert_files import refused
from tools import tiny

F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30
UINT32, STRING, ARRAY = 4, 8, 9


# ---- a small writer ------------------------------------------------------------------------------

def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(name: str, kind: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def array(kind: int, n: int, raw: bytes) -> bytes:
    return struct.pack("<IQ", kind, n) + raw


def info(name="a", shape=(32,), kind=F32, offset=0) -> bytes:
    """A tensor's entry; the shape in the file's order, rows first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(fields=(), infos=(), data=b"", version=3, counts=None, magic=b"GGUF", alignment=32) -> bytes:
    n_tensors, n_fields = counts or (len(infos), len(fields))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_fields) + b"".join([*fields, *infos])
    return head + bytes(-len(head) % alignment) + data


def written(tmp_path: pathlib.Path, raw: bytes) -> pathlib.Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    return path


# ---- metadata ------------------------------------------------------------------------------------

def test_metadata_of_every_type_is_read(tmp_path):
    numbers = {"u8": (0, "B", 255), "i8": (1, "b", -128), "u16": (2, "H", 65535), "i16": (3, "h", -5),
               "u32": (4, "I", 2**32 - 1), "i32": (5, "i", -7), "f32": (6, "f", 0.5), "bool": (7, "?", True),
               "u64": (10, "Q", 2**64 - 1), "i64": (11, "q", -2**63), "f64": (12, "d", 1e300)}
    fields = [field(name, kind, struct.pack("<" + form, value)) for name, (kind, form, value) in numbers.items()]
    fields += [field(name + "s", ARRAY, array(kind, 2, struct.pack("<2" + form, value, value)))
               for name, (kind, form, value) in numbers.items()]
    fields += [field("text", STRING, text("你好")), field("none", ARRAY, array(STRING, 0, b"")),
               field("texts", ARRAY, array(STRING, 3, text("a") + text("") + text("词"))),
               field("nest", ARRAY, array(ARRAY, 2, array(UINT32, 1, struct.pack("<I", 4)) + array(STRING, 0, b"")))]
    found, tensors = read_gguf(written(tmp_path, gguf(fields)))
    assert found == ({name: value for name, (_, _, value) in numbers.items()}
                     | {name + "s": [value, value] for name, (_, _, value) in numbers.items()}
                     | {"text": "你好", "none": [], "texts": ["a", "", "词"], "nest": [[4], []]})
    assert len(tensors) == 0


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(tmp_path, version):
    x = noise(32)
    fields, tensors = read_gguf(written(tmp_path, gguf([], [info()], x.numpy().tobytes(), version)))
    assert torch.equal(tensors["a"].read(), x)


# ---- tensors -------------------------------------------------------------------------------------

def test_plain_tensors_keep_their_type_and_have_torchs_shape(tmp_path):
    x = noise(3, 32)
    infos = [info("f32", (32, 3), F32), info("f16", (32, 3), F16, 384), info("bf16", (32, 3), BF16, 576)]
    data = b"".join(x.to(dtype).view(torch.uint8).numpy().tobytes()
                    for dtype in (torch.float32, torch.float16, torch.bfloat16))
    tensors = open_tensors(written(tmp_path, gguf([], infos, data)))
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        assert (tensors[name].shape, tensors[name].dtype) == ((3, 32), dtype)
        assert torch.equal(tensors[name].read(), x.to(dtype))
    assert torch.equal(tensors["bf16"].read(torch.float32), x.bfloat16().float())


def test_fields_come_with_the_tensors_and_alignment_is_heeded(tmp_path):
    fields = [field("general.alignment", UINT32, struct.pack("<I", 128))]
    data = noise(32).numpy().tobytes()
    tensors = open_tensors(written(tmp_path, gguf(fields, [info("a"), info("b", offset=128)], data * 2,
                                                  alignment=128)))
    assert tensors.metadata == {"general.alignment": 128}
    assert torch.equal(tensors["b"].read(), noise(32))


# (type, a block's bytes, its 32 numbers)
BLOCKS = [
    (Q8_0, struct.pack("<e", 0.5) + bytes(np.arange(-16, 16, dtype=np.int8)), [0.5 * n for n in range(-16, 16)]),
    (Q4_0, struct.pack("<e", 2.0) + bytes(n | (15 - n) << 4 for n in range(16)),
     [2.0 * (n - 8) for n in (*range(16), *range(15, -1, -1))]),
    (Q4_1, struct.pack("<ee", 2.0, -3.0) + bytes(n | (15 - n) << 4 for n in range(16)),
     [2.0 * n - 3 for n in (*range(16), *range(15, -1, -1))]),
]


@pytest.mark.parametrize("kind, block, numbers", BLOCKS, ids=[LAYOUTS[kind].name for kind, _, _ in BLOCKS])
def test_a_block_is_scale_times_number_low_halves_first(tmp_path, kind, block, numbers):
    tensors = read_gguf(written(tmp_path, gguf([], [info("a", (64, 2), kind)], block * 4)))[1]
    assert tensors["a"].dtype == torch.float32
    assert tensors["a"].shape == (2, 64)
    assert torch.equal(tensors["a"].read(), torch.tensor(numbers * 4).view(2, 64))


def random_blocks(layout, n: int) -> np.ndarray:
    """n blocks of random bytes, scales NaN and infinity included."""
    return np.random.default_rng(layout.size).integers(0, 256, (n, layout.size), dtype=np.uint8)


@pytest.mark.parametrize("kind", LAYOUTS, ids=[layout.name for layout in LAYOUTS.values()])
@pytest.mark.parametrize("piece", [200, 2**20])
def test_random_blocks_equal_the_packages_bit_for_bit(tmp_path, monkeypatch, kind, piece):
    package = pytest.importorskip("gguf")
    monkeypatch.setattr(stored, "PIECE", piece)
    layout = LAYOUTS[kind]
    blocks = random_blocks(layout, 3000)
    with np.errstate(invalid="ignore"):
        wanted = package.dequantize(blocks.reshape(30, -1), package.GGMLQuantizationType(kind))
    path = written(tmp_path, gguf([], [info("a", (100 * layout.numbers, 30), kind)], blocks.tobytes()))
    tensor = read_gguf(path)[1]["a"].read(torch.float32)
    assert tensor.shape == wanted.shape
    real = ~np.isnan(wanted)
    assert np.array_equal(np.isnan(tensor.numpy()), ~real)
    assert np.array_equal(tensor.numpy()[real].view(np.uint32), wanted[real].astype(np.float32).view(np.uint32))


def test_what_the_package_writes_is_read(tmp_path):
    package = pytest.importorskip("gguf")
    writer = package.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(77)
    writer.add_token_list(["a", "词", ""])
    writer.add_token_scores([0.5, -1.0, 0.0])
    writer.add_add_bos_token(False)
    x = noise(6, 64).numpy()
    writer.add_tensor("f32", x)
    writer.add_tensor("q8", package.quantize(x, package.GGMLQuantizationType.Q8_0),
                      raw_dtype=package.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields, tensors = read_gguf(tmp_path / "model.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["llama.context_length"] == 77
    assert fields["tokenizer.ggml.tokens"] == ["a", "词", ""]
    assert fields["tokenizer.ggml.scores"] == [0.5, -1.0, 0.0]
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert np.array_equal(tensors["f32"].read().numpy(), x)
    assert tensors["q8"].shape == (6, 64)
    assert np.abs(tensors["q8"].read().numpy() - x).max() < 0.02


def test_the_packages_names_of_types_are_ours():
    package = pytest.importorskip("gguf")
    for kind, name in OTHERS.items() | {(kind, layout.name) for kind, layout in LAYOUTS.items()}:
        assert getattr(package.GGMLQuantizationType(kind), "name", None) == name


@pytest.mark.skipif("MOSSLET_GGUF" not in os.environ, reason="MOSSLET_GGUF names a real GGUF file to compare")
def test_a_real_file_equals_the_packages_bit_for_bit():
    package = pytest.importorskip("gguf")
    path = os.environ["MOSSLET_GGUF"]
    fields, tensors = read_gguf(path)
    theirs = package.GGUFReader(path)
    assert fields == {name: found.contents() for name, found in theirs.fields.items() if not name.startswith("GGUF.")}
    assert [tensor.name for tensor in theirs.tensors] == list(tensors)
    for tensor in theirs.tensors:
        wanted = package.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(tensors[tensor.name].read(torch.float32).numpy().view(np.uint32), wanted.view(np.uint32))


# ---- whole models --------------------------------------------------------------------------------

def valued(name: str, value) -> bytes:
    """A field of a text, a whole number, a number, or a list of texts or whole numbers."""
    if isinstance(value, list):
        texts = isinstance(value[0], str)
        raw = b"".join(text(x) if texts else struct.pack("<I", x) for x in value)
        return field(name, ARRAY, array(STRING if texts else UINT32, len(value), raw))
    kind, raw = {str: (STRING, text), bool: (7, lambda x: struct.pack("<?", x)), float: (6, lambda x: struct.pack(
        "<f", x)), int: (UINT32, lambda x: struct.pack("<I", x))}[type(value)]
    return field(name, kind, raw(value))


PARTS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk"}


def whole_model(tmp_path, changes: dict) -> tuple[pathlib.Path, dict]:
    """(a Qwen2 as GGUF, matrices in float16 and vectors in float32, its tensors by the names of
    transformers). changes: of its fields; None: left out."""
    tiny.make("qwen2", tmp_path / "folder")
    tensors = {name: x.read() for name, x in open_tensors(tmp_path / "folder").items()}
    tensors = {name: x.half() if x.dim() == 2 else x * 70_000 for name, x in tensors.items()}
    c = json.loads((tmp_path / "folder" / "config.json").read_text())
    file = json.loads((tmp_path / "folder" / "tokenizer.json").read_text())
    special = {x["id"]: x["content"] for x in file["added_tokens"]}
    ids, rows = {i: name for name, i in file["model"]["vocab"].items()} | special, range(c["vocab_size"])
    fields = {"general.architecture": "qwen2", "qwen2.embedding_length": 64, "qwen2.block_count": 2,
              "qwen2.feed_forward_length": 128, "qwen2.attention.head_count": 4, "qwen2.attention.head_count_kv": 2,
              "qwen2.attention.layer_norm_rms_epsilon": 1e-6, "qwen2.rope.freq_base": 1e6,
              "qwen2.context_length": 512, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
              "tokenizer.ggml.tokens": [ids.get(i, f"[PAD{i}]") for i in rows],
              "tokenizer.ggml.token_type": [3 if i in special else 1 if i in ids else 5 for i in rows],
              "tokenizer.ggml.merges": [x if isinstance(x, str) else " ".join(x) for x in file["model"]["merges"]],
              "tokenizer.ggml.eos_token_id": c["eos_token_id"]} | changes
    infos, data = [], b""
    for name, x in tensors.items():
        stored_name = name
        for theirs, ours in PARTS.items():
            stored_name = stored_name.replace(theirs, ours)
        infos.append(info(stored_name, tuple(reversed(x.shape)), F16 if x.dim() == 2 else F32, len(data)))
        raw = x.numpy().tobytes()
        data += raw + bytes(-len(raw) % 32)
    raw = gguf([valued(name, x) for name, x in fields.items() if x is not None], infos, data)
    return written(tmp_path, raw), tensors


@pytest.mark.parametrize("changes", [{}, {
    "qwen2.rope.dimension_count": 16, "qwen2.rope.scale_linear": 1.0, "qwen2.rope.scaling.factor": 0.0,
    "qwen2.logit_scale": 1.0, "qwen2.expert_count": 0, "qwen2.rope.scaling.type": "none"}])
def test_a_whole_model_comes_back_each_tensor_in_its_type(tmp_path, changes):
    """A float16 file has its norms and biases in float32: here they are beyond what float16 holds."""
    path, tensors = whole_model(tmp_path, changes)
    import_model(path, tmp_path / "run")
    export_model(str(tmp_path / "run"), tmp_path / "back")
    assert equal({name: (str(x.dtype), x.read()) for name, x in open_tensors(tmp_path / "back").items()},
                 {name: (str(x.dtype), x) for name, x in tensors.items()})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"], config["dtype"]) == (1e6, None, "float16")
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert (config["num_key_value_heads"], config["head_dim"]) == (2, 16)


@pytest.mark.parametrize(("name", "value"), [
    ("qwen2.rope.dimension_count", 8), ("qwen2.rope.scale_linear", 4.0), ("qwen2.rope.scaling.factor", 4.0),
    ("qwen2.rope.scaling.attn_factor", 0.5), ("qwen2.logit_scale", 0.5), ("qwen2.expert_count", 8),
    ("qwen2.final_logit_softcapping", 30.0), ("qwen2.rope.scaling.factor", math.nan),
    ("qwen2.rope.dimension_count", [16]), ("qwen2.logit_scale", "high")])
def test_what_changes_the_computation_is_refused_by_name(tmp_path, name, value):
    path, _ = whole_model(tmp_path, {name: value})
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: {name} is "):
        import_model(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "x", True, [1]])
@pytest.mark.parametrize("name", ["embedding_length", "block_count", "attention.head_count", "attention.head_count_kv",
                                  "attention.key_length", "rope.freq_base", "context_length"])
def test_numbers_of_another_kind_are_one_line(tmp_path, name, value):
    path, _ = whole_model(tmp_path, {f"qwen2.{name}": value})
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .* must be a positive number"):
        import_model(path, tmp_path / "run")


def test_an_embedding_without_rows_is_one_line(tmp_path):
    fields = {"general.architecture": "llama", "llama.attention.head_count": 4, "llama.embedding_length": 64}
    path = written(tmp_path, gguf([valued(*x) for x in fields.items()], [info("token_embd.weight", ())], bytes(32)))
    with pytest.raises(UserError, match="model.gguf"):
        import_model(path, tmp_path / "run")


def test_what_a_file_leaves_out_counts_as_in_llama_cpp(tmp_path):
    path, _ = whole_model(tmp_path, {"qwen2.attention.head_count_kv": None})
    fields, tensors = read_gguf(path)
    for kind in ("llama", "qwen2", "qwen3"):  # the classes of transformers have 128 for Qwen3's heads, and 32 for keys
        config = gguf_config({name.replace("qwen2", kind): kind if value == "qwen2" else value
                              for name, value in fields.items()}, tensors, path)
        assert (config["num_key_value_heads"], config["head_dim"]) == (4, 16)


# ---- damaged and hostile files -------------------------------------------------------------------

DATA = bytes(128)
GOOD = gguf([field("f", UINT32, struct.pack("<I", 1))], [info()], DATA)
BAD = [
    ("an empty file", b"", "is empty"),
    ("a pointer of Git LFS", b"version https://git-lfs.example/spec/v1\nsize 5\n", "git lfs pull"),
    ("other letters at the start", gguf(magic=b"GGML"), "is no GGUF file"),
    ("a few bytes", b"GGUF\3", "is no GGUF file"),
    ("version 1", gguf(version=1), "GGUF of version 1"),
    ("version 0", gguf(version=0), "GGUF of version 0"),
    ("version 9", gguf(version=9), "GGUF of version 9, but only 2 and 3"),
    ("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    ("2^60 tensors", gguf(counts=(2**60, 0)), "claims 1,152,921,504,606,846,976 tensors"),
    ("2^60 fields", gguf(counts=(0, 2**60)), "claims 1,152,921,504,606,846,976 fields"),
    ("a field's name longer than the file", gguf([struct.pack("<Q", 2**60) + bytes(40)]), "a field's name .* beyond"),
    ("a text longer than the file", gguf([field("f", STRING, struct.pack("<Q", 2**60))]), "field 'f' of .* beyond"),
    ("2^60 texts", gguf([field("f", ARRAY, array(STRING, 2**60, b""))]), "claims .* elements of field 'f'"),
    ("2^60 numbers", gguf([field("f", ARRAY, array(12, 2**60, b""))]), "claims .* elements of field 'f'"),
    ("arrays in arrays without end", gguf([field("f", ARRAY, array(ARRAY, 1, b"") * 9999)]), "arrays in arrays"),
    ("a field of unknown type", gguf([field("f", 13, b"")]), "'f' has the unknown type 13"),
    ("an array of unknown type", gguf([field("f", ARRAY, array(99, 1, bytes(8)))]), "'f' has the unknown type 99"),
    ("a text that is not UTF-8", gguf([field("f", STRING, text(b"\xff\xfe"))]), "field 'f', .* is not UTF-8"),
    ("a name that is not UTF-8", gguf([], [text(b"\xff") + bytes(40)]), "a tensor's name, .* is not UTF-8"),
    ("a field twice", gguf([field("f", 0, b"\1")] * 2), "the field 'f' occurs twice"),
    ("cut inside the fields", GOOD[:30], "claims 1 fields|beyond the end|tensors"),
    ("cut inside the tensors' entries", gguf([], [info()])[:40], "beyond the end|more than the file can hold"),
    ("cut inside the numbers", GOOD[:-1], "'a' lies beyond the end"),
    ("2^31 dimensions", gguf([], [text("a") + struct.pack("<I", 2**31) + bytes(40)]), "2,147,483,648 dimensions"),
    ("an absurd shape", gguf([], [info(shape=(2**60,))], DATA), "claims more numbers than the file has"),
    ("a shape whose product wraps round", gguf([], [info(shape=(2**32, 2**32, 32))], DATA), "claims more numbers"),
    ("an absurd shape of no numbers", gguf([], [info(shape=(0, 2**62))], DATA), "claims more numbers"),
    ("an offset outside", gguf([], [info(offset=2**62)], DATA), "'a' lies beyond the end"),
    ("an offset between", gguf([], [info(offset=4)], DATA + DATA), "'a' is not aligned to 32 bytes"),
    ("overlapping tensors", gguf([], [info(), info("b", offset=32)], DATA + DATA), "'b' overlaps"),
    ("a tensor twice", gguf([], [info(), info(offset=128)], DATA + DATA), "the tensor 'a' occurs twice"),
    ("rows of half a block", gguf([], [info(shape=(16, 2), kind=Q8_0)], DATA), "no whole blocks of 32"),
    ("one number in a block", gguf([], [info(shape=(), kind=Q8_0)], DATA), "no whole blocks of 32"),
    ("six bits", gguf([], [info(shape=(256,), kind=14)], bytes(256)), "stored as Q6_K, which is not read: .* F16"),
    ("an unknown type of numbers", gguf([], [info(kind=200)], DATA), "stored as type 200"),
    ("an alignment of 0", gguf([field("general.alignment", UINT32, struct.pack("<I", 0))]), "alignment is '0'"),
    ("an alignment of 3", gguf([field("general.alignment", UINT32, struct.pack("<I", 3))]), "not a power of two"),
    ("an alignment in words", gguf([field("general.alignment", STRING, text("wide"))]), "alignment is 'wide'"),
    ("a name with a line break", gguf([], [info("a\nb", kind=200)], DATA), r"'a\\nb' is stored"),
    ("no tensors", gguf(), "holds no tensors"),
]


def test_the_good_file_of_the_table_is_read(tmp_path):
    fields, tensors = read_gguf(written(tmp_path, GOOD))
    assert fields == {"f": 1}
    assert torch.equal(tensors["a"].read(), torch.zeros(32))


@pytest.mark.parametrize("what, raw, words", BAD, ids=[what for what, _, _ in BAD])
def test_a_bad_file_is_refused(tmp_path, what, raw, words):
    path = written(tmp_path, raw)
    refused(path, words, str(path), most=400)


def test_an_array_longer_than_any_vocabulary_is_refused_though_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.gguf.LONGEST", 100)
    with pytest.raises(UserError, match="claims 101 elements of field 'f', more than 100"):
        read_gguf(written(tmp_path, gguf([field("f", ARRAY, array(0, 101, bytes(101)))])))


@pytest.mark.parametrize("seed", range(20))
def test_a_file_with_random_bytes_in_it_is_read_or_refused(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        raw = bytearray(GOOD)
        for at in rng.integers(4, len(GOOD) - len(DATA), rng.integers(1, 6)):
            raw[at] = rng.integers(0, 256)
        try:
            for entry in open_tensors(written(tmp_path, bytes(raw))).values():
                entry.read()
        except UserError as error:
            assert str(error).isprintable()
