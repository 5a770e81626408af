"""Claims that each gradient balancer satisfies; see `tests.claims`."""

import torch

from balance import gradient_balancers
from balance.rules.protocol import takes

GENERIC = "on linearly independent gradients"

TWO = [[1.0, 0.0], [-1.0, 1.0]]  # two gradients in conflict
SKEWED = [[1.0, 0.0], [0.0, 3.0]]
THREE = [[1.0, 3.0, 1.0], [-3.0, 3.0, -3.0], [0.0, -3.0, 0.0]]  # conflicts that depend on the order
NEGATIVE = [[1.0, 1.0, 0.0], [20.0, 4.0, 6.0], [4.0, 20.0, 6.0]]  # IMTL-G's weights are of both signs
ACUTE = [[1.0, 0.0], [1.0, 0.1]]  # nearly parallel, no conflict
LONG = [[10.0, 0.0], [-1.0, 0.1]]  # a long gradient, in conflict with a short one
HARMLESS = [[0.0, 3.0, 2.0], [0.0, -2.0, -3.0]]  # the mean conflicts with neither
OUTLIER = [[-1.0, -1.0], [4.0, -1.0], [2.0, 3.0]]

# What is usual for a rule that sees the Jacobian; a row lists what differs
ON_JACOBIANS = {
    "finite": True,
    "permutation_equivariant": True,
    "rotation_equivariant": True,
    "conflict_free": TWO,
    "unchanged_by_scaling_one_task": SKEWED,
    "scales_with_the_gradients": True,
    "linear_under_scaling": SKEWED,
    "sum_without_conflict": SKEWED,
    "equal_projections": SKEWED,
}
# The same for a rule that sees the Gramian
ON_GRAMIANS = ON_JACOBIANS | {
    "positive_at_one_task": True,
    "on_simplex": SKEWED,
    "at_least_one": SKEWED,
    "non_negative": True,
}

