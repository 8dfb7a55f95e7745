"""One kind of record serves the other stages, too, so that one file walks the whole road.

    feedback   its preferred replies are dialogues, and a share of it is for judges
    dialogues  they are read in pretraining, in the form that fine-tuning will have, and so are
               replies with low ratings or labels: they are language, too
    both       their prompts are those of PPO

Records are by (stage, split), as data/own.py divides them. What a stage has of its own stays.
"""
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence

from data.dataset import SPLITS, DataWriter, Part, feedback_of, text_hash
from data.feedback import BESIDE
from data.records import as_messages
from data.splits import split_key
from data.texts import PIECE, SAMPLE, Texts, sample
from data.tokenizer import Tokenizer

PARTS = ("text", "dialogue")  # of what is read in pretraining
SHARE = 0.3  # of the tokens, for dialogues beside much text
# Passes over the tokens read in pretraining. On 245,000 of HH, 2 end at a validation loss of 3.87, and
# 8 at 4.38, with 3.92 on the way.
PASSES = 3
MOST_TOKENS = 2_000_000
MANY = 2000  # records of feedback, of which judges have half; of fewer a fifth
FEW = 100  # of fewer than these they have none
Records = dict[tuple[str, str], list[dict] | Texts]  # (stage, split) -> records


# ---- from stage to stage -------------------------------------------------------------------------

def preferred(feedback: Sequence[dict], mean: float | None) -> list[dict]:
    """sft records of the replies that people chose, liked, or rated above the mean, each once. Those that they also
    put second to another one, as they do with one that they edit, are left out, unless no other is left.

    mean: None takes all replies but the rejected ones of pairs.
    """
    def key(r: dict, field: str) -> str:
        return json.dumps([r["prompt"], r[field]], sort_keys=True)

    def is_meant(r: dict) -> bool:
        if "chosen" in r:  # of a tie neither reply
            return "tie" not in r or mean is None
        return mean is None or (r["label"] == 1 if "label" in r else r["score"] > mean)

    found = [{"prompt": r["prompt"], "response": r.get("chosen", r.get("response"))}
             for r in feedback if is_meant(r)]
    if mean is not None:
        beaten = {key(r, "rejected") for r in feedback if "chosen" in r and "tie" not in r}
        found = [r for r in found if key(r, "response") not in beaten] or found
    return list({json.dumps(record): record for record in found}.values())


def mean_score(feedback: Sequence[dict]) -> float:
    """The mean of the ratings among these records; 0 without any."""
    scores = [record["score"] for record in feedback if "score" in record]
    return sum(scores) / max(1, len(scores))


def fill(records: Records) -> None:
    """Give sft and ppo, where they have nothing of their own, what other stages have for them."""
    mean = mean_score(records.get(("reward", "train"), []))
    for split in SPLITS:
        feedback = records.get(("reward", split), [])
        source = records.get(("sft", split), feedback)
        if ("ppo", split) not in records and source:
            records["ppo", split] = [{"prompt": r["prompt"] if "prompt" in r else r["messages"][:-1]}
                                     for r in source]
        if ("sft", split) not in records and (replies := preferred(feedback, mean)):
            records["sft", split] = replies


def keep_for_judges(records: Records, share: float) -> str:
    """Move a share of the feedback to be trained on to the judges, by a hash of the first user message:
    talks that begin alike are on one side. share: −1 for half of MANY and more, else a fifth.
    Returns why judges have none; "" if they have some."""
    feedback = records.get(("reward", "train"), [])
    if ("judge", "train") in records or share == 0 or not feedback:
        return ""
    if share < 0:
        if len(feedback) < FEW:
            return (f"there are {len(feedback)} records of feedback to train on, and judges need {FEW} "
                    "to have a share of them: bring more, or a judge.jsonl")
        share = 0.5 if len(feedback) >= MANY else 0.2
    sides: dict[bool, list[dict]] = {False: [], True: []}
    for record in feedback:
        sides[text_hash(f"judge {split_key(record, 'reward')}") < share * 2**64].append(record)
    if not all(map(varied, sides.values())):
        return "too little of the feedback differs to divide it: bring more, or a judge.jsonl"
    records["reward", "train"], records["judge", "train"] = sides[False], sides[True]
    return ""


