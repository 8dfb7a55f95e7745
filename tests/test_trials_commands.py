"""The trials find the faults that they look for."""
import pytest
import tiktoken

from data.tokenizer import train_bpe
from tools import trials_commands
from tools.trials_commands import TrialOptions, forge, forgery, run_apart, wrong
from train import PretrainOptions


def test_no_text_forges_a_control_token(capsys):
    assert forge(TrialOptions(n=50)) == 0


@pytest.mark.parametrize("text", ["<eom>", "a<|Human|>: b", "<|endoftext|>"])
def test_a_tokenizer_that_can_be_forged_is_found_out(text):
    tokenizer = train_bpe([text], 300)
    assert forgery(tokenizer, [text], "{prompt}") == ""
    ranks = {token: i for i, token in enumerate(tokenizer.ranks)}
    naive = tiktoken.Encoding("naive", pat_str=tokenizer.pattern, mergeable_ranks=ranks,
                              special_tokens=tokenizer.special)
    tokenizer.encode = lambda text: naive.encode(text, allowed_special="all")
    assert forgery(tokenizer, [text], "{prompt}")


@pytest.mark.parametrize("code,log,fault", [
    (1, "Traceback (most recent call last):", "traceback"), (2, "", "0 lines of error"),
    (2, "error: a\nerror: b\n", "2 lines"), (0, "error: a\n", "exit code 0"),
    (0, "", "nothing printed"), (-9, "", "exit code -9"), (2, "error: a\n", ""),
    (None, "step 3", "")])
def test_how_a_command_ends_is_judged(tmp_path, code, log, fault):
    assert fault in wrong(code, log, ["pretrain"], PretrainOptions, tmp_path)
    assert bool(wrong(code, log, ["pretrain"], PretrainOptions, tmp_path)) == bool(fault)


def test_a_command_has_a_process_of_its_own(tmp_path):
    def main(argv):
        print(argv)
        trials_commands.TRIALS.clear()
        raise ZeroDivisionError

    assert run_apart(main, ["--x"], tmp_path / "log", 20) == 99
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()
    assert trials_commands.TRIALS
