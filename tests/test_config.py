from dataclasses import dataclass, field, make_dataclass

import pytest
import yaml
from omegaconf import OmegaConf

from balance.config import StageConfig, build_balancer, check_settings, compose, flatten, methods_schema, setting
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


@dataclass
class Described:
    epochs: int = setting(3, help="passes over the data", minimum=1)
    share: float = setting(0.5, minimum=0, below=1)
    factor: float = setting(0.5, above=0, maximum=1)
    rate: float | None = setting(None, above=0, remedy="null turns it off.")
    seed: int = setting(0, minimum=0)
    sizes: list[int] = setting([3, 4], minimum=1)
    source: str = setting("small", choices=("small", "official"))
    free: str = "anything"


@dataclass
class Whole:
    data: Described = field(default_factory=Described)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=0", r"data\.epochs must be at least 1, but got 0\."),
        ("share=1", r"data\.share must be at least 0 and below 1, but got 1\.0\."),
        ("share=nan", r"data\.share must be at least 0 and below 1, but got nan\."),
        ("factor=1.5", r"data\.factor must be above 0 and at most 1, but got 1\.5\."),
        ("rate=0", r"data\.rate must be positive, but got 0\.0\. null turns it off\."),
        ("seed=-1", r"data\.seed must not be negative, but got -1\."),
        ("sizes=[3,0]", r"data\.sizes must be at least 1, but got \[3, 0\]\."),
        ("source=big", r"data\.source must be one of small, official, but got big\."),
    ],
)
def test_a_value_outside_the_range_of_its_field_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        compose(Whole, {}, [f"data.{override}"])
    config = compose(Whole, {}, [])
    key, _, value = override.partition("=")
    OmegaConf.update(config, f"data.{key}", yaml.safe_load(value) if value != "nan" else float("nan"))
    with pytest.raises(ValueError, match=message):
        check_settings(config.data, "data")
    with pytest.raises(ValueError, match=message):
        check_settings(OmegaConf.to_object(config.data), "data")


def test_values_on_the_edge_of_their_range_are_valid():
    compose(Whole, {}, ["data.epochs=1", "data.share=0", "data.factor=1", "data.rate=null", "data.sizes=[]"])
    check_settings(Described(rate=1e-9), "data")


def test_instances_do_not_share_a_mutable_default():
    assert Described().sizes == [3, 4]
    assert Described().sizes is not Described().sizes


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
        ("ls", "mgda", "balancer.every=0", r"balancer\.every must be at least 1, but got 0"),
        ("ls", "mgda", "balancer.smoothing=1.0", r"balancer\.smoothing must be at least 0 and below 1"),
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

    with pytest.raises(ValueError, match=r"Give loss\.exponent=value"):
        build("power", None)
    assert build("power", None, "loss.exponent=2.0").loss_balancer.rule.keywords == {"exponent": 2.0}


def test_a_mistake_in_the_settings_is_told():
    with pytest.raises(ValueError, match="Did you mean"):
        compose(Schema, {"inner": {"epoch": 3}}, [])
    with pytest.raises(ValueError, match=r"The file does not fit 'inner\.epochs'"):
        compose(Schema, {"inner": {"epochs": "many"}}, [])


def test_weights_of_a_list_come_from_the_command_line():
    balancer = build("constant", None, "loss.weights=[1,2.5]")
    assert balancer.loss_balancer.rule.weights.tolist() == [1, 2.5]
    schedule = build("linear_schedule", None, "loss.end=[0,2]", "loss.steps=10").loss_balancer.rule
    assert (schedule.end.tolist(), schedule.start.tolist(), schedule.steps) == ([0, 2], [1, 1], 10)
    assert build("tchebycheff", None, "loss.preference=[0.3,0.7]").loss_balancer.rule.target.preference.tolist() == [0.3, 0.7]
    with pytest.raises(ValueError, match="weights of 'constant' must have one number for each of 2 tasks"):
        build("constant", None, "loss.weights=[1,2,3]")
