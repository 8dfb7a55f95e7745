"""A checkpoint's chat template: the system line that it adds by itself, and a line where it is seen to write what our
format does not. It is read and never run, for it is a program of strangers.
"""
import re
import sys

from data.chat import ChatFormat

OURS = '"Human: " + message.content'  # in the template that an export of the plain format has
LITERAL = re.compile(r"""(['"])<\|im_start\|>system(?:\\n|\n)((?:\\.|(?!\1)[^\\])*?)<\|im_end\|>""", re.DOTALL)
TEXT = re.compile(r"(?:^|[}\s])<\|im_start\|>system\n((?:(?!\{[{%#]|<\|im_start\|>).)*?)<\|im_end\|>", re.DOTALL)
TRIMS = re.compile(r"content['\"\]]*\s*\|\s*trim")


def system_line(template: str) -> str:
    """The system text that a ChatML template adds by itself: in a string of Jinja's, else as plain text."""
    if found := LITERAL.search(template):
        return found[2].encode("ascii", "backslashreplace").decode("unicode-escape", "replace")  # as Jinja does
    found = TEXT.search(template)
    return found[1] if found else ""


def say_difference(chat: ChatFormat, template: str, where: str) -> None:
    """Print a line if a template is seen to differ from the format that it is taken for."""
    thinks = "<think>" in template and not chat.think
    differs = {"plain": {"is of no format that Mosslet knows": OURS not in template},
               "chatml": {"writes thoughts (<think>), which this format leaves out": thinks,
                          "trims what is said, which this format does not": bool(TRIMS.search(template))}}
    if found := [what for what, seen in differs.get(chat.name, {}).items() if seen]:
        print(f"{where}: its chat template {' and '.join(found)}; Mosslet speaks {chat.name}, unless "
              "`python -m convert import … --chat_format` names another", file=sys.stderr)
