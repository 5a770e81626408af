"""Claims that each loss balancer satisfies; see `tests.claims`."""

from balance import loss_balancers

UNEQUAL = [[1.0, 2.0, 5.0], [0.9, 1.0, 4.0], [0.5, 0.9, 4.0], [0.4, 0.7, 3.0]]
DECREASING = [row[::-1] for row in UNEQUAL]  # scaling the later losses up changes the largest one

ALWAYS = {
    "usable": True,
    "loss_permutation_equivariant": True,
    "positive_weights": True,
    "weights_sum_to_one": UNEQUAL,
    "weights_sum_to_k": UNEQUAL,
    "factors_sum_to_k": UNEQUAL,
    "gradient_unchanged_by_scaling_a_loss": UNEQUAL,
    "separable": True,
    "absent_task_is_a_smaller_problem": True,
    "resumes_bit_for_bit": True,
}

INVARIANT = ["loss_permutation_equivariant", "separable", "absent_task_is_a_smaller_problem"]

LOSS_ROWS = {
    "ls": ALWAYS | {"weights_sum_to_k": True},
    "scaleinvls": ALWAYS | {"gradient_unchanged_by_scaling_a_loss": True, "factors_sum_to_k": True},
    "constant": ALWAYS | {"weights_sum_to_k": True},
    "linear_schedule": ALWAYS | {"weights_sum_to_k": True},
    "gls": ALWAYS | {"gradient_unchanged_by_scaling_a_loss": True},
    # by nature not equivariant: the main task is an index
    "stl": ALWAYS
    | {
        "loss_permutation_equivariant": UNEQUAL,
        "positive_weights": UNEQUAL,
        "weights_sum_to_one": True,
        "gradient_unchanged_by_scaling_a_loss": True,
    },
    # equivariant in distribution only
    "rlw": ALWAYS | {"loss_permutation_equivariant": UNEQUAL, "weights_sum_to_one": True},
    "dwa": ALWAYS | {"weights_sum_to_k": True},
    "uw": ALWAYS,
    "imtl_l": ALWAYS | {"weights_sum_to_k": True},
    # effective weights sum to one; those of the logarithms are z / S
    "famo": ALWAYS | {"weights_sum_to_one": True, "gradient_unchanged_by_scaling_a_loss": True},
    "go4align": ALWAYS,
    "stch": ALWAYS | {"factors_sum_to_k": True, "gradient_unchanged_by_scaling_a_loss": True},
    # only the largest loss has a weight
    "tchebycheff": ALWAYS | {"positive_weights": UNEQUAL, "gradient_unchanged_by_scaling_a_loss": DECREASING},
    "cosmos": ALWAYS | {"positive_weights": [[0.1, 0.2, 0.5]]},  # negative for losses far below the preferred direction
    "pbi": ALWAYS | {"positive_weights": UNEQUAL},
    "softadapt": ALWAYS | {"weights_sum_to_one": True},
    "relobralo": ALWAYS | {"weights_sum_to_k": True},
    "resnorm": ALWAYS | {"weights_sum_to_k": True},
    "minimax": ALWAYS,
    "coba": ALWAYS | {"weights_sum_to_one": True},
    "igbv1": ALWAYS | {"factors_sum_to_k": True, "gradient_unchanged_by_scaling_a_loss": True},
    # draws its weights; its state is all losses, so that no task can be absent
    "igbv2": ALWAYS
    | {
        "loss_permutation_equivariant": UNEQUAL,
        "factors_sum_to_k": True,
        "gradient_unchanged_by_scaling_a_loss": UNEQUAL + UNEQUAL,  # the agent acts from the sixth epoch
        "absent_task_is_a_smaller_problem": UNEQUAL,
    },
}

# Claims that hold with options other than the default ones
LOSS_OPTIONS = [
    ("coba", {"warmup": 2, "history": 3}, ["weights_sum_to_one", "positive_weights", *INVARIANT]),
    ("famo", {"optimizer": "user"}, ["weights_sum_to_one", "positive_weights", *INVARIANT]),
    ("minimax", {"ascent": "gradient", "every": 2}, ["positive_weights", *INVARIANT]),
    ("relobralo", {"alpha": 0.5, "rho": 0.5, "temperature": 0.1}, ["weights_sum_to_k", *INVARIANT]),
    ("resnorm", {"alpha": 0.0, "lr": 0.5}, ["weights_sum_to_k", *INVARIANT]),
    ("softadapt", {"variant": "normalized", "window": 3}, ["weights_sum_to_one", "positive_weights", *INVARIANT]),
    ("softadapt", {"variant": "loss_weighted", "beta": -2.0}, ["weights_sum_to_one", *INVARIANT]),
    ("stch", {"warmup_epochs": 0, "mu": 0.1}, ["factors_sum_to_k", "gradient_unchanged_by_scaling_a_loss", *INVARIANT]),
    ("stch", {"form": "plain"}, ["positive_weights", *INVARIANT]),
    ("tchebycheff", {"rho": 0.1}, ["positive_weights", *INVARIANT]),
    ("tchebycheff", {"rho": 0.1, "form": "modified"}, ["positive_weights", *INVARIANT]),
]


def loss_factory(name, **options):
    return lambda num_tasks: loss_balancers.build(name, num_tasks=num_tasks, **options)
