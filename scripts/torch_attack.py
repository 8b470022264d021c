"""The official attack on a released client, trained by PyTorch, epoch by epoch.

    python -m scripts.torch_attack --official_clients=FILE.npz --client=NAME --data_dir=data [--seed=0]

It is what `python -m mocosfl_jax.attack --protocol=official` is compared with in docs/privacy.md: the images,
their smashed data and the victims are the same for the same seed, the decoder and its training are PyTorch's.
Each line has an epoch's errors and what the decoder makes of the victims; a star marks epochs in which the
weights were kept. It needs torch, and takes 11 minutes on a CPU core.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mocosfl_jax import data
from mocosfl_jax.attack import VICTIMS
from mocosfl_jax.data import images
from mocosfl_jax.models import split_model
from mocosfl_jax.privacy import protocol, similarity
from mocosfl_jax.weights.official import client_from_official
from scripts.save_torch_decoders import decoder

IMAGES, TRAINED, BATCH, EPOCHS = 500, 450, 32, 50


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official_clients", type=Path, required=True)
    parser.add_argument("--client", required=True)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    attacker, victims = pairs(options)
    attack(attacker, victims, options.seed)


Pair = tuple[np.ndarray, np.ndarray]  # smashed data, and images in [0, 1], NHWC


def pairs(options: argparse.Namespace) -> tuple[Pair, Pair]:
    """Of the attacker, and of the victims."""
    with np.load(options.official_clients) as arrays:
        prefix = f"{options.client}/"
        state = {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}
        victims = arrays[VICTIMS]
    layers = sum(key.endswith("conv1.weight") for key in state)
    params = client_from_official(state, name="resnet18", cut_layer=layers, bottleneck="C4S2")
    client = split_model("resnet18", cut_layer=layers, bottleneck="C4S2").client
    cifar10 = data.load("cifar10", options.data_dir, None)
    x_train = images.in_memory(cifar10.x_train)
    rows = np.random.default_rng(options.seed).permutation(len(x_train))[:IMAGES]
    normalised = (cifar10.mean, cifar10.std)
    both = (
        protocol.official_attacker(x_train[rows], *normalised),
        protocol.official_victims(victims, *normalised),
    )
    attacker, others = (
        (protocol.smash(lambda x: client(params, x), given.inputs), given.truth / np.float32(255))
        for given in both
    )
    return attacker, others


def attack(attacker: Pair, victims: Pair, seed: int) -> None:
    """Train the decoder as the official code does, and print what each epoch gives."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    smashed, targets = attacker
    x, y = nchw(smashed), nchw(targets)
    side, channels = smashed.shape[2:]
    net = decoder("res_norm", 4, 64, side, channels, size=targets.shape[2])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    order = torch.randperm(len(x))
    least = np.inf
    for epoch in range(1, EPOCHS + 1):
        net.train()
        trained, validated, kept = 0.0, 0.0, False
        for rows in order[torch.randperm(TRAINED)].split(BATCH):
            loss = nn.functional.mse_loss(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trained += loss.item() * len(rows) / TRAINED
        held_out = len(x) - TRAINED
        for rows in order[TRAINED + torch.randperm(held_out)].split(BATCH):  # in training mode, as there
            with torch.no_grad():
                mse = nn.functional.mse_loss(net(x[rows]), y[rows]).item()
            validated += mse * len(rows) / held_out
            if mse < least:
                least, kept, state = mse, True, {k: v.clone() for k, v in net.state_dict().items()}
        shown = described(net, *victims)
        print(
            f"epoch {epoch:2}  train {trained:.4f}  validation {validated:.4f}  {shown}{' *' * kept}",
            flush=True,
        )
    net.load_state_dict(state)
    print(f"kept      best batch {least:.4f}             {described(net, *victims)}")


def described(net: nn.Module, smashed: np.ndarray, truth: np.ndarray) -> str:
    """Errors of the reconstructions."""
    with torch.no_grad():
        found = net.eval()(nchw(smashed)).permute(0, 2, 3, 1).numpy()
    mse, ssim = (float(np.mean(measure(found, truth))) for measure in (similarity.mse, similarity.ssim))
    return f"victims MSE {mse:.4f} SSIM {ssim:.3f}"


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


if __name__ == "__main__":
    main()
