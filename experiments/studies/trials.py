"""The runs of a study: single-task networks, trials of each method, and the chosen trial with every seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from experiments.problems import base as problems
from experiments.sweeps.job import make_job
from experiments.sweeps.plan import missing_baselines

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.studies.study_file import MethodEntry, ProblemEntry, Study
    from experiments.sweeps.job import Job

FACTOR = 1000.0  # largest ratio of two random weights


def overrides_of(problem: ProblemEntry, further: tuple[str, ...]) -> list[str]:
    """Return the entries of the trainer's configuration that all runs of a problem have; the network is not recorded."""
    return [f"experiment={problem.experiment}", "log_model=false", *problem.overrides, *further]


def base_config(problem: ProblemEntry, further: tuple[str, ...]) -> DictConfig:
    """Return the configuration of the problem's single-task networks, apart from their task.

    Raises:
        ValueError: If an entry is wrong.
    """
    return make_job(overrides_of(problem, further)).config


def baselines_to_train(study: Study, problem: ProblemEntry, further: tuple[str, ...]) -> list[Job]:
    """Return the runs of single-task networks, unless the problem has them already or compares with a method."""
    if problem.reference is not None:
        return []
    return missing_baselines(overrides_of(problem, further), range(study.baseline_seeds))


def trials(study: Study, name: str, problem: ProblemEntry, further: tuple[str, ...]) -> list[Job]:
    """Return one run for each trial of a method.

    Args:
        study: The study.
        name: Name of the method.
        problem: The problem.
        further: Entries of the trainer's configuration for all runs of the study.

    Raises:
        ValueError: If an entry is wrong.
    """
    method, common = study.methods[name], overrides_of(problem, further)
    config = base_config(problem, further)
    return [
        make_job([*common, *trial_overrides(method, config, trial, rate), f"seed={study.tuning_seed}"], name)
        for trial, rate in enumerate(study.rates)
    ]


def trial_overrides(method: MethodEntry, config: DictConfig, trial: int, rate: float) -> list[str]:
    """Return the entries of the trainer's configuration that distinguish a trial.

    Args:
        method: The method.
        config: Configuration of the problem, for its learning rate and its tasks.
        trial: Number of the trial, from 0.
        rate: Factor of the learning rate.
    """
    names = [f"loss_method={method.loss_method}", f"gradient_method={method.gradient_method or 'none'}"]
    searched = {key: values[trial % len(values)] for key, values in method.search.items()}
    options = [f"{key}={value}" for key, value in searched.items() if value is not None]
    if method.random_weights:
        options.append(f"loss.weights={random_weights(len(problems.tasks_of(config)), trial)}")
    return [*names, *options, f"train.lr={config.train.lr * rate:.6g}"]


def random_weights(num_tasks: int, trial: int) -> list[float]:
    """Return log-uniform weights with mean 1 and ratios of at most `FACTOR`, which a trial draws. Length K."""
    exponents = np.random.default_rng([trial, num_tasks]).uniform(0, 1, num_tasks)
    weights = FACTOR**exponents
    return [float(f"{weight:.4g}") for weight in weights / weights.mean()]


def with_seed(job: Job, seed: int) -> Job:
    """Return the run of a trial with another seed."""
    return make_job([*job.overrides, f"seed={seed}"], job.name)
