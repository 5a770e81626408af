import importlib
import importlib.util
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

pytest.importorskip("torch_geometric")

from torch_geometric.data import Batch, Data
from torch_geometric.nn import NNConv, Set2Set

import experiments.problems.quantum_chemistry
from balance import Balancer
from experiments.datasets import molecules
from experiments.problems.quantum_chemistry import TASKS, DataConfig, ModelConfig, build_model, load, losses, metrics, targets
from experiments.problems.quantum_chemistry.data import UNITS
from tests.writers.qm9 import pieces


@pytest.fixture(scope="module")
def splits():
    return load(DataConfig())


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


# The data


def test_splits_of_the_shipped_molecules(splits):
    count = len(molecules.read().smiles)
    assert [len(split) for split in splits] == [count - 400, 200, 200]
    members = [set(split.members.tolist()) for split in splits]
    assert set.union(*members) == set(range(count))
    assert sum(map(len, members)) == count


def test_the_seed_of_the_data_fixes_the_split(splits):
    assert torch.equal(load(DataConfig()).test.members, splits.test.members)
    assert not torch.equal(load(DataConfig(seed=1)).test.members, splits.test.members)


def test_targets_are_standardised_with_the_training_molecules_only(splits):
    everything = [split[list(range(len(split)))][1] for split in splits]
    torch.testing.assert_close(everything[0].mean(0), torch.zeros(11), atol=1e-5, rtol=0)
    torch.testing.assert_close(everything[0].std(0), torch.ones(11), atol=1e-5, rtol=0)
    assert torch.cat(everything).mean(0).abs().max() > 1e-3
    paper = load(DataConfig(protocol="paper"))
    everything = torch.cat([split[list(range(len(split)))][1] for split in paper])
    torch.testing.assert_close(everything.mean(0), torch.zeros(11), atol=1e-5, rtol=0)


def test_a_batch_is_what_torch_geometric_collates(splits):
    """Against its own collation of graphs that are made one by one."""
    chosen = [5, 0, 77]
    batch, standardised = splits.train[chosen]
    shipped = pieces(len(molecules.read().smiles))
    graphs = []
    for member in splits.train.members[chosen].tolist():
        elements, positions, bonds = shipped[member]
        n = len(elements)
        order = np.zeros((n, n), dtype=int)
        order[bonds[:, 0], bonds[:, 1]] = order[bonds[:, 1], bonds[:, 0]] = bonds[:, 2]
        edges = [(i, j) for i in range(n) for j in range(n) if i != j]
        attributes = [
            [*(float(order[i, j] == kind) for kind in (1, 2, 3, 4)), np.linalg.norm(positions[i] - positions[j])]
            for i, j in edges
        ]
        features = [
            [*(float(e == z) for z in (1, 6, 7, 8, 9)), float(e), 0, 0, 0, 0, float(((order[k] > 0) & (elements == 1)).sum())]
            for k, e in enumerate(elements)
        ]
        graphs.append(Data(x=torch.tensor(features), edge_index=torch.tensor(edges).T, edge_attr=torch.tensor(attributes)))
    expected = Batch.from_data_list(graphs)
    for name in ("x", "edge_index", "edge_attr", "batch", "ptr"):
        torch.testing.assert_close(batch[name], expected[name].to(batch[name].dtype), atol=1e-5, rtol=0)
    assert batch.num_graphs == expected.num_graphs == len(standardised) == 3
    members = splits.train.members
    raw = torch.from_numpy(molecules.read().targets)
    mean, deviations = raw[members].mean(0), raw[members].std(0)
    torch.testing.assert_close(standardised, ((raw[members[chosen]] - mean) / deviations).float())
    torch.testing.assert_close(batch.deviations, (deviations * UNITS).float())


def test_batches_go_through_the_data_loader(splits):
    order = BatchSampler(SequentialSampler(splits.test), 64, drop_last=False)
    batches = list(DataLoader(splits.test, sampler=order, batch_size=None))
    assert [len(standardised) for _, standardised in batches] == [64, 64, 64, 8]
    again = pickle.loads(pickle.dumps(batches[-1]))
    assert torch.equal(again[0].edge_attr, splits.test[list(range(192, 200))][0].edge_attr)
    assert torch.equal(again[0].to("cpu").ptr, batches[-1][0].ptr)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(source="qm8"), r"data\.source must be one of molecules, qm9, but got qm8"),
        (DataConfig(source="qm9"), r"the folder with raw/gdb9\.sdf in it, but got None\. Set data\.path=FOLDER"),
        (DataConfig(path="somewhere"), r"data\.source must be qm9 where data\.path is given, but got molecules"),
        (DataConfig(protocol="fair"), r"data\.protocol must be one of sound, paper, but got fair"),
        (DataConfig(test_molecules=0), r"data\.test_molecules must be at least 1"),
        (
            DataConfig(validation_molecules=1125),
            "of 1326 molecules 1 are left for training after 1125 for validation and 200",
        ),
    ],
)
def test_mistakes_in_the_configuration_are_said(config, message):
    with pytest.raises(ValueError, match=message):
        load(config)


# The model


def test_numbers_of_parameters():
    model = build_model()
    assert numbers(model) == 617_675
    assert numbers(model.trunk) == 616_960
    assert numbers(model.heads) == 715
    assert numbers(model.trunk.output) == 8_256
    assert numbers(build_model(ModelConfig(dim=32))) == 89_707
    with pytest.raises(ValueError, match=r"model\.dim must be at least 1, but got 0"):
        build_model(ModelConfig(dim=0))


