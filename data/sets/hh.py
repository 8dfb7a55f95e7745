"""Dialogues of people with an assistant, each with two replies of which they chose one: the harmless
part of Anthropic's HH (Bai et al. 2022).

One kind of record is enough for all stages (data/road.py): the chosen replies, with the turns before
them, are pretrained on and fine-tuned on, the pairs teach the reward model, a share of them the judges,
and PPO answers the users' last words. Pairs whose first user message is the same are in one split.
"""
import pathlib
from collections.abc import Iterable, Sequence

from data import own
from data.dataset import SPLITS, DataSet, DataWriter, text_hash
from data.downloads import git_blob, web_download
from runtime.lines import read_lines
from runtime.options import UserError

URL = ("https://raw.githubusercontent.com/anthropics/hh-rlhf/354e5c3cb8960630860dd5774a6ac2a58313bf4d/"
       "harmless-base/")
PUBLISHED = {"train.jsonl.gz": "df7c90b1bbd6093bda9c996e8aab9a46fa557dcf",  # names that git gives them
             "test.jsonl.gz": "a616e6a27660ded23c5ce0e585a3e4cf0d761f0e"}
INSTEAD = ("bring a file of such transcripts, or a folder with train.jsonl.gz and, if you have it, "
           "test.jsonl.gz, and give its path as --source")


def raw_files(path: pathlib.Path | None, downloads: pathlib.Path) -> list[pathlib.Path]:
    """The files of transcripts: `path` itself, train, val and test.jsonl(.gz) of that folder, or the
    two that are published."""
    if path is None:
        return [download(name, downloads) for name in PUBLISHED]
    if path.is_file():
        return [path]
    files = [path / f"{split}.jsonl{suffix}" for split in SPLITS for suffix in ("", ".gz")]
    files = [file for file in files if file.exists()]
    if not files or split_of_file(files[0]) != "train":
        raise UserError(f"{path}: train.jsonl or train.jsonl.gz is missing; --source needs it, and may "
                        "have val and test beside it")
    if len({split_of_file(file) for file in files}) < len(files):
        raise UserError(f"{path}: a file is there plain and as .gz: keep one of the two")
    return files


def split_of_file(file: pathlib.Path) -> str:
    """The split that a file's name says; the training split for any other name."""
    return next((split for split in SPLITS[1:] if file.name.startswith(f"{split}.jsonl")), "train")


def download(name: str, downloads: pathlib.Path) -> pathlib.Path:
    """A published file, checked."""
    path = web_download(URL + name, downloads / f"hh-harmless-{name}", INSTEAD)
    if git_blob(path.read_bytes()) != PUBLISHED[name]:
        raise UserError(f"{path}: damaged, or not the file that was published; delete it and run again")
    return path


def build(folder: pathlib.Path, files: Sequence[pathlib.Path], vocab_size: int, limit: int,
          judge_share: float) -> DataWriter:
    """Read the pairs, leaving out and counting those that are no two replies to one dialogue; the rest
    is that of files of the user's own. limit: so many pairs of the training file."""
    places = [("reward", split_of_file(file)) for file in files]
    if limit:
        files = [write_some(files[0], limit, folder / "limited.jsonl"), *files[1:]]
    out = own.build(places, "{prompt}", folder, files, vocab_size, skip_bad=True, judge_share=judge_share)
    (folder / "limited.jsonl").unlink(missing_ok=True)
    return out


def write_some(file: pathlib.Path, limit: int, path: pathlib.Path) -> pathlib.Path:
    """A file of `limit` lines of another, drawn by their hashes, in their order."""
    lines: Iterable[bytes] = [line for _, line in read_lines(file) if line.strip()]
    drawn = sorted(lines, key=lambda line: text_hash(line.decode("utf-8", "replace")))[:limit]
    chosen = set(drawn)
    path.write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in lines if line in chosen))
    return path


DATA_SET = DataSet(
    "hh",
    source=raw_files,
    build=build,
    options=("source", "vocab_size", "limit", "judge_share"),
    # Of 1,500 pairs four prompts in five fit, and three replies in four, so that two cores need a
    # quarter of an hour; what 95 % need (512 and 96) takes about twice as long. Its judges like short evasions,
    # to which the policy collapses at 4 nats: distinct-2 is 66 % of SFT's there, and 89 % at 1.5.
    defaults={"pretrain": {"max_len": 320}, "sft": {"max_len": 288}, "reward": {"max_len": 288},
              "judge": {"max_len": 288}, "ppo": {"reply_len": 64, "updates": 36, "batch": 96, "micro_batch": 24,
                                                     "kl_target": 1.5}},
    summary="dialogues in English, of whose last replies people chose one",
)
