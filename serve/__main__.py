"""Ask people which replies are better, let them chat with a checkpoint, and train on what they say.

    python -m serve --from out/reviews/sft --to feedback.jsonl
    python -m serve --from out/reviews/sft --compare_with out/reviews/ppo --to feedback.jsonl
    python -m serve --pairs pairs.jsonl --to feedback.jsonl --mode compare
    python -m serve --terminal --from out/reviews/sft --to feedback.jsonl
    python -m serve export feedback.jsonl --out FOLDER --to trl
"""
import contextlib
import dataclasses
import pathlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from data.export import TOOLS
from runtime.machine import keep_freed_memory
from runtime.options import Options, UserError, option, parse, run_main
from runtime.storage import checkpoint_path
from runtime.terminal import for_terminal
from sample import ChatSession, SampleOptions
from serve.exports import OWN
from serve.log import FeedbackLog, export_log
from serve.pairs import Fixed, Pairs, Source
from serve.sources import Model, Sampled, prompts_of, read_pairs, reward_scorer

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


@dataclasses.dataclass
class ServeOptions(Options):
    """`python -m serve`"""

    # What people are asked about.
    checkpoint: str = option("", "checkpoint or folder of a run that writes the replies, and that a chat asks",
                             flag="from")
    compare_with: str = option("", "a second one: each pair has one reply of either, in random order")
    pairs: str = option("", "ask about the pairs of this file instead, in any form of docs/data.md")
    fields: str = option("", "your file's names for ours: prompt=question,chosen=good")
    prompts: str = option("", "file of prompts; empty: the training prompts of the checkpoint's data")
    pick: str = option("random", "uncertain: of four pairs ask about the one on which a reward model is least sure",
                       choices=("random", "uncertain"))
    reward_from: str = option("", "reward model of --pick uncertain; empty: `reward` beside the checkpoint's folder")
    mode: str = option("compare", "compare two replies, rate one with 1 to 5 stars, or label it good or bad",
                       choices=("compare", "rate", "label"))
    # Where the answers go.
    to: str = option("feedback.jsonl", "log of the answers, which is continued if it is there")
    annotator: str = option("me", "your name in the log; on the page it may be changed")
    terminal: bool = option(False, "ask here, and not on a page")
    # The server.
    host: str = option("127.0.0.1", "address to listen at; another one than this computer's own needs --token")
    port: int = option(8000, "port to listen at", low=1, high=65535)
    token: str = option("", "what other computers must know: 16 letters and digits, or more")
    stop_with_input: bool = option(False, "stop when the standard input ends, as a pipe does when its other end dies")
    rows: int = option(16, "replies that are written at once, at most", low=1, high=1024)
    # How replies are drawn.
    max_new_tokens: int = option(64, "longest reply to ask about, in tokens", low=1, high=2048)
    temperature: float = option(1.0, "below 1 sharper, above 1 flatter, 0 greedy", low=0)
    top_k: int = option(0, "draw among the k likeliest tokens; 0: all", source="Fan 2018", low=0)
    top_p: float = option(1.0, "draw among the fewest likeliest tokens whose probabilities reach this sum",
                          source="Holtzman 2020", low=0.001, high=1)
    repetition_penalty: float = option(1.0, "above 1 makes tokens already written less likely", source="Keskar 2019",
                                       low=0.01)
    seed: int = option(0, "replies, their order and what is asked twice follow from it", low=0)
    # The machine.
    device: str = option("auto", "device to compute on", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "precision of matrix products", choices=("auto", "float32", "bfloat16", "int8"))
    traceback: bool = option(False, "show where in the code an error arose")

    def check(self) -> None:
        """Refuse what does not go together."""
        if not self.checkpoint and not self.pairs:
            raise UserError("nothing to ask about: give a checkpoint as --from, or a file as --pairs")
        if not self.checkpoint:
            self.refuse("compare_with", "rows", "device", "dtype", why="without --from")
        if self.pairs:
            self.refuse("compare_with", "prompts", "pick", "reward_from", "max_new_tokens", *SAMPLING,
                        why="with --pairs, which has the replies already")
        else:
            self.refuse("fields", why="without --pairs")
        if self.pick == "random":
            self.refuse("reward_from", why="without --pick uncertain")
        if self.mode != "compare":
            self.refuse("compare_with", why=f"with --mode {self.mode}, which asks about one reply")
        if self.terminal:
            self.refuse("host", "port", "token", "rows", "stop_with_input", why="with --terminal")


@dataclasses.dataclass
class ExportOptions(Options):
    """`python -m serve export feedback.jsonl`"""

    out: str = option("", "folder to write into; nothing in it is overwritten")
    to: str = option(OWN, "whose files: mosslet's for train.py --data, or those of another tool", choices=(OWN, *TOOLS))
    template: str = option("{prompt}", "text around each prompt, with {prompt} in it")
    traceback: bool = option(False, "show where in the code an error arose")


# ---- what is asked -------------------------------------------------------------------------------

