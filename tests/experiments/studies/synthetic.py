"""Records of studies without runs."""

from experiments.studies.record import MethodResult, ProblemResult, StudyRecord

PAIRS = {"ls": ("ls", None), "uw": ("uw", None), "nashmtl": ("ls", "nashmtl")}


def result(name, drops, **further):
    loss, gradient = PAIRS[name]
    return MethodResult(loss, gradient, dict(enumerate(drops)), step_seconds=0.01 if gradient is None else 0.02, **further)


FOUND = {"ls": (), "nashmtl": ("domination",)}  # findings for which the library advises a method


def problem(drops, advice="ls", tasks=2, **further):
    """Return the result of a problem from delta_m by seed, by method, and the method that the library should advise."""
    further = {"findings": FOUND[advice], **further}
    methods = {name: result(name, values) for name, values in drops.items()}
    return ProblemResult("digits", (), "single-task networks", methods, {"tasks": float(tasks)}, **further)


def record(*problems):
    return StudyRecord(2, (1.0,), {f"p{k}": of_problem for k, of_problem in enumerate(problems)})


THREE = record(
    problem({"ls": [10, 12], "uw": [4, 6], "nashmtl": [0, 2]}, "nashmtl"),
    problem({"ls": [0, 0], "uw": [3, 3], "nashmtl": [8, 8]}),
    problem({"ls": [20, 20], "uw": [2, 2], "nashmtl": [1, 1]}, "nashmtl"),
)
