"""A trained network in MLflow's format: loaded back as it was, and served by task.

The file itself travels with the model, where MLflow imports it on its own: it must not import this project.
"""

from __future__ import annotations

import copy
import logging
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from torch import nn


class ByTask:
    """What MLflow serves: inputs (B, ...) as an array -> outputs by task as arrays (B, ...)."""

    def __init__(self, network: nn.Module, device: str) -> None:
        self.network = network.eval().to(device)
        self.device = device

    def predict(self, data: np.ndarray, params: dict[str, Any] | None = None) -> dict[str, np.ndarray]:  # noqa: ARG002
        """Outputs by task. ``params`` is there because MLflow passes it."""
        import torch  # noqa: PLC0415

        with torch.no_grad():
            outputs = self.network(torch.as_tensor(data).to(self.device))
        return {task: output.cpu().numpy() for task, output in outputs.items()}


def save_network(network: nn.Module, inputs: Any, folder: Path) -> None:
    """Save a network for ``mlflow.pytorch.load_model`` and, if its input is a tensor, for ``mlflow models predict``.

    The classes of this project are saved with it by value, so that it loads where the project is not installed.

    Args:
        network: Maps inputs to outputs by task.
        inputs: A batch, for the shapes: a tensor (B, ...), or graphs.
        folder: Where to; must not exist.
    """
    import cloudpickle  # noqa: PLC0415
    import torch  # noqa: PLC0415

    import experiments  # noqa: PLC0415

    network, inputs = copy.deepcopy(network).cpu().eval(), inputs.cpu()
    of_arrays = isinstance(inputs, torch.Tensor)
    with torch.no_grad():
        outputs = {task: output.numpy() for task, output in network(inputs).items()}
    with _quiet():
        import mlflow.pytorch  # noqa: PLC0415
        from mlflow.models import Model, infer_signature  # noqa: PLC0415

        model = Model()
        cloudpickle.register_pickle_by_value(experiments)
        try:
            mlflow.pytorch.save_model(
                network,
                folder,
                mlflow_model=model,
                code_paths=[__file__],
                signature=infer_signature(inputs.numpy(), outputs) if of_arrays else None,
                pip_requirements=[
                    f"{name}=={version(name).partition('+')[0]}"
                    for name in ("torch", "mlflow", "cloudpickle", *(() if of_arrays else ("torch_geometric",)))
                ],
                serialization_format="pickle",
            )
        finally:
            cloudpickle.unregister_pickle_by_value(experiments)
    if of_arrays:
        model.flavors["python_function"]["loader_module"] = Path(__file__).stem  # MLflow's own serves single tensors only
    else:
        del model.flavors["python_function"]
    model.save(folder / "MLmodel")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's warnings of its own type hints, and of pickles, which a checkpoint of one's own may well be."""
    logger = logging.getLogger("mlflow.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> ByTask:
    """What MLflow calls to serve a model. ``path``: its data folder; ``model_config``: may name a ``device``."""
    import mlflow.pytorch  # noqa: PLC0415

    return ByTask(mlflow.pytorch.load_model(str(Path(path).parent)), (model_config or {}).get("device") or "cpu")
