"""Print dialogues of a JSON Lines file with their loss mask in colour.

    python -m tools.show FILE.jsonl [--from out/reviews/sft]

--from names a checkpoint or a prepared folder, whose tokenizer and prompt template are used;
without it, the folder of the file.
"""
import pathlib
import sys

from data.prepared import Prepared
from data.records import as_messages, load_records
from data.tokenizer import Tokenizer
from model import load_checkpoint
from runtime.options import UserError, run_main

GREEN, GREY, DIM, RESET = "\033[32m", "\033[90m", "\033[2m", "\033[0m"


def show(path: str, tokenizer: Tokenizer, template: str, n: int = 5) -> None:
    """Print the first n dialogues: learned tokens in green, others in grey, a dot after each."""
    for record in load_records(path, "sft")[:n]:
        ids, mask = tokenizer.render_chat(as_messages(record, template))
        pending = b""  # bytes of a character that is not complete yet
        for token, learned in zip(ids, mask, strict=True):
            pending += tokenizer.token_bytes(token)
            try:
                text, pending = pending.decode(), b""
            except UnicodeDecodeError:
                continue
            print(f"{GREEN if learned else GREY}{text}{DIM}·{RESET}", end="")
        print(f"\n   {len(ids)} tokens, {sum(mask)} learned\n")


def main(argv: list[str]) -> None:
    if len(argv) not in (1, 3) or len(argv) == 3 and argv[1] != "--from":
        raise UserError("usage: python -m tools.show FILE.jsonl [--from "
                        "CHECKPOINT-OR-PREPARED-FOLDER]")
    place = pathlib.Path(argv[2] if len(argv) == 3 else pathlib.Path(argv[0]).parent)
    if (place / "meta.json").exists():
        data = Prepared.load(place)
        show(argv[0], data.require_tokenizer(), data.template)
    else:
        _, tokenizer, state = load_checkpoint(place)
        show(argv[0], tokenizer, state.get("template", "{prompt}"))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
