"""Claims that each loss balancer satisfies; see `tests.claims`."""

from balance import loss_balancers

UNEQUAL = [[1.0, 2.0, 5.0], [0.9, 1.0, 4.0], [0.5, 0.9, 4.0], [0.4, 0.7, 3.0]]

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

LOSS_ROWS = {
    "ls": ALWAYS | {"weights_sum_to_k": True},
    "scaleinvls": ALWAYS | {"gradient_unchanged_by_scaling_a_loss": True, "factors_sum_to_k": True},
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
    # effective weights sum to one; those of the logarithms are z / S
    "famo": ALWAYS | {"weights_sum_to_one": True, "gradient_unchanged_by_scaling_a_loss": True},
    "go4align": ALWAYS,
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


def loss_factory(name):
    return lambda num_tasks: loss_balancers.build(name, num_tasks=num_tasks)
