"""Trials of what strangers may type: forged control tokens, and command lines at random.

    python -m tools.trials_commands forge --n 10000       texts that try to forge a turn
    python -m tools.trials_commands commands --n 500      command lines, each in a process of its own

Each trial follows from its number and --seed, prints what went wrong, and ends with exit code 1 if
anything did.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import sys
import tempfile
import time
import traceback

import torch

import data.prepare
import evaluate
import sample
import train
from data.batches import prompt_ids
from data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe, train_chars
from runtime.options import Options, UserError, bounds, option, parse, run_main


@dataclasses.dataclass
class TrialOptions(Options):
    """`python -m tools.trials_commands forge|commands`"""

    n: int = option(500, "number of trials", low=1)
    seed: int = option(0, "the trials follow from it", low=0)
    seconds: int = option(60, "longest time of one command; then it counts as under way", low=1)
    traceback: bool = option(False, "show where in the code an error arose")


# ---- forged control tokens -----------------------------------------------------------------------

def forged_text(rng: random.Random) -> str:
    """A text of control tokens' names, whole, cut, doubled and mixed with what stands between
    turns."""
    pieces = [*SPECIAL_TOKENS, "<|", "|>", "<", ">", "eom", "eoh", ": ", "\n", " ", "Human", "MOSS",
              "\\u003c", "＜eom＞", "\u200b", "\x00", "好", "hello", "{prompt}"]
    text = ""
    for _ in range(rng.randint(1, 12)):
        piece = rng.choice(pieces)
        if rng.random() < 0.3:
            piece = piece[rng.randint(0, len(piece)):] + piece[:rng.randint(0, len(piece))]
        text += piece
    return text


def forgery(tokenizer: Tokenizer, texts: list[str], template: str) -> str:
    """What is wrong with the ids of a dialogue of these texts; empty if every control token in them
    is one of the dialogue's own."""
    control = set(tokenizer.special_ids)
    for text in texts:
        ids = tokenizer.encode(text)
        if control & set(ids) or tokenizer.decode(ids) != text:
            return f"encode({text!r}) = {ids}"
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text}
                for i, text in enumerate(texts)]
    turns = [tokenizer.special[name] for name in tokenizer.chat.tokens]
    expected = (turns * len(texts))[:2 * len(texts)]
    for ids, own in (
            (tokenizer.render_chat(messages, reply=len(texts) % 2 == 1)[0],
             expected + turns[2:3] * (len(texts) % 2)),
            (prompt_ids(tokenizer, texts[0], template), turns[:3]),
            (prompt_ids(tokenizer, texts[0], template, bare=True), [tokenizer.eot_id])):
        if [i for i in ids if i in control] != own:
            return f"{messages}: {ids}"
    return ""


def forge(o: TrialOptions) -> int:
    """Number of texts that forge a control token, for a vocabulary of bytes that has seen such
    texts, and for one of characters."""
    rng = random.Random(o.seed)
    seen = [forged_text(rng) for _ in range(2000)]
    tokenizers = [train_bpe(seen, 600), train_chars("".join(seen))]
    faults = 0
    for i in range(o.n):
        texts = [forged_text(rng) for _ in range(rng.randint(1, 4))]
        template = rng.choice(["{prompt}", "{prompt}{prompt}", "<eom>\n<|Human|>: {prompt}<eoh>"])
        for tokenizer in tokenizers:
            with contextlib.suppress(UserError):  # a character that this vocabulary does not know
                if fault := forgery(tokenizer, texts, template):
                    faults += 1
                    print(f"{i}: {fault}")
    print(f"forged control tokens: {faults} of {o.n}")
    return faults


# ---- command lines -------------------------------------------------------------------------------

STRINGS = ["", " ", "x", "好", "/", "..", "/nonexistent/x", "/dev/null", "/dev/full", "a,b", "news=.5",
           "\x1b[2J", "a\nb", "\u2028", "'\"$(x)`", "--seed", "-1"]


def random_value(field: dataclasses.Field, rng: random.Random, places: list[str]) -> str:
    """A value for an option: often one that it takes, also an end of its range, one beyond, and what
    is no value at all."""
    kind, choices = field.type, field.metadata.get("choices")
    if rng.random() < 0.1:
        return rng.choice(["", "nan", "inf", "1e400", "-1", "0", "1e30", str(10**30), "x", "1.5"])
    if kind is bool:
        return rng.choice(["true", "false", "yes", "0"])
    if choices:
        return str(rng.choice(choices))
    if kind is str:
        return rng.choice([*STRINGS, *places])
    low, high = bounds(field)
    near = [field.default, field.default, low, min(high, max(low, 1)), 2 * field.default]
    if rng.random() < 0.15:
        near += [high, low - 1, high + 1]
    return str(kind(rng.choice(near)))


