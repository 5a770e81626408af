"""Random sequences of all that a training loop can do with a `Splitter`, next to copies that were restored on the way."""

from __future__ import annotations

import copy
import io
import os
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import event, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import balance
from tests.fuzz.training import MACHINE, ROWS, TASKS, Net, Step, all_finite, assert_same, composed, fields
from tests.splitter.views import RULES as RULES_OF_SPLITTERS

STEPS, EXAMPLES = 40, int(os.environ.get("FUZZ_MACHINES", "190"))  # in all about 10 000 steps
NOT_FINITE = ("nan", "inf", "overflow")
COUNT = [0]  # steps


class Setup(NamedTuple):
    """Options of a splitter."""

    gradient: Any = "normalized"
    projection: int = 0
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)

    def splitter(self, number: int = 0) -> balance.Splitter:
        gradient = composed(self.gradient)
        return balance.Splitter(TASKS, gradient, projection=self.projection, weights=self.weights, beta=0.9, seed=number)


GRAMIAN = [name for name in RULES_OF_SPLITTERS if balance.gradient_balancers.traits(name).sees == "gramian"]
COMPOSITIONS = ("every", "smoothed", "grouped", "smoothed every", "grouped every")
WEIGHTS = st.sampled_from([(1.0, 1.0, 1.0), (1.0, 0.0, 3.0)])
RULES = st.sampled_from(RULES_OF_SPLITTERS)
COMPOSED = st.tuples(st.sampled_from(COMPOSITIONS), st.sampled_from(GRAMIAN))
SETUPS = st.one_of(
    st.tuples(RULES | COMPOSED, st.just(0), WEIGHTS),
    st.tuples(st.sampled_from(["normalized", None]), st.sampled_from([0, 1, 3]), WEIGHTS),
).map(lambda options: Setup(*options))
DAMAGES = st.one_of(
    st.just({}),
    st.dictionaries(st.sampled_from(TASKS), st.sampled_from(["zero", "detached", *NOT_FINITE]), max_size=2),
)
STEP = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "tasks": st.sets(st.sampled_from(TASKS), min_size=1).map(lambda tasks: tuple(sorted(tasks))) | st.just(TASKS),
        "damage": DAMAGES.map(lambda damage: tuple(damage.items())),
        "factor": st.sampled_from([1.0, 0.5]),
        "extra": st.booleans(),
        "clear": st.sampled_from(["all", "all", "none"]),
        "update": st.booleans(),
    }
).map(lambda options: Step(**options))


OPERATION = st.sampled_from(["evaluate", "restore", "restore", "deepcopy", None]) | st.integers(0, 12)  # of the scale


class Trainer:
    """A network with a splitter, its optimizer, and a gradient scaler that comes and goes."""

    def __init__(self, setup: Setup, number: int = 0) -> None:
        self.setup, self.model, self.splitter = setup, Net(), setup.splitter(number)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)

    def restored(self) -> Trainer:
        other = Trainer(self.setup, 5)
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.splitter.state_dict()], file)
        file.seek(0)
        model, state = torch.load(file, weights_only=True)
        other.model.load_state_dict(model)
        other.splitter.load_state_dict(state)
        if self.splitter.scaler is not None:
            other.splitter.scaler = torch.amp.GradScaler("cpu")
            other.splitter.scaler.load_state_dict(self.splitter.scaler.state_dict())
            other.splitter.scaler.scale(torch.ones(()))  # initialises the scale
        return self._continued(other)

    def copied(self) -> Trainer:
        other = Trainer(self.setup)
        other.model, other.splitter = copy.deepcopy((self.model, self.splitter))
        other.optimizer = torch.optim.Adam(other.model.parameters(), lr=0.01)
        return self._continued(other)

    def _continued(self, other: Trainer) -> Trainer:
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        for mine, its in zip(self.model.parameters(), other.model.parameters(), strict=True):
            its.grad = None if mine.grad is None else mine.grad.clone()
        return other

    def gradients(self):
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.model.named_parameters()}

    def state(self):
        return {name: value.clone() for name, value in self.splitter.state_dict().items()}

    def everything(self):
        weights = {f"model.{name}": p.detach().clone() for name, p in self.model.named_parameters()}
        return {**weights, **{f"{name}.grad": g for name, g in self.gradients().items()}, **self.state()}

    def run(self, step: Step, *, twice: bool) -> None:
        """Make one backward pass, or two over one graph, of which only the second writes ``.grad``."""
        rows = torch.arange(ROWS)
        z = self.model.features(step, rows)
        losses = self.model.losses(step, z, dict.fromkeys(step.tasks, rows), self.splitter(z))
        total = step.factor * torch.stack(list(losses.values())).sum()
        if step.extra:
            total = total + self.model.regulariser()
        if self.splitter.scaler is not None:
            total = self.splitter.scaler.scale(total)
        if twice:
            live = [p for p in self.model.parameters() if p.requires_grad]
            torch.autograd.grad(total, live, retain_graph=True, allow_unused=True)
        total.backward()

    def update(self) -> None:
        if self.splitter.scaler is None:
            self.optimizer.step()
        else:
            self.splitter.scaler.step(self.optimizer)
            self.splitter.scaler.update()


