import functools
import sys
import textwrap

import pytest
import torch

import balance
from balance.rules.options import describe
from balance.rules.registry import Registry


@pytest.fixture
def registry():
    registry = Registry("loss balancer", "balance.test_rules")

    @registry.register("half")
    def half(losses, *, factor: float = 0.5):
        return factor * losses

    @registry.register("stateful")
    class Stateful:
        def __init__(self, num_tasks: int, sizes: "list[int] | None" = None, flag: bool = False):
            self.num_tasks = num_tasks

        def __call__(self, losses):
            return losses

    return registry


def test_a_rule_of_the_other_kind_is_named():
    with pytest.raises(ValueError, match=r"Unknown loss balancer 'gradnorm'.* 'gradnorm' is a gradient balancer"):
        balance.Balancer(2, loss="gradnorm")
    with pytest.raises(ValueError, match="'famo' is a loss balancer"):
        balance.Balancer(2, gradient="famo")


def test_public_names():
    loss_names = ("dwa", "famo", "go4align", "igbv1", "igbv2", "ls", "rlw", "scaleinvls", "stl", "uw")
    gradient_names = ("cagrad", "graddrop", "imtl", "mgda", "nashmtl", "pcgrad")
    assert set(loss_names) <= set(balance.loss_balancers.names())
    assert set(gradient_names) <= set(balance.gradient_balancers.names())
    assert "famo" in balance.loss_balancers
    assert "mgda" not in balance.loss_balancers
    assert [name for name in gradient_names if balance.gradient_balancers.sees(name) == "jacobian"] == ["graddrop"]
    heads = {name: balance.gradient_balancers.heads(name) for name in gradient_names}
    assert {name for name, rule in heads.items() if rule == "weighted"} == {"imtl", "mgda", "nashmtl"}


def test_build(registry):
    assert registry.build("half")(torch.tensor([2.0])).item() == 1
    assert registry.build("half", factor=2, num_tasks=1)(torch.tensor([2.0])).item() == 4
    assert registry.build("stateful", num_tasks=3, sizes=[1, 2]).num_tasks == 3


def test_repr(registry):
    assert repr(registry) == "Registry('loss balancer': half, stateful)"
    assert repr(Registry("gradient balancer", "none")) == "Registry('gradient balancer': empty)"


def function(gramian, power=1):
    return gramian.diagonal() ** power


@pytest.mark.parametrize(
    ("rule", "options", "text"),
    [
        ("mgda", None, "mgda"),
        ("cagrad", {"c": 0.9, "solver": "exact"}, "cagrad(c=0.9, solver='exact')"),
        (("scaleinvls", "rlw"), {"rlw": {"scale": 3.0}}, "scaleinvls + rlw(scale=3.0)"),
        (function, None, "function"),
        (functools.partial(function, power=2), None, "function(power=2)"),
        (functools.partial(function, 2, power=3), None, "function(2, power=3)"),
        (torch.nn.Identity(), None, "Identity"),
        (balance.gradient_balancers.build("nashmtl", num_tasks=3, max_norm=2.0), None, "nashmtl(max_norm=2.0)"),
        (balance.gradient_balancers.build("nashmtl", num_tasks=3), {}, "nashmtl"),
        (balance.loss_balancers.build("rlw", seed=3), None, "rlw(seed=3)"),
        (None, None, "None"),
    ],
)
def test_describe(rule, options, text):
    assert describe(rule, options) == text


def test_register_returns_what_it_decorates():
    def rule(losses):
        return losses

    assert Registry("loss balancer", "none").register("rule")(rule) is rule


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("hlaf", {}, ValueError, r"Unknown loss balancer 'hlaf'. Did you mean 'half'\? Known: half, stateful."),
        ("xyz", {}, ValueError, r"Unknown loss balancer 'xyz'. Known: half, stateful."),
        ("Ha-lf", {}, ValueError, "Did you mean 'half'"),
        ("half", {"facto": 1.0}, ValueError, r"The loss balancer 'half' has no option 'facto'. Did you mean 'factor'\?"),
        ("half", {"factor": "1"}, TypeError, "Option 'factor' of loss balancer 'half' must be float, but got '1'"),
        ("half", {"factor": True}, TypeError, "must be float"),
        ("stateful", {}, TypeError, "build it with num_tasks=K"),
        ("stateful", {"num_tasks": 0}, TypeError, "an int >= 1"),
        ("stateful", {"num_tasks": 2, "sizes": 3}, TypeError, r"must be list\[int\] or None, but got 3"),
        ("stateful", {"num_tasks": 2, "sizes": [0.5]}, TypeError, "must be list"),
        ("stateful", {"num_tasks": 2, "flag": 1}, TypeError, "must be bool"),
    ],
)
def test_mistakes(registry, name, options, error, message):
    with pytest.raises(error, match=message):
        registry.build(name, **options)


def test_second_registration(registry):
    with pytest.raises(ValueError, match=r"'half' is already registered, by tests\.rules\.test_registry"):
        registry.register("half")(lambda losses: losses)


@pytest.mark.parametrize("name", ["GO4Align", "two words", "", "a-b"])
def test_names_are_lower_case_identifiers(registry, name):
    with pytest.raises(ValueError, match="lower-case identifier"):
        registry.register(name)


def test_rules_of_all_kinds(registry):
    def legal(
        losses, *, w: list = (), pair: "tuple[int, str]" = (1, "b"), odd: "int | None.__class__.x" = 3, gone: "torch.NoSuch" = 0
    ):
        return losses

    registry.register("legal")(legal)
    registry.register("built_in")(torch.sqrt)
    registry.register("partial")(functools.partial(torch.mul, 2))
    losses = torch.tensor([4.0])
    assert registry.build("legal", w=[1], pair=(2, "c"), odd="x", gone=1)(losses) is losses
    assert registry.build("built_in", num_tasks=1)(losses).item() == 2
    assert registry.build("partial")(losses).item() == 8
    with pytest.raises(TypeError, match="must be tuple"):
        registry.build("legal", pair=(1, 2))
    with pytest.raises(ValueError, match="already registered"):
        registry.register("partial")(legal)


def test_an_option_without_default_is_asked_for_at_once(registry):
    registry.register("needs")(lambda losses, *, alpha: losses)
    with pytest.raises(TypeError, match="needs its option 'alpha'"):
        registry.build("needs")


def test_entry_points(registry, tmp_path, monkeypatch):
    """A package that is installed adds rules without being imported, until one of them is built."""
    (tmp_path / "other_rules.py").write_text(
        textwrap.dedent("""
        def double(losses, *, factor: float = 2.0):
            return factor * losses
        """),
        encoding="utf-8",
    )
    info = tmp_path / "other_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-rules\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[balance.test_rules]\ndouble = other_rules:double\nbroken = missing_module:rule\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.names() == ("broken", "double", "half", "stateful")
    assert "double" in registry
    assert "other_rules" not in sys.modules
    assert registry.build("double")(torch.tensor(2.0)).item() == 4
    assert registry.build("half")(torch.tensor(2.0)).item() == 1
    with pytest.raises(ModuleNotFoundError, match="missing_module"):
        registry.build("broken")
