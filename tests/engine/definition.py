"""Task gradients by their definition, one ordinary backward pass each, and all engines to compare with them."""

import torch

WAYS = [{"engine": engine, "memory": memory} for engine in ("loop", "batched", "auto") for memory in ("jacobian", "gramian")]


def in_proportion(gramian):
    """A rule whose weights depend on every entry of the Gramian."""
    return 1 + gramian.sum(dim=1) / gramian.trace()


def grads(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def rows(losses, parameters):
    """Return the Jacobian of losses with respect to parameters. Shape (K, P)."""
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    gradients = [torch.autograd.grad(loss, parameters, **options) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients])


def reference(model, weights=None):
    """Return the Gramian of a step, and the gradients that it adds, by parameter; heads are unweighted."""
    model.zero_grad()
    parameters = [p for p in model.parameters() if p.requires_grad]
    trunk = {id(p) for p in model.trunk.parameters()}
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    gradients = [torch.autograd.grad(loss, parameters, **options) for loss in model.losses()[1]]
    J = torch.stack(
        [torch.cat([g.flatten() for p, g in zip(parameters, row, strict=True) if id(p) in trunk]) for row in gradients]
    ).double()
    w = torch.ones(len(gradients), dtype=torch.float64) if weights is None else weights
    sums = {}
    for i, (name, parameter) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad):
        factors = w if id(parameter) in trunk else torch.ones_like(w)
        sums[name] = sum(f * row[i].double() for f, row in zip(factors, gradients, strict=True))
    return J @ J.T, sums


def assert_close(model, expected, **tolerance):
    for name, gradient in grads(model).items():
        if gradient is not None:
            torch.testing.assert_close(gradient.double(), expected[name], **tolerance)
        else:
            assert name not in expected or expected[name].abs().max() == 0


def many_losses(y, num_tasks):
    """Return losses of an output, linear and quadratic in turns."""
    torch.manual_seed(1)
    return [(y * torch.randn_like(y)).sum() if k % 2 else (y * torch.randn_like(y)).square().sum() for k in range(num_tasks)]


class Opaque(torch.autograd.Function):
    """An operation whose backward pass depends on numbers, which no batched pass allows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1.0 if float(gradient.sum()) > -1e9 else 0.0)