def varied(feedback: Sequence[dict]) -> bool:
    """Can anything be learned from these records: a pair, two labels, two ratings?"""
    name = {"pairs": "chosen", "labels": "label", "scores": "score"}[feedback_of(feedback[0])] if feedback else ""
    return bool(feedback) and (name == "chosen" or len({record[name] for record in feedback}) > 1)


# ---- what pretraining reads ----------------------------------------------------------------------

def dialogues_of(records: Records, split: str, template: str) -> list[list[dict[str, str]]]:
    """The dialogues of a split as messages, each once: those of sft, and those of feedback, but for
    rejected replies."""
    replies = preferred(records.get(("reward", split), []), None)
    found = [as_messages(record, template) for record in [*records.get(("sft", split), []), *replies]]
    return list({json.dumps(messages): messages for messages in found}.values())


def strings(texts: Texts | Sequence, dialogues: Sequence[list[dict[str, str]]]) -> Iterator[str]:
    """What a vocabulary is learned from: all of it, or pieces drawn evenly from much."""
    yield from sample(texts) if texts else ()
    size = sum(len(m["content"].encode()) for messages in dialogues for m in messages)
    draw = random.Random(1)
    for message in itertools.chain.from_iterable(dialogues):
        for start in range(0, len(message["content"]), PIECE):
            if size <= SAMPLE or draw.random() < SAMPLE / size:
                yield message["content"][start:start + PIECE]


def write_documents(out: DataWriter, split: str, texts: Texts | Sequence,
                    dialogues: Sequence[list[dict[str, str]]]) -> None:
    """Encode the texts and the dialogues of a split one after another."""
    def documents() -> Iterator[tuple[str, list[int]]]:
        for record in texts:
            yield "text", [out.tokenizer.eot_id, *out.tokenizer.encode(record["text"])]
        for messages in dialogues:
            yield "dialogue", [out.tokenizer.eot_id, *out.tokenizer.render_chat(messages)[0]]

    n_bytes = texts.n_bytes if isinstance(texts, Texts) else 0
    out.documents(split, documents(), n_bytes + sum(len(m["content"].encode()) for messages in dialogues
                                                    for m in messages))


def tokens_to_read(tokens: int) -> int:
    """How many tokens pretraining reads of so many: PASSES over few, MOST_TOKENS of many."""
    return max(20_000, min(MOST_TOKENS, PASSES * tokens))


def mixture(counts: dict) -> dict[str, Part]:
    """Shares of the parts: dialogues beside much text get SHARE of what is read, but no more than twice
    as many passes as a text."""
    tokens = {part: counts.get(f"pretrain_train[{part}]", {}).get("tokens", 0) for part in PARTS}
    total = sum(tokens.values())
    if not all(tokens.values()) or tokens["dialogue"] > SHARE * total:
        return {}
    return {"dialogue": Part(min(SHARE, 2 * PASSES * tokens["dialogue"] / tokens_to_read(total)))}


# ---- lengths, and the options that suit them -----------------------------------------------------

LONGEST = 512  # tokens of a row that are proposed at most
LONGEST_REPLY = 96


