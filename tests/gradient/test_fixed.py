import torch

from tests.gradient.directions import build


def test_random_weights_differ_between_steps_and_resume_from_a_state_dict():
    rule, resumed = build("random", 3), build("random", 3, seed=5)
    first = rule(torch.eye(3))
    resumed.load_state_dict(rule.state_dict())
    second = rule(torch.eye(3))
    assert not torch.equal(first, second)
    assert torch.equal(second, resumed(torch.eye(3)))
    assert torch.isclose(first.sum(), torch.tensor(1.0))
    assert (first > 0).all()


def test_mean_and_sum_do_not_see_the_gradients():
    G = torch.tensor([[4.0, -1.0], [-1.0, 0.0]])
    assert build("mean", 2)(G).tolist() == [0.5, 0.5]
    assert build("sum", 2)(G).tolist() == [1.0, 1.0]
