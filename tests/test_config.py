from dataclasses import dataclass, field, make_dataclass

import pytest
from omegaconf import OmegaConf

from balance.config import StageConfig, build_balancer, compose, flatten, methods_schema
from balance.rules.registry import loss_balancers


@dataclass
class Inner:
    epochs: int = 3
    rate: float = 0.1
    sizes: list[int] | None = None


@dataclass
class Schema:
    inner: Inner = field(default_factory=Inner)
    track: bool = True


def test_defaults_then_settings_then_overrides():
    config = compose(Schema, {"inner": {"epochs": 5, "rate": 0.5}}, ["inner.epochs=7", "track=false", "inner.sizes=[1,2]"])
    assert flatten(config) == {"inner.epochs": 7, "inner.rate": 0.5, "inner.sizes": [1, 2], "track": False}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.epoch=3", r"Unknown key 'inner\.epoch'\. Did you mean 'inner\.epochs'\?"),
        ("tarck=false", r"Did you mean 'track'\?"),
        ("inner.epochs=three", r"'inner\.epochs=three' does not fit 'inner\.epochs'"),
        ("inner.epochs=2.5", r"does not fit 'inner\.epochs'"),
        ("track=perhaps", "does not fit 'track'"),
        ("inner=3", "does not fit"),
        ("inner.sizes=[a]", "does not fit"),
        ("inner.epochs", "must read key=value"),
        ("=3", "must read key=value"),
        ("inner.sizes=[1", "cannot be read"),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(ValueError, match=message) as caught:
        compose(Schema, {}, [override])
    assert "\n" not in str(caught.value)


def build(loss, gradient, *overrides):
    loss_options, gradient_options = methods_schema(loss, gradient)

    parts = [
        ("loss_method", str, loss),
        ("gradient_method", str | None, gradient),
        ("seed", int, 5),
        ("loss", loss_options, field(default_factory=loss_options)),
        ("gradient", gradient_options, field(default_factory=gradient_options)),
        ("balancer", StageConfig, field(default_factory=StageConfig)),
    ]
    return build_balancer(compose(make_dataclass("Run", parts), {}, overrides), ("a", "b"))


def test_build_balancer():
    balancer = build(
        "famo", "pcgrad", "loss.min_losses=[0,-1]", "loss.gamma=0.5", "gradient.order=fixed", "balancer.scale=norm"
    )
    assert balancer.tasks == ("a", "b")
    assert balancer.loss_balancer.rule.min_losses.tolist() == [0, -1]
    assert balancer.loss_balancer.rule.gamma == 0.5
    assert balancer.gradient_balancer.rule.order == "fixed"
    assert balancer.scale == "norm"


@pytest.mark.parametrize("name", loss_balancers.names())
def test_defaults_are_those_of_the_rule(name):
    options, _ = methods_schema(name, None)
    expected = {key: p.default for key, p in loss_balancers.options(name).items() if key != "seed"}
    assert OmegaConf.to_container(OmegaConf.structured(options)) == expected


@pytest.mark.parametrize(
    ("loss", "gradient", "override", "message"),
    [
        ("go4align", None, "loss.num_group=2", r"Did you mean 'loss\.num_groups'"),
        ("go4align", None, "loss.num_groups=many", "does not fit"),
        ("go4align", None, "loss.num_groups=0", "at least 1"),
        ("ls", "pcgrad", "gradient.order=sorted", "does not fit"),
        ("ls", None, "balancer.heads=all", "does not fit"),
        ("ls", None, "loss.seed=3", "Unknown key"),
    ],
)
def test_mistakes_in_methods(loss, gradient, override, message):
    with pytest.raises(ValueError, match=message):
        build(loss, gradient, override)


def test_an_option_without_default_must_be_given(monkeypatch):
    monkeypatch.setattr(loss_balancers, "_methods", dict(loss_balancers._methods))

    @loss_balancers.register("power")
    def power(losses, *, exponent: float):
        return losses**exponent

    with pytest.raises(ValueError, match=r"give loss\.exponent=value"):
        build("power", None)
    assert build("power", None, "loss.exponent=2.0").loss_balancer.rule.keywords == {"exponent": 2.0}


def test_a_mistake_in_the_settings_is_told():
    with pytest.raises(ValueError, match="Did you mean"):
        compose(Schema, {"inner": {"epoch": 3}}, [])
    with pytest.raises(ValueError, match=r"The file does not fit 'inner\.epochs'"):
        compose(Schema, {"inner": {"epochs": "many"}}, [])
