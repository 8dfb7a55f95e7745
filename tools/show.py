"""Print records of a JSON Lines file with their loss mask in colour.

    python -m tools.show FILE.jsonl [--from out/reviews/sft]

--from names a checkpoint or a prepared folder, whose tokenizer and prompt template are used;
without it, the folder of the file. `python -m data.prepare check` shows more of your own files.
"""
import pathlib
import sys

from data.own import stage_of
from data.records import load_records
from data.render import Look, can_colour, tokenizer_at
from runtime.options import UserError, run_main
from runtime.terminal import lacking


def show(path: str, look: Look, n: int = 5) -> None:
    """Print the first n records: learned tokens in green, others in grey (marks where the output is no terminal),
    a dot after each."""
    stage = stage_of(pathlib.Path(path), {})
    for record in load_records(path, stage)[:n]:
        print(look.show(record, stage) + "\n")


@lacking("skip_bad", "fields", "template")
def main(argv: list[str]) -> None:
    if len(argv) not in (1, 3) or len(argv) == 3 and argv[1] != "--from":
        raise UserError("usage: python -m tools.show FILE.jsonl [--from "
                        "CHECKPOINT-OR-PREPARED-FOLDER]")
    if not pathlib.Path(argv[0]).is_file():
        raise UserError(f"{argv[0]}: no such file: name a JSON Lines file")
    place = pathlib.Path(argv[2] if len(argv) == 3 else pathlib.Path(argv[0]).parent)
    show(argv[0], Look(*tokenizer_at(place), colour=can_colour(), dots=True))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