def source_of(o: ServeOptions, models: Sequence[Model], state: dict[str, Any] | None) -> Source:
    """The cards of the options. state: the first checkpoint's."""
    single = o.mode != "compare"
    if o.pairs:
        cards = read_pairs(o.pairs, single, o.fields)
        if not cards:
            raise UserError(f"--pairs {o.pairs}: holds nothing to ask about")
        return Fixed(cards)
    score, scorer = None, ""
    if o.pick == "uncertain":
        place = checkpoint_path(o.checkpoint).parent.parent / "reward"
        if not o.reward_from and not checkpoint_path(place).exists():
            raise UserError("--pick uncertain: no reward model lies beside the checkpoint: name one as --reward_from")
        score, scorer = reward_scorer(o.reward_from or str(place), o.device, (state or {}).get("template", ""))
    return Sampled(prompts_of(state or {}, "train", o.prompts, o.checkpoint), models, seed=o.seed, single=single,
                   score=score, scorer=scorer)


def checkpoints(o: ServeOptions) -> list[str]:
    """Those that the options name, each once."""
    return list(dict.fromkeys(filter(None, (o.checkpoint, o.compare_with))))


def begin(o: ServeOptions, log: FeedbackLog, models: Sequence[Model], state: dict[str, Any] | None) -> Pairs:
    """The questions, whose cards are kept beside the log."""
    return Pairs(source_of(o, models, state), log, seed=o.seed,
                 kept=None if o.pairs else pathlib.Path(o.to).with_suffix(".cards.jsonl"))


# ---- in the terminal -----------------------------------------------------------------------------

def in_terminal(o: ServeOptions) -> None:
    """Ask here."""
    from serve.terminal import ask
    own = {name: getattr(o, name) for name in (*SAMPLING, "max_new_tokens", "device", "dtype")}
    sampling = SampleOptions(**own)
    sampling.explicit = o.explicit & {*own}
    with FeedbackLog(o.to) as log:
        paths = [] if o.pairs else checkpoints(o)
        sessions = [ChatSession(path, sampling) for path in paths]
        models = [Model.of_session(session, path) for session, path in zip(sessions, paths, strict=True)]
        with begin(o, log, models, sessions[0].state if sessions else None) as pairs:
            ask(pairs, log, o.annotator, o.mode)


# ---- on a page -----------------------------------------------------------------------------------

def on_page(o: ServeOptions) -> None:
    """Serve the page and the chat until Ctrl-C."""
    from serve import app  # here, as it needs packages that nothing else does
    rules = app.Rules(o.host, o.port, o.token)
    with contextlib.closing(app.listening(o.host, o.port)) as place, FeedbackLog(o.to) as log:
        with server_of(o, log, rules) as server:
            if o.stop_with_input:
                threading.Thread(target=stop_at_the_end_of, args=(sys.stdin.buffer,), daemon=True).start()
            app.serve_on(place, app.create_app(server), lambda: announce(o))
    print("stopped; what was called saved is in", for_terminal(o.to), flush=True)


def stop_at_the_end_of(file: BinaryIO) -> None:
    """Read to the end, then do what Ctrl-C does."""
    while file.read(4096):
        pass
    signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def server_of(o: ServeOptions, log: FeedbackLog, rules: Any) -> Iterator[Any]:
    """What the page needs, closed at the end of the block."""
    from serve.app import Server
    from serve.engine import Engine
    from serve.models import Models
    from serve.training import Training

    def load(path: str) -> Engine:
        return Engine(path, rows=o.rows, device=o.device, dtype=o.dtype)

    folder = pathlib.Path(o.to).with_suffix(".training")
    engines = [load(path) for path in checkpoints(o)]
    own = {name: getattr(o, name) for name in SAMPLING if name in o.explicit}
    models = [Model.of_engine(engine, dataclasses.replace(engine.sampling, **own), o.max_new_tokens)
              for engine in engines]
    first = engines[0] if engines else None
    known = first.state.get("options", {}) if first else {}
    roots = [checkpoint_path(o.checkpoint).resolve().parent.parent.parent, folder] if first and checkpoint_path(
        o.checkpoint).exists() else [folder]
    server = Server(log, begin(o, log, models, first.state if first else None), Models(engines, roots, load),
                    Training(o.to, o.checkpoint, folder) if first else None, mode=o.mode,
                    data=pathlib.Path(o.pairs or str(known.get("data", ""))).name,
                    template=first.template if first else "{prompt}", rules=rules)
    server.annotator = o.annotator
    try:
        yield server
    finally:
        server.close()


def announce(o: ServeOptions) -> None:
    """Print the address to open."""
    name = socket.gethostname() if o.host in ("0.0.0.0", "::") else f"[{o.host}]" if ":" in o.host else o.host
    print(f"open http://{name}:{o.port}/{f'?token={o.token}' * bool(o.token)}   answers go to {for_terminal(o.to)}; "
          "Ctrl-C stops", flush=True)


# ---- command line --------------------------------------------------------------------------------

def export(argv: Sequence[str]) -> None:
    """`python -m serve export FILE --out FOLDER`"""
    path = argv[0] if argv and not argv[0].startswith("--") else ""
    o = parse(ExportOptions, argv[1:] if path else argv, "-m serve export FILE")
    if not path or not o.out:
        raise UserError("which log, and where to? write: python -m serve export feedback.jsonl --out FOLDER")
    export_log(path, o.out, o.to, o.template)


def main(argv: list[str]) -> int:
    if argv[:1] == ["export"]:
        export(argv[1:])
        return 0
    o = parse(ServeOptions, argv, "-m serve")
    keep_freed_memory()
    in_terminal(o) if o.terminal else on_page(o)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
