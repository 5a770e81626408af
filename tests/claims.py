"""Claims of `balance.testing` that each rule satisfies: one row per registered name, one entry per claim.

An entry is True if hypothesis proves the claim, on degenerate input too. It is GENERIC if the claim is true for linearly
independent gradients. Otherwise it is a counter-example, an input on which the claim is checked to fail. So every rule meets
every claim, and folklore that is false stays refuted.
"""

from balance import gradient_balancers, loss_balancers

GENERIC = "on linearly independent gradients"

TWO = [[1.0, 0.0], [-1.0, 1.0]]  # two gradients in conflict
SKEWED = [[1.0, 0.0], [0.0, 3.0]]
THREE = [[1.0, 3.0, 1.0], [-3.0, 3.0, -3.0], [0.0, -3.0, 0.0]]  # conflicts that depend on the order
NEGATIVE = [[1.0, 1.0, 0.0], [20.0, 4.0, 6.0], [4.0, 20.0, 6.0]]  # IMTL-G's weights are of both signs
ACUTE = [[1.0, 0.0], [1.0, 0.1]]  # nearly parallel, no conflict

GRADIENT_ROWS = {
    "mgda": {
        "finite": True,
        "positive_at_one_task": True,
        "permutation_equivariant": True,
        "rotation_equivariant": True,
        "on_simplex": True,
        "at_least_one": SKEWED,
        "non_negative": True,
        "conflict_free": True,
        "unchanged_by_scaling_one_task": SKEWED,  # believed, but it favours small gradients
        "scales_with_the_gradients": True,
        "linear_under_scaling": SKEWED,
        "sum_without_conflict": SKEWED,
        "equal_projections": SKEWED,
    },
    "pcgrad": {
        "finite": True,
        "positive_at_one_task": True,
        "permutation_equivariant": THREE,  # in distribution only
        "rotation_equivariant": True,
        "on_simplex": TWO,
        "at_least_one": True,
        "non_negative": True,
        "conflict_free": THREE,  # believed, but true for two tasks only
        "unchanged_by_scaling_one_task": SKEWED,
        "scales_with_the_gradients": True,
        "linear_under_scaling": True,
        "sum_without_conflict": True,
        "equal_projections": SKEWED,
    },
    "cagrad": {
        "finite": True,
        "positive_at_one_task": True,
        "permutation_equivariant": True,
        "rotation_equivariant": True,
        "on_simplex": SKEWED,
        "at_least_one": SKEWED,
        "non_negative": True,
        "conflict_free": [[10.0, 0.0], [-1.0, 0.1]],  # believed, but it takes c >= 1
        "unchanged_by_scaling_one_task": SKEWED,
        "scales_with_the_gradients": True,
        "linear_under_scaling": SKEWED,
        "sum_without_conflict": SKEWED,
        "equal_projections": SKEWED,
    },
    "imtl": {
        "finite": True,
        "positive_at_one_task": True,
        "permutation_equivariant": True,
        "rotation_equivariant": True,
        "on_simplex": NEGATIVE,  # believed, but weights can be negative
        "at_least_one": SKEWED,
        "non_negative": NEGATIVE,
        "conflict_free": GENERIC,
        "unchanged_by_scaling_one_task": GENERIC,
        "scales_with_the_gradients": True,
        "linear_under_scaling": SKEWED,
        "sum_without_conflict": SKEWED,
        "equal_projections": GENERIC,
    },
    "nashmtl": {
        "finite": True,
        "positive_at_one_task": True,
        "permutation_equivariant": True,
        "rotation_equivariant": True,
        "on_simplex": SKEWED,
        "at_least_one": SKEWED,
        "non_negative": True,
        "conflict_free": True,
        "unchanged_by_scaling_one_task": GENERIC,
        "scales_with_the_gradients": SKEWED,  # the direction has length max_norm
        "linear_under_scaling": SKEWED,
        "sum_without_conflict": SKEWED,
        "equal_projections": [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]],  # for two tasks it is IMTL-G
    },
    "graddrop": {
        "finite": True,
        "permutation_equivariant": True,
        "rotation_equivariant": TWO,
        "conflict_free": [[0.0, 3.0, 2.0], [0.0, -2.0, -3.0]],
        "unchanged_by_scaling_one_task": SKEWED,
        "scales_with_the_gradients": True,
        "linear_under_scaling": [[1.0] * 6, [-1.0] * 6],
        "sum_without_conflict": True,
        "equal_projections": SKEWED,
    },
}


# What options other than the default ones add: (name, options) and the claims that hold with them, on degenerate input too
GRADIENT_OPTIONS = [
    ("mgda", {"normalization": "l2"}, ["on_simplex"]),  # with parallel gradients the order decides
    ("pcgrad", {"order": "fixed"}, ["rotation_equivariant", "linear_under_scaling", "sum_without_conflict"]),
    ("cagrad", {"c": 1.0}, ["conflict_free", "permutation_equivariant", "rotation_equivariant", "non_negative"]),
    ("cagrad", {"c": 1.0, "rescale": 0}, ["conflict_free", "permutation_equivariant", "scales_with_the_gradients"]),
    ("cagrad", {"c": 1.5, "rescale": 2}, ["conflict_free", "permutation_equivariant"]),
    ("cagrad", {"c": 10.0, "rescale": 0}, ["conflict_free", "permutation_equivariant"]),
    ("cagrad", {"c": 0.0}, ["linear_under_scaling", "on_simplex"]),
    ("imtl", {"official": True}, ["permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"]),
    ("nashmtl", {"max_norm": None}, ["conflict_free", "permutation_equivariant", "non_negative"]),
    ("graddrop", {"leak": 1.0}, ["permutation_equivariant", "rotation_equivariant", "linear_under_scaling"]),
]


def gradient_factory(name, **options):
    return lambda num_tasks: gradient_balancers.build(name, num_tasks=num_tasks, **options)


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
