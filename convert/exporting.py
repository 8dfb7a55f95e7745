"""A run's checkpoint becomes a folder that `transformers`, TRL and vLLM read."""
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from convert.families import FAMILIES, Config, Family, family_of
from convert.files import write_tensors
from convert.tokenizer_files import write_tokenizer
from data.tokenizer import Tokenizer
from model import ModelConfig, Transformer, checkpoint_path, load_checkpoint
from reward import RewardModel
from runtime.options import UserError
from runtime.storage import largest, load_whole, replace_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(run: str, folder: pathlib.Path, family: str = "", dtype: str = "auto") -> None:
    """Write a policy, or a reward model, in the layout of `transformers`.

    family: "" is the one that it was imported from, else one that computes the same. dtype: of the
    weights; auto: that of an import, float32 of what was trained. UserError if no family computes what
    this model does, or if the folder has files already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty: name a new folder")
    kind = load_whole(checkpoint_path(run)).get("kind") if checkpoint_path(run).exists() else ""
    model, tokenizer, state = load_checkpoint(run, cls=RewardModel if kind == "RewardModel" else Transformer)
    source = state.get("source", {})
    chosen = FAMILIES[family] if family else FAMILIES.get(source.get("family"), None) or family_of(model.config)
    require_same_computing(chosen, model.config)
    config = config_of(model, tokenizer, chosen, source if not family else {})
    types = source.get("dtypes", {}) if dtype == "auto" else {"": dtype}
    config |= dict.fromkeys(("torch_dtype", "dtype"), types.get("", "float32"))
    write_tensors(folder, list(their_tensors(model, chosen, types)))  # all of it is known before a file is made
    write_tokenizer(tokenizer, folder)
    generation = {"eos_token_id": list(tokenizer.end_ids), "pad_token_id": tokenizer.pad_id,
                  **(source.get("generation") or {"do_sample": True, "top_k": 0, "top_p": 1.0})}  # else it takes 50
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        replace_text(folder / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    print(f"exported {run} to {folder}: {config['architectures'][0]}, {config['dtype']}", flush=True)


def require_same_computing(family: Family, config: ModelConfig) -> None:
    """UserError unless the family's config, read again, gives this shape."""
    values = {"tie_word_embeddings": config.tied, "vocab_size": config.vocab_size, **family.write(config)}
    read = family.fields(Config(values, "the exported config"))
    own = {name: getattr(config, name) for name in read}
    differs = [name for name in read if read[name] != own[name] and not (
        name == "rotary_dim" and own[name] in (0, config.head_dim))]
    differs += [f.name for f in dataclasses.fields(ModelConfig) if f.name not in read and f.name not in (
        "vocab_size", "tied", "dropout", "max_len") and getattr(config, f.name) != f.default
        and not (family.names is FAMILIES["gpt2"].names and f.name == "rope_base")]
    if differs:
        raise UserError(f"a {family.model_type} model cannot compute what this one does: it differs in "
                        f"{', '.join(differs)}; leave --family out")


def config_of(model: nn.Module, tokenizer: Tokenizer, family: Family, source: dict[str, Any]) -> dict[str, Any]:
    """config.json: what an import said, then what this model is."""
    c, scored = model.config, isinstance(model, RewardModel)
    if scored and not family.reward:
        raise UserError(f"transformers has no reward model of the family {family.model_type}: name another --family")
    config = source.get("config", {}) if source.get("family") == family.model_type else {}
    config, own = {k: v for k, v in config.items() if not k.startswith("_")}, family.write(c)
    # an import's positions, too, by the names of both generations
    config = config | {k: v for k, v in own.items() if k.startswith("rope_")} if config else own
    config |= {"architectures": [family.reward if scored else family.policy], "model_type": family.model_type,
               "vocab_size": c.vocab_size, "tie_word_embeddings": c.tied, "pad_token_id": tokenizer.pad_id,
               "bos_token_id": config.get("bos_token_id", tokenizer.eot_id),
               "eos_token_id": config.get("eos_token_id", tokenizer.eom_id), "use_cache": True}
    if scored:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
    return config


def their_tensors(model: nn.Module, family: Family, types: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each of the family's tensors. types: of tensors by their names; "": of all others."""
    for ours, tensor in model.state_dict().items():
        name = ours.removeprefix("backbone.")
        if isinstance(model, RewardModel) and name.startswith(("score_head.", "output.")):
            continue  # the score comes last, and its trunk's own head predicts nothing
        for their, part in zip(family.theirs(name), family.split(name, tensor, model.config), strict=True):
            yield their, typed(their, part, types)
    if isinstance(model, RewardModel):
        yield "score.weight", typed("score.weight", score_weight(model), types)


def typed(name: str, tensor: Tensor, types: dict[str, str]) -> Tensor:
    """The tensor in the type that it is written in; UserError if that cannot hold its numbers."""
    dtype = types.get(name, types.get("", "float32"))
    found = tensor.to(DTYPES[dtype])
    if not largest(found) < float("inf"):
        raise UserError(f"{name} has numbers up to {largest(tensor):g}, which {dtype} cannot hold: give --dtype "
                        "bfloat16 or float32")
    return found


def score_weight(model: RewardModel) -> Tensor:
    """(1, D): the head without its bias, which those of `transformers` lack. UserError if more than one
    head, or an average over tokens, makes the score."""
    c, head = model.config, model.score_head
    if c.pool != "last":
        raise UserError("this reward model scores the mean over a reply's tokens, those of transformers the last "
                        "token: train it with --pool last")
    if len(head.weight) > 1:
        raise UserError(f"this reward model has {len(head.weight)} heads, those of transformers have one: train it "
                        "without parts and --members")
    if abs(bias := head.bias.item()) > 5e-5:
        print(f"the head's bias of {bias:+.4f} is left out: transformers' scores have none, so they are all that much "
              "lower", flush=True)
    return head.weight.detach()
