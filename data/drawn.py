"""What rejection sampling (`train.py best`) replies to, and best.jsonl, where it writes what it keeps."""
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data.batches import drop_long_prompts
from data.curves import read_log
from data.prepared import Prepared
from data.records import prompt_text
from data.tokenizer import Tokenizer
from runtime.draws import key
from runtime.progress import Progress
from runtime.run import RunFolder
from runtime.storage import replace_text


def drawn_prompts(data: Prepared, tokenizer: Tokenizer, limit: int, n: int, seed: int) -> list:
    """Up to n different training prompts of PPO that have at most `limit` tokens, drawn by the seed."""
    fitting = drop_long_prompts(data.records("ppo", "train"), tokenizer, data.template, limit)
    distinct = list({prompt_text(record["prompt"]): record["prompt"] for record in fitting}.values())
    order = np.random.default_rng(key(seed, "best", "plan")).permutation(len(distinct))
    return [distinct[i] for i in order[:n]]


def mark_of(*drawn_by: Any) -> str:
    """A short mark of all that replies are drawn by: lines with another one are of another draw."""
    return hashlib.sha256(json.dumps(drawn_by).encode()).hexdigest()[:12]


def written_before(path: pathlib.Path, mark: str, total: int, at_once: int) -> list[dict[str, Any]]:
    """The records {…, "of": mark} that an earlier process wrote: all `total`, or those of whole groups of
    `at_once`, to which the file is cut."""
    records = [record for record in read_log(path) if record.get("of") == mark][:total]
    if len(records) != total:
        records = records[:len(records) // at_once * at_once]
        replace_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return records


def grown_records(folder: RunFolder, mark: str, prompts: Sequence, answered: Callable[[Sequence, int], list[dict]],
                  at_once: int = 64) -> list[dict[str, Any]]:
    """The records of all prompts, in the folder's best.jsonl, which grows by `at_once` prompts at a time: a
    stop loses little. answered: gives the records of some prompts, of which the first has this number."""
    path = folder.path / "best.jsonl"
    records = written_before(path, mark, len(prompts), at_once)
    with Progress("best: replies", len(records) // at_once, math.ceil(len(prompts) / at_once)) as bar:
        for first in range(len(records), len(prompts), at_once):
            new = [record | {"of": mark} for record in answered(prompts[first:first + at_once], first)]
            folder.append(path.name, new)
            records += new
            bar.update()
    return records


def best_records(run: Any, data: Prepared, room: int, answered: Callable[[Sequence, int], list[dict]]) -> list[dict]:
    """The records of `best`: those of prompts of at most `room` tokens, drawn as the run's options say."""
    o = run.o
    mark = mark_of(o.n, o.reply_len, o.temperature, o.seed, sorted(run.folder.parents.items()))
    return grown_records(run.folder, mark, drawn_prompts(data, run.tokenizer, room, o.prompts, o.seed), answered)


def scores_of(records: Sequence[dict], kept: Sequence[dict]) -> str:
    """How many prompts there are, what their replies score, and how many of them are not kept, in words."""
    mean, best = np.mean([r["mean_score"] for r in records]), np.mean([r["score"] for r in kept])
    return (f"{len(records)} prompts; mean score {mean:.3f}, of the best {best:.3f}; {len(records) - len(kept)} "
            "prompts without a reply that ends")
