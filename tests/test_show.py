"""tools/show.py prints the loss mask in colour."""
import re

import pytest

from data.tokenizer import train_bpe
from data.prepare import open_data
from model import ModelConfig, Transformer, save_checkpoint
from runtime.options import UserError
from tools.show import main

RECORD = '{"prompt": "问", "response": "答"}\n'


@pytest.fixture
def file(tmp_path):
    (tmp_path / "d.jsonl").write_text(RECORD, encoding="utf-8")
    return str(tmp_path / "d.jsonl")


def test_learned_tokens_are_green_and_others_grey_on_a_terminal(file, tmp_path, capsys, monkeypatch):
    tokenizer = train_bpe(["问答"] * 3, 270)
    model = Transformer(ModelConfig(vocab_size=tokenizer.n_vocab, d_model=16, n_head=2, n_kv_head=2,
                                    d_ff=16, n_layer=1))
    save_checkpoint(tmp_path, model, tokenizer)
    main([file, "--from", str(tmp_path)])
    assert "\033" not in (shown := capsys.readouterr().out) and "⟦" in shown  # a pipe
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    main([file, "--from", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "\033[32m答" in shown
    assert "\033[32m<eom>" in shown
    assert "\033[90m问" in shown


def test_a_prepared_folder_gives_tokenizer_and_template(file, reviews_source, tmp_path, capsys):
    data = open_data("reviews", source=str(reviews_source), vocab_size=400, cache=tmp_path)
    main([file, "--from", str(data.folder)])
    shown = capsys.readouterr().out
    plain = "".join(piece.partition("m")[2] for piece in ("\033[0m" + shown).split("\033[")[1:]).replace("·", "")
    assert data.template.replace("{prompt}", "问") in plain


def test_what_people_judged_is_shown_below_its_prompt(tmp_path, reviews_source, capsys):
    data = open_data("reviews", source=str(reviews_source), vocab_size=400, cache=tmp_path)
    main([str(data.folder / "reward_val.jsonl")])
    shown = capsys.readouterr().out
    assert len(re.findall("^(not )?liked: ", shown, re.MULTILINE)) == min(5, len(data.records("reward", "val")))
    assert " judged" in shown


def test_wrong_words_show_the_usage(file):
    with pytest.raises(UserError, match="usage"):
        main([file, "--form", "x"])
