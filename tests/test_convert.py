"""Whole models in and out: `python -m convert`, `--init_from` with a folder, and folders that are damaged
or hostile."""
import dataclasses
import json
import math
import os
import pathlib
import shutil

import pytest
import torch

import evaluate
import sample
import train
from convert import importing
from convert.__main__ import main
from convert.exporting import export_model
from convert.files import open_tensors, write_tensors
from convert.importing import as_checkpoint, import_model
from data.parents import like_parent, preset_of
from data.tokenizer import train_bpe
from model import ModelConfig, Transformer, checkpoint_path, load_checkpoint, next_token_loss, save_checkpoint
from reward import RewardConfig, RewardModel
from runtime.options import UserError, bounds, parse
from tests.conftest import equal, signals_restored, write_reviews_source
from tools import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """A random model of each family in its own layout."""
    root = tmp_path_factory.mktemp("families")
    for family in tiny.SHAPES:
        tiny.make(family, root / family)
    return {family: root / family for family in tiny.SHAPES}


@pytest.fixture
def tokenizer():
    return train_bpe(tiny.TEXTS, 280)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "CACHE", tmp_path / "cache")


def greedy(model, tokens, n):
    return sample.generate(model, tokens, torch.ones_like(tokens).bool(), n, temperature=0).tokens


def equal_files(before, after) -> bool:
    """Whether two folders hold the same tensors, bit for bit, in the same types."""
    a, b = ({name: (str(stored.dtype), stored.read()) for name, stored in open_tensors(folder).items()}
            for folder in (before, after))
    return equal(a, b)


# ---- what a real model is trained with -----------------------------------------------------------

def test_a_model_of_others_is_not_trained_at_the_demos_rates(folders, capsys):
    argv = ["--init_from", str(folders["qwen2"]), "--batch", "4"]
    o = importing.with_checkpoints(parse(train.SFTOptions, argv, "x"))
    found = like_parent({"sft": o}, "pretrain")["sft"]
    assert (found.preset, found.optimizer, found.lr, found.batch) == ("real", "adamw", 3e-4, 4)
    assert f"--preset real, as {o.init_from} has" in capsys.readouterr().out
    with pytest.raises(UserError, match="name it by --init_from"):
        parse(train.PretrainOptions, ["--preset", "real"], "x")
    for preset in ("demo", "smollm"):  # a flag says otherwise
        o = importing.with_checkpoints(parse(train.SFTOptions, [*argv, "--preset", preset], "x"))
        assert like_parent({"sft": o}, "pretrain")["sft"] is o


# ---- there and back ------------------------------------------------------------------------------

@pytest.mark.parametrize("family", tiny.SHAPES)
def test_a_folder_is_imported_and_comes_back(family, folders, tmp_path):
    """Tensors bit for bit, the same config, and a tokenizer of the same ids."""
    main(["import", str(folders[family]), str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), str(tmp_path / "back")])
    before, after = open_tensors(folders[family]), open_tensors(tmp_path / "back")
    assert set(before) == set(after)
    for name in before:
        assert torch.equal(before[name].read(), after[name].read())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (folders[family], tmp_path / "back")]
    assert configs[0] == configs[1]
    again = load_checkpoint(as_checkpoint(str(tmp_path / "back")))[1]
    _, tokenizer, _ = load_checkpoint(tmp_path / "run")
    text = "今天 weather, 12 345!\n\n  é<eom><|im_end|>"
    assert again.encode(text) == tokenizer.encode(text)
    assert (again.eom_id, again.pad_id, again.n_vocab) == (tokenizer.eom_id, tokenizer.pad_id, tokenizer.n_vocab)


def test_an_import_overwrites_no_config(folders, tmp_path):
    """`convert import M M` once replaced the model's own config.json by a run's."""
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2"], folder)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="config.json: is there already"):
        main(["import", str(folder), str(folder)])
    assert (folder / "config.json").read_bytes() == before and not (folder / "checkpoint.pt").exists()