def reference(trunk, graphs):
    """The same network of torch_geometric's own layers, one message at a time."""
    dim = trunk.convolution.dim
    edge_network = torch.nn.Sequential(torch.nn.Linear(5, 2 * dim), torch.nn.ReLU(), torch.nn.Linear(2 * dim, dim * dim))
    convolution = NNConv(dim, dim, edge_network, aggr="mean").double()
    edge_network.load_state_dict(
        {"0.weight": trunk.convolution.edge_hidden.weight, "0.bias": trunk.convolution.edge_hidden.bias}
        | {"2.weight": trunk.convolution.edge_matrix.weight, "2.bias": trunk.convolution.edge_matrix.bias}
    )
    convolution.lin.weight, convolution.bias = trunk.convolution.root.weight, trunk.convolution.root.bias
    gru = torch.nn.GRU(dim, dim).double()
    gru.load_state_dict({f"{name}_l0": value for name, value in trunk.update.state_dict().items()})
    readout = Set2Set(dim, processing_steps=3).double()
    readout.load_state_dict(trunk.readout.state_dict())
    atoms = torch.relu(trunk.embedding(graphs.x))
    hidden = atoms.unsqueeze(0)
    for _ in range(3):
        message = torch.relu(convolution(atoms, graphs.edge_index, graphs.edge_attr))
        atoms, hidden = gru(message.unsqueeze(0), hidden)
        atoms = atoms.squeeze(0)
    return torch.relu(trunk.output(readout(atoms, graphs.batch, dim_size=graphs.num_graphs)))


def test_the_trunk_is_the_network_of_torch_geometrics_layers(splits):
    """Values and gradients, in double precision; also of graphs that are not complete."""
    torch.manual_seed(0)
    trunk = build_model(ModelConfig(dim=8)).trunk.double()
    torch.nn.init.normal_(trunk.convolution.root.bias)
    whole, _ = splits.train[list(range(7))]
    sparse = whole.clone()
    keep = torch.rand(whole.edge_index.shape[1]) < 0.3
    sparse.edge_index, sparse.edge_attr = whole.edge_index[:, keep], whole.edge_attr[keep]
    for graphs in (whole, sparse):
        graphs.x, graphs.edge_attr = graphs.x.double(), graphs.edge_attr.double()
        found, expected = trunk(graphs), reference(trunk, graphs)
        torch.testing.assert_close(found, expected)
        shared = [trunk.embedding.weight, trunk.convolution.root.weight, trunk.output.weight]
        ours, theirs = (torch.autograd.grad(features.square().sum(), shared) for features in (found, expected))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_a_molecule_is_not_changed_by_its_company(splits):
    torch.manual_seed(0)
    model = build_model(ModelConfig(dim=8))
    together, alone = model(splits.test[[3, 1, 150]][0]), model(splits.test[[150]][0])
    for task in TASKS:
        assert together[task].shape == (3,)
        torch.testing.assert_close(together[task][2:], alone[task])


# The tasks


def test_losses_are_mean_squared_errors_recomputed_by_numpy(splits):
    batch = splits.train[list(range(20))]
    outputs = {task: torch.randn(20, generator=torch.Generator().manual_seed(k)) for k, task in enumerate(TASKS)}
    computed = losses(outputs, batch)
    assert tuple(computed) == TASKS
    assert TASKS == ("mu", "alpha", "homo", "lumo", "r2", "zpve", "u0", "u", "h", "g", "cv")
    for k, task in enumerate(TASKS):
        assert computed[task].item() == pytest.approx(
            np.square(outputs[task].numpy() - batch[1][:, k].numpy()).mean(), rel=1e-5
        )


def test_metrics_are_mean_absolute_errors_in_reported_units(splits):
    """Over batches of unequal size; in meV where the benchmark reports meV."""
    raw = torch.from_numpy(molecules.read().targets)
    truth = raw[splits.test.members]
    members = splits.train.members
    mean, deviations = raw[members].mean(0), raw[members].std(0)
    wrong = truth + torch.linspace(0.5, 1.5, 200)[:, None] * torch.linspace(0.1, 1, 11)
    measures = metrics()
    for indices in (list(range(150)), list(range(150, 200))):
        batch = splits.test[indices]
        answers = targets(batch)
        for k, task in enumerate(TASKS):
            measures[f"{task}/mae"].update(((wrong[indices, k] - mean[k]) / deviations[k]).float(), answers[task])
    expected = (wrong - truth).abs().mean(0) * torch.tensor([1, 1, 1e3, 1e3, 1, 1e3, 1e3, 1e3, 1e3, 1e3, 1])
    assert [metric.compute().item() for metric in measures.values()] == pytest.approx(expected.tolist(), rel=1e-4)


def test_training_with_a_gradient_balancer_lowers_every_loss(splits):
    torch.manual_seed(0)
    model = build_model(ModelConfig(dim=8))
    balancer = Balancer(TASKS, gradient="pcgrad", source="features")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = splits.train[list(range(32))]
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        features = model.trunk(batch[0])
        report = balancer.backward(losses(model.heads(features), batch), shared=model.trunk.parameters(), features=features)
        optimizer.step()
        history.append(report.losses)
    assert (history[-1] < history[0]).all()
    assert history[-1].mean() < 0.6 * history[0].mean()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_torch_geometric_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e \. --group graph"):
        importlib.reload(experiments.problems.quantum_chemistry)
