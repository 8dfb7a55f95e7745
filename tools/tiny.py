"""A folder with a random model of a family, as small as it can be: to try an import, a whole road or an
export without a download, and for tests.

    python -m tools.tiny qwen2 FOLDER       config.json, model.safetensors, tokenizer.json …
    python -m tools.tiny moss FOLDER        in the layout of MOSS-moon-003: vocab.json, merges.txt, …

The numbers mean nothing; names, shapes, files and special tokens are the family's.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import dataclasses
import json
import pathlib
import sys
import tempfile

from convert.exporting import export_model
from convert.splits import GPT2, LLAMA3, QWEN2, from_bytes
from convert.tokenizer_files import merges_of
from data.bpe import learn_tokens
from data.chat import LLAMA_DATE, MOSS_SYSTEM, QWEN_SYSTEM
from data.tokenizer import Tokenizer, Vocabulary
from model import ModelConfig, Transformer, save_checkpoint
from runtime.options import Options, UserError, option, parse, run_main

TEXTS = ["今天天气真好，我们一起去公园吧。", "我爱学习编程，人工智能很酷。", "人工智能的发展趋势是让更多的人用得上。",
         "The weather is fine today, and people learn to write programs.", "What is the capital of France? Paris."]
LAYERS = dict(n_layer=2, n_head=4, n_kv_head=4, d_model=64, d_ff=128, max_len=512, qk_norm=False)
GPT = dict(n_kv_head=4, d_ff=256, norm="layer", mlp="gelu", mlp_bias=True)
MOSS = dict(GPT, head_bias=True, parallel=True, rotary_dim=8, tied=False, max_len=2048)  # its instruction is long
SHAPES = {  # what a family's shape has beyond LAYERS
    "llama": dict(n_kv_head=2, rope_base=5e5, rope_scaling=(8.0, 1.0, 4.0, 256.0)),
    "mistral": dict(n_kv_head=2, tied=False), "qwen2": dict(n_kv_head=2, qkv_bias=True, rope_base=1e6),
    "qwen3": dict(n_kv_head=2, qk_norm=True, head_dim=32, rope_base=1e6),
    "gpt2": dict(GPT, positions="learned", qkv_bias=True, out_bias=True), "codegen": MOSS, "moss": MOSS}
# pattern of pieces, special tokens (the first begins a document, the last ends a reply), chat format
TOKENS = {
    "llama": (LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
              {"name": "llama3", "bos": "<|begin_of_text|>", "date": LLAMA_DATE}),
    "moss": (GPT2, ("<|endoftext|>", "<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>"),
             {"name": "moss", "system": MOSS_SYSTEM}),
    **dict.fromkeys(("gpt2", "codegen", "mistral"),
                    (GPT2, ("<|endoftext|>",), {"name": "plain", "end": "<|endoftext|>"})),
    **dict.fromkeys(("qwen2", "qwen3"), (QWEN2, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), {"name": "chatml"}))}


@dataclasses.dataclass
class TinyOptions(Options):
    """`python -m tools.tiny FAMILY FOLDER`"""

    seed: int = option(0, "of the random weights", low=0)
    traceback: bool = option(False, "show where in the code an error arose")


def tiny_tokenizer(family: str, vocab_size: int = 400, empty: int = 8) -> Tokenizer:
    """A vocabulary of the family's kind, learned from TEXTS; the model has `empty` rows more, as many real
    ones have."""
    pattern, special, chat = TOKENS[family]
    if family == "qwen2":
        chat = chat | {"system": QWEN_SYSTEM}
    ranks = learn_tokens(TEXTS, vocab_size - len(special), pattern)
    ids = {name: len(ranks) + i for i, name in enumerate(special)}
    return Tokenizer(ranks, pattern, Vocabulary(
        range(len(ranks)), len(ranks) + len(special) + empty, ids, [ids[special[-1]]], ids[special[0]],
        ids[special[0]], chat, nfc=pattern == QWEN2))


def make(family: str, folder: pathlib.Path, seed: int = 0) -> None:
    """Write the folder; UserError if it has files already."""
    tokenizer = tiny_tokenizer(family)
    model = Transformer(ModelConfig(vocab_size=tokenizer.n_vocab, **(LAYERS | SHAPES[family])))
    model.initialise(seed)
    with tempfile.TemporaryDirectory() as place:
        save_checkpoint(place, model, tokenizer)
        export_model(place, folder, family)
    if family == "moss":  # its own files are older than tokenizer.json
        names = {from_bytes(token): i for i, token in enumerate(tokenizer.ranks)}
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges_of(tokenizer))]
        added = {name: i for name, i in tokenizer.special.items() if name != "<|endoftext|>"}
        settings = {"tokenizer_class": "MossTokenizer", "bos_token": "<|endoftext|>", "eos_token": "<eom>",
                    "add_prefix_space": False, "model_max_length": LAYERS["max_len"]}
        for name, text in (("vocab.json", json.dumps(names | {"<|endoftext|>": tokenizer.eot_id})),
                           ("merges.txt", "\n".join(lines) + "\n"), ("added_tokens.json", json.dumps(added)),
                           ("tokenizer_config.json", json.dumps(settings, indent=2))):
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "tokenizer.json").unlink()


def main(argv: list[str]) -> None:
    o = parse(TinyOptions, argv[2:], "-m tools.tiny FAMILY FOLDER")
    if len(argv) < 2 or argv[0] not in SHAPES:
        raise UserError(f"usage: python -m tools.tiny {'|'.join(SHAPES)} FOLDER [--seed N]")
    make(argv[0], pathlib.Path(argv[1]), o.seed)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
