"""Steps and runs of the problem ``llm``, on functions, on JSONL files, and with a model on disk."""

import importlib
import importlib.util
import json

import pytest
import torch
from omegaconf import OmegaConf

pytest.importorskip("peft")

from experiments.problems import base, llm
from experiments.problems.llm.data import cache_folder
from experiments.problems.llm.tokenizer import ModelTokenizer
from experiments.recording.fingerprint import common_of, fingerprint
from experiments.training import loop
from experiments.training.step import build_optimizer, observe_validation, train_step
from tests.experiments.short_runs import configure, prepare
from tests.experiments.training.interruptions import interrupt, raise_killed
from tests.writers.mftcoder import chat, write_lines, write_mftcoder

# Steps

PAIRINGS = [
    (["--gradient_method=nashmtl"], "task"),
    (["--loss_method=famo", "--gradient_method=pcgrad"], "tokens"),
    (["--loss_method=uw"], "task"),
]


@pytest.mark.parametrize(("methods", "aggregation"), PAIRINGS)
def test_micro_batches_make_the_step_of_the_joint_forward_pass(methods, aggregation, tiny):
    results = []
    for separate in ("true", "false"):
        words = [f"data.aggregation={aggregation}", f"train.micro_batches={separate}", "train.optimizer=sgd", "train.lr=0.1"]
        run = prepare(*tiny("llm", *methods, *words))
        run.model.double()
        optimizer = build_optimizer(run)
        reports = [train_step(run, optimizer, batch) for batch in [*run.batches] * 2]
        results.append((run, reports))
    (run, reports), (joint, expected) = results
    close = {"rtol": 1e-7, "atol": 1e-9, "equal_nan": True}
    for ours, theirs in zip(reports, expected, strict=True):
        torch.testing.assert_close(ours.losses, theirs.losses, **close)
        torch.testing.assert_close(ours.total_weights, theirs.total_weights, **close)
    for ours, theirs in zip(run.model.parameters(), joint.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    for ours, theirs in zip(run.balancer.state_dict().values(), joint.balancer.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_each_task_has_a_forward_pass_for_itself(tiny):
    run = prepare(*tiny("llm", "--loss_method=famo", "--gradient_method=mgda"))
    passes = []
    run.model.trunk.register_forward_hook(lambda module, inputs, output: passes.append(tuple(output)))
    train_step(run, build_optimizer(run), next(iter(run.batches)))
    assert passes == [(task,) for task in llm.TASKS] * 2  # the second time for famo
    observe_validation(run, 0)
    assert len(passes) == 8


def test_validation_losses_for_coba_are_equal(tiny):
    firsts = []
    for separate in ("true", "false"):
        run = prepare(*tiny("llm", "--loss_method=coba", f"train.micro_batches={separate}"))
        observe_validation(run, 0)
        firsts.append(run.balancer.loss_balancer.rule.first)
    torch.testing.assert_close(*firsts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--gradient_method=mgda", "balancer.measure=['*layers.0*']"],
            r"train\.micro_batches must be false with balancer\.measure",
        ),
        (
            ["--gradient_method=graddrop", "balancer.source=features"],
            r"must be false with balancer\.source=features with graddrop",
        ),
        (["model.width=6", "model.attention_heads=2"], r"model\.width must be a multiple of twice model\.attention_heads=2"),
        (["data.max_length=20"], r"'\w+' must have train samples, but \d+ of \d+ .* more than 20 tokens"),
        (["data.tokenizer=nowhere"], r"data\.tokenizer must be a folder with a tokenizer, but nowhere does not exist"),
        (["model.path=nowhere", "data.tokenizer=null"], r"model\.path must be the folder .* but nowhere does not exist"),
        (["data.python=3.1.0"], r"data\.python must be .*, the version that runs, but got 3\.1\.0"),
        (["data.source=jsonl"], r"data\.path must be the folder"),
    ],
)
def test_choices_that_do_not_fit_are_refused(words, message, tiny):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(*tiny("llm", *words))


def test_a_joint_step_measures_on_some_adapters(tiny):
    run = prepare(*tiny("llm", "--gradient_method=mgda", "balancer.measure=['*layers.0*']", "train.micro_batches=false"))
    assert train_step(run, build_optimizer(run), next(iter(run.batches))).gramian.shape == (4, 4)


def test_a_run_resumes(tiny, monkeypatch):
    words = tiny(
        "llm",
        "--loss_method=famo",
        "--gradient_method=pcgrad",
        "resume=true",
        "train.epochs=2",
        "train.checkpoint_minutes=1e-9",
    )
    final = loop.train(prepare(*words))

    class Runs:
        @staticmethod
        def train(*more):
            return loop.train(prepare(*words, *more))

    for step in (1, 1):  # in the middle of both epochs
        interrupt(Runs, loop, "train_step", step, raise_killed)
    assert Runs.train() == final