def lengths(records: Records, tokenizer: Tokenizer, template: str, most: int = 2000) -> dict[str, list[int]]:
    """Tokens of dialogues, of feedback with its prompt, of prompts and of replies to be trained on, of
    `most` records each, drawn evenly; by these names."""
    def drawn(*stages: str) -> list[dict]:
        found = [r for stage in stages for r in records.get((stage, "train"), [])]
        return found[::max(1, len(found) // most)]

    def size(messages: Iterable[dict], reply: bool = False) -> int:
        return len(tokenizer.render_chat(list(messages), reply)[0])

    found: dict[str, list[int]] = {"dialogues": [], "feedback": [], "prompts": [], "replies": []}
    for record in drawn("sft"):
        messages = as_messages(record, template)
        found["dialogues"].append(size(messages))
        found["replies"].append(len(tokenizer.reply_ids(messages[-1]["content"])))
    for record in drawn("reward", *BESIDE, "judge"):
        found["feedback"] += [size(as_messages({**record, "response": record[name]}, template))
                              for name in ("chosen", "rejected", "response") if name in record]
    for record in drawn("ppo"):
        messages = as_messages({**record, "response": ""}, template)[:-1]
        found["prompts"].append(size(messages, reply=True))
    return {name: sizes for name, sizes in found.items() if sizes}


def quantile(sizes: Sequence[int], share: float) -> int:
    """The least length that this share of the lengths does not exceed."""
    return sorted(sizes)[max(0, -(-int(share * 1000) * len(sizes) // 1000) - 1)]


def described(sizes: dict[str, list[int]], options: dict[str, dict[str, int | float]]) -> dict[str, dict]:
    """Of each kind of length: quantiles, and the share that fits the stage's option."""
    limits = {"dialogues": ("sft", "max_len"), "feedback": ("reward", "max_len"),
              "prompts": ("pretrain", "max_len"), "replies": ("ppo", "reply_len")}
    found: dict[str, dict] = {}
    for name, of_kind in sizes.items():
        stage, option = limits[name]
        found[name] = {"half": quantile(of_kind, 0.5), "95": quantile(of_kind, 0.95), "most": max(of_kind)}
        if limit := options.get(stage, {}).get(option):
            found[name] |= {"option": f"{stage}.{option}", "value": limit,
                            "fits": sum(n <= limit for n in of_kind) / len(of_kind)}
    return found


def proposals(sizes: dict[str, list[int]], counts: dict) -> dict[str, dict[str, int | float]]:
    """{stage: {option: value}}: lengths that 95 % of the records have, up to LONGEST; steps enough for
    few records; PASSES over what is read. Reward model and judge also read the policy's replies: a
    prompt for which they have no room beside a reply would be left out of the report."""
    def room(low: int, high: int, *names: str, beside: int = 0) -> int:
        most = max([quantile(sizes[name], 0.95) for name in names if name in sizes], default=0)
        return max(low, min(high, -(-(most + beside) // 16) * 16))

    reply_len = room(16, LONGEST_REPLY, "replies")
    found: dict[str, dict[str, int | float]] = {}
    if tokens := sum(c["tokens"] for name, c in counts.items() if name.startswith("pretrain_train[")):
        rows = room(64, LONGEST, "dialogues", "feedback")
        found["pretrain"] = {"max_len": max(256, min(LONGEST, rows + LONGEST_REPLY)),
                             "tokens": tokens_to_read(tokens)}
    for stage, name, steps in (("sft", "dialogues", 40), ("reward", "feedback", 100), ("judge", "feedback", 60)):
        n = sum(counts.get(f"{name}_train", 0) for name in (stage, *(BESIDE if stage == "reward" else ())))
        if name in sizes and n:
            epochs = round(max(1.0 if stage != "reward" else 2.0, min(4.0, steps * 32 / n)), 2)
            total = -(-int(epochs * n) // 32)
            longest = room(32, LONGEST, name)
            if stage != "sft" and "prompts" in sizes:
                longest = max(longest, room(32, LONGEST, "prompts", beside=reply_len))
            found[stage] = {"max_len": longest, "epochs": epochs, "eval_every": max(5, min(100, total // 8))}
    if "replies" in sizes:
        found["ppo"] = {"reply_len": reply_len}
    return found