def test_an_import_of_older_code_is_made_anew_in_its_place(folders, monkeypatch):
    """Runs name its path, and compare it when they go on."""
    monkeypatch.setattr(importing, "VERSION", importing.VERSION - 1)
    first = as_checkpoint(str(folders["qwen2"]))
    monkeypatch.undo()
    monkeypatch.setattr(importing, "CACHE", pathlib.Path(first).parent.parent)
    assert as_checkpoint(str(folders["qwen2"])) == first
    assert json.loads((pathlib.Path(first) / "config.json").read_text())["import_version"] == importing.VERSION


def test_a_checkpoint_alone_tells_its_preset(folders, tmp_path):
    place = pathlib.Path(as_checkpoint(str(folders["qwen2"])))
    shutil.copy(place / "checkpoint.pt", tmp_path / "handed.pt")
    assert preset_of(place) == preset_of(tmp_path / "handed.pt") == "real"


def test_an_import_is_kept_until_the_folder_changes(folders, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2"], folder)
    first = as_checkpoint(str(folder))
    assert as_checkpoint(str(folder)) == first
    assert capsys.readouterr().err.count("imported") == 1
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 1, "top_k": 3}')
    second = as_checkpoint(str(folder))
    assert second != first
    assert load_checkpoint(second)[2]["generation"] == {"temperature": 0.5, "top_k": 3}


def test_what_from_reads_is_exported_without_an_import_by_hand(folders, tmp_path):
    main(["export", str(folders["qwen2"]), str(tmp_path / "back")])
    before, after = ({name: x.read().tolist() for name, x in open_tensors(folder).items()}
                     for folder in (folders["qwen2"], tmp_path / "back"))
    assert before == after


def test_what_is_ours_is_left_alone(tmp_path):
    for path in ("", "out/reviews/sft", str(tmp_path), str(tmp_path / "checkpoint.pt")):
        assert as_checkpoint(path) == path


def test_sampling_is_that_of_the_models_own_config_unless_a_flag_says_otherwise(folders, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "top_p": 0.25}')
    sample.main(["--from", str(folder), "--prompt", "Paris", "--max_new_tokens", "4", "--top_p", "0.75"])
    said = capsys.readouterr()
    assert "--temperature 0.5" in said.err
    assert "top_p" not in said.err


