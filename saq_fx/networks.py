"""Small networks for the demo, the benchmarks and the reproductions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network of nine layers for small images: a stem, three blocks, a classifier."""

    def __init__(self, width: int = 16, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block1 = ResidualBlock(width, width)
        self.block2 = ResidualBlock(width, 2 * width, 2)
        self.block3 = ResidualBlock(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, classes)."""
        x = torch.relu(self.bn(self.stem(x)))
        x = self.block3(self.block2(self.block1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection; the narrow ends carry signed values (MobileNetV2, 2018)."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1, expansion: int = 4) -> None:
        super().__init__()
        wide = expansion * channels_in
        self.is_residual = stride == 1 and channels_in == channels
        self.expand = nn.Conv2d(channels_in, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.project = nn.Conv2d(wide, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        out: Tensor = torch.relu(self.bn1(self.expand(x)))
        out = torch.relu(self.bn2(self.depthwise(out)))
        out = self.bn3(self.project(out))
        return out + x if self.is_residual else out


class SmallMobileNet(nn.Module):
    """Inverted residuals for small images, 17 layers of very different shapes: a test bed for mixed precision."""

    def __init__(self, width: int = 8, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            InvertedResidual(width, width),
            InvertedResidual(width, 2 * width, 2),
            InvertedResidual(2 * width, 2 * width),
            InvertedResidual(2 * width, 4 * width, 2),
            InvertedResidual(4 * width, 4 * width),
        )
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, classes)."""
        x = self.blocks(torch.relu(self.bn(self.stem(x))))
        logits: Tensor = self.fc(torch.relu(x).mean((2, 3)))
        return logits


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each behind a LayerNorm and around a shortcut (ViT, ICLR 2021)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> (N, tokens, width)."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return result


class SmallViT(nn.Module):
    """A vision Transformer for 8 x 8 images: patches of 2 x 2, blocks, a classifier on the mean token."""

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 4, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, 8, 8) -> (N, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        x = self.norm(self.blocks(x))
        logits: Tensor = self.fc(x.mean(1))
        return logits
