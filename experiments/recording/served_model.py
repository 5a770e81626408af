"""A trained network in MLflow's format, which loads unchanged and is served with one output per task.

A copy of this file travels with the model, and MLflow imports it under this name. So the file must not import this project
when it is loaded, and its name must not clash with other modules.
"""

from __future__ import annotations

import copy
import logging
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from mlflow.models import Model, ModelSignature
    from torch import nn


OPTIONAL = {"torch_geometric", "transformers", "peft"}  # packages that some networks need


class ServedNetwork:
    """A network for MLflow's servers. Inputs are an array (B, ...), outputs are arrays (B, ...) by task."""

    def __init__(self, network: nn.Module, device: str) -> None:
        self.network = network.eval().to(device)
        self.device = device

    def predict(self, data: np.ndarray, params: dict[str, Any] | None = None) -> dict[str, np.ndarray]:  # noqa: ARG002
        """Return outputs by task. MLflow also passes ``params``, which have no effect."""
        with torch.no_grad():
            outputs = self.network(torch.as_tensor(data).to(self.device))
        return {task: output.cpu().numpy() for task, output in outputs.items()}


def save_network(network: nn.Module, inputs: Any, folder: Path) -> None:
    """Save a network for ``mlflow.pytorch.load_model`` and, if its input is a tensor, for ``mlflow models predict``.

    The classes of this project are saved with it by value, so that it loads where the project is not installed.

    Args:
        network: Network that maps inputs to outputs by task.
        inputs: A batch that gives the shapes: a tensor (B, ...), or graphs.
        folder: Folder to create.
    """
    network, inputs = copy.deepcopy(network).cpu().eval(), inputs.cpu()
    if isinstance(inputs, torch.Tensor):
        model = _save(network, folder, _signature(network, inputs))
        # MLflow's own loader serves only single tensors
        model.flavors["python_function"]["loader_module"] = Path(__file__).stem
    else:
        model = _save(network, folder, None)
        del model.flavors["python_function"]
    model.save(folder / "MLmodel")


def _signature(network: nn.Module, inputs: torch.Tensor) -> ModelSignature:
    """Return shapes and types of inputs and outputs."""
    with torch.no_grad():
        outputs = {task: output.numpy() for task, output in network(inputs).items()}
    with _without_warnings():
        from mlflow.models import infer_signature  # noqa: PLC0415

        return infer_signature(inputs.numpy(), outputs)


def _save(network: nn.Module, folder: Path, signature: ModelSignature | None) -> Model:
    """Save a network with this file and the versions of its packages, and return MLflow's description of it.

    Args:
        network: Network to save.
        folder: Folder to create.
        signature: Shapes and types of inputs and outputs.

    Returns:
        MLflow's description of the model.
    """
    origins = {type(module).__module__.partition(".")[0] for module in network.modules()}
    packages = ["torch", "mlflow", "cloudpickle", *sorted(origins & OPTIONAL)]
    with _without_warnings(), _project_by_value():
        import mlflow.pytorch  # noqa: PLC0415
        from mlflow.models import Model  # noqa: PLC0415

        model = Model()
        mlflow.pytorch.save_model(
            network,
            folder,
            mlflow_model=model,
            code_paths=[__file__],
            signature=signature,
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in packages],
            serialization_format="pickle",
        )
    return model


@contextmanager
def _project_by_value() -> Iterator[None]:
    """Let cloudpickle save the classes of this project by value."""
    import cloudpickle  # noqa: PLC0415

    import experiments  # noqa: PLC0415

    cloudpickle.register_pickle_by_value(experiments)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(experiments)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence MLflow's warnings about its own type hints and about pickles: this pickle is the user's own."""
    logger = logging.getLogger("mlflow.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> ServedNetwork:
    """Return the network to serve; MLflow calls this function.

    Args:
        path: Data folder of the model.
        model_config: Configuration of the server, which can have a ``device``.
    """
    import mlflow.pytorch  # noqa: PLC0415

    return ServedNetwork(mlflow.pytorch.load_model(str(Path(path).parent)), (model_config or {}).get("device") or "cpu")