def test_a_checkpoint_in_bfloat16_is_exported_in_bfloat16(folders, tmp_path):
    config = json.loads((folders["llama"] / "config.json").read_text())
    half = [(name, stored.read().bfloat16()) for name, stored in open_tensors(folders["llama"]).items()]
    shutil.copytree(folders["llama"], tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors"))
    write_tensors(tmp_path / "half", half)
    (tmp_path / "half" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    main(["import", str(tmp_path / "half"), str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), str(tmp_path / "back")])
    after = open_tensors(tmp_path / "back")
    assert all(torch.equal(after[name].read(), tensor) for name, tensor in half)
    main(["export", str(tmp_path / "run"), str(tmp_path / "full"), "--dtype", "float32"])
    assert {entry.dtype for entry in open_tensors(tmp_path / "full").values()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tensors_of_several_types_come_back_each_in_its_own(family, folders, tmp_path):
    """Vectors are float32, beyond the range of float16; matrices are of two types, also those of one qkv."""
    shutil.copytree(folders[family], tmp_path / "model")

    def edit(tensors):
        for name, tensor in tensors.items():
            half = torch.float16 if "q_proj" in name or "c_attn" in name else torch.bfloat16
            kind = torch.float32 if tensor.dim() == 1 else half
            tensors[name] = (tensor * 70_000 if tensor.dim() == 1 else tensor).to(kind)

    tensors_with(edit)(tmp_path / "model")
    main(["import", str(tmp_path / "model"), str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), str(tmp_path / "back")])
    assert equal_files(tmp_path / "model", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_reward_model_in_bfloat16_with_a_score_in_float32_comes_back(folders, tmp_path):
    reward_folder(folders["qwen2"], tmp_path / "model", lambda t: t.update(
        {name: x.bfloat16() for name, x in t.items() if name != "score.weight"}))
    main(["import", str(tmp_path / "model"), str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), str(tmp_path / "back")])
    assert equal_files(tmp_path / "model", tmp_path / "back")


def test_an_import_of_older_code_is_exported_without_a_loss(folders, tmp_path):
    """It has no types of its own to come back in."""
    main(["import", str(folders["qwen2"]), str(tmp_path / "run")])
    model, tokenizer, state = load_checkpoint(tmp_path / "run")
    del state["source"]["dtypes"]
    save_checkpoint(tmp_path / "older", model, tokenizer, source=state["source"] | {"dtype": "bfloat16"})
    main(["export", str(tmp_path / "older"), str(tmp_path / "back")])
    assert equal_files(folders["qwen2"], tmp_path / "back")


def test_float64_is_said(folders, tmp_path, capsys):
    shutil.copytree(folders["qwen2"], tmp_path / "model")
    tensors_with(lambda t: t.update({NORM: t[NORM].double()}))(tmp_path / "model")
    main(["import", str(tmp_path / "model"), str(tmp_path / "run")])
    assert "1 tensors of float64 are read, and later exported, as float32" in capsys.readouterr().err
    main(["export", str(tmp_path / "run"), str(tmp_path / "back")])
    assert open_tensors(tmp_path / "back")[NORM].dtype == torch.float32


def test_what_float16_cannot_hold_is_said_before_anything_is_written(folders, tmp_path):
    shutil.copytree(folders["qwen2"], tmp_path / "model")
    tensors_with(lambda t: t[NORM].fill_(70_000.0))(tmp_path / "model")
    with pytest.raises(UserError, match=f"{NORM} has numbers up to 70000.*--dtype bfloat16 or float32"):
        main(["export", str(tmp_path / "model"), str(tmp_path / "back"), "--dtype", "float16"])
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_config_of_transformers_5_is_exported_with_the_keys_of_4_too(family, folders, tmp_path):
    shutil.copytree(folders[family], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    newer = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling")}
    (tmp_path / "model" / "config.json").write_text(json.dumps(newer))
    main(["export", str(tmp_path / "model"), str(tmp_path / "back")])
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_a_model_of_ours_is_read_by_transformers(tmp_path, tokenizer):
    """Its greedy replies, too: head, positions and tokenizer are the same."""
    transformers = pytest.importorskip("transformers")
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48)
    model = Transformer(ModelConfig(tokenizer.n_vocab, **shape))
    save_checkpoint(tmp_path / "run", model.eval(), tokenizer)
    export_model(str(tmp_path / "run"), tmp_path / "out")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.encode("今天的天气")
    assert theirs("今天的天气", add_special_tokens=False).input_ids == ids
    tokens = torch.tensor([ids])
    expected = twin.generate(tokens, max_new_tokens=16, do_sample=False, eos_token_id=None)[:, len(ids):]
    assert torch.equal(greedy(model, tokens, 16), expected)


def test_reward_models_come_in_and_go_out(folders, tmp_path):
    main(["import", str(folders["qwen2"]), str(tmp_path / "trunk")])
    trunk, own, _ = load_checkpoint(tmp_path / "trunk")
    model = RewardModel(RewardConfig(**vars(trunk.config), pool="last")).eval()
    model.backbone.load_state_dict(trunk.state_dict())
    save_checkpoint(tmp_path / "reward", model, own)
    export_model(str(tmp_path / "reward"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"}
    back, _, _ = load_checkpoint(as_checkpoint(str(tmp_path / "out")), cls=RewardModel)
    tokens = torch.randint(0, 200, (3, 9))
    assert torch.equal(back(tokens, torch.ones_like(tokens).bool()), model(tokens, torch.ones_like(tokens).bool()))
    mean = RewardModel(RewardConfig(**vars(trunk.config), pool="mean")).eval()
    save_checkpoint(tmp_path / "mean", mean, own)
    with pytest.raises(UserError, match="--pool last"):
        export_model(str(tmp_path / "mean"), tmp_path / "none")


# ---- the road ------------------------------------------------------------------------------------

ADAMW = ["--optimizer", "adamw", "--lr", "0.001"]


@pytest.mark.parametrize(("options", "sft_options"), [([], ADAMW), (["--train_layers", "1"], ADAMW),
                                                      (["--lora_rank", "4"], [])])
def test_a_qwen2_walks_the_road_and_goes_back(options, sft_options, folders, tmp_path, capsys):
    """sft → reward → ppo, all weights, the last block, adapters; then `transformers` generates."""
    write_reviews_source(tmp_path / "source")
    common = ["--preset", "smoke", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out"),
              "--device", "cpu", "--dtype", "float32", "--compile", "off", *options]
    rows = ["--max_len", "256"]  # Qwen's system line alone has 70 bytes, and a byte is a token here
    with signals_restored():
        train.main(["sft", *common, *rows, "--init_from", str(folders["qwen2"]), *sft_options])
        train.main(["reward", *common, *rows])
        train.main(["ppo", *common, "--updates", "2", "--critic_warmup", "1"])
    runs = tmp_path / "out" / "reviews"
    evaluate.main([str(runs / "sft"), str(runs / "ppo"), "--prompts", "8"])
    main(["export", str(runs / "ppo"), str(tmp_path / "back")])
    ours, tokenizer, _ = load_checkpoint(runs / "ppo")
    started = load_checkpoint(as_checkpoint(str(folders["qwen2"])))[0]
    moved = [name for name, p in ours.state_dict().items() if not torch.equal(p, started.state_dict()[name])]
    assert moved
    if options:
        assert "embedding.weight" not in moved
    transformers = pytest.importorskip("transformers")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids, _ = tokenizer.render_chat([{"role": "user", "content": "今天天气"}], reply=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back").apply_chat_template(
        [{"role": "user", "content": "今天天气"}], add_generation_prompt=True)
    assert list(theirs["input_ids"] if hasattr(theirs, "keys") else theirs) == ids
    tokens = torch.tensor([ids])
    expected = twin.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, len(ids):]
    assert torch.equal(greedy(ours, tokens, 12), expected)


def test_moss_learns_three_sentences(folders, tmp_path):
    """The project's origin: load, train ten epochs, save, load again, go on with a text."""
    texts = ["今天天气真好", "我爱学习编程", "人工智能很酷"]
    model, tokenizer, _ = load_checkpoint(as_checkpoint(str(folders["moss"])))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        for text in texts:
            ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eom_id]])
            loss = next_token_loss(model, ids[:, :-1], ids[:, 1:], None)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    save_checkpoint(tmp_path / "trained", model.eval(), tokenizer)
    again, _, _ = load_checkpoint(tmp_path / "trained")
    prompt = tokenizer.encode("人工智能的发展趋势是")
    replies = [sample.reply_to(m, tokenizer, [prompt], 50, seed=1) for m in (model, again)]
    assert torch.equal(replies[0].tokens, replies[1].tokens)
    transformers = pytest.importorskip("transformers")
    export_model(str(tmp_path / "trained"), tmp_path / "twin", "codegen")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twin").eval()
    assert type(twin).__name__ == "CodeGenForCausalLM"
    tokens = torch.tensor([prompt])
    expected = twin.generate(tokens, max_new_tokens=50, do_sample=False, eos_token_id=None)[:, len(prompt):]
    assert torch.equal(greedy(again, tokens, 50), expected)