GRADIENT_ROWS = {
    "mgda": ON_GRAMIANS | {"on_simplex": True, "conflict_free": True},  # scaling: believed, but it favours small gradients
    "pcgrad": ON_GRAMIANS
    | {
        "permutation_equivariant": THREE,  # in distribution only
        "on_simplex": TWO,
        "at_least_one": True,
        "conflict_free": THREE,  # believed, but true for two tasks only
        "linear_under_scaling": True,
        "sum_without_conflict": True,
    },
    "cagrad": ON_GRAMIANS | {"conflict_free": [[10.0, 0.0], [-1.0, 0.1]]},  # believed, but it takes c >= 1
    "imtl": ON_GRAMIANS
    | {
        "on_simplex": NEGATIVE,  # believed, but weights can be negative
        "non_negative": NEGATIVE,
        "conflict_free": GENERIC,
        "unchanged_by_scaling_one_task": GENERIC,
        "equal_projections": GENERIC,
    },
    "nashmtl": ON_GRAMIANS
    | {
        "conflict_free": True,
        "unchanged_by_scaling_one_task": GENERIC,
        "scales_with_the_gradients": SKEWED,  # the direction has length max_norm
        "equal_projections": [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]],  # for two tasks it is IMTL-G
    },
    "graddrop": ON_JACOBIANS
    | {
        "rotation_equivariant": TWO,
        "conflict_free": [[0.0, 3.0, 2.0], [0.0, -2.0, -3.0]],
        "linear_under_scaling": [[1.0] * 6, [-1.0] * 6],
        "sum_without_conflict": True,
    },
    "gradnorm": ON_GRAMIANS | {"conflict_free": THREE, "scales_with_the_gradients": SKEWED},  # long gradients learn faster
    "inverse_norm": ON_GRAMIANS | {"conflict_free": THREE, "at_least_one": True},
    "ntk": ON_GRAMIANS | {"conflict_free": THREE, "at_least_one": GENERIC},
    "ema_norm": ON_GRAMIANS
    | {
        "conflict_free": THREE,
        "unchanged_by_scaling_one_task": True,
        "scales_with_the_gradients": SKEWED,  # every gradient has its share of a fixed length
        "equal_projections": THREE,
    },
    "lr_annealing": ON_JACOBIANS | {"permutation_equivariant": SKEWED, "rotation_equivariant": SKEWED, "conflict_free": THREE},
    "sdmgrad": ON_GRAMIANS | {"on_simplex": True, "linear_under_scaling": THREE},
    "modo": ON_GRAMIANS | {"on_simplex": True, "conflict_free": THREE, "scales_with_the_gradients": SKEWED},
    "moco": ON_JACOBIANS | {"conflict_free": THREE, "scales_with_the_gradients": SKEWED},  # all have the length of the loss
    "db_mtl": ON_JACOBIANS | {"conflict_free": THREE},
    "config_momentum": ON_JACOBIANS
    | {
        "rotation_equivariant": SKEWED,
        "conflict_free": THREE,  # ConFIG is, but its entries are divided by their typical sizes
        "scales_with_the_gradients": SKEWED,
        "equal_projections": THREE,
    },
    "excess_mtl": ON_JACOBIANS | {"rotation_equivariant": SKEWED, "scales_with_the_gradients": SKEWED},
    "pcd": ON_GRAMIANS | {"permutation_equivariant": SKEWED, "conflict_free": THREE},  # the primary task is an index
    "cr_mogm": ON_GRAMIANS | {"on_simplex": True},
    "epo": ON_GRAMIANS
    | {"on_simplex": GENERIC, "unchanged_by_scaling_one_task": TWO, "linear_under_scaling": TWO},  # equal losses are on the ray
    "pmgda": ON_GRAMIANS | {"non_negative": ACUTE, "scales_with_the_gradients": SKEWED},  # corrections have a length of about 1
    "upgrad": ON_GRAMIANS | {"on_simplex": TWO, "conflict_free": True, "linear_under_scaling": True},
    "dualproj": ON_GRAMIANS | {"on_simplex": THREE, "conflict_free": True, "linear_under_scaling": HARMLESS},
    "aligned_mtl": ON_GRAMIANS
    | {
        "non_negative": NEGATIVE,
        "conflict_free": THREE,  # believed, but true of the replaced gradients only
        "unchanged_by_scaling_one_task": TWO,
        "linear_under_scaling": TWO,
        "equal_projections": TWO,
    },
    "fairgrad": ON_GRAMIANS | {"conflict_free": True, "scales_with_the_gradients": SKEWED},
    # on its first step PCGrad; later ones depend on the state
    "gradvac": ON_GRAMIANS
    | {
        "permutation_equivariant": THREE,
        "at_least_one": True,
        "conflict_free": THREE,
        "linear_under_scaling": True,
        "sum_without_conflict": True,
    },
    "config": ON_GRAMIANS
    | {
        "non_negative": NEGATIVE,
        "conflict_free": GENERIC,
        "unchanged_by_scaling_one_task": True,
        "linear_under_scaling": True,
        "equal_projections": GENERIC,
    },
    "conicgrad": ON_GRAMIANS | {"conflict_free": LONG},
    "krum": ON_GRAMIANS
    | {
        "permutation_equivariant": NEGATIVE,  # for three tasks two scores are always equal
        "on_simplex": True,
        "conflict_free": THREE,
        "linear_under_scaling": OUTLIER,
    },
    "trimmed_mean": ON_JACOBIANS
    | {"rotation_equivariant": THREE, "conflict_free": THREE, "linear_under_scaling": [[-3.0, 1.0], [-4.0, -2.0], [-1.0, 4.0]]},
    "sam_gs": ON_JACOBIANS
    | {
        "rotation_equivariant": TWO,
        "conflict_free": THREE,
        "unchanged_by_scaling_one_task": TWO,
        "scales_with_the_gradients": TWO,
        "linear_under_scaling": TWO,
        "equal_projections": TWO,
    },
    "mean": ON_GRAMIANS | {"on_simplex": True, "conflict_free": THREE, "linear_under_scaling": True},
    "sum": ON_GRAMIANS
    | {"at_least_one": True, "conflict_free": THREE, "linear_under_scaling": True, "sum_without_conflict": True},
    "random": ON_GRAMIANS | {"permutation_equivariant": SKEWED, "on_simplex": True, "linear_under_scaling": True},
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
    ("upgrad", {"reg_eps": 1e-4}, ["permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"]),
    ("dualproj", {"reg_eps": 1e-4}, ["permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients"]),
    ("aligned_mtl", {"scale_mode": "median"}, ["permutation_equivariant", "rotation_equivariant"]),
    ("aligned_mtl", {"scale_mode": "rmse"}, ["permutation_equivariant", "scales_with_the_gradients"]),
    ("fairgrad", {"alpha": 0.5}, ["conflict_free", "permutation_equivariant", "non_negative"]),
    ("fairgrad", {"alpha": 10.0}, ["conflict_free", "permutation_equivariant", "non_negative"]),
    ("gradvac", {"order": "fixed"}, ["at_least_one", "rotation_equivariant"]),
    *(
        (
            "config",
            {"length": length},
            ["permutation_equivariant", "unchanged_by_scaling_one_task", "scales_with_the_gradients"],
        )
        for length in ("minimum", "maximum", "harmonic", "arithmetic", "geometric")
    ),
    ("conicgrad", {"c": 0.1}, ["permutation_equivariant", "rotation_equivariant", "scales_with_the_gradients", "non_negative"]),
    ("conicgrad", {"c": 1.0}, ["linear_under_scaling"]),
    ("krum", {"distance": "squared"}, ["on_simplex", "rotation_equivariant", "scales_with_the_gradients"]),
    ("trimmed_mean", {"trim": 0}, ["rotation_equivariant", "linear_under_scaling"]),
    ("graddrop", {"leak": 1.0}, ["permutation_equivariant", "rotation_equivariant", "linear_under_scaling"]),
]


# Rules whose claims are checked at their second step, after a step on other gradients. (ema_norm's claim about the scaling of
# one task is about a factor that is constant over time.)
AT_SECOND_STEP = {
    "config_momentum",
    "cr_mogm",
    "db_mtl",
    "excess_mtl",
    "gradnorm",
    "inverse_norm",
    "lr_annealing",
    "moco",
    "modo",
    "pcd",
    "sdmgrad",
}


def gradient_factory(name, **options):
    """Return a factory of rules that get losses, unequal ones, if they take them, and that have been used where listed."""

    def build(num_tasks):
        rule = gradient_balancers.build(name, num_tasks=num_tasks, **options)

        def step(data):
            return rule(data, losses=unequal_losses(name, data)) if takes(rule, "losses") else rule(data)

        def second_step(data):
            step(with_mean_added(name, data))
            return step(data)

        return second_step if name in AT_SECOND_STEP else step

    return build


def unequal_losses(name, data):
    """Return positive losses that depend on the lengths of the gradients only, not on their scale."""
    squares = data.square().sum(dim=1) if gradient_balancers.sees(name) == "jacobian" else data.diagonal()
    return 1 + squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)


def with_mean_added(name, data):
    """Return the Jacobian or Gramian of the gradients with their mean added to each."""
    A = torch.eye(len(data), dtype=data.dtype) + 1 / len(data)
    return A @ data if gradient_balancers.sees(name) == "jacobian" else A @ data @ A.T
