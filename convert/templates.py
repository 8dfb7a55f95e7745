"""A checkpoint's chat template: the system line that it adds, and a line where it renders other text than our format.

A template is a program of strangers. It runs in Jinja's sandbox on three dialogues of ours, and nothing comes of it
but that line; what Mosslet writes is its own format's.
"""
import importlib.metadata
import os
import re
import sys

from convert.tokenizer_files import text_of
from data.chat import LLAMA_DATE, ChatFormat

USER = {"role": "user", "content": " Hi.\n"}  # white space, which some templates trim
DIALOGUES = ([USER], [{"role": "system", "content": " Be kind.\n"}, USER,
                      {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes. "}, USER],
             [USER, {"role": "assistant", "content": "No."}])
LITERAL = re.compile(r"""(['"])<\|im_start\|>system(?:\\n|\n)((?:\\.|(?!\1)[^\\])*?)<\|im_end\|>""", re.DOTALL)
TEXT = re.compile(r"(?:^|[}\s])<\|im_start\|>system\n((?:(?!\{[{%#]).)*?)<\|im_end\|>", re.DOTALL)


def system_line(template: str) -> str:
    """The system text that a ChatML template adds by itself: in a string of Jinja's, else as plain text."""
    if found := LITERAL.search(template):
        return found[2].encode("ascii", "backslashreplace").decode("unicode-escape", "replace")  # as Jinja does
    found = TEXT.search(template)
    return found[1] if found else ""


def has_sandbox() -> bool:
    """Is Jinja here, in a version whose sandbox has no known holes? It comes with torch."""
    try:
        return [int(n) for n in re.findall(r"\d+", importlib.metadata.version("jinja2"))[:3]] >= [3, 1, 6]
    except importlib.metadata.PackageNotFoundError:
        return False


def rendered(template: str, messages: list[dict[str, str]], names: dict[str, str]) -> str:
    """What the template makes of a dialogue, as `transformers` would run it; of an error its text."""
    import jinja2.sandbox

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    known = re.sub(r"(\{%-?\s*)generation(?=\s*-?%\})", r"\1if true", template)  # of what is learned: no tag of Jinja's
    known = re.sub(r"(\{%-?\s*)endgeneration(?=\s*-?%\})", r"\1endif", known)
    try:
        return environment.from_string(known).render(
            messages=messages, add_generation_prompt=messages[-1]["role"] == "user", enable_thinking=False,
            date_string=LLAMA_DATE, raise_exception=raise_exception,
            **{f"{role}_token": name for role, name in names.items() if name})
    except Exception as error:  # a program's: any kind
        return f"{type(error).__name__}: {error}"


def say_difference(chat: ChatFormat, template: str, names: dict[str, str], where: str) -> None:
    """Print a line if the template renders other text than our format. names: of the tokenizer's roles."""
    if not has_sandbox():
        print(f"{where}: its chat template is not compared with Mosslet's format {chat.name}, which it is taken for: "
              "that takes jinja2 3.1.6 or newer (`pip install -U jinja2`)", file=sys.stderr)
        return
    for messages in DIALOGUES:
        reply = messages[-1]["role"] == "user"
        ours, theirs = text_of(chat.pieces(messages, reply)), rendered(template, messages, names)
        if not reply:  # what follows the last reply is not read
            ours = ours.rstrip("\n")
            theirs = theirs[:len(ours)]
        if ours != theirs:
            start = max(0, len(os.path.commonprefix([ours, theirs])) - 20)
            a, b = (repr(text[start:start + 60]) for text in (ours, theirs))
            print(f"{where}: its chat template is of no format that Mosslet knows; it speaks {chat.name}, {a} where "
                  f"the template has {b}, unless `python -m convert import … --chat_format` names another",
                  file=sys.stderr)
            return
