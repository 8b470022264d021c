"""The official attack on a released client, trained by PyTorch, epoch by epoch.

    python -m scripts.torch_attack --official_clients=FILE.npz --client=NAME --data_dir=data [--seed=0]

It is what `python -m mocosfl_jax.attack --protocol=official` is compared with in docs/privacy.md: the images,
their smashed data and the victims are the same for the same seed, the decoder and its training are PyTorch's.
Each line has an epoch's errors and what the decoder makes of the victims; a star marks epochs in which the
weights were kept. The last lines compare the victims at full contrast with the pictures of the
data set's test images that are most like them: with CIFAR-10 that was encoded again, these are their copies.
It needs torch, and takes 11 minutes on a CPU core.
"""

import argparse
from collections.abc import Sequence
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
    attacker, *victims = pairs(options)
    attack(attacker, victims, options.seed)


Pair = tuple[np.ndarray, np.ndarray]  # smashed data, and images in [0, 1], NHWC


def pairs(options: argparse.Namespace) -> list[Pair]:
    """Of the attacker; of the victims as the official code has them, at full contrast, and their copies."""
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
    copies = most_like(victims, images.in_memory(cifar10.x_test))
    all_given = (
        protocol.official_attacker(x_train[rows], *normalised),
        protocol.official_victims(victims, *normalised),
        protocol.official_attacker(victims, *normalised),
        protocol.official_attacker(copies, *normalised),
    )
    return [
        (protocol.smash(lambda x: client(params, x), given.inputs), given.truth / np.float32(255))
        for given in all_given
    ]


def most_like(pictures: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each picture, that one `among` others [n, H, W, 3] with the smallest squared error."""
    one, other = (array.reshape(len(array), -1).astype(np.float32) for array in (pictures, among))
    return among[np.argmin(np.sum(other**2, axis=1) - 2 * one @ other.T, axis=1)]


def attack(attacker: Pair, victims: Sequence[Pair], seed: int) -> None:
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
        shown = described(net, *victims[0])
        print(
            f"epoch {epoch:2}  train {trained:.4f}  validation {validated:.4f}  {shown}{' *' * kept}",
            flush=True,
        )
    compare(f"epoch {EPOCHS}", net, victims)
    net.load_state_dict(state)
    print(f"kept      best batch {least:.4f}             {described(net, *victims[0])}")
    compare("kept", net, victims)


def compare(which: str, net: nn.Module, victims: Sequence[Pair]) -> None:
    """Print the errors on the victims at full contrast, which went through JPEG, and on their copies."""
    _, victims_themselves, copies = victims
    print(f"{which}: full contrast, {described(net, *victims_themselves)}; copies, {described(net, *copies)}")


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
