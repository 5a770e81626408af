from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")

from balance import Balancer
from experiments.datasets.layouts.mftcoder import Turn
from experiments.datasets.standard_library import Function
from experiments.problems import llm
from experiments.problems.llm import pretraining
from experiments.problems.llm.data import Mixture, conversations_of
from experiments.problems.llm.tasks import NOTHING, Mismatch, Perplexity, TokenLoss
from experiments.problems.llm.tokenizer import ByteTokenizer, Sample, sample_of
from experiments.recording.served_model import save_network

SMALL = llm.ModelConfig(width=8, layers=2, attention_heads=1, rank=2, pretraining_steps=0)


@pytest.fixture
def network(cache):
    """A network with random adapters, so that both factors of each adapter have gradients."""
    torch.manual_seed(0)
    model = llm.build_model(replace(SMALL, cache=str(cache)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def mixture(aggregation="task"):
    """Four tasks whose answers have 1, 2, 3 and 4 tokens; the first task has two samples, the others three."""
    samples = [
        [Sample([97, 98, *[99 + i + j for j in range(k)]], [False, False] + [True] * k) for i in range(2 if k == 1 else 3)]
        for k in (1, 2, 3, 4)
    ]
    return Mixture(samples, aggregation)


# Tokens


def test_answers_and_their_ends_count():
    sample = sample_of(
        (Turn("system", "s"), Turn("human", "é"), Turn("bot", "no"), Turn("human", ""), Turn("bot", "")), ByteTokenizer()
    )
    assert sample.tokens == [256, 115, 257, 195, 169, 258, 110, 111, 259, 257, 258, 259]
    assert [token for token, counts in zip(*sample, strict=True) if counts] == [110, 111, 259, 259]
    assert max(sample.tokens) < ByteTokenizer.size


def test_conversations_about_a_function():
    function = Function("train", "a.py", "add", "def add(a, b):\n", "Add.", "    c = a + b\n    return add.f(c)\n")
    conversations = conversations_of(function)
    assert {task: tuple(turn.content for turn in conversation) for task, conversation in conversations.items()} == {
        "completion": ("completion:\ndef add(a, b):\n", "    c = a + b\n    return add.f(c)\n"),
        "docstring": ("docstring:\ndef add(a, b):\n    c = a + b\n    return add.f(c)\n", "Add."),
        "code": ("code:\ndef add(a, b):\nAdd.\n", "    c = a + b\n    return add.f(c)\n"),
        "name": ("name:\ndef ?(a, b):\n    c = a + b\n    return ?.f(c)\n", "add"),
    }
    assert set(conversations_of(function._replace(docstring=""))) == {"completion", "name"}


def test_batches_are_padded_and_short_tasks_begin_again():
    data = mixture()
    assert len(data) == 3
    tokens, answers, divisors = data[[2, 1]]
    assert tokens.shape == answers.shape == (2, 4, 6)
    assert tokens[0, 0].tolist() == [97, 98, 99, -1, -1, -1]  # sample 0 again
    assert tokens[1, 3].tolist() == [97, 98, 100, 101, 102, 103]
    assert answers.sum(2).tolist() == [[1, 2, 3, 4]] * 2
    assert divisors.tolist() == [2, 4, 6, 8]


def test_labels_are_the_next_tokens():
    labels = llm.targets(mixture()[[0]])
    assert labels["docstring"].tolist() == [[-1, 99, 100, -1, -1, -1]]


def test_losses_are_means_over_the_tokens_of_a_task():
    batch = mixture()[[0, 1]]
    outputs = {task: torch.randn(2, 6, 300, generator=torch.Generator().manual_seed(k)) for k, task in enumerate(llm.TASKS)}
    computed = llm.losses(outputs, batch)
    for k, task in enumerate(llm.TASKS):
        logs = outputs[task].log_softmax(-1)
        terms = [-logs[b, 1 + j, batch[0][b, k, 2 + j]].item() for b in range(2) for j in range(k + 1)]
        assert computed[task].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    weighted = llm.losses(outputs, mixture("tokens")[[0, 1]])
    total = sum(computed[task].item() * 2 * (k + 1) for k, task in enumerate(llm.TASKS))
    assert sum(loss.item() for loss in weighted.values()) == pytest.approx(4 * total / 20, rel=1e-5)
    assert weighted["name"] / computed["name"] == pytest.approx(8 / 5)


def test_counts_weight_parts_of_a_batch_exactly():
    """The loss of a batch is the mean of the losses of its parts, such as the parts of two ranks, with either aggregation."""
    outputs = {task: torch.randn(3, 6, 300, generator=torch.Generator().manual_seed(k)) for k, task in enumerate(llm.TASKS)}
    samples = [[Sample(s.tokens[: 6 - i], s.answers[: 6 - i]) for i, s in enumerate(task)] for task in mixture().samples]
    for aggregation in ("task", "tokens"):
        data = Mixture(samples, aggregation)
        batches = [(rows, data[rows]) for rows in ([0], [1, 2])]
        losses = [
            llm.losses({task: output[rows, : b[0].shape[2]] for task, output in outputs.items()}, b) for rows, b in batches
        ]
        counts = [llm.counts(batch) for _, batch in batches]
        expected = llm.losses(outputs, data[[0, 1, 2]])
        for task in llm.TASKS:
            mean = sum(n[task] * loss[task] for n, loss in zip(counts, losses, strict=True)) / sum(n[task] for n in counts)
            torch.testing.assert_close(mean, expected[task])


# Metrics


def test_metrics_over_batches_of_unequal_size():
    logits = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-1, 1, 2, -1], [-1, 3, -1, -1], [0, 1, 2, 3], [-1, -1, -1, 6], [-1, 2, 2, -1]])
    logits[0, [1, 2], [1, 2]] = logits[3, 3, 6] = 9.0  # the first and the fourth answer are right
    logits[4, 1, 2] = 9.0  # half of the last one
    loss, perplexity, mismatch = TokenLoss(), Perplexity(), Mismatch()
    for rows in (slice(0, 1), slice(1, 5)):
        for metric in (loss, perplexity, mismatch):
            metric.update(logits[rows], labels[rows])
    terms = [-logits.log_softmax(-1)[b, t, labels[b, t]] for b in range(5) for t in range(4) if labels[b, t] != NOTHING]
    assert loss.compute().item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert perplexity.compute().item() == pytest.approx(loss.compute().exp().item(), rel=1e-6)
    assert mismatch.compute().item() == pytest.approx(3 / 5)
    assert mismatch.remark() == "one minus the exact match, of 2 out of 5 answers"


