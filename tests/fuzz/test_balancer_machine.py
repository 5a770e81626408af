"""Random sequences of all that a training loop can do with a `Balancer`, next to copies that were restored on the way."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import event, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import balance
from tests.fuzz.training import MACHINE, TASKS, Setup, Step, Trainer, all_finite, assert_near, assert_same, fields

STEPS, EXAMPLES = 40, int(os.environ.get("FUZZ_MACHINES", "190"))  # in all about 10 000 steps
EXPECTED_WARNINGS = (
    "The loss balancer .* needs balancer",
    "shared must hold parameters that several tasks reach",
    ".*cannot be batched",
    "There is a performance drop",
)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in EXPECTED_WARNINGS]

GRAMIAN = [name for name in balance.gradient_balancers.names() if balance.gradient_balancers.traits(name).sees == "gramian"]
COMPOSITIONS = ("every", "smoothed", "grouped", "smoothed every", "grouped every")
COUNT = [0]  # steps


def builds(setup: Setup) -> bool:
    try:
        setup.balancer()
    except ValueError:
        return False
    return True


OPTIONS = {
    "source": ("parameters", "features"),
    "heads": (None, "weighted", "unweighted"),
    "scale": ("paper", "sum", "norm"),
    "nan": ("error", "absent"),
    "zero": ("present", "absent"),
    "memory": ("jacobian", "gramian"),
    "engine": ("loop", "batched"),
}
SETUPS = st.builds(
    Setup,
    loss=st.sampled_from([*balance.loss_balancers.names(), ("scaleinvls", "dwa"), ("famo", "uw")]),
    gradient=st.none()
    | st.sampled_from(balance.gradient_balancers.names())
    | st.tuples(st.sampled_from(COMPOSITIONS), st.sampled_from(GRAMIAN)),
    options=st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in OPTIONS.items()}).map(
        lambda options: tuple(options.items())
    ),
    scaler=st.booleans(),
).filter(builds)
DAMAGES = st.one_of(
    st.just({}),
    st.dictionaries(st.sampled_from(TASKS), st.sampled_from(["zero", "nan", "inf", "overflow", "detached"]), max_size=2),
)
STEP = st.builds(
    Step,
    seed=st.integers(0, 99),
    tasks=st.lists(st.sampled_from(TASKS), min_size=1, unique=True).map(lambda tasks: tuple(sorted(tasks))) | st.just(TASKS),
    damage=DAMAGES.map(lambda damage: tuple(damage.items())),
    way=st.sampled_from(["backward", "loss", "collect"]),
    micro=st.integers(2, 3),
    skips=st.booleans(),
    factor=st.sampled_from([1.0, 0.5, 0.25]),
    extra=st.booleans(),
    measure=st.booleans(),
    stacked=st.booleans(),
    clear=st.sampled_from(["all", "all", "model", "none"]),
    update=st.booleans(),
    observe=st.booleans(),
    trial=st.booleans(),
)
OPERATION = st.sampled_from(["observe", "end_epoch", "restore", "restore", "deepcopy"])
OTHER_WAY = {"backward": "loss", "loss": "backward", "collect": "collect"}


class Training(RuleBasedStateMachine):
    """A training, and a copy of it that must stay equal bit for bit.

    Attributes:
        trainers: The training, and the copy.
        last: The last step.
        skipped: Whether the scaler skips the last step.
    """

    @initialize(setup=SETUPS)
    def begin(self, setup):
        self.setup = setup
        self.trainers = [Trainer(setup), Trainer(setup)]
        self.skipped = False
        self.last = Step(0)
        event(f"loss={setup.loss}")
        event(f"gradient={setup.gradient}")

    def each(self, operation, when):
        """Apply an operation to all trainings, and compare its results."""
        results = [operation(trainer, place) for place, trainer in enumerate(self.trainers)]
        assert all(result == results[0] for result in results), f"{when}: {results}"
        return results[0]

    @rule(operations=st.lists(st.one_of(STEP, STEP, OPERATION), min_size=1, max_size=3))
    def operate(self, operations):
        for operation in operations:
            if isinstance(operation, Step):
                COUNT[0] += 1
                self.step(operation)
            else:
                self.other(operation)

    def step(self, step):
        measure = step.measure and self.measures()
        self.last = step = step._replace(measure=measure)
        self.each(lambda trainer, _: trainer.clear(step), "clear")
        probe = self.probe(step)
        outcomes = []
        error = self.each(lambda trainer, place: self.run(trainer, step, place, outcomes), "step")
        event(f"{step.way}: {'error' if error else 'skipped' if outcomes[0] else 'step'}")
        self.skipped = error is None and outcomes[0]
        for trainer in self.trainers[1:] if error is None else ():
            assert_same(fields(trainer.balancer.report), fields(self.trainers[0].balancer.report), "of a copy")
        if not error and not outcomes[0] and probe is not None:
            self.compare(step, probe)
        if error or not step.update or (self.trainers[0].scaler is None and not all_finite(self.trainers[0].gradients())):
            return
        self.each(lambda trainer, _: trainer.update(), "update")
        if step.observe:
            self.observe_last()

    def measures(self):
        """Return whether the rule can measure conflict on some of the parameters."""
        rule = self.trainers[0].balancer.gradient_balancer
        return rule is not None and rule.sees == "gramian" and dict(self.setup.options)["source"] == "parameters"

    def run(self, trainer, step, place, outcomes):
        """Take a step, check what it left, and return its error. A copy takes the same step by another method."""
        before, state, trainer.trial = trainer.gradients(), trainer.state(), None
        error, report = trainer.run(step, step.way if place == 0 else OTHER_WAY[step.way])
        after = trainer.gradients()
        skipped = trainer.scaler is not None and not all_finite(after)
        outcomes.append(skipped)
        if error is not None:
            assert_same(after, before, f"after {error}")
        elif not skipped and self.checks_gradients(step):
            assert all_finite(after) or not all_finite(before), after
        if error is not None or (skipped and all_finite(before)):
            assert_same(self.of_rules(trainer, trainer.state()), self.of_rules(trainer, state), f"after {error or 'a skip'}")
        if error is None:
            self.check_none(step, before, after)
        if error is None and not skipped and trainer.trial is not None and report is not None:
            assert_near(fields(trainer.trial), fields(report), "of weights()", rtol=1e-7)
        return error

    def checks_gradients(self, step):
        return self.setup.gradient is not None or "overflow" not in dict(step.damage).values()

    def of_rules(self, trainer, state):
        """Leave out the sums of an epoch's losses where no rule uses them."""
        if trainer.balancer.loss_balancer.learns:
            return state
        return {name: value for name, value in state.items() if name not in {"loss_sums", "loss_counts"}}

    def check_none(self, step, before, after):
        """Check that heads of absent tasks have no new gradient."""
        for name, gradient in after.items():
            task = name.split(".")[1]
            if name.startswith("heads") and task not in step.tasks:
                assert_same({name: gradient}, {name: before[name]}, "of an absent task")

    def probe(self, step):
        """Return a copy that takes the step of the whole batch, where that must equal the step of micro-batches."""
        usable = all(kind == "zero" for _, kind in step.damage) and all_finite(self.trainers[0].gradients())
        if step.way != "collect" or not usable:
            return None
        self.forget_own_gradients()
        probe = self.trainers[0].copied()
        probe.outcome = probe.run(step._replace(trial=False, stacked=False, measure=False), "backward")
        return probe

    def compare(self, step, probe):
        """Compare micro-batches with the whole batch."""
        error, report = probe.outcome
        assert error is None, error
        assert_near(probe.gradients(), self.trainers[0].gradients(), "of the whole batch")
        found, expected = fields(report), fields(self.trainers[0].balancer.report)
        for name in ("losses", "weighted_losses", "gramian"):
            assert_near({name: found[name]}, {name: expected[name]}, "of the whole batch")

    def observe_last(self):
        before = [trainer.state() for trainer in self.trainers]
        error = self.each(lambda trainer, _: trainer.observe(self.last), "observe")
        assert not (self.skipped and error), error
        if error or self.skipped:
            for trainer, state in zip(self.trainers, before, strict=True):
                assert_same(trainer.state(), state, f"after {error or 'a skip'}")

    def other(self, operation):
        if operation == "observe":
            self.observe_last()
        elif operation == "end_epoch":
            self.each(lambda trainer, _: trainer.balancer.end_epoch(), "end_epoch")
        elif not self.trainers[0].balancer.last.skipped:  # a checkpoint does not contain this flag, which observe uses
            self.forget_own_gradients()
            trainer = self.trainers[0]
            self.trainers[1:] = [trainer.copied() if operation == "deepcopy" else trainer.restored()]

    def forget_own_gradients(self):
        """Clear the balancer's gradients: a copy has no record of whether an optimizer has used them."""
        for trainer in self.trainers:
            trainer.balancer.zero_grad()

    @invariant()
    def copies_are_equal(self):
        if not hasattr(self, "trainers"):
            return
        first, *others = self.trainers
        for other in others:
            assert_same(other.everything(), first.everything(), "of a copy")

    @invariant()
    def untouched_parameters_are_untouched(self):
        if not hasattr(self, "trainers"):
            return
        for trainer in self.trainers:
            frozen = trainer.model.trunk[0].bias
            assert frozen.grad is None
            assert torch.equal(frozen, Trainer.initial_bias)
            assert all(p.grad is None for p in trainer.model.unused.parameters())


Trainer.initial_bias = Trainer(Setup()).model.trunk[0].bias.detach()
FIXED = settings(MACHINE, stateful_step_count=STEPS)


def test_trainings():
    run_state_machine_as_test(seed(0)(Training), settings=settings(FIXED, max_examples=5))


@pytest.mark.slow
def test_many_trainings():
    run_state_machine_as_test(Training, settings=settings(FIXED, max_examples=EXAMPLES, print_blob=True))
