"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016): pre-activation blocks, depth 6n + 4."""
import math

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """BN-ReLU-conv twice; if the shape changes, the shortcut is a 1x1 convolution of the activated input."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_planes != planes:
            self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = F.relu(self.bn2(self.conv1(activated)))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return self.conv2(out) + shortcut


class NetworkBlock(nn.Module):
    """One stage of residual blocks, the first of which carries the stride."""

    def __init__(self, num_blocks: int, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(*(
            BasicBlock(in_planes if i == 0 else planes, planes, stride if i == 0 else 1)
            for i in range(num_blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-width; any image size through the global average pool.

    Parameter names are those of the checkpoints published with TRADES, MART and GAIRAT.
    Differs from the released code: no unused `sub_block1`, which those files carry and which takes no part in
    the output.
    """

    def __init__(self, depth: int = 34, width: int = 10, num_classes: int = 10, in_channels: int = 3):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a wide ResNet has depth 6n + 4, not {depth}")
        num_blocks, planes = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(in_channels, planes[0], 3, padding=1, bias=False)
        self.block1 = NetworkBlock(num_blocks, planes[0], planes[1], stride=1)
        self.block2 = NetworkBlock(num_blocks, planes[1], planes[2], stride=2)
        self.block3 = NetworkBlock(num_blocks, planes[2], planes[3], stride=2)
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.fc = nn.Linear(planes[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.relu(self.bn1(out))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))  # [B, K]