def test_mismatch_is_of_greedy_decoding(network):
    """Against a loop that decodes token by token: an answer that the model itself gives, and one that it does not."""
    prompt, written = [257, 97, 98, 258], []
    for _ in range(3):
        tokens = torch.tensor([*prompt, *written]).view(1, 1, -1).expand(1, 4, -1)
        written.append(int(network(tokens)["name"][0, -1].argmax()))
    for answer, expected in ((written, 0.0), ([*written[:2], (written[2] + 1) % 260], 1.0)):
        sample = Sample([*prompt, *answer], [False] * 4 + [True] * 3)
        batch = Mixture([[sample]] * 4, "task")[[0]]
        metric = llm.metrics()["name/mismatch"]
        metric.update(network(batch[0])["name"], llm.targets(batch)["name"])
        assert metric.compute().item() == expected


def test_metrics_and_score_follow_the_tasks():
    assert set(llm.metrics()) == {f"{task}/{kind}" for task in llm.TASKS for kind in ("loss", "perplexity")} | {"name/mismatch"}
    assert set(llm.metrics(("math",))) == {"math/loss", "math/perplexity"}
    assert llm.score({"a/loss": 1.0, "a/perplexity": 90.0, "b/loss": 2.0}) == 1.5


# The model


def test_adapters_are_the_shared_parameters(network):
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert all(name.startswith("trunk.") and ("lora_A" in name or "lora_B" in name) for name in trained)
    assert all(sum(kind in name for name in trained) == 2 * SMALL.layers for kind in kinds)
    assert len(trained) == 2 * SMALL.layers * len(kinds)
    assert not list(network.heads.parameters())


