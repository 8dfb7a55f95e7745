"""Dialogues of a JSON Lines file with their loss mask in colour.

    python -m tools.show FILE.jsonl [--from out/reviews/sft]
"""
import json
import pathlib
import sys

from data.records import as_messages, load_records
from data.tokenizer import Tokenizer
from model import load_checkpoint
from runtime.options import UserError, run_main


def show(path: str, tokenizer: Tokenizer, template: str = "{prompt}", n: int = 5) -> None:
    """Print dialogues of a JSON Lines file: learned tokens green, the rest grey, token borders marked."""
    for record in load_records(path, "sft")[:n]:
        ids, mask = tokenizer.render_chat(as_messages(record, template))
        pending = b""  # a character may take several tokens
        for token, learn in zip(ids, mask, strict=True):
            pending += tokenizer.token_bytes(token)
            try:
                text, pending = pending.decode(), b""
            except UnicodeDecodeError:
                continue
            print(f"\033[{'32' if learn else '90'}m{text}\033[2m·\033[0m", end="")
        print(f"\n   {len(ids)} tokens, {sum(mask)} learned\n")


def main(argv: list[str]) -> None:
    if len(argv) not in (1, 3) or len(argv) == 3 and argv[1] != "--from":
        raise UserError("usage: python -m tools.show FILE.jsonl [--from CHECKPOINT-OR-PREPARED-FOLDER]")
    where = pathlib.Path(argv[2] if len(argv) == 3 else pathlib.Path(argv[0]).parent)
    if (where / "tokenizer.json").exists():
        state, meta = (json.loads((where / name).read_text(encoding="utf-8"))
                       for name in ("tokenizer.json", "meta.json"))
        show(argv[0], Tokenizer.from_state(state), meta.get("template", "{prompt}"))
    else:
        _, tokenizer, state = load_checkpoint(where)
        show(argv[0], tokenizer, state.get("template", "{prompt}"))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
