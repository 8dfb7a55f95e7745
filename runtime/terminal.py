"""Between a command and its terminal: how it ends, which characters its output takes, and a model's
text without power over the terminal. This module has no project imports."""
import contextlib
import contextvars
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any


class UserError(Exception):
    """Something that the user can mend: one line that says what is wrong, where, and how to mend
    it."""


# ---- which options an error may name --------------------------------------------------------------

LACKED: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("LACKED", default=frozenset())


@contextlib.contextmanager
def lacking(*options: str) -> Iterator[None]:
    """Within this block, or a function that it decorates, the command has none of these options, so that
    no error offers them as a remedy (`remedy`)."""
    token = LACKED.set(LACKED.get() | set(options))
    try:
        yield
    finally:
        LACKED.reset(token)


def remedy(option: str, text: str, otherwise: str = "") -> str:
    """The text that names this option, or, in a command that lacks it, another one.

    >>> remedy("skip_bad", "leave it out with --skip_bad", "mend it")
    'leave it out with --skip_bad'
    >>> with lacking("skip_bad"):
    ...     remedy("skip_bad", "leave it out with --skip_bad", "mend it")
    'mend it'
    """
    return otherwise if option in LACKED.get() else text


# ---- how a command ends --------------------------------------------------------------------------

def run_main(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run a command line; returns its exit code. What the user can mend becomes one line and exit
    code 2; --traceback shows where it arose. A reader that has seen enough (`| head`) ends it
    quietly."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as runtime/__init__.py left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        take_all_characters(stream)
    try:
        try:
            return _exit_code(main, argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where an error is still told, and not after the end
    except BrokenPipeError:
        silence(sys.stdout, sys.stderr)
        return 141  # of SIGPIPE, as a shell has it
    except OSError as error:  # the output's disk is full
        silence(sys.stdout)
        return _tell(error, f"the output: {error}; {advice(error)}", argv)


def _exit_code(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """`main`, its errors told in one line."""
    try:
        for word in argv:
            require_unicode(word, "")
        return main(list(argv)) or 0
    except UserError as error:
        return _tell(error, str(error), argv)
    except BrokenPipeError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            return _tell(error, out_of_memory("close other programs, or use a machine with more"),
                         argv)
        if isinstance(error, OSError):  # a full disk, a missing right: the system says what and where
            return _tell(error, f"{error}; {advice(error)}", argv)
        raise
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def require_unicode(text: str, flag: str) -> None:
    """UserError for a text of the command line that is not UTF-8: Python hands its bytes on as halves
    of characters, which no file or stream takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag}{text!a} is not valid UTF-8: give a name or text that is") from None


def _tell(error: BaseException, message: str, argv: list[str]) -> int:
    """Print one line for an error, after its traceback if that was asked for; exit code 2."""
    if _wants_traceback(argv):
        traceback.print_exception(error)
    print(for_terminal(f"error: {' '.join(message.splitlines())}", sys.stderr), file=sys.stderr)
    return 2


def _wants_traceback(argv: list[str]) -> bool:
    """Whether --traceback is given, and not as one of false, 0, no and off."""
    wanted = False
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag == "--traceback":
            wanted = (value if equals else following).lower() not in ("false", "0", "no", "off")
    return wanted


def advice(error: OSError) -> str:
    """What to do about an error of the system: a sentence's end."""
    known = {"ENOSPC": "free some space on that drive, or choose another",
             "EDQUOT": "your share of that drive is used up: free some space, or choose another",
             "EACCES": "check the rights", "EPERM": "check the rights",
             "EROFS": "that drive is read-only: choose another",
             "EIO": "the drive fails: check it and its cable, and take the file from a copy",
             "EISDIR": "a folder is where a file belongs: move it, or name another",
             "ENOTDIR": "a file is where a folder belongs: move it, or name another",
             "EEXIST": "what is there is no folder: move it, or name another",
             "ENAMETOOLONG": "give a shorter name",
             "EFBIG": "no file may be that long there: raise the limit (ulimit -f), or choose another drive",
             "ENOENT": "check the path"}
    return known.get(errno.errorcode.get(error.errno, ""), "check the path, the rights and the free "
                                                           "space")


@contextlib.contextmanager
def reading(path: Any) -> Iterator[None]:
    """Within this block an error of the system is a UserError that names the file: one in the midst
    of a read does not know it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; "
                        f"{advice(error)}") from error


# ---- memory --------------------------------------------------------------------------------------

def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory is used up: Python's and numpy's error, the system's, or one of
    torch's, which on a CPU has no class of its own."""
    words = ("allocate memory", "out of memory", "enough memory", "bad_alloc", "Storage size")
    return (isinstance(error, MemoryError)
            or isinstance(error, OSError) and error.errno == errno.ENOMEM
            or isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def out_of_memory(remedy: str) -> str:
    """The line for memory that is used up."""
    return f"out of memory (what was saved is kept): {remedy}"


@contextlib.contextmanager
def memory_advice(remedy: str) -> Iterator[None]:
    """Within this block, or a function that it decorates, memory that is used up is a UserError with
    this remedy."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(out_of_memory(remedy)) from error


# ---- output --------------------------------------------------------------------------------------

def take_all_characters(stream: Any, windows: bool = os.name == "nt") -> None:
    """Let a stream write every character: one that its encoding lacks as an escape. Windows has an
    old encoding for files and pipes, which then get UTF-8, unless PYTHONIOENCODING asks for one."""
    if not hasattr(stream, "reconfigure"):  # replaced by code that is none of ours, or closed
        return
    if windows and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
        stream.reconfigure(encoding="utf-8")
    stream.reconfigure(errors="backslashreplace")


def writes_unicode(stream: Any) -> bool:
    """Whether a stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def silence(*streams: Any) -> None:
    """Let what is still to be written to these streams vanish: nobody is there to read it."""
    for stream in streams:
        with contextlib.suppress(AttributeError, ValueError, OSError):  # closed, or no file at all
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


# Control characters but line break and tab, and those that turn the direction of a line around.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def for_terminal(text: str, stream: Any = None) -> str:
    """Text as it may be printed: on a terminal, control characters are escaped, because a model may
    write them, and they move the cursor, colour, hide or rename. Files get the text as it is.

    stream: where to; None: standard output. The escapes are those of JSON.
    """
    stream = stream or sys.stdout
    if stream is None or not stream.isatty():
        return text
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
