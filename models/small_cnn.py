"""SmallCNN, the MNIST network of TRADES (Zhang et al., ICML 2019) and of Zeng et al. (AAAI 2021)."""
from collections import OrderedDict

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Four 3x3 convolutions and three linear layers with dropout 0.5; the last layer starts at zero.

    Parameter names are those of the published checkpoints. Image sizes other than 28x28 are brought to the
    4x4 map of the native size by adaptive average pooling, which leaves that map as it is.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, dropout: float = 0.5):
        super().__init__()
        self.feature_extractor = nn.Sequential(OrderedDict([
            ("conv1", nn.Conv2d(in_channels, 32, 3)), ("relu1", nn.ReLU(inplace=True)),
            ("conv2", nn.Conv2d(32, 32, 3)), ("relu2", nn.ReLU(inplace=True)), ("maxpool1", nn.MaxPool2d(2)),
            ("conv3", nn.Conv2d(32, 64, 3)), ("relu3", nn.ReLU(inplace=True)),
            ("conv4", nn.Conv2d(64, 64, 3)), ("relu4", nn.ReLU(inplace=True)), ("maxpool2", nn.MaxPool2d(2)),
        ]))
        self.average = nn.AdaptiveAvgPool2d(4)
        self.classifier = nn.Sequential(OrderedDict([
            ("fc1", nn.Linear(64 * 4 * 4, 200)), ("relu1", nn.ReLU(inplace=True)),
            ("drop", nn.Dropout(dropout)),
            ("fc2", nn.Linear(200, 200)), ("relu2", nn.ReLU(inplace=True)),
            ("fc3", nn.Linear(200, num_classes)),
        ]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.classifier.fc3.weight)
        nn.init.zeros_(self.classifier.fc3.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = self.average(self.feature_extractor(x))  # [B, 64, 4, 4]
        return self.classifier(features.flatten(1))  # [B, K]
