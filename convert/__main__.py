"""Real checkpoints in and out.

    python -m convert import FOLDER OUT     a folder in the layout of transformers, or a GGUF file
    python -m convert export RUN FOLDER     a run's checkpoint, or a GGUF file, as transformers, TRL and vLLM read it

`--init_from` and `--from` import by themselves: the first command is for its options.
"""
import runtime  # noqa: F401 (before torch: it sets how threads wait)
import dataclasses
import os
import pathlib
import sys

from convert.exporting import DTYPES, export_model
from convert.families import FAMILIES
from convert.importing import NAMED, as_checkpoint, import_model, is_real, named_file
from data.chat import FORMATS
from model import checkpoint_path
from runtime.options import Options, UserError, option, parse, run_main
from runtime.terminal import memory_advice


@dataclasses.dataclass
class ImportOptions(Options):
    """`python -m convert import FOLDER|FILE.gguf OUT`"""

    max_len: int = option(0, "longest row in tokens that the model is made for; 0: its config's, up to 4096", low=0)
    chat_format: str = option("", "instead of the tokenizer's own: " + ", ".join(FORMATS), choices=("", *FORMATS))
    traceback: bool = option(False, "show where in the code an error arose")


@dataclasses.dataclass
class ExportOptions(Options):
    """`python -m convert export RUN FOLDER`"""

    family: str = option("", "layout to write; empty: the one that was imported, else the one that computes the same",
                         choices=("", *FAMILIES))
    dtype: str = option("auto", "precision of the weights; auto: an import's own, float32 of what was trained",
                        choices=("auto", *DTYPES))
    traceback: bool = option(False, "show where in the code an error arose")


@memory_advice("take a smaller model")
def main(argv: list[str]) -> None:
    command, places = (argv[0] if argv else ""), []
    options = {"import": ImportOptions, "export": ExportOptions}.get(command)
    if options is None:
        raise UserError("usage: python -m convert import FOLDER OUT, or python -m convert export RUN FOLDER; --help "
                        "after either lists its options")
    rest = argv[1:]
    while rest and not rest[0].startswith("--"):
        places.append(rest.pop(0))
    o = parse(options, rest, f"-m convert {command}")
    if len(places) != 2:
        raise UserError(f"{options.__doc__.strip('`')}: give two paths before the options, not {len(places)}")
    source, out = places[0], pathlib.Path(places[1])
    if command == "export":
        export_model(as_checkpoint(source), out, o.family, o.dtype)
        return
    for there in (checkpoint_path(out), out / "config.json"):  # both are written
        if os.path.lexists(there):
            raise UserError(f"{there}: is there already: name another folder")
    path = pathlib.Path(source)
    if source in NAMED and not path.exists():
        path = named_file(source)
    elif not is_real(path):
        found = "no model is in this folder" if path.is_dir() else "no such folder or GGUF file"
        raise UserError(f"{path}: {found}: give a folder with config.json and weights, a .gguf file, or "
                        + ", ".join(NAMED))
    import_model(path, out, o.max_len, o.chat_format)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
