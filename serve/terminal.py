"""The same questions in the terminal, for which nothing but Mosslet is needed.

    python -m serve --terminal --from out/reviews/sft --to feedback.jsonl

One key an answer on a terminal; a line an answer where the input is piped. Texts are Chinese where the
locale is, else English.
"""
import contextlib
import os
import pathlib
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from runtime.terminal import for_terminal
from serve.exports import saved
from serve.log import FeedbackLog, NotSaved
from serve.pairs import Card, Pairs
from serve.strip import strip

try:
    import termios
    import tty
except ImportError:  # Windows: lines, and no keys
    termios = None

# What may be pressed, or written as a line, for each command; the first is what the help shows.
COMPARE = {"left": ("l", "left", "左", "\x1b[d"), "right": ("r", "right", "右", "\x1b[c"),
           "tie": ("t", "tie", "平"), "both_bad": ("b", "both bad", "都不好")}
LABEL = {1: ("+", "1", "y", "good", "好"), 0: ("-", "0", "n", "bad", "不好")}
RATE = {score: (str(score),) for score in range(1, 6)}
ANSWERS: dict[str, Mapping[Any, tuple[str, ...]]] = {"compare": COMPARE, "label": LABEL, "rate": RATE}
COMMANDS = {"skip": ("s", "skip", "跳过"), "undo": ("u", "undo", "撤销", "\x7f"), "edit": ("e", "edit", "改写"),
            "comment": ("c", "comment", "备注"), "help": ("?", "help", "帮助"), "quit": ("q", "quit", "退出", "\x04")}

WORDS = {
    "en": {"left": "left", "right": "right", "tie": "tie", "both_bad": "both bad", "skip": "skip", "undo": "undo",
           "edit": "edit", "comment": "comment", "help": "help", "quit": "quit", 1: "good", 0: "bad",
           "reply": "reply", "user": "user", "assistant": "assistant", "system": "system",
           "stars": "1–5 {key}", "saved": "✓ {n} saved", "waiting": "writing replies …", "done": "all is answered",
           "not_saved": "not saved: {why}; the question stays", "nothing": "nothing to take back",
           "back": "taken back: {what}", "which": "which one: left or right?", "unknown": "{word} is no answer",
           "one_key": "one key, without Enter:", "empty": "(empty)", "sure": "0–3 how sure, before left or right",
           "text": "new text on one line (empty: as it is): ", "note": "comment: ", "kept": "noted; now answer",
           "rate": "{n:g} an hour", "share": "left {share:.0%} ({low:.0%}–{high:.0%})",
           "self": "with yourself κ {k:.2f}"},
    "zh": {"left": "左", "right": "右", "tie": "平", "both_bad": "都不好", "skip": "跳过", "undo": "撤销",
           "edit": "改写", "comment": "备注", "help": "帮助", "quit": "退出", 1: "好", 0: "不好",
           "reply": "回答", "user": "用户", "assistant": "助手", "system": "系统",
           "stars": "1–5 {key}", "saved": "✓ 已保存 {n} 条", "waiting": "正在生成回答……", "done": "已全部回答",
           "not_saved": "未保存：{why}；此题保留", "nothing": "没有可撤销的回答",
           "back": "已撤销：{what}", "which": "改写哪一个：左还是右？", "unknown": "{word} 不是可选的回答",
           "one_key": "按一个键，不用回车：", "empty": "（空）", "sure": "0–3 多有把握（在选左右之前按）",
           "text": "写出新的回答（一行；留空则不改）：", "note": "备注：", "kept": "已记下，请作答",
           "rate": "每小时 {n:g} 条", "share": "选左 {share:.0%}（{low:.0%}–{high:.0%}）",
           "self": "自我一致 κ {k:.2f}"}}