# Files


def test_tasks_come_from_the_files(tmp_path, cache):
    write_mftcoder(tmp_path / "mixture")
    words = ["experiment=llm", f"data.path={tmp_path}/mixture", f"data.cache={cache}", f"output_dir={tmp_path}"]
    words += ["model.width=8", "model.attention_heads=1", "model.pretraining_steps=0", "track=false"]
    config = configure(*words)
    assert base.tasks_of(config) == ("name", "upper")
    run = prepare(*words)
    assert run.balancer.tasks == run.problem.TASKS == ("name", "upper")
    assert [len(split) for split in run.data] == [26, 2, 2]
    outputs = run.model(run.data.test[[0, 1]][0])
    assert tuple(outputs) == ("name", "upper")
    assert set(run.problem.metrics()) == {"name/loss", "name/perplexity", "name/mismatch", "upper/loss", "upper/perplexity"}
    assert set(run.problem.losses(outputs, run.data.test[[0, 1]])) == {"name", "upper"}


def test_equal_prompts_are_in_one_split(tmp_path):
    write_lines(tmp_path / "task.jsonl", [chat(f"prompt {i % 10}", f"answer {i}") for i in range(40)])
    splits = llm.load(llm.DataConfig(source="jsonl", path=str(tmp_path)))
    prompts = [{bytes(sample.tokens[1:9]) for sample in split.samples[0]} for split in splits]
    assert list(map(len, prompts)) == [8, 1, 1]
    assert sum(len(split.samples[0]) for split in splits) == 40
    assert not prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2]
    other = llm.load(llm.DataConfig(source="jsonl", path=str(tmp_path), seed=1))
    assert other.test.samples != splits.test.samples


def test_long_conversations_of_files_are_left_out_with_a_warning(tmp_path):
    write_lines(tmp_path / "task.jsonl", [chat(f"prompt {i}", "a" * (300 if i == 7 else 1)) for i in range(60)])
    with pytest.warns(UserWarning, match=r"1 of \d+ \w+ samples of 'task' have more than 160 tokens, and are left out"):
        splits = llm.load(llm.DataConfig(source="jsonl", path=str(tmp_path)))
    assert sum(len(split.samples[0]) for split in splits) == 59


def test_runs_on_other_files_are_other_runs(tmp_path):
    configs = []
    for name in ("a", "b"):
        write_mftcoder(tmp_path / name)
        configs.append(configure("experiment=llm", f"data.path={tmp_path}/{name}"))
    assert fingerprint(configs[0]) != fingerprint(configs[1])
    assert common_of(configs[0]) != common_of(configs[1])
    assert fingerprint(configure("experiment=llm", "data.cache=a")) == fingerprint(configure("experiment=llm", "data.cache=b"))


def write_model(folder):
    """A tiny model on disk, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789<>?:()_"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), **shape, eos_token_id=1, bos_token_id=None)
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}), encoding="utf-8"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return model, words


def test_a_model_on_disk_brings_its_tokenizer(tmp_path):
    write_mftcoder(tmp_path / "mixture")
    (tmp_path / "model").mkdir()
    model, words = write_model(tmp_path / "model")
    chosen = [f"data.path={tmp_path}/mixture", f"model.path={tmp_path}/model", "track=false", f"output_dir={tmp_path}"]
    run = prepare("experiment=llm", *chosen)
    assert run.config.data.tokenizer == run.config.model.path
    tokenizer = ModelTokenizer(str(tmp_path / "model"))
    assert (tokenizer.size, tokenizer.end) == (len(words), 1)
    assert tokenizer.encode("ab?") == [words.index(letter) for letter in "ab?"]
    tokens, answers, _ = run.data.train[[0]]
    assert tokens[answers].max() < len(words)
    assert (tokens[answers] == 1).sum() == 2
    upper = tokens[0, 1][tokens[0, 1] >= 0]
    expected = model(input_ids=upper[None]).logits  # fresh adapters change nothing
    torch.testing.assert_close(run.model(tokens)["upper"][:, : len(upper)], expected)
    report = train_step(run, build_optimizer(run), next(iter(run.batches)))
    assert report.losses.isfinite().all()


def test_defaults_of_the_cache_and_of_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "balance" / "llm"
    config = configure("experiment=llm", "data.cache=here")
    assert (config.model.cache, config.data.tokenizer, config.model.path) == ("here", None, None)
    assert OmegaConf.structured(llm.ModelConfig).rank == 8


def test_without_the_libraries_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e \. --group llm"):
        importlib.reload(llm)