class Training(RuleBasedStateMachine):
    """A training, and a copy of it that must stay equal bit for bit."""

    @initialize(setup=SETUPS)
    def begin(self, setup):
        self.setup = setup
        self.trainers = [Trainer(setup), Trainer(setup)]
        event(f"gradient={setup.gradient}")

    @rule(operations=st.lists(st.one_of(STEP, STEP, OPERATION), min_size=1, max_size=3))
    def operate(self, operations):
        for operation in operations:
            if isinstance(operation, Step):
                COUNT[0] += 1
                self.step(operation)
            else:
                self.other(operation)

    def step(self, step):
        for place, trainer in enumerate(self.trainers):
            if step.clear == "all":
                trainer.optimizer.zero_grad()
            before, state = trainer.gradients(), trainer.state()
            trainer.run(step, twice=place == 1)
            self.check(step, trainer, before, state)
        reports = [fields(trainer.splitter.report) for trainer in self.trainers]
        for report in reports[1:] if self.arriving(step) else ():
            assert_same(report, reports[0], "of a copy")
        for trainer in self.trainers:
            if step.update and (trainer.splitter.scaler is not None or all_finite(trainer.gradients())):
                trainer.update()

    def arriving(self, step):
        """Return the tasks whose gradients reach the splitter."""
        damage = dict(step.damage)
        return [task for task in step.tasks if damage.get(task) != "detached"]

    def check(self, step, trainer, before, state):
        """Check what a step left in one training."""
        after, damage = trainer.gradients(), dict(step.damage)
        arriving = self.arriving(step)
        bad = [task for task in arriving if damage.get(task) in NOT_FINITE]
        event("not finite" if bad else "finite")
        for name, gradient in after.items():
            task = name.split(".")[1]
            if name.startswith("heads") and task not in step.tasks:
                assert_same({name: gradient}, {name: before[name]}, "of an absent task")
            elif name.startswith("heads") and damage.get(task) not in NOT_FINITE and all_finite({name: before[name]}):
                assert all_finite({name: gradient}), name
        trunk = {name: gradient for name, gradient in after.items() if name.startswith("trunk")}
        if bad or not arriving:
            assert_same(trainer.state(), state, "after a step that is not finite")
        if bad:
            assert all(gradient is None or bool(gradient.isnan().any()) for gradient in trunk.values())
        elif all_finite(before):
            assert all_finite(trunk)
        if not bad and self.setup.gradient == "normalized":
            new = [task in arriving and damage.get(task) != "zero" for task in TASKS]
            assert (trainer.splitter.counts - state["counts"]).tolist() == new

    def other(self, operation):
        if operation == "evaluate":
            self.evaluate()
        elif isinstance(operation, str):
            trainer = self.trainers[0]
            self.trainers[1:] = [trainer.copied() if operation == "deepcopy" else trainer.restored()]
        else:
            self.assign_scaler(operation)

    def assign_scaler(self, log_scale):
        """Begin or end mixed precision, with gradients set to None."""
        for trainer in self.trainers:
            trainer.optimizer.zero_grad()
            trainer.splitter.scaler = None
            if log_scale is not None:
                trainer.splitter.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**log_scale, growth_interval=2)

    def evaluate(self):
        """Run a forward pass in evaluation, which returns the features themselves."""
        for trainer in self.trainers:
            z = trainer.model.features(Step(0), torch.arange(ROWS))
            trainer.splitter.eval()
            assert all(view is z for view in trainer.splitter(z).values())
            trainer.splitter.train()

    @invariant()
    def copies_are_equal(self):
        if hasattr(self, "trainers"):
            for other in self.trainers[1:]:
                assert_same(other.everything(), self.trainers[0].everything(), "of a copy")

    @invariant()
    def untouched_parameters_are_untouched(self):
        for trainer in getattr(self, "trainers", ()):
            assert trainer.model.trunk[0].bias.grad is None
            assert torch.equal(trainer.model.trunk[0].bias, INITIAL_BIAS)
            assert all(p.grad is None for p in trainer.model.unused.parameters())


INITIAL_BIAS = Net().trunk[0].bias.detach()
FIXED = settings(MACHINE, stateful_step_count=STEPS)


def test_trainings():
    run_state_machine_as_test(seed(0)(Training), settings=settings(FIXED, max_examples=6))


@pytest.mark.slow
def test_many_trainings():
    run_state_machine_as_test(Training, settings=settings(FIXED, max_examples=EXAMPLES, print_blob=True))
