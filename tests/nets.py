"""Networks whose minimal distances are known, for the tests of the minimal-norm attacks."""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


def linear(num_classes: int = 3, size: int = 16, seed: int = 0,
           dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Logits linear in the pixels."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, num_classes))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def interior(model: nn.Sequential, count: int = 8, seed: int = 1,
             margin: float = 0.2) -> tuple[Tensor, Tensor]:
    """Images far from the faces of the box and near a decision boundary,
    with the model's own predictions as labels."""
    weight = model[1].weight.detach()
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 + 0.05 * torch.randn((count, weight.shape[1]), generator=generator).to(weight.dtype)
    logits = model(x).detach()
    first, second = logits.topk(2, dim=1).indices.T
    normal = weight[first] - weight[second]
    gap = (logits.gather(1, first[:, None]) - logits.gather(1, second[:, None])).squeeze(1)
    # the best two logits are now `margin` apart
    x = x - normal * ((gap - margin) / normal.square().sum(dim=1))[:, None]
    x = x.clamp(0.1, 0.9).view(count, 1, 4, -1)
    return x, model(x).argmax(dim=1)


def linear_distance(model: nn.Sequential, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """min over k != y of (z_y - z_k) / ||w_y - w_k||_q, the distance where no box is in the way: [B]."""
    weight, logits = model[1].weight.detach(), model(x).detach()
    normals = torch.linalg.vector_norm(weight[y][:, None] - weight, ord=DUAL[norm], dim=2)
    return ((logits.gather(1, y[:, None]) - logits) / normals).scatter(1, y[:, None], torch.inf).amin(dim=1)


def tiny_mlp() -> tuple[nn.Sequential, np.lib.npyio.NpzFile]:
    """784-16-10 with ReLU, trained on MNIST, and the file it is from:
    eight MNIST test images with their exact l_inf distances."""
    file = np.load(Path(__file__).parent / "golden" / "tiny_mlp_16.npz")
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))
    names = {name: name.replace(".", "_").replace("1_", "0_").replace("3_", "2_")
             for name in model.state_dict()}
    model.load_state_dict({ours: torch.from_numpy(file[theirs]) for ours, theirs in names.items()})
    return model.eval(), file