def language(environment: Mapping[str, str] = os.environ) -> str:
    """zh where the locale is Chinese, else en."""
    locale = next((environment[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environment.get(name)), "")
    return "zh" if locale.lower().startswith("zh") else "en"


class Keys:
    """What is pressed on a terminal, key by key within a `with` block, or the lines of any other input. None
    at the end."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.one_by_one = termios is not None and stream.isatty()
        self.before = termios.tcgetattr(stream.fileno()) if self.one_by_one else None
        self.waiting: list[str] = []

    def __enter__(self) -> "Keys":
        if self.one_by_one:
            tty.setcbreak(self.stream.fileno(), termios.TCSADRAIN)  # what is typed ahead stays
        return self

    def __exit__(self, *_: object) -> None:
        if self.one_by_one:
            termios.tcsetattr(self.stream.fileno(), termios.TCSADRAIN, self.before)

    def key(self) -> str | None:
        """The next key, or line without white space around it."""
        if not self.one_by_one:
            return self.line()
        if not self.waiting:
            pressed = os.read(self.stream.fileno(), 64).decode("utf-8", "ignore")
            # An arrow is one key of three characters; letters may have been typed ahead.
            self.waiting = [pressed] if pressed.startswith("\x1b") else list(pressed)
        return self.waiting.pop(0) if self.waiting else None

    def line(self) -> str | None:
        """The next line."""
        with self.as_before():
            line = self.stream.readline()
        return line.strip() if line else None

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """Within this block the terminal takes lines, as before."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class Questioner:
    """One annotator at a terminal."""

    def __init__(self, pairs: Pairs, log: FeedbackLog, annotator: str, mode: str, streams: tuple[TextIO, TextIO],
                 words: Mapping[Any, str]):
        self.pairs, self.log, self.annotator, self.mode, self.words = pairs, log, annotator, mode, words
        self.keys, self.out = Keys(streams[0]), streams[1]
        self.answers = ANSWERS[mode]
        self.commands = {word: command for table in (COMMANDS, self.answers) for command, words in table.items()
                         for word in words}
        self.edited: tuple[str, str] | None = None  # (side, new text) of the card that is asked about
        self.comment: str | None = None
        self.strength: int | None = None
        self.answered = 0

    def say(self, text: str = "", end: str = "\n") -> None:
        print(for_terminal(text, self.out), end=end, file=self.out, flush=True)

    def tell(self, name: Any, **values: Any) -> None:
        self.say(self.words[name].format(**values))

    # ---- the loop --------------------------------------------------------------------------------

    def run(self) -> int:
        """Ask until all is answered, the input ends or somebody quits; how many answers were saved."""
        with self.keys:
            card = self.next_card()
            while card is not None:
                self.edited = self.comment = self.strength = None
                self.show(card)
                card = self.answer(card)
        self.summary()
        return self.answered

    def next_card(self) -> Card | None:
        """The next card, waited for; None if all is answered."""
        told = False
        while (card := self.pairs.next(self.annotator, wait=0.5)) is None:
            if self.pairs.done(self.annotator):
                self.tell("done")
                return None
            if not told:
                self.tell("waiting")
            told = True
        return card

    def answer(self, card: Card) -> Card | None:
        """Read keys until the card is answered or skipped; the card after that, None to end."""
        since = time.monotonic()
        while (word := self.keys.key()) is not None:
            command, strength = self.parsed(word)
            if command == "quit":
                return None
            if command == "undo":
                return self.undo() or card
            if command in ("edit", "comment"):
                self.note(card, command)
            elif self.mode == "compare" and word in ("0", "1", "2", "3"):
                self.strength = int(word)
                self.tell("kept")
            elif command == "help" or command is None:
                if command is None and word.strip():
                    self.tell("unknown", word=word.strip())
                self.say(self.menu())
            elif self.save(card, command, strength, time.monotonic() - since):
                return self.next_card()
        return None

    def parsed(self, word: str) -> tuple[Any, int | None]:
        """(the command of a key or line, the strength behind it or set before it): "left 2"; None if it is none."""
        word = word.lower()
        found = self.commands.get(word)
        before = word[:-1].strip()
        if found is None and word[-1:] in "0123" and before and not before.isdigit():
            decided = self.commands.get(before)
            return (decided, int(word[-1])) if decided in ("left", "right") else (None, None)
        return found, self.strength if found in ("left", "right") else None

    def save(self, card: Card, choice: Any, strength: int | None, seconds: float) -> bool:
        """Append the answer and its edit, and say so once they are on the disk; False if they are not."""
        more = {"strength": strength, "comment": self.comment, "seconds": round(seconds, 2)}
        event = card.record(self.annotator, choice, self.mode, id=secrets.token_hex(8), **more)
        try:
            self.log.append(event)
            if self.edited:
                self.log.append(card.edit(self.annotator, event["id"], *self.edited))
        except NotSaved as error:
            self.tell("not_saved", why=error.reason)
            return self.log.get(event["id"]) is not None  # then it is the edit alone that is lost
        self.answered += choice != "skip"
        names = "" if choice == "skip" or len({*card.names}) < 2 else "  (" + ", ".join(
            card.names[i] for i in card.order) + ")"
        self.say(self.words["saved"].format(n=saved(self.log.standing(), self.annotator)) + names)
        return True

    def undo(self) -> Card | None:
        """Take back the last answer, and return its card; None if there is nothing to take back."""
        try:
            event = self.log.undo(self.annotator)
        except NotSaved as error:
            self.tell("not_saved", why=error.reason)
            return None
        if event is None:
            self.tell("nothing")
            return None
        what = event.get("choice", event.get("score", event.get("label", "skip")))
        self.tell("back", what=what if event["kind"] == "rating" else self.words.get(what, what))
        return self.pairs.find(event["card"], self.annotator, wait=60) or self.next_card()

    # ---- texts -----------------------------------------------------------------------------------

    def show(self, card: Card) -> None:
        """Print the prompt and the replies, whole."""
        self.say("\n" + "─" * 60)
        for speaker, text in card.turns:
            self.say(f"{self.words.get(speaker, speaker)}: {text}")
        sides = ("left", "right") if self.mode == "compare" else ("reply",)
        for side, text in zip(sides, card.shown, strict=False):
            self.say(f"\n[{self.words[side]}]\n{text if text.strip() else self.words['empty']}")
        self.say("\n" + self.menu())

    def menu(self) -> str:
        """All commands with their keys."""
        table = COMMANDS if self.mode == "rate" else {**self.answers, **COMMANDS}
        stars = [self.words["stars"].format(key="★")] * (self.mode == "rate")
        return "  ".join([*[self.words["one_key"]] * self.keys.one_by_one, *stars,
                          *(f"{keys[0]} {self.words[command]}" for command, keys in table.items()),
                          *[self.words["sure"]] * (self.mode == "compare")])

    def note(self, card: Card, command: str) -> None:
        """Take a comment or an edited reply, which are saved with the answer."""
        if command == "comment":
            self.say(self.words["note"], end="")
            self.comment = self.keys.line() or None
        else:
            side = "left"
            if self.mode == "compare":
                self.tell("which")
                side = self.commands.get((self.keys.key() or "").lower())
            if side not in ("left", "right"):
                self.say(self.menu())
                return
            original = card.shown[("left", "right").index(side)]
            text = self.rewritten(original)
            if not text or text == original:
                return
            self.edited = side, text
        self.tell("kept")

    def rewritten(self, text: str) -> str:
        """The text as the annotator leaves it, in $EDITOR on a terminal, else on one line."""
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
        if not (editor and self.keys.one_by_one):
            self.say(self.words["text"], end="")
            return self.keys.line() or ""
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "reply.txt"
            file.write_text(text, encoding="utf-8")
            with contextlib.suppress(OSError, ValueError, subprocess.CalledProcessError), self.keys.as_before():
                subprocess.run([*shlex.split(editor), str(file)], check=True)
                return file.read_text(encoding="utf-8").removesuffix("\n")
        self.say(self.words["text"], end="")  # the editor did not work
        return self.keys.line() or ""

    def summary(self) -> None:
        """One line of figures."""
        self.say(" · ".join(self.figures()))

    def figures(self) -> Iterator[str]:
        """What the strip of the page shows, in words."""
        found = strip(self.log.events, self.annotator)
        yield self.words["saved"].format(n=found["saved"])
        if found["per_hour"] is not None:
            yield self.words["rate"].format(n=found["per_hour"])
        if found["left"]["n"]:
            yield self.words["share"].format(**found["left"])
        if found["self"]["kappa"] is not None:
            yield self.words["self"].format(k=found["self"]["kappa"])


def ask(pairs: Pairs, log: FeedbackLog, annotator: str, mode: str = "compare", *, stdin: TextIO | None = None,
        stdout: TextIO | None = None) -> int:
    """Ask an annotator in the terminal; how many answers were saved. mode: compare, rate or label. UserError
    if no replies can be made."""
    streams = stdin or sys.stdin, stdout or sys.stdout
    return Questioner(pairs, log, annotator, mode, streams, WORDS[language()]).run()
