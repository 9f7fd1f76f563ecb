"""LeNet-5 (LeCun et al., 1998) with ReLU and max-pooling."""
import torch.nn.functional as F
from torch import Tensor, nn

from models.fused import conv_norm_relu
from models.pooling import max_pool
from models.stem import Stem


class LeNet(nn.Module):
    """Two 5x5 convolutions (6 and 16 channels), three linear layers (120, 84, K); 28x28 is the native size.

    Other image sizes are brought to the 5x5 map of the native size by adaptive average pooling.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    @property
    def first_layer(self) -> nn.Module:
        return self.conv1

    def forward(self, x: Tensor) -> Tensor:
        return self.after_first_layer(conv_norm_relu(x, self.first_layer, relu=False))  # [B, K]

    @property
    def stem(self) -> Stem:
        return Stem(lambda x: self._pool(F.conv2d(x, self.conv1.weight, self.conv1.bias)), self._after_first_pool,
                    reach=6, stride=2, padding=2)

    def after_first_layer(self, x: Tensor) -> Tensor:
        """The logits [B, K] from the output of `first_layer` on."""
        return self._after_first_pool(self._pool(x))

    def _pool(self, x: Tensor) -> Tensor:
        return F.relu(max_pool(x), inplace=True)  # pooled first: a quarter of the ReLUs

    def _after_first_pool(self, x: Tensor) -> Tensor:
        x = self._pool(conv_norm_relu(x, self.conv2, relu=False))
        if x.shape[-2:] != (5, 5):
            x = F.adaptive_avg_pool2d(x, 5)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)  # [B, K]
