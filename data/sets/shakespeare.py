"""Shakespeare's plays, character by character: pretraining only, split as in nanoGPT."""
import http.client
import pathlib
import urllib.request

from data.tokenizer import train_chars
from data.dataset import DataSet, DataWriter, refuse_zip, require_published
from runtime.terminal import UserError, advice

URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
LARGEST = 2**28  # bytes: the text has one MB, and is read at once


def raw_files(path: pathlib.Path | None, downloads: pathlib.Path) -> list[pathlib.Path]:
    """The text file: `path` itself, tinyshakespeare.txt in that folder, or a download."""
    if path is not None:
        return [path / "tinyshakespeare.txt" if path.is_dir() else path]
    path = downloads / "shakespeare.txt"
    if not path.exists():
        try:
            with urllib.request.urlopen(URL, timeout=30) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{URL} could not be downloaded ({error}); bring the file and give its "
                            "path as --source") from None
        downloads.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_bytes(content)
        path.with_suffix(".tmp").replace(path)
    require_published(path, SHA256)
    return [path]


def read(path: pathlib.Path) -> str:
    """The text of the file; UserError if it cannot be read or is too short to be split."""
    refuse_zip(path)
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"--source {path}: has more than {LARGEST / 1e6:.0f} MB; bring a long "
                            "text as records {\"text\"} in a .jsonl file: --data FILE.jsonl")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--source {path}: not UTF-8 at byte {error.start}: give a plain text, "
                        "unpacked, and convert it to UTF-8") from None
    except OSError as error:
        raise UserError(f"--source {path}: cannot be read: {error.strerror}; "
                        f"{advice(error)}") from None
    if len(text) < 1000:
        raise UserError(f"--source {path}: has only {len(text)} characters; the yardstick is Shakespeare's "
                        "1,115,394: give the whole text")
    return text


def build(folder: pathlib.Path, files: list[pathlib.Path]) -> DataWriter:
    """One document a split: the first nine tenths of the text to train on, the rest to validate."""
    text = read(files[0])
    out = DataWriter(folder, train_chars(text))
    border = int(0.9 * len(text))
    for split, part in (("train", text[:border]), ("val", text[border:])):
        out.documents(split, [("text", out.tokenizer.encode(part))], len(part.encode()))
    return out


DATA_SET = DataSet("shakespeare", source=raw_files, build=build, options=("source",),
                   summary="Shakespeare's plays, character by character: pretraining only")