def test_padding_and_other_tasks_do_not_change_the_logits(network):
    batch = mixture()[[0, 1, 2]]
    together = network(batch[0])
    assert tuple(together) == llm.TASKS
    for k, (task, part) in enumerate(zip(llm.TASKS, llm.micro_batches(batch), strict=True)):
        alone = network(part[0])
        assert set(alone) == {task}
        assert alone[task].shape == (3, 3 + k, 260)
        torch.testing.assert_close(alone[task], together[task][:, : 3 + k])


def test_checkpoints_contain_the_adapters_only(network, cache):
    state = network.state_dict()
    assert set(state) == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    other = llm.build_model(replace(SMALL, cache=str(cache)))
    tokens = mixture()[[0]][0]
    assert not torch.equal(other(tokens)["name"], network(tokens)["name"])
    other.load_state_dict(state)
    assert torch.equal(other(tokens)["name"], network(tokens)["name"])
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_gradient_checkpointing_repeats_the_gradients(network, cache):
    other = llm.build_model(replace(SMALL, cache=str(cache), gradient_checkpointing=True))
    other.load_state_dict(network.state_dict())
    gradients = []
    for model in (network, other):
        batch = mixture()[[0, 1]]
        balancer = Balancer(llm.TASKS, gradient="nashmtl")
        balancer.backward(llm.losses(model.train()(batch[0]), batch), shared=model.trunk.parameters())
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_the_recorded_network_names_its_packages(network, tmp_path):
    import mlflow

    tokens = mixture()[[0]][0]
    save_network(network, tokens, tmp_path / "model")
    requirements = (tmp_path / "model" / "requirements.txt").read_text(encoding="utf-8")
    assert all(f"{package}==" in requirements for package in ("torch", "transformers", "peft"))
    loaded = mlflow.pytorch.load_model(str(tmp_path / "model"))
    assert torch.equal(loaded(tokens)["name"], network.eval()(tokens)["name"])


def test_the_model_is_trained_once_and_equally(monkeypatch, tmp_path):
    shape = pretraining.Shape(8, 1, 1, 3)
    texts = pretraining.training_texts()
    monkeypatch.setattr(pretraining, "training_texts", lambda: texts)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = pretraining.pretrained(shape, tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again = pretraining.pretrained(shape, tmp_path / "b").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.state_dict().items())
    untrained = pretraining.pretrained(shape._replace(steps=0), tmp_path / "a").state_dict()
    assert not torch.equal(untrained["model.embed_tokens.weight"], again["model.embed_tokens.weight"])
    monkeypatch.setattr(pretraining, "_train", None)
    pretraining.pretrained(shape, tmp_path / "a")


def test_pretraining_lowers_the_loss(monkeypatch, tmp_path):
    texts = pretraining.training_texts()[:64]
    monkeypatch.setattr(pretraining, "training_texts", lambda: texts)
    models = [pretraining.pretrained(pretraining.Shape(16, 1, 1, steps), tmp_path) for steps in (0, 40)]
    with torch.no_grad():
        before, after = (pretraining.next_token_loss(model, texts.long()).item() for model in models)
    assert after < 0.9 * before


def test_pretraining_texts_are_training_files():
    texts = pretraining.training_texts()
    assert texts.shape[1] == pretraining.LENGTH
    assert texts.min() >= 0
    assert texts.max() == ByteTokenizer.end
    assert 200 < (texts == ByteTokenizer().marker("human")[0]).sum() < 1000  # files
