"""MocoSFL in plain PyTorch: a Python loop over client modules and their optimizers.

This is the baseline: a rewrite of the official code's approach for ResNet-18. It does no work that the
algorithm does not need: momentum models run without gradients, smashed data is detached at the cut, and no
gradient is computed for the images. `agreement.check` compares its losses with those of mocosfl_jax.

It runs on the kind of device that JAX runs on: on a GPU if PyTorch finds one too.
"""

import copy
import os
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.settings import Setting


def use_all_cores() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def device() -> torch.device:
    """The device of the loop: a GPU if JAX computes on one and PyTorch was built for it."""
    gpu = jax.devices()[0].platform == "gpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def wait() -> None:
    """Return when the device has done its work."""
    if device().type == "cuda":
        torch.cuda.synchronize()


class Conv(nn.Conv2d):
    """Convolution with weight standardisation."""

    def __init__(self, channels: int, features: int, kernel_size: int, stride: int) -> None:
        super().__init__(channels, features, kernel_size, stride, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = self.weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, centred / std, None, self.stride, self.padding)


class Stem(nn.Module):
    def __init__(self, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv(3, features, 3, stride)
        self.norm1 = nn.GroupNorm(features // 4, features)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm1(self.conv1(x)))


class BasicBlock(nn.Module):
    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, features, 3, stride)
        self.norm1 = nn.GroupNorm(features // 4, features)
        self.conv2 = Conv(features, features, 3, 1)
        self.norm2 = nn.GroupNorm(features // 4, features)
        self.changes = stride != 1 or channels != features
        if self.changes:
            self.shortcut_conv = Conv(channels, features, 1, stride)
            self.shortcut_norm = nn.GroupNorm(features // 4, features)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + (self.shortcut_norm(self.shortcut_conv(x)) if self.changes else x))


class Head(nn.Module):
    def __init__(self, channels: int, key_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, key_dim)
        self.out = nn.Linear(key_dim, key_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(x)))


class Client(nn.Sequential):
    """The layers before the cut."""


class Server(nn.Module):
    """The layers after the cut, the global average pool and the head."""

    def __init__(self, layers: nn.Sequential, head: Head) -> None:
        super().__init__()
        self.layers = layers
        self.head = head

    def backbone(self, smashed: Tensor) -> Tensor:
        return self.layers(smashed).mean(dim=(2, 3))

    def forward(self, smashed: Tensor) -> Tensor:
        return self.head(self.backbone(smashed))


def split_resnet18(setting: Setting) -> tuple[Client, Server]:
    """The models of a client and of the server. Layers have the same names as in mocosfl_jax."""
    width = setting.width
    layers: list[nn.Module] = [Stem(width, setting.stem_stride)]
    channels = width
    for stage in range(4):
        for block in range(2):
            features = width * 2**stage
            layers.append(BasicBlock(channels, features, 2 if stage > 0 and block == 0 else 1))
            channels = features
    client, rest = Client(), nn.Sequential()
    for number, layer in enumerate(layers):
        (client if number < setting.cut_layer else rest).add_module(f"layer{number}", layer)
    return client, Server(rest, Head(channels, setting.key_dim))


def momentum_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def momentum_update(key_model: nn.Module, model: nn.Module, momentum: float) -> None:
    for key, param in zip(key_model.parameters(), model.parameters(), strict=True):
        key.mul_(momentum).add_(param, alpha=1 - momentum)


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)


class ClientSide:
    """All clients. Each has a model, a momentum model and an optimizer."""

    def __init__(self, model: Client, num_clients: int, *, lr: float, momentum: float) -> None:
        self.models = [copy.deepcopy(model) for _ in range(num_clients)]
        self.key_models = [momentum_copy(model) for _ in range(num_clients)]
        self.optimizers = [sgd(model, lr) for model in self.models]
        self.momentum = momentum
        self.outputs: list[Tensor] = []

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Views [M, B, 3, H, W] -> smashed data of queries and of keys, concatenated: [M * B, c, h, w]."""
        self.outputs, keys = [], []
        for i, model in enumerate(self.models):
            self.outputs.append(model(query[i]))
            momentum_update(self.key_models[i], model, self.momentum)
            with torch.no_grad():
                keys.append(self.key_models[i](key[i]))
        return torch.cat([output.detach() for output in self.outputs]), torch.cat(keys)

    def backward(self, grad: Tensor) -> None:
        """One SGD step of each client, from the gradient [M * B, c, h, w] of the smashed queries."""
        pieces = grad.split([len(output) for output in self.outputs])
        for output, piece, optimizer in zip(self.outputs, pieces, self.optimizers, strict=True):
            optimizer.zero_grad()
            output.backward(piece)
            optimizer.step()

    @torch.no_grad()
    def synchronize(self) -> None:
        """FedAvg of the online models."""
        for params in zip(*(model.parameters() for model in self.models), strict=True):
            mean = torch.stack(params).mean(dim=0)
            for param in params:
                param.copy_(mean)


class Loop:
    """The whole algorithm, with the symmetric loss."""

    def __init__(
        self,
        setting: Setting,
        client: Client,
        server: Server,
        queue: Tensor,
        *,
        lr: float = 0.06,
        temperature: float = 0.1,
        momentum: float = 0.99,
    ) -> None:
        self.clients = ClientSide(client, setting.clients, lr=lr, momentum=momentum)
        self.server = server
        self.key_server = momentum_copy(server)
        self.optimizer = sgd(server, lr)
        self.queue = queue  # [K, D], unit rows
        self.cursor = 0
        self.temperature = temperature
        self.momentum = momentum

    def step(self, query: Tensor, key: Tensor) -> float:
        """One training step on views [M, B, 3, H, W]; returns the loss."""
        smashed_query, smashed_key = self.clients.forward(query, key)
        smashed_query.requires_grad_()
        momentum_update(self.key_server, self.server, self.momentum)
        with torch.no_grad():
            keys_1 = F.normalize(self.key_server(smashed_query))
            keys_2 = F.normalize(self.key_server(smashed_key))
        queries_1 = F.normalize(self.server(smashed_query))
        queries_2 = F.normalize(self.server(smashed_key))
        loss = self.info_nce(queries_1, keys_2) + self.info_nce(queries_2, keys_1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.enqueue(keys_1)
        self.enqueue(keys_2)
        self.clients.backward(smashed_query.grad)
        return loss.item()

    def info_nce(self, query: Tensor, key: Tensor) -> Tensor:
        positive = (query * key).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, query @ self.queue.T], dim=1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))

    def enqueue(self, keys: Tensor) -> None:
        rows = (self.cursor + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.cursor = (self.cursor + len(keys)) % len(self.queue)


def new_loop(setting: Setting) -> Loop:
    """A loop with PyTorch's own initialization, as the time does not depend on the values."""
    client, server = (model.to(device()) for model in split_resnet18(setting))
    queue = F.normalize(torch.randn(setting.queue_size, setting.key_dim, device=device()))
    return Loop(setting, client, server, queue)


def images(array: Any) -> Tensor:
    """Converts an array [..., H, W, c] of JAX or NumPy to a tensor [..., c, H, W] on `device()`."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, -3))).to(device())


@torch.no_grad()
def load(module: nn.Module, params: Any) -> None:
    """Copies a tree of parameters of mocosfl_jax into a module with the same names."""
    for name, child in params.items():
        if isinstance(child, dict):
            load(module.get_submodule(name), child)
            continue
        value = torch.from_numpy(np.array(child)).to(device())
        if name == "kernel":
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        module.get_parameter({"kernel": "weight", "scale": "weight", "bias": "bias"}[name]).copy_(value)