# ---- damaged and hostile -------------------------------------------------------------------------

def config_with(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return change


def tensors_with(edit):
    """Rewrite the weights after `edit` of a dict of tensors."""
    def change(folder):
        tensors = {name: stored.read() for name, stored in open_tensors(folder).items()}
        edit(tensors)
        (folder / "model.safetensors").unlink()
        write_tensors(folder, list(tensors.items()))
    return change


def reward_folder(policy, folder, edit=lambda tensors: None):
    """A reward model's folder made of a policy's; `edit` of its tensors."""
    shutil.copytree(policy, folder)
    config_with(architectures=["Qwen2ForSequenceClassification"], num_labels=1, id2label={"0": "LABEL_0"},
                label2id={"LABEL_0": 0})(folder)
    tensors_with(lambda t: (t.update({"score.weight": torch.randn(1, 64)}), edit(t)))(folder)


def as_reward(**changes):
    """The folder as a reward model's, some of its tensors changed."""
    def change(folder):
        policy = folder.with_name("policy")
        folder.rename(policy)
        reward_folder(policy, folder, lambda t: t.update(changes))
    return change


def piped(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    return change


def nowhere(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../../blobs/nothing")
    return change


def shard_missing(folder):
    tensors = [(name, stored.read()) for name, stored in open_tensors(folder).items()]
    (folder / "model.safetensors").unlink()
    paths = write_tensors(folder, tensors, max_shard_bytes=100_000)
    next(path for path in paths if path.suffix == ".safetensors").unlink()


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": pathlib.PurePosixPath("/")}, folder / "pytorch_model.bin")


def written(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def removed(name):
    return lambda folder: (folder / name).unlink()


def nan(tensors):
    tensors["model.norm.weight"][3] = float("nan")


EMBEDDING, NORM, SCORE = "model.embed_tokens.weight", "model.norm.weight", "score.weight"
HOSTILE = {  # what is done to the folder, what the line must name
    "missing shard": (shard_missing, "safetensors"),
    "missing tensor": (tensors_with(lambda t: t.pop(NORM)), NORM),
    "wrong shape": (tensors_with(lambda t: t.update({NORM: torch.ones(65)})), "(65,)"),
    "unknown tensor": (tensors_with(lambda t: t.update(extra=torch.ones(2))), "extra"),
    "integers for weights": (tensors_with(lambda t: t.update({NORM: torch.ones(64, dtype=torch.int64)})), NORM),
    "not finite": (tensors_with(nan), f"model.safetensors: {NORM} holds numbers that are not finite"),
    "too large": (tensors_with(lambda t: t[NORM].fill_(1e30)), f"{NORM} holds numbers of magnitude 1e+30"),
    "a score not finite": (as_reward(**{SCORE: torch.full((1, 64), math.nan)}), f"model.safetensors: {SCORE} holds"),
    "a score too large": (as_reward(**{SCORE: torch.full((1, 64), 1e30)}), f"{SCORE} holds numbers of magnitude 1e+30"),
    "two scores": (as_reward(**{SCORE: torch.ones(2, 64)}), f"{SCORE} gives 2 scores, but a reward model has one"),
    "no score": (as_reward(**{SCORE: torch.ones(64)}), f"{SCORE} is of shape (64,)"),
    "an unknown tensor that writes on the terminal": (tensors_with(lambda t: t.update({"\033[2J" * 99: torch.ones(2)})),
                                                      "'\\x1b[2J"),
    "a head that differs though tied": (tensors_with(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
                                        "tie_word_embeddings"),
    "untied without a head": (config_with(tie_word_embeddings=False), "lm_head.weight"),
    "untied by silence": (config_with(tie_word_embeddings=None), "lm_head.weight is missing"),
    "a pickle with code": (pickled, "pytorch_model.bin"),
    "no config": (removed("config.json"), "config.json"),
    "config no JSON": (written("config.json", "{"), "config.json"),
    "config a list": (written("config.json", "[]"), "config.json"),
    "config deep": (written("config.json", '{"model_type": ' + "[" * 10**5), "config.json"),
    "absurd layers": (config_with(num_hidden_layers=10**9), "1000000000 layers"),
    "absurd width": (config_with(hidden_size=2**31), "config.json"),
    "absurd length": (config_with(max_position_embeddings=-5), "max_position_embeddings"),
    "heads do not divide": (config_with(num_attention_heads=3, num_key_value_heads=2, head_dim=None), "3"),
    "another vocabulary": (config_with(vocab_size=99), "99"),
    "eps zero": (config_with(rms_norm_eps=0), "rms_norm_eps"),
    "text for a number": (config_with(rope_parameters={"rope_theta": "big"}), "rope_theta"),
    "another family": (config_with(model_type="mamba"), "mamba"),
    "not its family": (config_with(model_type="llama"), "bias"),
    "no weights": (removed("model.safetensors"), "model.safetensors"),
    "huge header": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors"),
    "weights cut short": (lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-100]), "model.safetensors"),
    "no tokenizer": (removed("tokenizer.json"), "tokenizer.json"),
    "tokenizer no JSON": (written("tokenizer.json", "no"), "tokenizer.json"),
    "tokenizer of another kind": (written("tokenizer.json", '{"model": {"type": "Unigram"}}'), "Unigram"),
    "tokenizer empty": (written("tokenizer.json", "{}"), "tokenizer"),
    "generation of another kind": (written("generation_config.json", '{"temperature": "hot"}'), "temperature"),
    "generation a list": (written("generation_config.json", "[1]"), "generation_config.json"),
    "generation a link into nothing": (nowhere("generation_config.json"), "generation_config.json"),
    "config a number beyond all": (lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1e400')), "'inf'"),
    "config a pipe": (piped("config.json"), "config.json: is no plain file"),
    "generation a pipe": (piped("generation_config.json"), "generation_config.json: is no plain file"),
    **{f"generation {name} {value}": (written("generation_config.json", json.dumps({name: value})), f"{name} is")
       for name, value in (("top_k", 0.5), ("top_k", -1), ("top_k", math.inf), ("repetition_penalty", 0), ("top_p", 3),
                           ("top_p", 0), ("temperature", math.nan), ("temperature", True), ("top_p", [1]))},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_or_hostile_folder_is_one_line_and_leaves_nothing(case, folders, tmp_path):
    change, word = HOSTILE[case]
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2"], folder)
    change(folder)
    with pytest.raises(UserError) as error:
        import_model(folder, tmp_path / "out")
    assert word in str(error.value)
    assert str(error.value).isprintable()
    assert not checkpoint_path(tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "word"), [
    (written("config.json", "[" * 200_000), "config.json"), (written("config.json", '{"a": ' * 200_000), "config.json"),
    (piped("config.json"), "config.json: is no plain file"), (nowhere("config.json"), "config.json")])
def test_a_config_that_is_none_is_one_line_for_from_too(change, word, folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2"], folder)
    change(folder)
    with pytest.raises(UserError, match=word):
        as_checkpoint(str(folder))


def test_sampling_has_the_ranges_of_the_options_of_sample():
    for field in dataclasses.fields(sample.SampleOptions):
        if field.name in importing.SAMPLING:
            kind, *ends = importing.SAMPLING[field.name]
            assert (kind, tuple(ends)) == (type(field.default), bounds(field))
    found = importing.sampling_of({"top_k": 50.0, "temperature": 1, "top_p": None}, pathlib.Path())
    assert repr(found) == "{'temperature': 1.0, 'top_k': 50}"
    greedy = {"do_sample": False, "temperature": 0.7, "top_k": 3}
    assert importing.sampling_of(greedy, pathlib.Path()) == {"temperature": 0}


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2"], folder)
    tensors_with(lambda t: t.update({EMBEDDING: t[EMBEDDING][:290]}))(folder)
    config_with(vocab_size=290)(folder)
    with pytest.raises(UserError, match="290"):
        import_model(folder, tmp_path / "out")


@pytest.mark.parametrize(("words", "message"), [
    ([], "usage"), (["into"], "usage"), (["import", "a"], "two paths"), (["import", "nowhere", "b"], "nowhere"),
    (["export", "nowhere", "b"], "nowhere"), (["import", "{qwen2}", "{here}", "--chat_format", "irc"], "irc"),
    (["import", "{qwen2}", "{here}", "--max_len", "100000"], "100000"),
    (["import", "{qwen2}", "{here}", "--chat_format", "llama3"], "start_header_id"),
    (["export", "{run}", "{qwen2}"], "not empty"), (["export", "{run}", "{here}", "--family", "gpt2"], "gpt2"),
])
def test_words_that_do_not_fit_are_one_line(words, message, folders, tmp_path):
    main(["import", str(folders["qwen2"]), str(tmp_path / "run")])
    places = {"qwen2": folders["qwen2"], "here": tmp_path / "here", "run": tmp_path / "run"}
    with pytest.raises(UserError, match=message) as error:
        main([word.format(**places) for word in words])
    assert "\n" not in str(error.value)