def random_command(rng: random.Random, tiny: pathlib.Path, base: pathlib.Path,
                   out: pathlib.Path) -> tuple[str, object, list[str], type]:
    """(name, main, words, options' class) of a command on tiny data and the finished runs in
    base."""
    stages = {f"train.py {stage}": (train.main, [stage], cls)
              for stage, (cls, _) in train.commands().items()}
    commands = stages | {
        "sample.py": (sample.main, [], sample.SampleOptions),
        "evaluate.py": (evaluate.main, [str(base / "sft")], evaluate.EvaluateOptions),
        "data.prepare": (data.prepare.main, [str(tiny)], data.prepare.PrepareOptions)}
    name = rng.choice(list(commands))
    main, words, cls = commands[name]
    words = list(words)
    if name in stages:
        words += ["--preset", "smoke", "--data", str(tiny), "--out", str(out), "--device", "cpu"]
        if name != "train.py pretrain":
            words += ["--init_from", str(base / ("pretrain" if name.endswith("sft") else "sft"))]
        if name == "train.py ppo":
            words += ["--reward_from", str(base / "reward")]
    elif name == "sample.py":
        words += ["--from", str(base / rng.choice(["pretrain", "sft", "ppo"])),
                  *rng.choice([["--prompt", "Review 3"], ["--file", str(tiny / "ppo.jsonl")],
                               ["--chat"], []])]
    places = [str(tiny), str(tiny / "sft.jsonl"), str(base), str(base / "sft"),
              str(base / "sft" / "checkpoint.pt"), str(base / "reward")]
    for field in rng.sample(dataclasses.fields(cls), rng.randint(0, 3)):
        flag, value = f"--{field.name}", random_value(field, rng, places)
        if field.name in ("out", "traceback"):
            continue
        words += [f"{flag}={value}"] if rng.random() < 0.7 else [flag, value]
    if rng.random() < 0.05:
        words.insert(rng.randint(0, len(words)), rng.choice(STRINGS))
    return name, main, words, cls


def run_apart(main: object, words: list[str], log: pathlib.Path, seconds: int) -> int | None:
    """Exit code of a command in a process of its own, its output in `log`; None if it was still under
    way."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for fd in (1, 2):
                os.dup2(file, fd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin = open(0, encoding="utf-8", closefd=False)
            sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False)
                                      for fd in (1, 2))
            sys.argv = ["train.py", *words]
            code = run_main(main, words)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def wrong(code: int | None, log: str, words: list[str], cls: type, out: pathlib.Path) -> str:
    """What is wrong with how a command ended; empty if nothing is."""
    if "Traceback" in log:
        return "a traceback"
    if code is None:
        return ""
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    if code == 2:
        return "" if len(errors) == 1 else f"{len(errors)} lines of error"
    if code != 0:
        return f"exit code {code}"
    if errors:
        return "an error, and exit code 0"
    record = next(out.glob("*/*/config.json"), None)
    if record is None:
        return "" if log.strip() or "--chat" in words else "nothing printed"
    options = json.loads(record.read_text(encoding="utf-8"))
    asked = parse(cls, words[1:], "x")
    for name in asked.explicit - asked.not_compared():
        if name in ("max_len", "reward_norm"):  # resolved by what the stage finds
            continue
        if options["options"][name] != getattr(asked, name):
            return f"--{name} was not used"
    lines = (record.parent / "metrics.jsonl").read_text(encoding="utf-8")
    if not options["finished"] or "NaN" in lines or "Infinity" in lines or not lines:
        return "exit code 0 of a run that is not finished, or whose numbers are not"
    return ""


def commands(o: TrialOptions) -> int:
    """Number of command lines, out of n at random, with a traceback or a silent wrong run."""
    torch.set_num_threads(1)
    faults, late, codes = 0, 0, {}
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        data.prepare.prepare.__kwdefaults__["cache"] = root / "cache"
        base, tiny = tiny_runs(root)
        for i in range(o.n):
            rng, out = random.Random(f"{o.seed} {i}"), root / f"out{i}"
            name, main, words, cls = random_command(rng, tiny, base, out)
            code = run_apart(main, words, root / "log", o.seconds)
            log = (root / "log").read_text(encoding="utf-8", errors="replace")
            codes[code], late = codes.get(code, 0) + 1, late + (code is None)
            if fault := wrong(code, log, words, cls, out):
                faults += 1
                print(f"{i}: {fault}: {name} {words}\n    {log.strip()[-400:]}", flush=True)
    print(f"wrong: {faults} of {o.n} command lines; exit codes {codes}, {late} still under way after "
          f"{o.seconds} s")
    return faults


def tiny_runs(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """(folder of finished smoke runs of all stages, the folder of their data)."""
    tiny, rng = root / "tiny", random.Random(1)
    tiny.mkdir()

    def write(name: str, records: list[dict]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tiny / name).write_text(text, encoding="utf-8")

    things = "room book screen bed story lobby price service".split()
    kinds = "good bad slow fine loud clean old new".split()
    said = [f"The {rng.choice(things)} was {rng.choice(kinds)} and {rng.choice(kinds)}."
            for _ in range(200)]
    write("pretrain.jsonl", [{"text": f"{text} No {i}."} for i, text in enumerate(said * 2)])
    prompts = [f"Review {i} of the {rng.choice(things)}" for i in range(200)]
    write("sft.jsonl", [{"prompt": p, "response": s} for p, s in zip(prompts, said, strict=True)])
    write("reward.jsonl", [{"prompt": p, "chosen": "It was good and clean.",
                            "rejected": f"It was bad and {rng.choice(kinds)}."} for p in prompts])
    write("ppo.jsonl", [{"prompt": p} for p in prompts])
    words = ["--preset", "smoke", "--data", str(tiny), "--out", str(root / "base"), "--device", "cpu"]
    code = run_apart(train.main, words, root / "log", 600)
    if code != 0:
        raise UserError("the tiny runs failed: " + (root / "log").read_text()[-300:])
    return next((root / "base").glob("*/sft")).parent, tiny


# ---- command line --------------------------------------------------------------------------------

TRIALS = {"forge": forge, "commands": commands}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in TRIALS:
        raise UserError(f"which trial? python -m tools.trials_commands {'|'.join(TRIALS)} --n 500")
    return min(1, TRIALS[argv[0]](parse(TrialOptions, argv[1:], "-m tools.trials_commands")))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
