"""Train `zoo:digits_cnn` and write the weights the package ships."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import hwmpq.zoo
from hwmpq import data
from hwmpq.zoo.digits_train import accuracy, train


def tensors(spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = data.load(spec)
    assert dataset.labels is not None
    images = dataset.batch(range(len(dataset)))
    return torch.from_numpy(images), torch.from_numpy(dataset.labels)


def main() -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    state = train(*tensors("digits#train"), seed=0)
    seconds = time.perf_counter() - start
    path = Path(hwmpq.zoo.__file__).with_name("digits_cnn.safetensors")
    save_file({name: value for name, value in state.items() if value.is_floating_point()}, path)
    top1 = accuracy(state, *tensors("digits#test"))
    print(f"{path.name}: {top1:.2f} % on digits#test, {seconds:.1f} s")


if __name__ == "__main__":
    main()
